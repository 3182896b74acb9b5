"""Fills a queue with a million messages quickly.

A client that can do nothing else makes the frames of one message once, and writes them repeatedly.
It asks the broker for the length of the queue to see when all have arrived.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from types import MappingProxyType
from typing import TypeVar
from urllib.parse import urlsplit

from pamqp import commands, frame
from pamqp.base import Frame
from pamqp.body import ContentBody
from pamqp.header import ContentHeader, ProtocolHeader

from benchmarks.protocol import CELERY_TASK

NO_HEADERS: Mapping[str, str] = MappingProxyType({})

_CHANNEL = 1
_FRAME_MAX = 131_072
_FRAME_OVERHEAD = 8
_CHUNK = 1 << 18
_PATIENCE = 300  # seconds

Answer = TypeVar("Answer", bound=Frame)


class Filler:
    """A connection that declares, fills and deletes queues."""

    def __init__(self, conversation: socket.socket) -> None:
        self._socket = conversation
        self._received = b""

    def make(self, queue: str, kind: str = "classic") -> None:
        """Declare a durable queue."""
        arguments = {"x-queue-type": kind}
        asked = commands.Queue.Declare(queue=queue, durable=True, arguments=arguments)
        self._call(asked, commands.Queue.DeclareOk)

    def delete(self, queue: str) -> None:
        """Delete a queue if it exists."""
        self._call(commands.Queue.Delete(queue=queue), commands.Queue.DeleteOk)

    def length(self, queue: str) -> int:
        """Return the number of ready messages."""
        asked = commands.Queue.Declare(queue=queue, passive=True)
        return self._call(asked, commands.Queue.DeclareOk).message_count or 0

    def wait(self, queue: str, at_least: int, patience: float = _PATIENCE) -> int:
        """Wait until a queue is this long, and return its length."""
        deadline = time.monotonic() + patience
        while (length := self.length(queue)) < at_least and time.monotonic() < deadline:
            time.sleep(0.05)  # noqa: TID251  -- no event loop here
        return length

    def fill(self, queue: str, count: int, body: int, shape: str = "plain") -> None:
        """Put persistent messages into a queue, and wait until all have arrived."""
        make = _celery_message if shape == "celery" else _message
        one = make(queue, body)
        many = max(1, _CHUNK // len(one))
        frames = [one] * many
        if shape == "traced":
            # Each has an origin of its own, as if it came from a request of its own.
            traces = [f"00-{number:032x}-{number:016x}-01" for number in range(1, many + 1)]
            frames = [_message(queue, body, {"traceparent": each}) for each in traces]
        for _ in range(count // many):
            self._socket.sendall(b"".join(frames))
        self._socket.sendall(b"".join(frames[: count % many]))
        if (length := self.wait(queue, count)) != count:
            raise RuntimeError(f"{queue} has {length} messages instead of {count}")

    def send(self, sent: Frame | ProtocolHeader, channel: int = _CHANNEL) -> None:
        """Send one method."""
        self._socket.sendall(frame.marshal(sent, channel))

    def hear(self, wanted: type[Answer]) -> Answer:
        """Wait for one method. Anything else but a heartbeat is an error."""
        while True:
            while len(self._received) < _size(self._received):
                chunk = self._socket.recv(_CHUNK)
                if not chunk:
                    raise ConnectionError("the broker closed the connection")
                self._received += chunk
            size, _, heard = frame.unmarshal(self._received)
            self._received = self._received[size:]
            if isinstance(heard, wanted):
                return heard
            if isinstance(heard, Frame):
                raise RuntimeError(  # noqa: TRY004  -- no argument of ours is wrong
                    f"{heard.name} instead of {wanted.name}: {dict(heard)}"
                )

    def _call(self, asked: Frame, wanted: type[Answer]) -> Answer:
        self.send(asked)
        return self.hear(wanted)


@contextmanager
def connected(url: str) -> Iterator[Filler]:
    """Connect to a broker, with one channel."""
    parts = urlsplit(url)
    address = (parts.hostname or "localhost", parts.port or 5672)
    with socket.create_connection(address, timeout=_PATIENCE) as conversation:
        filler = Filler(conversation)
        filler.send(ProtocolHeader(), 0)
        filler.hear(commands.Connection.Start)
        login = f"\0{parts.username or 'guest'}\0{parts.password or 'guest'}"
        filler.send(commands.Connection.StartOk({}, "PLAIN", login, "en_US"), 0)
        filler.hear(commands.Connection.Tune)
        filler.send(commands.Connection.TuneOk(2047, _FRAME_MAX, 0), 0)
        filler.send(commands.Connection.Open(parts.path[1:] or "/"), 0)
        filler.hear(commands.Connection.OpenOk)
        filler.send(commands.Channel.Open())
        filler.hear(commands.Channel.OpenOk)
        yield filler


def _size(received: bytes) -> int:
    """Return the length of the first frame; longer than the data if that can't be seen yet."""
    head = 7
    if len(received) < head:
        return head
    return head + int.from_bytes(received[3:7], "big") + 1


def _message(queue: str, body: int, headers: Mapping[str, str] = NO_HEADERS) -> bytes:
    """Return a message as an application might publish it."""
    properties = commands.Basic.Properties(
        content_type="application/octet-stream",
        delivery_mode=2,
        timestamp=datetime(2025, 1, 1, tzinfo=UTC),
        headers={"tenant": 42, "trace": "4bf92f3577b34da6a3ce929d0e0e4736", **headers},
    )
    return _frames(queue, properties, b"x" * body)


def _celery_message(queue: str, body: int) -> bytes:
    """Return a message as Celery publishes a task (its protocol 2)."""
    task_id = "0b9e46f3-5f5d-4d6c-9c5e-5b0c4b2c7c11"
    properties = commands.Basic.Properties(
        content_type="application/json",
        content_encoding="utf-8",
        delivery_mode=2,
        correlation_id=task_id,
        headers={
            "lang": "py",
            "task": CELERY_TASK,
            "id": task_id,
            "root_id": task_id,
            "parent_id": None,
            "group": None,
        },
    )
    embedded = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}
    rest = json.dumps([[""], {}, embedded])
    argument = "x" * max(1, body - len(rest))
    return _frames(queue, properties, json.dumps([[argument], {}, embedded]).encode())


def _frames(queue: str, properties: commands.Basic.Properties, body: bytes) -> bytes:
    room = _FRAME_MAX - _FRAME_OVERHEAD
    parts = [body[start : start + room] for start in range(0, len(body), room)]
    frames: list[Frame | ContentHeader | ContentBody] = [
        commands.Basic.Publish(routing_key=queue),
        ContentHeader(body_size=len(body), properties=properties),
        *(ContentBody(part) for part in parts),
    ]
    return b"".join(frame.marshal(each, _CHANNEL) for each in frames)

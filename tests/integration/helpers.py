"""Helpers for tests of whole consumers: waiting, looking at queues, and running programs.

Only ``Recorder`` uses the library. Queues are read by aio-pika or, where each byte counts, by a
minimal client that does not decode properties.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import signal
import struct
import sys
import time
from collections import Counter
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import unquote, urlsplit

import aio_pika
import pytest
from aio_pika.exceptions import ChannelNotFoundEntity
from pamqp import commands, frame
from pamqp.header import ProtocolHeader

from aio_pika_batch import Observer
from aio_pika_batch.testing.rabbitmq.processes import kill_group, spawn

if TYPE_CHECKING:
    import subprocess
    from collections.abc import AsyncIterator, Callable, Iterable, Mapping

    from aio_pika.abc import AbstractChannel, AbstractIncomingMessage

    from aio_pika_batch.testing.rabbitmq.node import RabbitMQ
    from tests.support.find import RunningBroker

PATIENCE = 120.0
"""Seconds for what takes one on an idle machine: only a failure ever waits for so long."""

SLACK = 12.0
"""Seconds by which a busy machine may exceed a time limit. Without the limit a wait is longer."""

QUEUE_TYPES = pytest.mark.parametrize(
    "queue_type", [pytest.param("classic", marks=pytest.mark.long), "quorum"]
)
"""Both types of queue; most of the tests that name none of them use a classic queue."""

_APPS = Path(__file__).parent / "apps"


# --- waiting --------------------------------------------------------------------


async def until(
    condition: Callable[[], Any],
    *,
    within: float = PATIENCE,
    what: str | Callable[[], object] = "",
) -> Any:
    """Wait until *condition*, which may be asynchronous, returns something true; return that."""
    deadline = time.monotonic() + within
    while True:
        said = condition()
        if inspect.isawaitable(said):
            said = await said
        if said:
            return said
        if time.monotonic() > deadline:
            seen = what() if callable(what) else what
            if inspect.isawaitable(seen):
                seen = await seen
            raise AssertionError(f"not within {within} s: {seen or inspect.getsource(condition)}")
        await asyncio.sleep(0.02)


class Stopwatch:
    """Measures elapsed seconds."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began


# --- the broker -----------------------------------------------------------------


def parse_version(broker: RunningBroker) -> tuple[int, ...]:
    """Return the major and minor version, for comparisons."""
    return tuple(map(int, broker.version.split(".")[:2]))


def skip_without_amqp10(broker: RunningBroker) -> None:
    """Skip a test of AMQP 1.0 on a broker that doesn't speak it without a plugin."""
    if parse_version(broker) < (4, 0):
        pytest.skip(f"RabbitMQ {broker.version} does not speak AMQP 1.0 by itself")


def _erlang(*texts: str) -> str:
    """Return texts as binaries of Erlang, whatever characters they have."""
    return ", ".join(f"<<{','.join(map(str, text.encode()))}>>" for text in texts)


def add_user(node: RabbitMQ, name: str, password: str, *permissions: str) -> None:
    """Add a user, with patterns of what it may configure, write and read, or without access."""
    # `rabbitmqctl` does the same, but takes a second for each step.
    node.eval(f"rabbit_auth_backend_internal:add_user({_erlang(name, password, 'test')}).")
    if permissions:
        allow(node, name, *permissions)


def allow(node: RabbitMQ, name: str, configure: str, write: str, read: str) -> None:
    """Set what a user may configure, write and read in the virtual host `/`."""
    arguments = _erlang(name, "/", configure, write, read, "test")
    node.eval(f"rabbit_auth_backend_internal:set_permissions({arguments}).")


def change_password(node: RabbitMQ, name: str, password: str) -> None:
    """Change the password of a user."""
    arguments = _erlang(name, password, "test")
    node.eval(f"rabbit_auth_backend_internal:change_password({arguments}).")


def delete_user(node: RabbitMQ, name: str) -> None:
    """Delete a user."""
    node.eval(f"rabbit_auth_backend_internal:delete_user({_erlang(name, 'test')}).")


def set_policy(node: RabbitMQ, queue: str, definition: str) -> None:
    """Set a policy for the queue of this name."""
    where = _erlang("/", queue, f"^{queue}$", definition)
    node.eval(f"rabbit_policy:parse_set({where}, 0, {_erlang('queues', 'test')}).")


async def declare_dead_letters(
    channel: AbstractChannel, name: str, *, kind: str = "fanout", keys: Iterable[str] = ("",)
) -> tuple[str, str]:
    """Declare a dead-letter exchange and a queue bound to it, as users do; return both names."""
    exchange = await channel.declare_exchange(f"{name}.dlx", kind, durable=True)
    queue = await channel.declare_queue(f"{name}.dlq", durable=True)
    for key in keys:
        await queue.bind(exchange, key)
    return exchange.name, queue.name


async def publish(
    channel: AbstractChannel,
    bodies: Iterable[bytes],
    *,
    routing_key: str,
    exchange: str = "",
    **properties: Any,
) -> None:
    """Publish persistent messages, and wait for all confirms."""
    target = await channel.get_exchange(exchange, ensure=False) if exchange else None
    to = target or channel.default_exchange
    properties.setdefault("delivery_mode", aio_pika.DeliveryMode.PERSISTENT)
    await asyncio.gather(
        *(to.publish(aio_pika.Message(body, **properties), routing_key) for body in bodies)
    )


async def ready(url: str, queue: str) -> int:
    """Return the number of ready messages in a queue; -1 if there is no such queue."""
    return (await counts(url, queue))[0]


async def consumers(url: str, queue: str) -> int:
    """Return the number of consumers of a queue; -1 if there is no such queue."""
    return (await counts(url, queue))[1]


async def counts(url: str, queue: str) -> tuple[int, int]:
    """Return the numbers of ready messages and of consumers of a queue; -1 if there is none."""
    # On a connection of its own: a queue that is missing costs the channel.
    async with await aio_pika.connect(url) as connection:
        channel = await connection.channel()
        try:
            found = (await channel.get_queue(queue)).declaration_result
        except ChannelNotFoundEntity:
            return -1, -1
        return found.message_count or 0, found.consumer_count or 0


async def holds(url: str, queue: str, count: int, *, within: float = PATIENCE) -> None:
    """Wait until a queue has exactly this number of ready messages."""
    seen: list[int] = []

    async def look() -> bool:
        seen.append(await ready(url, queue))
        return seen[-1] == count

    await until(look, within=within, what=lambda: f"{count} ready in {queue}: {seen[-1]}")


async def take_all(
    channel: AbstractChannel, queue: str, count: int = 0, *, within: float = PATIENCE
) -> list[AbstractIncomingMessage]:
    """Take at least *count* messages, and all others before a mark that is published after those.

    Later messages are not waited for: none may be in flight when this is called.
    """
    source = await channel.get_queue(queue, ensure=False)
    mark = os.urandom(8).hex()
    marked = False
    taken: list[AbstractIncomingMessage] = []
    deadline = time.monotonic() + within
    while True:
        if len(taken) >= count and not marked:
            await channel.default_exchange.publish(aio_pika.Message(mark.encode()), queue)
            marked = True
        message = await source.get(no_ack=True, fail=False)
        if message is None:
            assert time.monotonic() < deadline, f"{len(taken)} of {count} came to {queue}"
            await asyncio.sleep(0.02)
        elif message.body == mark.encode():
            return taken
        else:
            taken.append(message)


def ids(messages: Iterable[AbstractIncomingMessage]) -> Counter[int]:
    """Return the ids in the bodies of messages, and how often each occurs."""
    return Counter(json.loads(each.body)["id"] for each in messages)


# --- what the library tells -----------------------------------------------------


class Recorder(Observer):
    """Records all events."""

    def __init__(self) -> None:
        self.results: Counter[str] = Counter()
        self.causes: Counter[str] = Counter()
        self.triggers: list[str] = []
        self.copies: list[int] = []
        self.dead: list[tuple[bytes, str]] = []
        self.epochs: list[int] = []
        self.losses: list[BaseException] = []
        self.on_lost: Callable[[], object] = lambda: None
        self.stale = 0
        self.errors: list[BaseException] = []
        self.breaker: list[str] = []

    def batch_cut(self, origin, event) -> None:
        self.triggers.append(event.trigger.value)

    def settled(self, origin, event) -> None:
        for (result, cause), count in event.counts.items():
            self.results[result.name if result else "RETURNED"] += count
            self.causes[cause.value] += count

    def requeued(self, origin, event) -> None:
        self.copies.append(event.retry_count)

    def dead_lettered(self, origin, event) -> None:
        self.dead.append((event.message.body, event.reason.value))

    def connected(self, origin, event) -> None:
        self.epochs.append(event.epoch)

    def lost(self, origin, event) -> None:
        self.losses.append(event.error)
        self.on_lost()

    def stale_results(self, origin, event) -> None:
        self.stale += event.count

    def handler_error(self, origin, event) -> None:
        self.errors.append(event.error)

    def breaker_opened(self, origin, event) -> None:
        self.breaker.append("opened")

    def breaker_probing(self, origin, event) -> None:
        self.breaker.append("probing")

    def breaker_closed(self, origin, event) -> None:
        self.breaker.append("closed")


# --- consumers as processes of their own ----------------------------------------


@dataclass
class App:
    """A running program from ``apps``.

    It writes one JSON line for each thing that it has done, directly to a file: a line is there
    even if the program is killed right after.
    """

    process: subprocess.Popen[bytes]
    events: Path
    output: Path
    _read: int = 0
    _entries: list[dict[str, Any]] = field(default_factory=list)

    @property
    def entries(self) -> list[dict[str, Any]]:
        """All entries so far, of this program and earlier ones with the same file."""
        if self.events.exists():
            with self.events.open("rb") as events:
                events.seek(self._read)
                for line in events:
                    if not line.endswith(b"\n"):
                        break
                    self._read += len(line)
                    self._entries.append(json.loads(line))
        return self._entries

    def of(self, what: str) -> list[Any]:
        """Return the entries of one kind, in order."""
        return [entry["of"] for entry in self.entries if entry["what"] == what]

    @property
    def printed(self) -> str:
        """Everything that it has printed and logged."""
        return self.output.read_text(errors="replace")

    async def noted(self, what: str, count: int = 1, *, within: float = PATIENCE) -> None:
        """Wait for this many entries of one kind."""

        def there() -> bool:
            assert self.process.poll() is None or len(self.of(what)) >= count, self.printed[-4000:]
            return len(self.of(what)) >= count

        await until(
            there,
            within=within,
            what=lambda: f"{count} × {what!r}: {len(self.of(what))}\n{self.printed[-4000:]}",
        )

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    async def ended(self, *, within: float = PATIENCE) -> int:
        """Wait for its end; return the exit code."""
        await until(
            lambda: self.process.poll() is not None,
            within=within,
            what=lambda: f"the program ends\n{self.printed[-4000:]}",
        )
        return self.process.returncode


@asynccontextmanager
async def app(
    name: str, folder: Path, url: str, queue: str, **options: object
) -> AsyncIterator[App]:
    """Run a program from ``apps`` while the context is open, and kill it afterwards if needed."""
    events, output = folder / "events.jsonl", folder / "output.txt"
    arguments = {"url": url, "queue": queue, "event_log": str(events), **options}
    with output.open("ab") as out:
        process = spawn(
            [sys.executable, str(_APPS / f"{name}.py"), json.dumps(arguments)], stdout=out
        )
    try:
        yield App(process, events, output)
    finally:
        kill_group(process)


@asynccontextmanager
async def command_line(
    folder: Path, *arguments: str, queue: str = "", url: str = "memory://", **environment: str
) -> AsyncIterator[App]:
    """Run ``aio-pika-batch`` while the context is open, and kill all its processes afterwards."""
    events, output = folder / "events.jsonl", folder / "output.txt"
    env = {
        **os.environ,
        "AIO_PIKA_BATCH_URL": url,
        "AIO_PIKA_BATCH_QUEUE_NAME": queue or "orders",
        "EVENT_LOG": str(events),
        **environment,
    }
    with output.open("ab") as out:
        process = spawn(
            [sys.executable, "-m", "aio_pika_batch", *arguments], stdout=out, env=env, cwd=folder
        )
    try:
        yield App(process, events, output)
    finally:
        # Each process of a supervisor has a group of its own, and all are in its session still.
        for pid in _session(process.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def _session(leader: int) -> list[int]:
    """Return all processes of a session."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            if int(stat.read_text().rpartition(")")[2].split()[3]) == leader:
                found.append(int(stat.parent.name))
    return found


def shop(*arguments: str) -> tuple[str, ...]:
    """Return the arguments that run the consumer in ``apps/shop.py``."""
    return ("run", "shop:make", "--factory", "--app-dir", str(_APPS), *arguments)


def is_running(pid: int) -> bool:
    """Return whether there is such a process, and it has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# --- raw bytes ------------------------------------------------------------------

_BITS = {
    "content_type": 0x8000,
    "content_encoding": 0x4000,
    "headers": 0x2000,
    "delivery_mode": 0x1000,
    "priority": 0x0800,
    "correlation_id": 0x0400,
    "reply_to": 0x0200,
    "expiration": 0x0100,
    "message_id": 0x0080,
    "timestamp": 0x0040,
    "type": 0x0020,
    "user_id": 0x0010,
    "app_id": 0x0008,
    "cluster_id": 0x0004,
}
_FIXED = {b"t": 1, b"b": 1, b"B": 1, b"s": 2, b"u": 2, b"I": 4, b"i": 4, b"f": 4}
_FIXED |= {b"l": 8, b"d": 8, b"T": 8, b"D": 5, b"V": 0}


def pack_properties(properties: Mapping[str, bytes]) -> bytes:
    """Encode properties, each given as its bytes on the wire."""
    flags = sum(_BITS[each] for each in properties)
    return struct.pack(">H", flags) + b"".join(
        properties[each] for each in _BITS if each in properties
    )


def unpack_properties(raw: bytes) -> dict[str, bytes]:
    """Decode a property list into the bytes of each property."""
    [flags] = struct.unpack_from(">H", raw)
    found, at = {}, 2
    for name, bit in _BITS.items():
        if flags & bit:
            match name:
                case "headers":
                    size = 4 + struct.unpack_from(">I", raw, at)[0]
                case "delivery_mode" | "priority":
                    size = 1
                case "timestamp":
                    size = 8
                case _:
                    size = 1 + raw[at]
            found[name] = raw[at : at + size]
            at += size
    assert at == len(raw)
    return found


def short(text: bytes) -> bytes:
    """Encode a short string."""
    return bytes([len(text)]) + text


def long(text: bytes) -> bytes:
    """Encode a long string, or anything else that has its length before it."""
    return struct.pack(">I", len(text)) + text


def pack_table(entries: Mapping[bytes, bytes]) -> bytes:
    """Encode a field table; each value is given with its type, as on the wire."""
    return long(b"".join(short(name) + value for name, value in entries.items()))


def unpack_table(raw: bytes) -> dict[bytes, bytes]:
    """Decode a field table into the type and bytes of each value."""
    found, at = {}, 4
    while at < len(raw):
        name = raw[at + 1 : at + 1 + raw[at]]
        at += 1 + raw[at]
        kind = raw[at : at + 1]
        size = _FIXED[kind] if kind in _FIXED else 4 + struct.unpack_from(">I", raw, at + 1)[0]
        found[name] = raw[at : at + 1 + size]
        at += 1 + size
    return found


HEADERS = {
    b"bool": b"t\x01",
    b"int8": b"b\xff",
    b"int16": b"s\xff\xfe",
    b"int32": b"I\xff\xff\xff\xfd",
    b"int64": b"l" + (5).to_bytes(8),
    b"float": b"f\x3f\x8c\xcc\xcd",
    b"double": b"d\x3f\xf1\x99\x99\x99\x99\x99\x9a",  # 1.1, which no float is
    b"decimal": b"D\x02\x00\x00\x01\x3a",
    b"text": b"S" + long("grün".encode()),
    b"latin": b"S" + long(b"gr\xfcn"),
    b"bytes": b"x" + long(b"\x00\xff"),
    b"time": b"T" + (1_700_000_000).to_bytes(8),
    b"nothing": b"V",
    b"table": b"F" + pack_table({b"inner": b"I\x00\x00\x00\x01"}),
    b"array": b"A" + long(b"I\x00\x00\x00\x01S" + long(b"two")),
    b"empty": b"S" + long(b""),
}
"""A header of each type that there is."""

PROPERTIES = {
    "content_type": short(b"application/json"),
    "headers": pack_table(HEADERS),
    "delivery_mode": b"\x02",
    "priority": b"\x07",
    "correlation_id": short(b"corr-1"),
    "reply_to": short(b"answers"),
    "expiration": short(b"600000"),
    "message_id": short(b"m-1"),
    "timestamp": (1_700_000_000).to_bytes(8),
    "type": short(b"order"),
    "app_id": short(b"shop"),
}
"""Every property that a publisher may set as it likes."""


@dataclass(frozen=True)
class RawMessage:
    """A message as it is on the wire."""

    exchange: str
    routing_key: str
    properties: bytes
    body: bytes


class RawClient:
    """A connection with one channel, which does not decode properties."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    @asynccontextmanager
    async def connect(cls, url: str) -> AsyncIterator[Self]:
        """Log in, and open a channel with confirms."""
        parts = urlsplit(url)
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        client = cls(reader, writer)
        try:
            writer.write(ProtocolHeader().marshal())
            await client._expect(commands.Connection.Start)
            login = f"\0{parts.username}\0{parts.password}"
            client._send(commands.Connection.StartOk({}, "PLAIN", login, "en_US"), 0)
            tune = await client._expect(commands.Connection.Tune)
            client._send(commands.Connection.TuneOk(tune.channel_max, tune.frame_max, 0), 0)
            client._send(commands.Connection.Open(unquote(parts.path[1:]) or "/"), 0)
            await client._expect(commands.Connection.OpenOk)
            client._send(commands.Channel.Open())
            await client._expect(commands.Channel.OpenOk)
            client._send(commands.Confirm.Select())
            await client._expect(commands.Confirm.SelectOk)
            yield client
        finally:
            writer.close()
            await writer.wait_closed()

    async def publish(
        self, routing_key: str, properties: bytes, body: bytes, *, exchange: str = ""
    ) -> None:
        """Publish, and wait for the confirm."""
        self._send(commands.Basic.Publish(exchange=exchange, routing_key=routing_key))
        header = struct.pack(">HHQ", 60, 0, len(body)) + properties
        for kind, payload in ((2, header), (3, body)):
            self._writer.write(struct.pack(">BHI", kind, 1, len(payload)) + payload + b"\xce")
        await self._expect(commands.Basic.Ack)

    async def get(self, queue: str, *, within: float = PATIENCE) -> RawMessage:
        """Wait for a message, and take it."""

        async def taken() -> RawMessage | None:
            self._send(commands.Basic.Get(queue=queue, no_ack=True))
            answer = await self._frame()
            if isinstance(answer, commands.Basic.GetEmpty):
                return None
            assert isinstance(answer, commands.Basic.GetOk), answer
            header = await self._frame()
            [size] = struct.unpack_from(">Q", header, 4)
            body = b""
            while len(body) < size:
                body += await self._frame()
            return RawMessage(answer.exchange, answer.routing_key, header[12:], body)

        return await until(taken, within=within, what=f"a message in {queue}")

    def _send(self, method: Any, channel: int = 1) -> None:
        self._writer.write(frame.marshal(method, channel))

    async def _expect(self, kind: type) -> Any:
        method = await self._frame()
        assert isinstance(method, kind), f"{kind.name} was expected, and this came: {method!r}"
        return method

    async def _frame(self) -> Any:
        """Read a method, or the payload of a content frame."""
        async with asyncio.timeout(PATIENCE):
            head = await self._reader.readexactly(7)
            kind, _, size = struct.unpack(">BHI", head)
            rest = await self._reader.readexactly(size + 1)
        return frame.unmarshal(head + rest)[2] if kind == 1 else rest[:-1]

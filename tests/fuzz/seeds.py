"""The valid inputs that are mutated: captured from a RabbitMQ, or written by pamqp."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pamqp import commands

from tests.fuzz.mutate import frames_of
from tests.unit.adapters.aio_pika.broker_frames import (
    CHANNEL,
    HEARTBEAT,
    TAG,
    delivery,
    method,
    raw_properties,
    returned,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

CORPUS = Path(__file__).with_name("corpus")
CAPTURED_TAG = "fuzzed"
_CAPTURED_CHANNEL = 1
_HEADER_FRAME = 2


@dataclass(frozen=True, slots=True)
class Seed:
    """Frames of one connection, and the channel that is tapped."""

    frames: Sequence[bytes]
    channel: int
    consumer_tag: str


def _captured(name: str) -> Seed:
    stream = (CORPUS / f"{name}.bin").read_bytes()
    return Seed(frames_of(stream), _CAPTURED_CHANNEL, CAPTURED_TAG)


def _written() -> Seed:
    properties = commands.Basic.Properties(
        content_type="text/plain",
        headers={"n": 1, "t": {"u": ["v", None, True]}, "s": "x" * 40},
        delivery_mode=2,
        message_id="m",
    )
    methods: Sequence[Any] = (
        commands.Basic.ConsumeOk(TAG),
        commands.Basic.Ack(1, multiple=False),
        commands.Basic.Ack(9, multiple=True),
        commands.Basic.Nack(2, multiple=False),
        commands.Basic.Cancel(TAG),
        commands.Basic.CancelOk(TAG),
        commands.Channel.CloseOk(),
        commands.Channel.Close(406, "PRECONDITION_FAILED", 60, 80),
    )
    frames = [
        HEARTBEAT,
        *delivery(1, b"body", properties=properties),
        *delivery(2, bytes(300), exchange="e", routing_key="a.b", part=70),
        *delivery(3, b""),
        *returned(b"body", "e", "k", properties),
        *(method(each) for each in methods),
        *delivery(4, b"native", channel=9),
        method(commands.Connection.Tune(2047, 4096, 60), 0),
        method(commands.Connection.Blocked("memory"), 0),
        method(commands.Connection.Close(320, "CONNECTION_FORCED", 0, 0), 0),
    ]
    return Seed(frames, CHANNEL, TAG)


STREAMS = (_captured("consuming"), _captured("publishing"), _written())

PROPERTY_LISTS = tuple(
    dict.fromkeys(
        [
            *(
                frame[19:-1]
                for seed in STREAMS
                for frame in seed.frames
                if frame[0] == _HEADER_FRAME
            ),
            raw_properties(headers={"x-retry-count": 2, "x-death": [{"count": 1, "reason": "r"}]}),
            raw_properties(headers={"deep": {"a": [[[{"b": {}}]]]}}, user_id="guest", app_id="a"),
            raw_properties(headers={}, expiration="1000", reply_to="r", message_type="t"),
        ]
    )
)
"""What a message's properties look like on the wire."""

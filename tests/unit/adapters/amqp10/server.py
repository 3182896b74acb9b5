"""A broker for the sessions of unit tests: no socket, and it does what the test says."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any
from urllib.parse import quote, urlencode

from aio_pika_batch.adapters.amqp10 import performatives as p
from aio_pika_batch.adapters.amqp10 import spec
from aio_pika_batch.adapters.amqp10.codec import Symbol, UByte, UInt, UShort
from aio_pika_batch.adapters.amqp10.frames import (
    Frames10Parser,
    ProtocolHeader,
    ReceivedRecord,
    pack,
)
from aio_pika_batch.adapters.url import Address
from aio_pika_batch.transport import Endpoint
from tests.unit.adapters.amqp10.broker import Broker
from tests.unit.adapters.amqp10.spoken import FRAME_MAX, frame, section

ADDRESS = Address("broker", 5672, "user", "s3cret", "v/1")
SHOWN = "amqp://broker:5672/v%2F1"


def endpoint(*addresses: Address, heartbeat: int = 10) -> Endpoint:
    """How to connect to one of these."""
    urls = [
        f"{'amqps' if each.tls else 'amqp'}://{each.user}:{each.password}@{each.host}:{each.port}"
        f"/{quote(each.vhost, safe='')}?{urlencode(each.options)}"
        for each in addresses
    ]
    return Endpoint(url=",".join(urls), heartbeat=heartbeat, connection_name="container")


def about_queue(kind: str, status: str = "200", **arguments: Any) -> bytes:
    """The broker's answer to a question about a queue."""
    of_queue = {
        "type": kind,
        "arguments": {name.replace("_", "-"): arguments[name] for name in arguments},
    }
    return section(spec.PROPERTIES, [None, None, None, status]) + section(spec.AMQP_VALUE, of_queue)


def mechanisms(names: list[str]) -> bytes:
    """The frame that offers them: an array of symbols."""
    items = b"".join(bytes((len(name),)) + name.encode() for name in names)
    array = bytes((0xE0, 2 + len(items), len(names), 0xA3)) + items
    return frame(b"\x00\x53\x40\xc0" + bytes((1 + len(array), 1)) + array, kind=1)


class Server(asyncio.Transport):
    """One connection's other end.

    Attributes:
        received: All records that came, of all kinds.
        is_silent: It reads, and answers nothing.
        keeps_open: It doesn't confirm a close.
    """

    def __init__(self, **broker: Any) -> None:
        super().__init__()
        self.broker = Broker(**broker)
        self.mechanisms = ["PLAIN", "AMQPLAIN", "ANONYMOUS"]
        self.greeting = b""
        self.outcome = 0
        self.header = spec.SASL_HEADER
        self.opened: p.Record | None = p.Open(
            "cluster",
            idle_time_out=UInt(30_000),
            properties={Symbol("product"): "RabbitMQ", Symbol("version"): "4.3.6"},
        )
        self.answer: bytes | None = about_queue("quorum")
        self.received: list[Any] = []
        self.is_silent = False
        self.keeps_open = False
        self.is_aborted = False
        self.context: Any = None
        self._parser = Frames10Parser(FRAME_MAX)
        self._protocol: Any = None

    # --- as asyncio has it -----------------------------------------------------------

    def connect(self, protocol: Any, context: Any) -> None:
        """A client has connected."""
        self.context = context
        self._protocol = protocol
        protocol.connection_made(self)

    def write(self, data: Any) -> None:
        assert not self.is_aborted
        for event in self._parser.feed(bytes(data)):
            match event:
                case ProtocolHeader():
                    self.received.append(event)
                    self.say(self.header if event.header == spec.SASL_HEADER else event.header)
                    if event.header == spec.SASL_HEADER:
                        self.say(self.greeting or mechanisms(self.mechanisms))
                case ReceivedRecord(1, record):
                    self._manage(record)
                case ReceivedRecord(_, record):
                    self.received.append(record)
                    self._answer(record)
        if not self._parser._held and bytes(data) == b"\0\0\0\x08\x02\0\0\0":
            self.received.append("sign of life")

    def _answer(self, record: p.Record) -> None:
        match record:
            case p.Init():
                outcome = p.SaslOutcome(UByte(self.outcome))
                self.say(pack(outcome, 0, spec.SASL_FRAME))
            case p.Open():
                if self.opened is None:
                    self.hang_up()
                else:
                    self.say(pack(self.opened))
            case p.Close():
                if not self.keeps_open:
                    self.say(pack(p.Close()))
                    self.hang_up()
            case _:
                self.broker._on_record(record)
                self.tell()

    def _manage(self, record: p.Record) -> None:
        """Answer on the channel of requests about queues."""
        match record:
            case p.Begin():
                self.say(pack(p.Begin(UShort(1), UInt(0), UInt(9), UInt(9)), 1))
            case p.Attach(role=False):
                self.say(pack(p.Flow(UInt(0), UInt(9), UInt(0), UInt(9)), 1))
                self.say(
                    pack(p.Flow(UInt(0), UInt(9), UInt(0), UInt(9), UInt(0), UInt(0), UInt(9)), 1)
                )
            case p.Flow(next_incoming_id=int()):
                # It can't be known before the broker's begin: 4.0 begins with another one.
                self.say(pack(p.End(p.PeerError(Symbol("amqp:session:window-violation"))), 1))
            case p.Transfer() if self.answer is None:
                self.say(pack(p.End(p.PeerError(Symbol("amqp:internal-error"))), 1))
            case p.Transfer():
                transfer = p.Transfer(UInt(1), UInt(0), b"0", UInt(0), settled=True)
                self.say(pack(transfer, 1, payload=self.answer))
            case p.End():
                self.say(pack(p.End(), 1))

    def abort(self) -> None:
        if not self.is_aborted:
            self.is_aborted = True
            asyncio.get_running_loop().call_soon(self._protocol.connection_lost, None)

    def is_closing(self) -> bool:
        return self.is_aborted

    # --- what a test does --------------------------------------------------------------

    def tell(self) -> None:
        """Let the queue answer, and send what it may."""
        if self.is_silent:
            return
        self.broker.answer()
        self.broker.answer()
        while self.broker.deliver():
            pass
        if self.broker.output:
            self.say(b"".join(self.broker.output))
            self.broker.output.clear()

    def publish(self, count: int) -> None:
        """Put messages into the queue."""
        self.broker.ready += count
        self.tell()

    def say(self, data: bytes) -> None:
        """Send these bytes."""
        if not self.is_silent:
            self._later(self._protocol.data_received, data)

    def hang_up(self) -> None:
        """Close the connection."""
        self._later(self._protocol.eof_received)

    def break_off(self, error: Exception | None = None) -> None:
        """Let the connection break."""
        self._later(self._protocol.connection_lost, error)

    def _later(self, call: Callable[..., object], *args: object) -> None:
        asyncio.get_running_loop().call_soon(call, *args)


def sent(server: Server, kind: type) -> list[Any]:
    """The records of one kind that the client has sent."""
    return [record for record in server.received if isinstance(record, kind)]

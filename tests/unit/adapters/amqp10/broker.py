"""A model of RabbitMQ's side of a link: credit, windows, questions, outcomes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from aio_pika_batch.adapters.amqp10 import performatives as p
from aio_pika_batch.adapters.amqp10.codec import Described, Symbol, UInt, UShort
from aio_pika_batch.adapters.amqp10.frames import Frames10Parser, ReceivedRecord, pack
from tests.unit.adapters.amqp10.spoken import FRAME_MAX, Sent, transfers

SERIAL = 2**32


def signed(number: int) -> int:
    """A difference of two serial numbers."""
    return (number + 2**31) % SERIAL - 2**31


@dataclass
class Delivery:
    """One that is not settled yet."""

    number: int
    delivery_id: int


@dataclass
class Broker:
    """One queue, one session, one link.

    Attributes:
        initial_count: Deliveries are counted from here on; 4.0 and 4.3 differ.
        initial_transfer: And transfers from here on.
        ready: How many messages wait in the queue.
        outcomes: What was decided about each message, by its number.
        output: Bytes on their way to the client, frame by frame.
    """

    initial_count: int = 0
    initial_transfer: int = 0
    first_id: int = 0
    frame_payload: int | None = None
    ready: int = 0
    unsettled: dict[int, Delivery] = field(default_factory=dict)
    outcomes: dict[int, tuple[int, Any]] = field(default_factory=dict)
    output: list[bytes] = field(default_factory=list)
    received: list[p.Record] = field(default_factory=list)
    taken: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.parser = Frames10Parser(FRAME_MAX)
        self.limit: int | None = None
        self.window = 0
        self.sent_transfers = 0
        self.sent = 0
        self.skipped = 0
        self.waiting: p.Flow | None = None
        self.in_flight: p.Flow | None = None
        self.is_attached = False
        self.is_told = False
        self.most_unsettled = 0

    # --- what comes ----------------------------------------------------------------

    def receive(self, data: bytes) -> None:
        """Bytes of the client."""
        for event in self.parser.feed(data):
            assert isinstance(event, ReceivedRecord), event
            self.received.append(event.record)
            self._on_record(event.record)

    def _on_record(self, record: p.Record) -> None:
        match record:
            case p.Begin():
                self._send(
                    p.Begin(UShort(0), UInt(self.initial_transfer), UInt(400), UInt(2**32 - 1))
                )
            case p.Attach():
                assert record.role is True
                self._send(
                    p.Attach(
                        record.name,
                        record.handle,
                        role=False,
                        source=record.source,
                        target=record.target,
                        initial_delivery_count=UInt(self.initial_count),
                    )
                )
                self.is_attached = True
            case p.Flow():
                assert self.is_attached
                self._flow(record)
            case p.DispositionFrame():
                assert record.role is True
                assert record.settled is True
                self._dispose(record)
            case p.Detach():
                self._send(p.Detach(UInt(0), closed=True))
                self.is_attached = False
            case p.End():
                self._send(p.End())

    def _flow(self, flow: p.Flow) -> None:
        assert flow.next_incoming_id is not None
        in_flight = signed(self.initial_transfer + self.sent_transfers - flow.next_incoming_id)
        assert in_flight >= 0, "the client counts transfers that were not sent"
        self.window = flow.incoming_window - in_flight
        if self.in_flight is None:
            self.in_flight = flow
        else:
            self.waiting = flow

    def answer(self) -> None:
        """Let the queue reply to the credit that it was given, as RabbitMQ 4.3 handles it."""
        flow, self.in_flight = self.in_flight, None
        if flow is None:
            return
        self._grant(flow)
        if flow.drain:
            self.skipped += self.credit
            self._tell(drain=True)
        if self.waiting is not None:
            self.in_flight, self.waiting = self.waiting, None
        elif not flow.drain and (flow.echo or not self.is_told):
            self._tell()

    def _grant(self, flow: p.Flow) -> None:
        assert flow.delivery_count is not None
        assert flow.link_credit is not None
        self.limit = flow.delivery_count + flow.link_credit
        if flow.drain:
            while self.deliver():
                pass

    def _tell(self, *, drain: bool = False) -> None:
        """Send the link's state, with the news that this is the active consumer if that is due."""
        news = {} if self.is_told else {Symbol("rabbitmq:active"): True}
        self.is_told = True
        self._send_flow(credit=self.credit, drain=drain, properties=news or None)

    def _dispose(self, record: p.DispositionFrame) -> None:
        last = record.first if record.last is None else record.last
        state = record.state
        assert isinstance(state, Described)
        for delivery_id in list(self.unsettled):
            inside = signed(delivery_id - record.first) >= 0 >= signed(delivery_id - last)
            if inside:
                delivery = self.unsettled.pop(delivery_id)
                self.outcomes[delivery.number] = (int(state.descriptor), state.value)

    # --- what is sent --------------------------------------------------------------

    @property
    def count(self) -> int:
        """Its delivery count."""
        return (self.initial_count + self.sent + self.skipped) % SERIAL

    @property
    def credit(self) -> int:
        """How many messages it may send."""
        return 0 if self.limit is None else max(0, signed(self.limit - self.count))

    def deliver(self) -> bool:
        """Send a message, if there is one and it may."""
        if not (self.ready and self.credit and self.is_attached):
            return False
        payload = Sent(b"%d" % self.sent).payload
        size = self.frame_payload
        frames = 1 if size is None else -(-len(payload) // size)
        if self.window < frames:
            return False
        self.window -= frames
        self.sent_transfers += frames
        delivery_id = (self.first_id + self.sent) % SERIAL
        self.unsettled[delivery_id] = Delivery(self.sent, delivery_id)
        self.most_unsettled = max(self.most_unsettled, len(self.unsettled))
        self.output.append(transfers(payload, delivery_id, size=size))
        self.sent += 1
        self.ready -= 1
        return True

    def take_back(self, count: int) -> None:
        """The oldest were held for too long."""
        ids = list(self.unsettled)[:count]
        for each in ids:
            self.taken.add(self.unsettled.pop(each).number)
            self.ready += 1
        if ids:
            self._send(
                p.DispositionFrame(
                    role=False,
                    first=UInt(ids[0]),
                    last=UInt(ids[-1]),
                    settled=False,
                    state=Described(0x26, []),
                )
            )

    def become_active(self) -> None:
        """Become the single active consumer, after another one."""
        if self.is_attached:
            self.is_told = False
            self._tell()

    def alarm(self) -> None:
        """Take no more messages of publishers."""
        self._send(p.Flow(UInt(0), UInt(0), UInt(0), UInt(0)))

    def _send_flow(self, *, credit: int, **more: Any) -> None:
        self._send(
            p.Flow(
                UInt(0),
                UInt(400),
                UInt((self.initial_transfer + self.sent_transfers) % SERIAL),
                UInt(2**32 - 1),
                UInt(0),
                UInt(self.count),
                UInt(credit),
                UInt(self.ready),
                **more,
            )
        )

    def _send(self, record: p.Record) -> None:
        self.output.append(pack(record))

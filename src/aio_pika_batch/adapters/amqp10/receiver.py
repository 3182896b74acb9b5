"""Keeps the state of one AMQP 1.0 session with one link that receives from a queue.

It is pure: frames in, events out. Frames to be sent are collected in `output`.

Laws:

- The credit is the prefetch, without the unsettled messages that count. It is absolute, so that
  repeating it changes nothing.
- Ids and counts begin where the broker says, and wrap.
- One question is open at a time. Its answer proves that everything settled before it was applied.
  Until then no other flow is sent, because the broker would drop the question.
- A flow that the broker sends by itself is not taken for an answer.
- Nothing is sent for a link that has ended.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from enum import Enum, auto
from typing import Any, Final, NamedTuple, TypeAlias
from urllib.parse import quote

from aio_pika_batch.adapters.amqp10 import settling, spec
from aio_pika_batch.adapters.amqp10.codec import Symbol, UByte, UInt
from aio_pika_batch.adapters.amqp10.frames import pack
from aio_pika_batch.adapters.amqp10.performatives import (
    Attach,
    Begin,
    Detach,
    DispositionFrame,
    End,
    Flow,
    PeerError,
    Record,
    SourceTerminus,
    TargetTerminus,
)
from aio_pika_batch.adapters.amqp10.settling import RELEASED, Decided, OutcomeRun, Unsettled
from aio_pika_batch.adapters.amqp10.transfers import Transfers
from aio_pika_batch.core import message

WINDOW: Final = 2**31 - 1
"""The session's window. Credit is what limits transfers; each flow renews the window."""

UNLIMITED: Final = 2**31 - 1
"""The credit without a prefetch limit."""

_CHANNEL, _HANDLE = 0, 0
_RECEIVER: Final = True

# A flow is sent with each batch, so it is packed without the generic encoder.
_FLOW = struct.Struct(">15sI13sIBI3s")
_FLOW_HEAD: Final = struct.pack(
    ">IBBH3sBBBB", 44, 2, 0, _CHANNEL, b"\x00\x53\x13", 0xC0, 31, 10, 0x70
)
_FLOW_WINDOWS: Final = struct.pack(">BIBBIBB", 0x70, WINDOW, 0x43, 0x70, WINDOW, 0x43, 0x70)
_UINT: Final = 0x70
_DRAIN, _NO_DRAIN = b"\x40\x41\x42", b"\x40\x42\x42"  # available, drain and echo


class Attached(NamedTuple):
    """The link is open, and deliveries follow."""

    transfers: Transfers


class Answered(NamedTuple):
    """The question with this number, and all before it, are answered."""

    number: int


class LinkEnded(NamedTuple):
    """The broker has ended the link or its session, or confirms its end."""

    error: PeerError | None


LinkEvent: TypeAlias = Attached | Answered | LinkEnded


class LinkPhase(Enum):
    """The phases of a link."""

    OPENING = auto()
    OPEN = auto()
    DETACHING = auto()
    ENDED = auto()


class Receiver:
    """A receiver of one queue.

    Args:
        source: What its messages share.
        name: The link's name, unique on the connection.
        prefetch: The maximum number of unsettled messages; 0 means no limit.
        properties: The link's properties, such as `rabbitmq:priority`.

    Attributes:
        unsettled: The deliveries that are not settled yet.
        output: Frames to be sent. The sender clears the list.
    """

    def __init__(
        self,
        source: message.Source,
        name: str,
        prefetch: int,
        properties: Mapping[str, Any] | None = None,
    ) -> None:
        self.phase = LinkPhase.OPENING
        self.unsettled = Unsettled()
        self.output: list[bytes] = []
        self._source = source
        self._prefetch = prefetch or UNLIMITED
        self._transfers: Transfers | None = None
        self._next_incoming = 0
        self._delivery_count = 0  # without what has been received
        self._is_stopped = False
        self._asked = 0
        self._answered = 0
        self._asks_again = False
        self._send(Begin(None, UInt(0), UInt(WINDOW), UInt(WINDOW), UInt(_HANDLE)))
        self._send(
            Attach(
                name,
                UInt(_HANDLE),
                _RECEIVER,
                snd_settle_mode=UByte(0),
                rcv_settle_mode=UByte(0),
                source=SourceTerminus(f"/queues/{quote(source.queue, safe='')}"),
                target=TargetTerminus(source.consumer_tag),
                properties={Symbol(key): value for key, value in (properties or {}).items()},
            )
        )

    # --- actions -----------------------------------------------------------------------

    def settle(self, decided: Sequence[Decided]) -> None:
        """Settle deliveries, all or none, and renew the credit.

        Raises:
            SettlementError: A tag cannot be settled.
        """
        runs = self.unsettled.settle(decided)
        for run in runs:
            self._dispose(run)
        if runs and not self._is_stopped:
            self._flow()

    def ask(self) -> int:
        """Ask for an answer that comes when everything settled so far has been applied.

        Until then only messages arrive that are on their way.

        Returns:
            The number of the `Answered`.
        """
        if self._is_asking:
            self._asks_again = True
            return self._asked + 1
        # A drain without credit. RabbitMQ 4.3 reports the active consumer in a flow of its own, or
        # together with an answer: the answer to a mere `echo` would look the same.
        self._flow(drain=True)
        self._asked += 1
        return self._asked

    def stop(self) -> int:
        """Ask for no more messages. Those on their way arrive before the answer."""
        self._is_stopped = True
        return self.ask()

    def resume(self, prefetch: int) -> None:
        """Ask for messages again. The prefetch holds for those that are delivered from now on."""
        self._is_stopped = False
        self._prefetch = prefetch or UNLIMITED
        self.unsettled.exempt()
        self._flow()

    def detach(self) -> None:
        """End the link. Unsettled messages return to the queue."""
        if self.phase is LinkPhase.OPEN:
            self.phase = LinkPhase.DETACHING
            self._send(Detach(UInt(_HANDLE), closed=True))

    # --- incoming frames-----------------------------------------------------------------

    def received(self) -> None:
        """Add what the transfers have brought."""
        if self._transfers is not None:
            self.unsettled.deliver(self._transfers.count)

    def receive(self, channel: int, record: Record) -> LinkEvent | None:
        """Take a frame other than a transfer of this link."""
        match record:
            case Begin():
                self._next_incoming = record.next_outgoing_id
            case Attach():
                return self._attached(channel, record)
            case Flow():
                return self._flowed(record)
            case DispositionFrame(role=False):
                self._take_back(record)
            case Detach() | End():
                return self._ended(record)
        return None

    def _attached(self, channel: int, attach: Attach) -> Attached | None:
        if attach.source is None:
            return None  # refused; a detach with the reason follows
        self._transfers = Transfers(self._source, channel, attach.handle)
        self._delivery_count = attach.initial_delivery_count or 0
        self.phase = LinkPhase.OPEN
        self._flow()
        return Attached(self._transfers)

    def _flowed(self, flow: Flow) -> Answered | None:
        transfers = self._transfers
        if transfers is None or flow.handle != transfers.handle or self.phase is not LinkPhase.OPEN:
            return None  # it is about the session, and concerns only senders
        if not (flow.drain and self._is_asking):
            if flow.echo:
                self._flow()
            return None
        self._answered += 1
        if self._asks_again:
            self._asks_again = False
            self.ask()
        elif not self._is_stopped:
            self._flow()
        return Answered(self._answered)

    def _take_back(self, disposition: DispositionFrame) -> None:
        """Drop what the broker delivers again, because it was held for too long."""
        transfers = self._transfers
        if transfers is None:
            return
        first = transfers.tag(disposition.first)
        last = first if disposition.last is None else transfers.tag(disposition.last)
        self.unsettled.take_back(first, last)
        if not disposition.settled:
            # The broker delivers nothing new until each of them is settled here, too.
            self._dispose(OutcomeRun(RELEASED, first, last))
            if not self._is_stopped:
                self._flow()

    def _ended(self, record: Detach | End) -> LinkEnded | None:
        if self.phase is LinkPhase.ENDED:
            return None
        if self.phase is not LinkPhase.DETACHING:
            self._send(Detach(UInt(_HANDLE), closed=True) if isinstance(record, Detach) else End())
        self.phase = LinkPhase.ENDED
        return LinkEnded(record.error)

    @property
    def _is_asking(self) -> bool:
        """Whether a question is open."""
        return self._asked != self._answered

    # --- outgoing frames---------------------------------------------------------------

    def _flow(self, *, drain: bool = False) -> None:
        transfers = self._transfers
        if transfers is None or self.phase is not LinkPhase.OPEN or self._is_asking:
            return
        missing = max(0, self._prefetch - self.unsettled.counted)
        self.output.append(
            _FLOW.pack(
                _FLOW_HEAD,
                (self._next_incoming + transfers.frames) & spec.SERIAL,
                _FLOW_WINDOWS,
                (self._delivery_count + transfers.count) & spec.SERIAL,
                _UINT,
                0 if drain or self._is_stopped else missing,
                _DRAIN if drain else _NO_DRAIN,
            )
        )

    def _dispose(self, run: OutcomeRun) -> None:
        if self._transfers is not None and self.phase is LinkPhase.OPEN:
            first, last = map(self._transfers.delivery_id, (run.first, run.last))
            self.output.append(settling.pack(run, first, last, _CHANNEL))

    def _send(self, record: Record) -> None:
        self.output.append(pack(record, _CHANNEL))

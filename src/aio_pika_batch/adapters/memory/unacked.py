"""Holds what a channel has delivered, until it is settled.

To settle messages of a quorum queue, a channel sends commands to the queue's leader. While the
leader doesn't answer, the channel keeps all but the first ones, and drops these when it is closed.
The leader may stop to answer at any time, so here it always does as soon as a cancel is confirmed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby, takewhile
from typing import TypeAlias, assert_never

from aio_pika_batch.adapters.memory.queue import MemoryQueue, QueueConsumer, ReturnCause
from aio_pika_batch.adapters.memory.rabbitmq import QueueType, Refusal, VersionRules
from aio_pika_batch.adapters.memory.ready_list import QueueEntry
from aio_pika_batch.core.refusals import ReplyCode
from aio_pika_batch.core.settlement import Disposition, Frame, Modification

_Delivered: TypeAlias = dict[int, tuple[QueueConsumer, QueueEntry]]
_How: TypeAlias = tuple[Disposition, ReturnCause]
_Settled: TypeAlias = list[tuple[_How, _Delivered]]


class UnackedMessages:
    """The unsettled messages of a channel."""

    def __init__(self, rules: VersionRules) -> None:
        self._most_commands = rules.commands_without_answer
        self._unacked: _Delivered = {}
        self._transaction: _Settled | None = None
        self._kept: _Settled = []
        # The commands sent since a cancel, for each queue whose leader doesn't answer.
        self._commands: dict[MemoryQueue, int] = {}

    @property
    def tags(self) -> tuple[int, ...]:
        """The delivery tags that aren't settled, in their order."""
        return tuple(self._unacked)

    def add(self, tag: int, consumer: QueueConsumer, entry: QueueEntry) -> None:
        """Add a delivery."""
        self._unacked[tag] = (consumer, entry)

    def settle(
        self, disposition: Disposition, cause: ReturnCause, tag: int, *, multiple: bool
    ) -> None:
        """Settle messages, or keep that for the commit.

        Args:
            cause: The method that settles them, unless they are acked.

        Raises:
            Refusal: The tag is unknown.
        """
        # Tag 0, which in AMQP stands for all of them, is never among them.
        if tag not in self._unacked:
            raise Refusal(ReplyCode.PRECONDITION_FAILED, f"unknown delivery tag {tag}")
        tags = list(takewhile(lambda each: each <= tag, self._unacked)) if multiple else [tag]
        settled = {each: self._unacked.pop(each) for each in tags}
        if self._transaction is None:
            self._send((disposition, cause), settled)
        else:
            self._transaction.append(((disposition, cause), settled))

    def settle_run(self, disposition: Disposition, cause: ReturnCause, tags: Iterable[int]) -> None:
        """Settle messages by one frame of AMQP 1.0, which is one command."""
        self._send((disposition, cause), {tag: self._unacked.pop(tag) for tag in tags})

    def modify(self, modification: Modification, until: float | None) -> None:
        """Modify messages. A channel never keeps this, and what it has kept goes out before it."""
        modified = {tag: self._unacked.pop(tag) for tag in modification.tags}
        kept, self._kept = self._kept, []
        for how, members in kept:
            for queue, some in _by_queue(members):
                self._carry_out(how, queue, some)
        for queue, members in _by_queue(modified):
            queue.modify(_entries(members), modification, until)

    def select(self) -> None:
        """Settle in transactions from now on."""
        if self._transaction is None:
            self._transaction = []

    def commit(self) -> None:
        """Carry out a transaction: settlements of one kind that follow each other are one command.

        Raises:
            Refusal: The channel has no transactions.
        """
        if self._transaction is None:
            raise Refusal(ReplyCode.PRECONDITION_FAILED, "channel is not transactional")
        settled, self._transaction = self._transaction, []
        for how, run in groupby(settled, key=lambda each: each[0]):
            together = {tag: each for _, members in run for tag, each in members.items()}
            self._send(how, together)

    def on_answer(self, queue: MemoryQueue, *, to_cancel: bool) -> None:
        """Take note that a queue's leader has answered, and so has received everything before."""
        self._commands.pop(queue, None)
        kept, self._kept = self._kept, []
        for how, members in kept:
            self._send(how, members)
        if to_cancel and queue.spec.type is QueueType.QUORUM:
            self._commands[queue] = 0

    def on_answers(self) -> None:
        """Take note that the leaders of all queues have answered."""
        for queue in list(self._commands):
            self.on_answer(queue, to_cancel=True)

    def requeue_all(self, cause: ReturnCause) -> None:
        """Return everything to its queues, as the end of the channel does."""
        left = [*(self._transaction or ()), *self._kept]
        unacked = self._unacked | {tag: each for _, some in left for tag, each in some.items()}
        self._unacked, self._transaction, self._kept = {}, None, []
        for queue, members in _by_queue(dict(sorted(unacked.items()))):
            queue.requeue(_entries(members), cause)

    def _send(self, how: _How, settled: _Delivered) -> None:
        for queue, members in _by_queue(settled):
            if queue in self._commands:
                self._commands[queue] += 1
                if self._commands[queue] > self._most_commands:
                    self._kept.append((how, members))
                    continue
            self._carry_out(how, queue, members)

    @staticmethod
    def _carry_out(how: _How, queue: MemoryQueue, members: _Delivered) -> None:
        disposition, cause = how
        entries = _entries(members)
        match disposition:
            case Disposition.ACK:
                queue.ack(entries)
            case Disposition.REJECT:
                queue.reject(entries, cause)
            case Disposition.REQUEUE | Disposition.RETURN:
                queue.requeue(entries, cause)
            case never:
                assert_never(never)


def _by_queue(delivered: _Delivered) -> Iterable[tuple[MemoryQueue, _Delivered]]:
    # Only neighbours are grouped, which keeps the order of delivery.
    for queue, group in groupby(delivered.items(), key=lambda each: each[1][0].queue):
        yield queue, dict(group)


def _entries(delivered: _Delivered) -> list[QueueEntry]:
    entries = []
    for consumer, entry in delivered.values():
        consumer.unacked_count -= 1
        entries.append(entry)
    return entries


def acks_first(frames: Sequence[Frame], unsettled: Sequence[int]) -> Sequence[Frame]:
    """Return the frames of one write in the order in which a classic queue takes them."""
    if all(frame.disposition is Disposition.ACK for frame in frames):
        return frames
    settled = {frame.tag for frame in frames if not frame.multiple}
    singles = []
    for frame in frames:
        tags = [frame.tag]
        if frame.multiple:
            tags = [tag for tag in unsettled if tag <= frame.tag and tag not in settled]
            settled.update(tags)
        singles += [Frame(frame.disposition, tag) for tag in tags]
    return sorted(singles, key=lambda frame: frame.disposition is not Disposition.ACK)

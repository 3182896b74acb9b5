"""What can a broker be told about what it delivered?"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import islice

from aio_pika_batch.errors import SettlementError


class Disposition(Enum):
    """What a broker can be told about one delivery."""

    ACK = "ack"
    """`basic.ack`: done, forget it."""
    REJECT = "reject"
    """`basic.reject(requeue=False)`: dead-letter it as the queue says, else discard it."""
    REQUEUE = "requeue"
    """`basic.reject(requeue=True)`: it failed; deliver it again, and count this one."""
    RETURN = "return"
    """`basic.nack(requeue=True)`: it was not started; newer brokers do not count this one."""


@dataclass(frozen=True, slots=True)
class Settlement:
    """One disposition for some deliveries of one session.

    Grouped, because a batch has hundreds of messages and hardly ever more than two dispositions.
    """

    disposition: Disposition
    tags: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Frame:
    """One settling method: `basic.ack`, `basic.reject` or `basic.nack`, as the disposition says."""

    disposition: Disposition
    tag: int
    multiple: bool = False


class Ledger:
    """The unsettled deliveries of one session, in the order of their delivery."""

    __slots__ = ("_last", "_outstanding")

    def __init__(self) -> None:
        self._outstanding: dict[int, None] = {}
        self._last = 0

    def __len__(self) -> int:
        """How many deliveries are unsettled."""
        return len(self._outstanding)

    def deliver(self, tags: Sequence[int]) -> None:
        """Enter deliveries; each tag is larger than all before it."""
        if tags:
            self._outstanding.update(dict.fromkeys(tags))
            self._last = tags[-1]

    def settle(self, settlements: Iterable[Settlement]) -> list[Frame]:
        """Strike deliveries off.

        Returns:
            The frames to send, in this order.

        Raises:
            SettlementError: A tag is settled already, was never delivered, or stands here twice.
                Then nothing has changed.
        """
        settlements = list(settlements)
        outstanding = self._outstanding
        if len(settlements) == 1:
            only = settlements[0]
            tags = only.tags
            if (
                only.disposition is Disposition.ACK
                and tags
                and tags == tuple(islice(outstanding, len(tags)))
            ):
                # What nearly always happens: the oldest batch, and all of it went well.
                for tag in tags:
                    del outstanding[tag]
                return [Frame(Disposition.ACK, tags[-1], len(tags) > 1)]
        decided = self._decide(settlements)
        frames = self._plan(decided)
        for tag in decided:
            del outstanding[tag]
        return frames

    def _decide(self, settlements: Sequence[Settlement]) -> dict[int, Disposition]:
        decided: dict[int, Disposition] = {}
        for settlement in settlements:
            for tag in settlement.tags:
                if tag not in self._outstanding:
                    why = "settled already" if 0 < tag <= self._last else "never delivered here"
                    msg = (
                        f"delivery tag {tag} cannot be settled: {why}"
                        " (each delivery, once, in its own session)"
                    )
                    raise SettlementError(msg)
                if tag in decided:
                    msg = (
                        f"delivery tag {tag} is settled twice at once, as {decided[tag].value}"
                        f" and as {settlement.disposition.value}"
                    )
                    raise SettlementError(msg)
                decided[tag] = settlement.disposition
        return decided

    def _plan(self, decided: dict[int, Disposition]) -> list[Frame]:
        prefix: list[int] = []
        for tag in self._outstanding:
            if tag not in decided:
                break
            prefix.append(tag)
        # What cannot be joined goes first: the holes that it leaves stand in no other frame's way.
        singles = {tag for tag in decided if decided[tag] not in _JOINABLE}
        joinable = [tag for tag in prefix if tag not in singles]
        singles.update(decided.keys() - set(prefix))
        segments = _fewest_segments([decided[tag] for tag in joinable])
        multiples: list[Frame] = []
        start = 0
        for end, disposition in segments:
            members = joinable[start:end]
            start = end
            same = [tag for tag in members if decided[tag] is disposition]
            singles.update(tag for tag in members if decided[tag] is not disposition)
            multiples.append(Frame(disposition, same[-1], len(same) > 1))
        return [Frame(decided[tag], tag) for tag in sorted(singles)] + multiples


_JOINABLE = (Disposition.ACK, Disposition.RETURN)


def _fewest_segments(row: Sequence[Disposition]) -> list[tuple[int, Disposition]]:
    """Divide a row of acks and returns so that one `multiple` for each part, and a single frame for
    each member that is of the other kind, are the fewest frames together.

    Two numbers are carried along: the cost so far with the open part being acks, or returns.
    Opening a part costs one frame, and so does every member of the other kind.

    Returns:
        The parts, each as (end, kind).
    """
    if not row:
        return []
    if row.count(row[0]) == len(row):
        return [(len(row), row[0])]
    costs = dict.fromkeys(_JOINABLE, 1)
    switched: list[dict[Disposition, bool]] = []
    for disposition in row:
        came: dict[Disposition, bool] = {}
        before = dict(costs)
        for kind, other in zip(_JOINABLE, reversed(_JOINABLE), strict=True):
            came[kind] = before[other] + 1 < before[kind]
            costs[kind] = min(before[kind], before[other] + 1) + (disposition is not kind)
        switched.append(came)
    kind = min(_JOINABLE, key=costs.__getitem__)
    segments = []
    end = len(row)
    for at in range(len(row) - 1, -1, -1):
        if switched[at][kind]:
            segments.append((end, kind))
            end = at
            kind = _JOINABLE[1 - _JOINABLE.index(kind)]
    segments.append((end, kind))
    return segments[::-1]

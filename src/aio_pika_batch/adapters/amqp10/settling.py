"""Keeps the unsettled deliveries of a link, and plans the frames that settle them.

Laws:

- A tag is settled once. Settling it again, or a tag that was never delivered, raises an error, and
  nothing is sent.
- A frame's range may contain deliveries that are settled already, which the broker skips. So the
  rarer outcomes are sent first, and one frame for the most common one spans them.
- Only header values that every later reader can read are written into a message. A float or a null
  would end the session of each consumer that gets it.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice, pairwise
from typing import Final, NamedTuple

from aio_pika_batch.adapters.amqp10 import spec
from aio_pika_batch.adapters.amqp10.codec import (
    CodecError,
    Described,
    Symbol,
    Timestamp,
    ULong,
    write,
)
from aio_pika_batch.core.settlement import (
    Disposition,
    Modification,
    check_modified_headers,
    not_unsettled_error,
)
from aio_pika_batch.errors import SettlementError

_DELIVERY_TIME: Final = "x-opt-delivery-time"
_RESERVED: Final = ("x-exchange", "x-routing-key", "x-death", "x-opt-deaths", "x-basic-")
_FRAME = struct.Struct(">IBBH")
_FIELDS = struct.Struct(">BBIBIB")
_SIZE_AND_COUNT = struct.Struct(">II")
_LONGEST_LIST8: Final = 0xFF

_MOST_KINDS: Final = 16
"""The number of different outcomes up to which frames are saved. The recursion is as deep."""

_FEWEST_TO_SAVE: Final = 3
"""Two neighbouring runs differ, so nothing spans fewer than three."""

_LARGEST_OUTCOME: Final = 4096
"""Bytes. A queue keeps its headers in memory for as long as it keeps the message."""


class Decided(NamedTuple):
    """Deliveries and their encoded outcome."""

    outcome: bytes
    tags: tuple[int, ...]


class OutcomeRun(NamedTuple):
    """One frame: an outcome for all unsettled deliveries from one tag to another."""

    outcome: bytes
    first: int
    last: int


def _outcome(code: int, *fields: object) -> bytes:
    return write(Described(ULong(code), list(fields)))


ACCEPTED: Final = _outcome(spec.ACCEPTED)
REJECTED: Final = _outcome(spec.REJECTED)
RELEASED: Final = _outcome(spec.RELEASED)
_IS_FAILED = True
FAILED: Final = _outcome(spec.MODIFIED, _IS_FAILED)

OUTCOMES: Final = {
    Disposition.ACK: ACCEPTED,
    Disposition.REJECT: REJECTED,
    Disposition.REQUEUE: FAILED,
    Disposition.RETURN: RELEASED,
}


def modified(modification: Modification) -> bytes:
    """Return the encoded outcome of a modification.

    Raises:
        SettlementError: A header cannot be written; its name is in the text.
    """
    check_modified_headers(modification.headers)
    annotations: dict[Symbol, object] = {}
    for key, value in modification.headers.items():
        if key.startswith(_RESERVED) or not key.isascii():
            raise SettlementError(
                f"header {key!r} cannot be written into a message: its name must be ASCII, and not"
                " one of the broker's own"
            )
        annotations[Symbol(key)] = value
    if modification.until is not None:
        # Rounded up, so that the delivery is never too early.
        milliseconds = -(-int(modification.until.timestamp() * 1_000_000) // 1000)
        annotations[Symbol(_DELIVERY_TIME)] = Timestamp(milliseconds)
    fields = [modification.failed, modification.dead, *([annotations] if annotations else [])]
    try:
        outcome = _outcome(spec.MODIFIED, *fields)
    except CodecError as error:
        raise SettlementError(f"headers cannot be written into a message: {error}") from error
    if len(outcome) > _LARGEST_OUTCOME:
        raise SettlementError(
            f"headers of {len(outcome)} bytes cannot be written into a message;"
            f" {_LARGEST_OUTCOME} are allowed"
        )
    return outcome


class Unsettled:
    """The unsettled deliveries of one link, in the order of their tags."""

    __slots__ = ("_exempt", "_last", "_outstanding", "_taken_back")

    def __init__(self) -> None:
        self._exempt: set[int] = set()
        self._outstanding: dict[int, None] = {}
        self._last = 0
        self._taken_back: set[int] = set()

    def __len__(self) -> int:
        """The number of unsettled deliveries."""
        return len(self._outstanding)

    @property
    def counted(self) -> int:
        """The number of unsettled deliveries that count against the prefetch."""
        return len(self._outstanding) - len(self._exempt)

    def exempt(self) -> None:
        """No longer count those that are unsettled now against the prefetch."""
        self._exempt = set(self._outstanding)

    def deliver(self, last: int) -> None:
        """Add deliveries up to the one with this tag."""
        self._outstanding.update(dict.fromkeys(range(self._last + 1, last + 1)))
        self._last = last

    def take_back(self, first: int, last: int) -> None:
        """Remove what the broker has taken back. A later settlement of it is dropped."""
        taken = [tag for tag in range(max(first, 1), last + 1) if tag in self._outstanding]
        for tag in taken:
            del self._outstanding[tag]
        self._exempt.difference_update(taken)
        self._taken_back.update(taken)

    def settle(self, decided: Sequence[Decided]) -> list[OutcomeRun]:
        """Remove deliveries.

        Returns:
            The frames to send, in this order.

        Raises:
            SettlementError: A tag is settled already, was never delivered, or occurs twice.
                Nothing has changed then.
        """
        outstanding = self._outstanding
        if len(decided) == 1:
            outcome, tags = decided[0]
            if tags and tags == tuple(islice(outstanding, len(tags))):
                # The common case: the oldest batch, with one outcome.
                for tag in tags:
                    del outstanding[tag]
                self._exempt.difference_update(tags)
                return [OutcomeRun(outcome, tags[0], tags[-1])]
        outcomes = self._decide(decided)
        tags_to_send = sorted(outcomes)
        if self._taken_back:
            tags_to_send = [tag for tag in tags_to_send if tag not in self._taken_back]
            self._taken_back.difference_update(outcomes)
        runs = list(self._runs(tags_to_send, outcomes))
        for tag in tags_to_send:
            del outstanding[tag]
        if self._exempt:
            self._exempt.difference_update(outcomes)
        return runs

    def _decide(self, decided: Sequence[Decided]) -> dict[int, bytes]:
        outcomes: dict[int, bytes] = {}
        for outcome, tags in decided:
            for tag in tags:
                if tag not in self._outstanding and tag not in self._taken_back:
                    raise not_unsettled_error(tag, self._last)
                if tag in outcomes:
                    raise SettlementError(
                        f"delivery tag {tag} is settled twice at once; settle it once"
                    )
                outcomes[tag] = outcome
        return outcomes

    def _runs(self, tags: Sequence[int], outcomes: dict[int, bytes]) -> Iterator[OutcomeRun]:
        """Plan frames for these tags, divided where an unsettled one is between two of them."""
        # Nothing is between them if they are the oldest ones, as they nearly always are.
        are_oldest = tags == list(islice(self._outstanding, len(tags)))
        runs: list[OutcomeRun] = []
        outcome, first, last = b"", 0, 0
        for tag in tags:
            is_apart = not are_oldest and bool(last) and self._has_between(last, tag)
            if is_apart or outcomes[tag] != outcome:
                if last:
                    runs.append(OutcomeRun(outcome, first, last))
                outcome, first = outcomes[tag], tag
            if is_apart:
                yield from _covered(runs)
                runs = []
            last = tag
        if last:
            runs.append(OutcomeRun(outcome, first, last))
        yield from _covered(runs)

    def _has_between(self, tag: int, other: int) -> bool:
        """Whether a delivery between these two is unsettled."""
        between = range(tag + 1, other)
        if not between:
            return False
        if len(between) < len(self._outstanding):
            return any(each in self._outstanding for each in between)
        return any(each in between for each in self._outstanding)


def _covered(runs: Sequence[OutcomeRun]) -> Iterator[OutcomeRun]:
    """Merge frames: rarer outcomes first, then one frame for the most common over all of them."""
    if len(runs) < _FEWEST_TO_SAVE:
        yield from runs
        return
    kinds = Counter([run.outcome for run in runs])
    if len(kinds) == len(runs) or len(kinds) > _MOST_KINDS:
        yield from runs
        return
    # Of several that are equally common, the longest one: it is written once then.
    usual = max(kinds, key=lambda outcome: (kinds[outcome], len(outcome)))
    places = [place for place, run in enumerate(runs) if run.outcome == usual]
    for before, place in pairwise([-1, *places, len(runs)]):
        yield from _covered(runs[before + 1 : place])
    yield OutcomeRun(usual, runs[places[0]].first, runs[places[-1]].last)


def pack(run: OutcomeRun, first: int, last: int, channel: int) -> bytes:
    """Write the frame of a run, whose first and last delivery have these ids."""
    outcome = run.outcome
    size = 1 + _FIELDS.size + len(outcome)
    if size > _LONGEST_LIST8:
        fields = b"\xd0" + _SIZE_AND_COUNT.pack(size + 3, 5)
    else:
        fields = bytes((0xC0, size, 5))
    body = b"\x00\x53\x15" + fields + _FIELDS.pack(0x41, 0x70, first, 0x70, last, 0x41)
    return _FRAME.pack(8 + len(body) + len(outcome), 2, 0, channel) + body + outcome

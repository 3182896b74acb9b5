"""Settlements of deliveries, and the fewest frames that express them.

Laws:

- A frame with `multiple` is used only if every outstanding tag up to its own is decided the same
  way, and it ends on a tag that is itself outstanding. Otherwise the broker closes the channel
  (`406 unknown delivery tag`). Tag 0, which means "all of them", is never used.
- A tag is settled once. Settling it again, or a tag that was never delivered, raises an error, and
  nothing is sent.

Acks and nacks have `multiple`, rejects don't (AMQP 0-9-1, basic class; nack is RabbitMQ's
extension).

The channel of a quorum queue sends each settling frame to the queue's leader as a command. While
the leader doesn't answer, it sends 33 of them, keeps the others, and drops these when it is closed.
The answer to `basic.cancel` proves that nothing is kept. So only what is settled after it needs
care: `drain_mode` and `CommandBudget` make sure that few commands follow.
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from enum import Enum
from itertools import chain, islice

from aio_pika_batch.core.message import Headers
from aio_pika_batch.errors import SettlementError


class Disposition(Enum):
    """The ways to settle one delivery."""

    ACK = "ack"
    """`basic.ack`: it is done; remove it."""
    REJECT = "reject"
    """`basic.reject(requeue=False)`: dead-letter it as the queue is configured, or discard it."""
    REQUEUE = "requeue"
    """`basic.reject(requeue=True)`: it failed; deliver it again, and count this delivery."""
    RETURN = "return"
    """`basic.nack(requeue=True)`: it was not started; newer brokers don't count this delivery."""


@dataclass(frozen=True, slots=True)
class Settlement:
    """One disposition for several deliveries of one session."""

    # Not one object for each message: a batch has hundreds, and rarely more than two dispositions.
    disposition: Disposition
    tags: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Modification:
    """AMQP 1.0's outcome `modified` for several deliveries: the queue keeps the original message.

    Attributes:
        failed: Whether this counts as a failed delivery.
        until: The message is delivered again then; None: at once.
        dead: Whether it goes to the queue's own dead-letter exchange instead.
        headers: They replace headers of the message that have the same name. Each name begins with
            `x-`, each value is a str, int or bool. Later ones can replace them, but not remove
            them.
    """

    tags: tuple[int, ...]
    failed: bool = True
    until: datetime | None = None
    dead: bool = False
    headers: Headers = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class NativeRetries:
    """What a session can do to its queue's messages without a copy.

    Attributes:
        delays: Keep a message until a given time.
        headers: Attach headers.
        dead_letters: Dead-letter a message so that it can't get lost: the arguments of the queue
            name a dead-letter exchange, and the strategy is at-least-once.
        uncounted: Take a message back with `failed=False` without counting a delivery.
    """

    delays: bool
    headers: bool
    dead_letters: bool
    uncounted: bool


NO_NATIVE_RETRIES = NativeRetries(delays=False, headers=False, dead_letters=False, uncounted=False)


def check_modified_headers(headers: Headers) -> None:
    """Check that a broker and all its clients can read the headers of a modification.

    Raises:
        SettlementError: One of them can't be read. RabbitMQ closes each AMQP 1.0 connection to
            which it would have to deliver a float or a null.
    """
    for name, value in headers.items():
        is_readable = isinstance(value, str) or (
            isinstance(value, int) and -_INT64 <= value < _INT64
        )
        if not name.startswith("x-") or not is_readable:
            raise SettlementError(
                f"header {name!r} of a modified message can't be {type(value).__name__} {value!r};"
                " its name must begin with x-, its value must be a str, bool or 64-bit int"
            )


def join_modifications(changes: Iterable[tuple[Modification, int]]) -> list[Modification]:
    """Give modifications their tags. Those that don't differ otherwise become one."""
    # By identity first: messages that were planned alike share theirs, and comparing costs more.
    tags_by_id: dict[int, list[int]] = {}
    distinct: list[Modification] = []
    for each, tag in changes:
        tags = tags_by_id.get(id(each))
        if tags is None:
            tags = tags_by_id[id(each)] = []
            distinct.append(each)
        tags.append(tag)
    joined: dict[object, tuple[Modification, list[int]]] = {}
    for each in distinct:
        key = (each.failed, each.until, each.dead, tuple(each.headers.items()))
        joined.setdefault(key, (each, []))[1].extend(tags_by_id[id(each)])
    return [replace(first, tags=tuple(tags)) for first, tags in joined.values()]


@dataclass(frozen=True, slots=True)
class Frame:
    """One `basic.ack`, `basic.reject` or `basic.nack`, depending on the disposition."""

    disposition: Disposition
    tag: int
    multiple: bool = False


def not_unsettled_error(tag: int, last: int) -> SettlementError:
    """Return the error for a tag that isn't unsettled; `last` was the last one delivered."""
    why = "settled already" if 0 < tag <= last else "never delivered here"
    rule = "settle each delivery once, in the session that delivered it"
    return SettlementError(f"delivery tag {tag} cannot be settled: {why}; {rule}")


_INT64 = 2**63

RECENT = 10_000
"""Unsettled deliveries that are kept for fast access; older ones need a tenth of the memory."""


class Ledger:
    """The unsettled deliveries of one session, in the order of their delivery.

    Args:
        recent: See `RECENT`.
    """

    __slots__ = ("_held", "_kinds", "_last", "_old", "_outstanding", "_recent")

    def __init__(self, recent: int = RECENT) -> None:
        self._recent = recent
        # A consumer has none of these; who reads a whole queue without settling has thousands.
        self._old = array("Q")
        self._outstanding: dict[int, None] = {}
        self._held: dict[int, Disposition] = {}
        self._kinds: set[Disposition] = set()
        self._last = 0

    def __len__(self) -> int:
        """The number of unsettled deliveries, including those that are held."""
        return len(self._old) + len(self._outstanding)

    @property
    def held(self) -> int:
        """The number of deliveries that are decided and not released."""
        return len(self._held)

    @property
    def held_kinds(self) -> int:
        """The number of dispositions among the held deliveries."""
        return len(self._kinds)

    def deliver(self, tags: Sequence[int]) -> None:
        """Add deliveries. Each tag is larger than all before it."""
        if tags:
            self._outstanding.update(dict.fromkeys(tags))
            self._last = tags[-1]
            if (surplus := len(self._outstanding) - self._recent) > self._recent:
                tags = list(self._outstanding)
                self._old.extend(tags[:surplus])
                self._outstanding = dict.fromkeys(tags[surplus:])

    def settle(self, settlements: Iterable[Settlement]) -> list[Frame]:
        """Remove deliveries.

        Returns:
            The frames to send, in this order.

        Raises:
            SettlementError: A tag has been settled before, was never delivered, or occurs twice.
                Nothing has changed then.
        """
        settlements = list(settlements)
        outstanding = self._outstanding
        if len(settlements) == 1 and not self._held and not self._old:
            only = settlements[0]
            tags = only.tags
            if (
                only.disposition is Disposition.ACK
                and tags
                and tags == tuple(islice(outstanding, len(tags)))
            ):
                # The common case, without a look at each tag: all of the oldest batch is acked.
                for tag in tags:
                    del outstanding[tag]
                return [Frame(Disposition.ACK, tags[-1], len(tags) > 1)]
        # Decide first: an invalid tag must not leave the ledger half changed.
        decided = self.decide(settlements)
        frames = self._plan(decided)
        self._remove(decided)
        return frames

    def hold(self, settlements: Iterable[Settlement]) -> None:
        """Decide deliveries that stay outstanding until `release`. Raises as `settle` does."""
        decided = self.decide(list(settlements))
        self._held.update(decided)
        self._kinds.update(decided.values())

    def release(self, *, joined: bool) -> list[Frame]:
        """Remove the held deliveries, and return the frames that settle them.

        Args:
            joined: Whether to join them by `multiple`. Otherwise each one has its own frame, and
                those of one disposition follow each other.
        """
        held, self._held = self._held, {}
        self._kinds = set()
        if joined:
            frames = self._plan(held)
        else:
            order = list(Disposition)
            tags = sorted(held, key=lambda tag: (order.index(held[tag]), tag))
            frames = [Frame(held[tag], tag) for tag in tags]
        self._remove(held)
        return frames

    def _is_old(self, tag: int) -> bool:
        at = bisect_left(self._old, tag)
        return at < len(self._old) and self._old[at] == tag

    def _remove(self, tags: Iterable[int]) -> None:
        outstanding, old = self._outstanding, self._old
        for tag in tags:
            if tag in outstanding:
                del outstanding[tag]
            else:
                del old[bisect_left(old, tag)]

    def decide(
        self, settlements: Sequence[Settlement], kept: Collection[int] = ()
    ) -> dict[int, Disposition]:
        """Return the disposition of each tag, without settling it. Raises as `settle` does.

        Args:
            kept: Tags that are decided elsewhere.
        """
        decided: dict[int, Disposition] = {}
        for settlement in settlements:
            for tag in settlement.tags:
                is_outstanding = tag in self._outstanding or self._is_old(tag)
                if not is_outstanding or tag in self._held or tag in kept:
                    raise not_unsettled_error(tag, self._last)
                if tag in decided:
                    raise SettlementError(
                        f"delivery tag {tag} is settled twice at once, as {decided[tag].value}"
                        f" and as {settlement.disposition.value}; settle it once"
                    )
                decided[tag] = settlement.disposition
        return decided

    def _plan(self, decided: dict[int, Disposition]) -> list[Frame]:
        prefix: list[int] = []
        for tag in chain(self._old, self._outstanding):
            if tag not in decided:
                break
            prefix.append(tag)
        # Rejects cannot be joined. Sent first, they leave no undecided tag in the middle of the
        # range that a `multiple` frame covers.
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
    """Divide a row of acks and returns into the segments that need the fewest frames.

    Each segment needs one `multiple` frame for one of the two kinds, and a single frame for each
    member of the other kind. This is dynamic programming over two numbers: the frames so far if the
    current segment consists of acks, and if it consists of returns. Beginning a segment costs one
    frame, and so does each member of the other kind.

    Returns:
        The segments, each as (end, kind).
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
    # Follow the cheapest way back to the beginning of the row.
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


# -- after the cancel -----------------------------------------------------------------------------

SAFE_COMMANDS = 30
"""Commands that a channel sends in any case: 32 on RabbitMQ 3.10, 33 on newer ones."""

_AT_ONCE = 9
_FIRST_PAUSE = 0.1


class DrainMode(Enum):
    """How to settle after the broker has confirmed a cancel."""

    DIRECT = "direct"
    """Each settlement in its own frames: there are few messages left."""
    COMMITTED = "committed"
    """In transactions: a commit needs one command for each disposition, however many messages."""
    JOINED = "joined"
    """All together at the end, in the fewest frames: the broker may not know transactions."""


def drain_mode(unsettled: int, *, is_rabbitmq: bool) -> DrainMode:
    """Return how to settle the messages that are unsettled when a cancel is confirmed."""
    if unsettled <= SAFE_COMMANDS:
        return DrainMode.DIRECT
    # Others may answer tx.select with 540, which ends the connection.
    return DrainMode.COMMITTED if is_rabbitmq else DrainMode.JOINED


class CommandBudget:
    """Spreads the commits of a drain over its time: the number of commands of a channel is limited.

    The first commits follow at once. From then on each command doubles the pause, so that the
    budget lasts for any drain. The last commit, before the close, is always possible.
    """

    __slots__ = ("_next_at", "_spent")

    def __init__(self) -> None:
        self._spent = 0
        self._next_at = -math.inf

    def commit_at(self, commands: int) -> float | None:
        """Return when a commit of this many commands may be sent; None: only before the close."""
        if self._spent + commands > SAFE_COMMANDS - len(Disposition):
            return None
        return self._next_at

    def spend(self, commands: int, now: float) -> None:
        """Count the commands of a commit."""
        self._spent += commands
        over = self._spent - _AT_ONCE
        self._next_at = now + (_FIRST_PAUSE * 2**over if over > 0 else 0.0)

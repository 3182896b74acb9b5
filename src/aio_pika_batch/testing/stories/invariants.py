"""The invariants of all stories, on every broker.

Each is a function that returns what breaks the invariant, or nothing. Its docstring is the text of
the report.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable
from typing import TypeAlias

from aio_pika_batch.core.settlement import Disposition
from aio_pika_batch.testing.stories.player import Played
from aio_pika_batch.testing.stories.story import Story

Invariant: TypeAlias = Callable[[Story, Played], object]


class StoryBroken(AssertionError):
    """A story broke an invariant; the text contains the story, to play it again."""


def judge(story: Story, played: Played) -> None:
    """Check all invariants of a story that was played.

    Raises:
        StoryBroken: Some invariants are broken; it lists each, and what breaks it.
    """
    found = [(each, each(story, played)) for each in INVARIANTS]
    broken = [f"  {inspect.getdoc(each)} Broken by {what}" for each, what in found if what]
    if broken:
        raise StoryBroken("\n".join([*broken, f"in {story}"]))


# -- with any faults --


def nothing_is_lost(story: Story, played: Played) -> object:
    """Each message is in a queue, or dead-lettered, or was ACKed by its handler."""
    return set(story.bodies) - set(played.waiting) - set(played.dead) - set(+played.acks)


def nothing_appears(story: Story, played: Played) -> object:
    """There are no messages that were not published."""
    return (set(played.waiting) | set(played.dead) | set(played.seen)) - set(story.bodies)


def nothing_is_acked_without_a_reason(story: Story, played: Played) -> object:
    """A message is acked only as often as its handler ACKed it or a copy was confirmed."""
    del story
    return played.settled[Disposition.ACK] - played.acks - played.confirmed


def nothing_is_discarded(story: Story, played: Played) -> object:
    """No message is rejected: dead letters are published."""
    del story
    return +played.settled[Disposition.REJECT]


def attempts_are_bounded(story: Story, played: Played) -> object:
    """No message is retried more often than `max_requeue_attempts`."""
    return [count for count in played.retries if not 0 <= count <= story.attempts]


def batches_are_within_their_size(story: Story, played: Played) -> object:
    """No batch is empty, or larger than `batch_size`."""
    return [batch for batch in played.batches if not 0 < len(batch) <= story.size]


def handlers_are_bounded(story: Story, played: Played) -> object:
    """No more than `concurrency` handlers run in each worker."""
    return played.most if played.most > story.concurrency * story.workers else None


def there_are_no_complaints(story: Story, played: Played) -> object:
    """Tags come in order and are settled once, prefetch is respected, and nothing stays open."""
    del story
    return played.complaints


def all_comes_to_its_end(story: Story, played: Played) -> object:
    """After all faults, the consumer is healthy and its queue becomes empty."""
    if not story.ends:
        return None
    return +played.waiting or (None if played.is_healthy else "a consumer that is not healthy")


# -- without faults, stops included --


def everything_is_there_once(story: Story, played: Played) -> object:
    """Without faults, each message is in one place, and no acked message comes back."""
    if story.faults:
        return None
    return _difference(Counter(story.bodies), played.waiting + played.dead + played.acks)


def everything_handled_is_settled(story: Story, played: Played) -> object:
    """Without faults, each ACK and each confirmed copy causes one ack, even before a stop."""
    if story.faults:
        return None
    return _difference(played.settled[Disposition.ACK], played.acks + played.confirmed)


def nothing_left_was_handled(story: Story, played: Played) -> object:
    """Without faults, each result of a handler is settled once, and no message just returned."""
    if story.faults or story.raises:
        return None
    settled = played.settled
    decided = settled[Disposition.ACK] + settled[Disposition.REQUEUE]
    decided += settled[Disposition.REJECT]
    return _difference(played.seen, decided)


def nothing_is_handled_too_often(story: Story, played: Played) -> object:
    """Without faults, a message is handled as often as its answers require."""
    if story.faults:
        return None
    wrong = []
    for body in story.bodies:
        seen = played.seen[body]
        # If an atomic batch fails, its ACKs are void and their messages are handled again.
        too_often = seen > len(story.answers[int(body)]) + 1 and story.settle != "atomic"
        exact = not played.waiting[body] and not story.raises
        if too_often or (exact and seen != story.times(body)):
            wrong.append((body, seen))
    return wrong


def order_is_kept(story: Story, played: Played) -> object:
    """Without faults, a single handler gets the messages in the order of the queue."""
    returns_messages = story.stop_at is not None or story.breaker is not None
    alone = story.workers == story.concurrency == 1
    # A quorum queue delivers returned messages first, but in the order of their return.
    keeps_place = played.keeps_place and not story.quorum
    if story.faults or not alone or (returns_messages and not keeps_place):
        return None
    first = list(dict.fromkeys(body for batch in played.batches for body in batch))
    return None if first == [body for body in story.bodies if body in first] else first


INVARIANTS: tuple[Invariant, ...] = (
    nothing_is_lost,
    nothing_appears,
    nothing_is_acked_without_a_reason,
    nothing_is_discarded,
    attempts_are_bounded,
    batches_are_within_their_size,
    handlers_are_bounded,
    there_are_no_complaints,
    all_comes_to_its_end,
    everything_is_there_once,
    everything_handled_is_settled,
    nothing_left_was_handled,
    nothing_is_handled_too_often,
    order_is_kept,
)
"""All invariants."""


def _difference(expected: Counter[bytes], found: Counter[bytes]) -> object:
    missing, too_many = expected - found, found - expected
    return {"missing": missing, "too many": too_many} if missing or too_many else None

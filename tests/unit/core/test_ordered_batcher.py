"""The order of each key, with concurrent handlers and failures.

A story is drawn before it begins: the keys of the messages, how often and how each of them fails,
and the order in which handlers end. It runs on the batcher and `RetryInPlace` together. Then the
batches and their times are compared with what the order of a key means.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from hypothesis import event, example, given
from hypothesis import strategies as st

from aio_pika_batch.core.batcher import Trigger
from aio_pika_batch.core.keyed_batcher import OrderedBatcher
from aio_pika_batch.core.results import Cause, MessageOutcome, MessageResult
from aio_pika_batch.core.retry import Backoff, RetryPolicy, make_delay_steps
from aio_pika_batch.core.retry_in_place import Attempt, RetryInPlace
from tests.unit.core.strategies import NOW, a_message, some_messages


def ordered(*, size=3, timeout=5.0):
    """A batcher that keeps the order of keys."""
    return OrderedBatcher(size=size, timeout=timeout)


def tags(batch):
    """The tags of a batch; None without one."""
    return None if batch is None else [message.delivery_tag for message in batch.messages]


def test_only_one_batch_of_a_key_is_handled_at_a_time():
    """The second is cut when the first is done. Other keys do not wait."""
    batcher = ordered(size=2)
    batcher.add(some_messages(6), 0, ["a", "a", "a", "a", "b", "b"])

    first, other = batcher.poll(0), batcher.poll(0)
    assert ([1, 2], [5, 6]) == (tags(first), tags(other))
    assert batcher.poll(100, exhausted=True) is None
    assert batcher.deadline is None

    batcher.release(first.key)

    assert [3, 4] == tags(batcher.poll(0))


def test_messages_without_a_key_have_no_order():
    """Any number of their batches can be handled at the same time."""
    batcher = ordered(size=2)
    batcher.add(some_messages(4), 0)

    first, second = batcher.poll(0), batcher.poll(0)

    assert ([1, 2], [3, 4]) == (tags(first), tags(second))
    batcher.release(first.key)
    assert batcher.poll(0) is None


def test_a_key_waits_for_a_handler_of_an_earlier_session():
    """Its redelivered messages must not overtake their first attempt."""
    batcher = ordered(size=1)
    batcher.block("a")
    batcher.add(some_messages(2), 0, ["a", "b"])

    assert [2] == tags(batcher.poll(0))
    assert batcher.poll(9) is None
    batcher.release("a")
    assert [1] == tags(batcher.poll(9))


def test_a_failed_message_is_retried_alone_and_later_ones_wait():
    """After its pause, until it has a final result. Then the others share batches again."""
    batcher = ordered(size=3)
    batcher.add(some_messages(5), 0, ["a"] * 5)
    batch = batcher.poll(0)
    attempt = Attempt(batch.messages[0], 2.0)
    batcher.keep(batch, [attempt], batch.messages[1:], 1)
    batcher.release("a")

    assert (5, 1, 0) == (len(batcher), batcher.held, batcher.since)
    assert 3 == batcher.deadline
    assert batcher.poll(2.75, exhausted=True) is None
    again = batcher.poll(3)
    assert ([1], Trigger.TIMEOUT, 0, "a") == (tags(again), again.trigger, again.since, again.key)
    assert (4, 0) == (len(batcher), batcher.held)
    assert batcher.poll(100, exhausted=True) is None

    batcher.release("a")

    assert [2, 3, 4] == tags(batcher.poll(3))


def test_several_failed_messages_are_retried_one_by_one():
    """Each until it has a final result: the second does not overtake the first."""
    batcher = ordered(size=3)
    batcher.add(some_messages(4), 0, ["a"] * 4)
    batch = batcher.poll(0)
    first, second, third = batch.messages
    batcher.keep(batch, [Attempt(first, 4.0), Attempt(third, 1.0)], [], 0)
    batcher.release("a")
    assert 4 == batcher.deadline

    again = batcher.poll(4)
    assert [1] == tags(again)
    batcher.keep(again, [Attempt(first, 8.0)], [], 5)
    batcher.release("a")

    assert batcher.poll(12) is None
    for tag in (1, 3, 4):
        assert [tag] == tags(batcher.poll(13))
        batcher.release("a")
    assert 0 == len(batcher)
    assert second.delivery_tag == 2


def test_a_flush_leaves_out_keys_with_failed_messages():
    """A drain has no time for retries. They are cleared with the rest, in order."""
    batcher = ordered(size=2)
    batcher.add(some_messages(5), 0, ["a", "a", "b", "a", "b"])
    batch = batcher.poll(0)
    batcher.keep(batch, [Attempt(batch.messages[0], 0.0)], batch.messages[1:], 0)
    batcher.release("a")

    assert [3, 5] == tags(batcher.flush())
    assert batcher.flush() is None
    assert [1, 2, 4] == [message.delivery_tag for message in batcher.clear()]
    assert (0, 0, None, None) == (len(batcher), batcher.held, batcher.since, batcher.deadline)
    assert batcher.poll(100) is None


def test_a_flush_takes_one_batch_of_a_key():
    """Its other messages wait for that batch."""
    batcher = ordered(size=2)
    batcher.add(some_messages(4), 0, ["a"] * 4)

    assert [1, 2] == tags(batcher.flush())
    assert batcher.flush() is None


def test_the_deadline_is_the_earlier_of_retries_and_new_messages():
    """Whichever comes first."""
    batcher = ordered(size=1, timeout=5)
    batcher.add(some_messages(1), 0, ["a"])
    batch = batcher.poll(0)
    batcher.keep(batch, [Attempt(batch.messages[0], 7.0)], [], 0)
    batcher.release("a")
    assert 7 == batcher.deadline
    batcher.add(some_messages(1, first=2), 1, ["b"])
    assert (6, 0) == (batcher.deadline, batcher.since)
    batcher.add(some_messages(1, first=3), 3, ["a"])
    assert [2] == tags(batcher.poll(3))
    assert 7 == batcher.deadline


@dataclass(frozen=True)
class Story:
    """A story: everything that will happen.

    Attributes:
        messages: The key of each message, and how often it fails.
        stops: Whether the handler stops at a failure, or goes on with the batch.
        turns: The position of the batch that ends next, among those being handled.
    """

    messages: tuple[tuple[str | None, int], ...]
    chunk: int
    size: int
    hands: int
    attempts: int
    stops: bool
    turns: tuple[int, ...]


stories = st.builds(
    Story,
    messages=st.lists(
        st.tuples(st.sampled_from([None, "a", "a", "b", "c"]), st.sampled_from([0, 0, 0, 1, 2, 9])),
        max_size=16,
    ).map(tuple),
    chunk=st.integers(1, 6),
    size=st.integers(1, 4),
    hands=st.integers(1, 3),
    attempts=st.integers(0, 3),
    stops=st.booleans(),
    turns=st.lists(st.integers(0, 2), min_size=1, max_size=6).map(tuple),
)


class Play:
    """A worker that plays one story, with some handler slots and a clock of its own."""

    def __init__(self, story):
        self.story = story
        self.batcher = ordered(size=story.size, timeout=1.0)
        policy = RetryPolicy(story.attempts, "x-retry-count")
        self.in_place = RetryInPlace(policy, Backoff(1.0, 8.0), make_delay_steps())
        self.at_work = []
        self.tries = Counter()
        self.handled = []
        self.outcomes = {}
        self.requeued = []
        self.now = 0.0

    def run(self):
        """Play until no messages are left, and return the number of steps."""
        left = [a_message(number + 1) for number in range(len(self.story.messages))]
        steps = 0
        while left or len(self.batcher) or self.at_work:
            steps += 1
            assert steps < 1000, "something waits forever"
            chunk, left = left[: self.story.chunk], left[self.story.chunk :]
            keys = [self.story.messages[message.delivery_tag - 1][0] for message in chunk]
            self.batcher.add(chunk, self.now, keys)
            self.hand_out()
            if self.at_work:
                turn = self.story.turns[steps % len(self.story.turns)]
                self.end(self.at_work.pop(turn % len(self.at_work)))
            elif not left and self.batcher.deadline is not None:
                self.now = max(self.now, self.batcher.deadline)
        return steps

    def hand_out(self):
        """Give a batch to each free slot."""
        while len(self.at_work) < self.story.hands:
            batch = self.batcher.poll(self.now)
            if batch is None:
                return
            busy = [each.key for each in self.at_work if each.key is not None]
            assert batch.key not in busy, "two batches of a key are at work"
            assert 0 < len(batch.messages) <= self.story.size
            self.at_work.append(batch)

    def end(self, batch):
        """Handle a batch in order."""
        outcomes = []
        for at, message in enumerate(batch.messages):
            tag = message.delivery_tag
            self.tries[tag] += 1
            self.handled.append((batch.key, tag, message.retry_count))
            if self.tries[tag] > self.story.messages[tag - 1][1]:
                self.conclude(tag, "acked")
            elif self.story.stops:
                rest = batch.messages[at:]
                outcomes += [
                    MessageOutcome(e, MessageResult.REQUEUE, Cause.EXCEPTION) for e in rest
                ]
                break
            else:
                outcomes.append(MessageOutcome(message, MessageResult.REQUEUE))
        if batch.key is None:
            for outcome in outcomes:
                self.conclude(outcome.message.delivery_tag, "back")
        else:
            found = self.in_place.decide(outcomes, now=NOW, jitter=0.5)
            for outcome in found.final:
                self.conclude(outcome.message.delivery_tag, "dead")
            self.batcher.keep(batch, found.attempts, found.not_attempted, self.now)
        self.batcher.release(batch.key)

    def conclude(self, tag, outcome):
        """Record the final outcome of a message."""
        assert tag not in self.outcomes
        self.outcomes[tag] = outcome


@given(stories)
@example(Story((("a", 9), ("a", 0), ("a", 9)), 3, 3, 2, 1, True, (0,)))
@example(Story((("a", 1), ("a", 1), ("a", 0)), 3, 3, 2, 3, False, (1, 0)))
def test_each_message_has_one_outcome_and_each_key_keeps_its_order(story):
    """In random runs with failures. No message waits forever."""
    play = Play(story)
    play.run()
    everything = range(1, len(story.messages) + 1)

    assert set(everything) == set(play.outcomes)
    for tag in everything:
        key, failures = story.messages[tag - 1]
        if key is None:
            continue
        is_dead = failures > story.attempts
        assert ("dead" if is_dead else "acked") == play.outcomes[tag]
        # Attempted as often as allowed, each time with its count.
        tries = min(failures, story.attempts) + 1
        assert list(range(tries)) == [count for _, each, count in play.handled if each == tag]

    for key in "abc":
        handled = [tag for each, tag, _ in play.handled if each == key]
        firsts = list(dict.fromkeys(handled))
        assert sorted(firsts) == firsts
        if story.stops or story.size == 1:
            # No other message of this key is handled between two attempts of a message.
            assert sorted(handled) == handled
        # Failed messages are always retried one after another.
        agains = [tag for each, tag, count in play.handled if each == key and count]
        assert all(
            agains.index(tag) + agains.count(tag) - 1 == len(agains) - 1 - agains[::-1].index(tag)
            for tag in agains
        )
    event("stops" if story.stops else "goes on")

"""When a batch is due, and which messages it has."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from aio_pika_batch.core.batcher import Batcher, Trigger
from tests.unit.core.strategies import some_messages

if TYPE_CHECKING:
    from aio_pika_batch.core.message import Message

# Quarters of seconds add up exactly, so tests can use the exact deadline.
quarters = st.integers(0, 40).map(lambda number: number / 4)
sizes = st.integers(1, 7)
arrivals = st.lists(st.tuples(quarters, st.integers(0, 12)), max_size=8)


def filled(batcher, pieces):
    """Add chunks of these sizes, each some time after the last. Returns the messages and times."""
    now = 0.0
    held: list[tuple[float, Message]] = []
    for wait, count in pieces:
        now += wait
        chunk = some_messages(count, first=len(held) + 1)
        batcher.add(chunk, now)
        held.extend((now, message) for message in chunk)
    return now, held


def everything(batcher):
    """Flush until nothing is left."""
    batches = []
    while (batch := batcher.flush()) is not None:
        batches.append(batch)
    return batches


@given(sizes, arrivals)
def test_no_message_is_lost_duplicated_or_reordered(size, pieces):
    """All batches together are the added messages in their order."""
    batcher = Batcher(size=size, timeout=5)
    _, held = filled(batcher, pieces)

    batches = everything(batcher)

    assert [message for _, message in held] == [
        message for batch in batches for message in batch.messages
    ]
    assert 0 == len(batcher)


@given(sizes, arrivals)
def test_a_batch_is_never_empty_and_never_too_large(size, pieces):
    """Only the last one can be smaller."""
    batcher = Batcher(size=size, timeout=5)
    _, held = filled(batcher, pieces)

    counts = [len(batch.messages) for batch in everything(batcher)]

    full, rest = divmod(len(held), size)
    assert [size] * full + [rest] * (rest > 0) == counts


@given(sizes, arrivals)
def test_the_age_of_a_batch_counts_from_its_first_message(size, pieces):
    """However the batches before it were cut."""
    batcher = Batcher(size=size, timeout=5)
    _, held = filled(batcher, pieces)
    arrived = {message.delivery_tag: when for when, message in held}

    batches = everything(batcher)

    assert [arrived[batch.messages[0].delivery_tag] for batch in batches] == [
        batch.since for batch in batches
    ]


@given(sizes, arrivals, arrivals)
def test_the_deadline_depends_only_on_the_buffered_messages(size, before, pieces):
    """Two batchers with the same messages are due at the same time, whatever happened before."""
    fresh, used = Batcher(size=size, timeout=3), Batcher(size=size, timeout=3)
    filled(used, before)
    everything(used)

    filled(fresh, pieces)
    filled(used, pieces)

    assert fresh.deadline == used.deadline
    assert fresh.since == used.since


@given(st.integers(1, 7), arrivals, quarters)
def test_before_the_deadline_only_a_full_or_exhausted_batch_is_cut(size, pieces, wait):
    """A poll that comes early changes nothing."""
    batcher = Batcher(size=size, timeout=3)
    now, held = filled(batcher, pieces)
    due = len(held) >= size or (bool(held) and now + wait >= held[0][0] + 3)

    for _ in range(2):
        if due:
            break
        assert batcher.poll(now + wait) is None

    assert len(held) == len(batcher)
    assert due is (batcher.poll(now + wait) is not None)


@given(sizes, arrivals)
def test_at_the_deadline_a_batch_is_cut(size, pieces):
    """At exactly that time, so that no timer has to fire twice."""
    batcher = Batcher(size=size, timeout=0.1)
    _, held = filled(batcher, pieces)

    while (deadline := batcher.deadline) is not None:
        full = len(batcher) >= size
        batch = batcher.poll(deadline)
        assert batch is not None
        assert (Trigger.SIZE if full else Trigger.TIMEOUT) is batch.trigger
        held = held[len(batch.messages) :]

    assert [] == held


def test_the_rest_after_a_full_batch_has_its_own_deadline():
    """The deadline of the batch before does not cut the next one early."""
    batcher = Batcher(size=2, timeout=10)
    first, second, third = some_messages(3)
    batcher.add([first], 0)
    batcher.add([second, third], 7)
    assert 10 == batcher.deadline

    batch = batcher.poll(7)

    assert batch is not None
    assert [first, second] == list(batch.messages)
    assert 17 == batcher.deadline
    assert batcher.poll(16.75) is None
    assert 7 == batcher.since


def test_adding_messages_does_not_move_the_deadline():
    """A slow stream of messages cannot delay a batch forever."""
    batcher = Batcher(size=100, timeout=10)
    for now in range(10):
        batcher.add(some_messages(1, first=now + 1), now)

    assert 10 == batcher.deadline
    batch = batcher.poll(10)
    assert batch is not None
    assert 10 == len(batch.messages)


@pytest.mark.parametrize(
    ("count", "now", "exhausted", "trigger"),
    [
        (0, 100, True, None),
        (1, 0, False, None),
        (2, 4.75, False, None),
        (1, 0, True, Trigger.PREFETCH),
        (2, 5, False, Trigger.TIMEOUT),
        (2, 5, True, Trigger.TIMEOUT),
        (3, 0, False, Trigger.SIZE),
        (3, 9, True, Trigger.SIZE),
        (4, 9, True, Trigger.SIZE),
    ],
)
def test_why_a_batch_was_cut(count, now, exhausted, trigger):
    """Size comes before age, and age before prefetch."""
    batcher = Batcher(size=3, timeout=5)
    batcher.add(some_messages(count), 0)

    batch = batcher.poll(now, exhausted=exhausted)

    assert trigger is (None if batch is None else batch.trigger)
    assert min(count, 3) == (count if batch is None else len(batch.messages))


def test_a_flush_cuts_batches_that_are_not_due():
    """It empties the buffer when no more messages arrive."""
    batcher = Batcher(size=3, timeout=5)
    messages = some_messages(2)
    batcher.add(messages, 1)

    batch = batcher.flush()

    assert batch is not None
    assert (Trigger.DRAIN, 1) == (batch.trigger, batch.since)
    assert messages == list(batch.messages)
    assert batcher.flush() is None


@pytest.mark.parametrize("counts", [(3,), (2,)])
def test_a_chunk_of_the_size_of_a_batch_is_not_copied(counts):
    """The messages of one network read are not touched one by one."""
    batcher = Batcher(size=3, timeout=5)
    chunk = some_messages(counts[0])
    batcher.add(chunk, 0)

    batch = batcher.flush()

    assert batch is not None
    assert chunk is batch.messages


def test_an_empty_chunk_starts_no_batch():
    """No message arrived, so none waits."""
    batcher = Batcher(size=3, timeout=5)

    batcher.add([], 0)

    assert batcher.deadline is None
    assert batcher.since is None
    assert batcher.poll(100, exhausted=True) is None
    assert batcher.flush() is None


@given(sizes, arrivals)
def test_clear_removes_and_returns_all_messages(size, pieces):
    """The session has ended. The batcher starts with an empty buffer."""
    batcher = Batcher(size=size, timeout=5)
    now, held = filled(batcher, pieces)
    first = batcher.poll(now)
    cut = 0 if first is None else len(first.messages)

    assert [message for _, message in held][cut:] == batcher.clear()
    assert 0 == len(batcher)
    assert batcher.deadline is None
    assert batcher.poll(now + 100, exhausted=True) is None


class Collecting(RuleBasedStateMachine):
    """The batcher against a model: a list of (arrival, message)."""

    @initialize(size=sizes, timeout=st.integers(1, 20).map(lambda number: number / 4))
    def begin(self, size, timeout):
        self.batcher = Batcher(size=size, timeout=timeout)
        self.size, self.timeout = size, timeout
        self.held = []
        self.now = 1000.0
        self.added = 0

    @rule(seconds=quarters)
    def wait(self, seconds):
        self.now += seconds

    @rule(count=st.integers(0, 10))
    def add(self, count):
        chunk = some_messages(count, first=self.added + 1)
        self.added += count
        self.batcher.add(chunk, self.now)
        self.held.extend((self.now, message) for message in chunk)

    @rule(exhausted=st.booleans())
    def poll(self, exhausted):
        expected = None
        if len(self.held) >= self.size:
            expected = Trigger.SIZE
        elif self.held and self.now >= self.held[0][0] + self.timeout:
            expected = Trigger.TIMEOUT
        elif self.held and exhausted:
            expected = Trigger.PREFETCH
        self.check(expected, self.batcher.poll(self.now, exhausted=exhausted))

    @rule()
    def flush(self):
        self.check(Trigger.DRAIN if self.held else None, self.batcher.flush())

    @rule()
    def clear(self):
        assert [message for _, message in self.held] == self.batcher.clear()
        self.held = []

    def check(self, expected, batch):
        """Cut the oldest messages that fit, with the trigger that the model expects."""
        if expected is None:
            assert batch is None
            return
        oldest, self.held = self.held[: self.size], self.held[self.size :]
        assert [message for _, message in oldest] == list(batch.messages)
        assert (expected, oldest[0][0]) == (batch.trigger, batch.since)

    @invariant()
    def it_knows_what_it_holds(self):
        since = self.held[0][0] if self.held else None
        assert len(self.held) == len(self.batcher)
        assert since == self.batcher.since
        assert (None if since is None else since + self.timeout) == self.batcher.deadline


TestCollecting = Collecting.TestCase

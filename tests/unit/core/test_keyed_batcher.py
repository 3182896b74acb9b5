"""Batches of one key, with a limit on their bytes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from aio_pika_batch.core.batcher import Batcher, Trigger
from aio_pika_batch.core.keyed_batcher import KeyedBatcher
from tests.unit.core.strategies import a_message, some_messages

quarters = st.integers(0, 40).map(lambda number: number / 4)
keys = st.sampled_from([None, "a", "b", ("c", 1)])
arrivals = st.lists(st.tuples(keys, st.integers(0, 9)), max_size=8)


def sized(*lengths, first=1):
    """Messages with bodies of these lengths."""
    return [a_message(first + at, body=b"x" * length) for at, length in enumerate(lengths)]


def tags(batch):
    """The tags of a batch; None without one."""
    return None if batch is None else [message.delivery_tag for message in batch.messages]


@given(
    st.integers(1, 5),
    st.lists(
        st.one_of(
            st.tuples(st.just("add"), st.integers(0, 9)),
            st.tuples(st.just("wait"), quarters),
            st.tuples(st.just("poll"), st.booleans()),
            st.tuples(st.just("flush"), st.none()),
            st.tuples(st.just("clear"), st.none()),
        ),
        max_size=20,
    ),
)
def test_without_keys_and_limits_it_equals_the_plain_batcher(size, steps):
    """Both cut the same batches at the same times, with the same triggers."""
    plain, keyed = (made(size=size, timeout=3) for made in (Batcher, KeyedBatcher))
    now, tag = 0.0, 1
    for step, number in steps:
        match step:
            case "add":
                chunk = some_messages(number, first=tag)
                tag += number
                plain.add(chunk, now)
                keyed.add(chunk, now)
            case "wait":
                now += number
            case "clear":
                assert plain.clear() == keyed.clear()
            case _:
                expected, found = (
                    each.flush() if step == "flush" else each.poll(now, exhausted=number)
                    for each in (plain, keyed)
                )
                assert tags(expected) == tags(found)
                if expected is not None:
                    assert (expected.trigger, expected.since) == (found.trigger, found.since)
        assert (len(plain), plain.since, plain.deadline) == (
            len(keyed),
            keyed.since,
            keyed.deadline,
        )


@pytest.mark.parametrize(
    ("lengths", "limit", "batches"),
    [
        ([4, 4, 4], 10, [[1, 2], [3]]),
        ([5, 5, 1], 10, [[1, 2], [3]]),
        ([11, 1, 1], 10, [[1], [2, 3]]),
        ([1, 11, 1], 10, [[1], [2], [3]]),
        ([10, 0, 1], 10, [[1], [2, 3]]),
        ([0, 0, 0, 0], 1, [[1, 2, 3], [4]]),
    ],
)
def test_a_batch_has_at_most_its_bytes_but_at_least_one_message(lengths, limit, batches):
    """A message above the limit gets a batch of its own."""
    batcher = KeyedBatcher(size=3, timeout=5, max_bytes=limit)
    batcher.add(sized(*lengths), 0)

    assert batches == [tags(batcher.flush()) for _ in batches]
    assert batcher.flush() is None


@pytest.mark.parametrize(
    ("lengths", "trigger"),
    [
        ([4, 4], None),
        ([4, 6], Trigger.BYTES),
        ([4, 7], Trigger.BYTES),
        ([10], Trigger.BYTES),
        ([99], Trigger.BYTES),
        ([3, 3, 4], Trigger.SIZE),
        ([3, 3, 3], Trigger.SIZE),
    ],
)
def test_a_batch_is_full_by_messages_or_bytes(lengths, trigger):
    """Whichever comes first; by messages if both do."""
    batcher = KeyedBatcher(size=3, timeout=5, max_bytes=10)
    batcher.add(sized(*lengths), 0)

    batch = batcher.poll(0)

    assert trigger is (None if batch is None else batch.trigger)


def test_messages_of_different_keys_never_share_a_batch():
    """Each key has batches of its own. None is a key like others."""
    batcher = KeyedBatcher(size=2, timeout=5)
    batcher.add(some_messages(6), 0, ["a", None, "b", None, "a", "c"])

    assert ([1, 5], "a") == (tags(batch := batcher.poll(0)), batch.key)
    assert ([2, 4], None) == (tags(batch := batcher.poll(0)), batch.key)
    assert batcher.poll(4.75) is None
    assert ([3], "b") == (tags(batch := batcher.poll(5)), batch.key)
    assert ([6], "c") == (tags(batch := batcher.poll(5)), batch.key)


def test_an_old_message_goes_before_a_full_batch_of_newer_ones():
    """A busy key cannot starve another."""
    batcher = KeyedBatcher(size=2, timeout=5)
    batcher.add(some_messages(1), 0, ["rare"])
    batcher.add(some_messages(4, first=2), 1, ["busy"] * 4)

    assert [2, 3] == tags(batcher.poll(4))
    assert [1] == tags(batcher.poll(5))
    assert [4, 5] == tags(batcher.poll(5))


def test_when_prefetch_is_exhausted_full_batches_go_first():
    """The others follow."""
    batcher = KeyedBatcher(size=2, timeout=5)
    batcher.add(some_messages(3), 0, ["a", "b", "b"])

    first, second = (batcher.poll(1, exhausted=True) for _ in range(2))

    assert ([2, 3], Trigger.SIZE) == (tags(first), first.trigger)
    assert ([1], Trigger.PREFETCH) == (tags(second), second.trigger)


def test_a_blocked_key_is_never_cut():
    """Not if it is full, old, or all that there is; and it has no deadline."""
    batcher = KeyedBatcher(size=2, timeout=5)
    batcher.block("a")
    batcher.add(some_messages(3), 0, ["a"] * 3)

    assert batcher.poll(100, exhausted=True) is None
    assert batcher.flush() is None
    assert batcher.deadline is None
    assert (3, 0) == (len(batcher), batcher.since)

    batcher.unblock("a")

    assert 5 == batcher.deadline
    assert [1, 2] == tags(batcher.poll(0))


def test_messages_that_are_put_back_come_first():
    """As if they had never been cut."""
    batcher = KeyedBatcher(size=3, timeout=5)
    batcher.add(some_messages(5), 1, ["a"] * 5)
    batch = batcher.poll(1)
    batcher.block("a")
    batcher.put_back("a", batch.messages[1:], batch.since)
    batcher.unblock("a")

    assert 4 == len(batcher)
    assert [2, 3, 4] == tags(batcher.poll(1))
    assert [5] == tags(batcher.flush())


def test_empty_keys_are_removed():
    """Over time there can be as many keys as messages."""
    batcher = KeyedBatcher(size=1, timeout=5)
    for number in range(1000):
        batcher.add([a_message(number + 1)], number, [number])
        assert [number + 1] == tags(batcher.poll(number))
        batcher.block(-1)
        batcher.unblock(-1)
    batcher.add(some_messages(9, first=2000), 0, range(9))
    assert 9 == len(batcher._buffers)
    batcher.clear()

    assert 0 == len(batcher._buffers)
    assert len(batcher._ages) + len(batcher._full) < 30


@pytest.mark.parametrize("timeout", [0, 1e9])
@pytest.mark.parametrize("is_one_waiting", [False, True])
def test_memory_does_not_grow_with_the_number_of_batches(timeout, is_one_waiting):
    """By size or by time, also while one key waits all the time."""
    batcher = KeyedBatcher(size=1, timeout=timeout)
    slow = KeyedBatcher(size=2, timeout=1e9)
    if is_one_waiting:
        slow.add([a_message(1)], 0, ["rare"])
    for number in range(2000):
        for each, count in ((batcher, 1), (slow, 2)):
            each.add(some_messages(count, first=2 * number + 2), number, [number % 3] * count)
            assert each.poll(number) is not None

    for each in (batcher, slow):
        assert len(each._ages) + len(each._full) < 200


class Sorting(RuleBasedStateMachine):
    """The batcher against a model: a list of (arrival, key, message)."""

    @initialize(
        size=st.integers(1, 4),
        timeout=st.integers(1, 20).map(lambda number: number / 4),
        limit=st.none() | st.integers(1, 12),
    )
    def begin(self, size, timeout, limit):
        self.batcher = KeyedBatcher(size=size, timeout=timeout, max_bytes=limit)
        self.size, self.timeout, self.limit = size, timeout, limit
        self.held = []
        self.blocked = set()
        self.now = 1000.0
        self.added = 0

    @rule(seconds=quarters)
    def wait(self, seconds):
        self.now += seconds

    @rule(chunk=arrivals)
    def add(self, chunk):
        some = sized(*(length for _, length in chunk), first=self.added + 1)
        self.added += len(some)
        self.batcher.add(some, self.now, [key for key, _ in chunk])
        for (key, _), message in zip(chunk, some, strict=True):
            self.held.append((self.now, key, message))

    @rule(key=keys)
    def block(self, key):
        self.batcher.block(key)
        self.blocked.add(key)

    @rule(key=keys)
    def unblock(self, key):
        self.batcher.unblock(key)
        self.blocked.discard(key)

    @rule(exhausted=st.booleans())
    def poll(self, exhausted):
        due = []
        for messages_of_key in self.by_key():
            batch, full = self.following(messages_of_key)
            arrived, _, first = messages_of_key[0]
            is_young = self.now < arrived + self.timeout
            trigger = full or (Trigger.PREFETCH if is_young else Trigger.TIMEOUT)
            if full is not None or exhausted or not is_young:
                rank = (is_young, is_young and full is None, arrived, first.delivery_tag)
                due.append((rank, batch, trigger))
        expected = min(due, key=lambda each: each[0])[1:] if due else None
        self.check(expected, self.batcher.poll(self.now, exhausted=exhausted))

    @rule()
    def flush(self):
        by_key = self.by_key()
        expected = (self.following(by_key[0])[0], Trigger.DRAIN) if by_key else None
        self.check(expected, self.batcher.flush())

    @rule(kept=st.integers(0, 3))
    def flush_and_put_back(self, kept):
        """Cut a batch, and put back all but some of its first messages."""
        batch = self.batcher.flush()
        by_key = self.by_key()
        assert (batch is None) is (not by_key)
        if batch is None:
            return
        cut = self.following(by_key[0])[0]
        for each in cut[:kept]:
            self.held.remove(each)
        back = batch.messages[kept:]
        self.batcher.block(batch.key)
        self.batcher.put_back(batch.key, back, batch.since)
        self.batcher.unblock(batch.key)
        ids = {id(message) for message in back}
        self.held = [
            (batch.since if id(each[2]) in ids else each[0], each[1], each[2]) for each in self.held
        ]

    @rule()
    def clear(self):
        assert [message for *_, message in self.held] == self.batcher.clear()
        self.held = []

    def by_key(self):
        """The messages of each key that is not blocked, oldest first."""
        found = {}
        for each in self.held:
            if each[1] not in self.blocked:
                found.setdefault(each[1], []).append(each)
        return sorted(
            found.values(),
            key=lambda messages_of_key: (messages_of_key[0][0], messages_of_key[0][2].delivery_tag),
        )

    def following(self, messages_of_key):
        """The next batch of a key, and why it is full, if it is."""
        batch, length = [], 0
        for each in messages_of_key:
            longer = length + len(each[2].body)
            if batch and self.limit is not None and longer > self.limit:
                return batch, Trigger.BYTES
            batch.append(each)
            length = longer
            if len(batch) == self.size:
                return batch, Trigger.SIZE
            if self.limit is not None and length >= self.limit:
                return batch, Trigger.BYTES
        return batch, None

    def check(self, expected, batch):
        """Compare a batch with the messages and the trigger that the model expects."""
        if expected is None:
            assert batch is None
            return
        cut, trigger = expected
        assert [each[2].delivery_tag for each in cut] == tags(batch)
        assert (trigger, cut[0][0], cut[0][1]) == (batch.trigger, batch.since, batch.key)
        self.held = [each for each in self.held if each not in cut]

    @invariant()
    def it_knows_what_it_holds(self):
        by_key = self.by_key()
        assert len(self.held) == len(self.batcher)
        assert min((each[0] for each in self.held), default=None) == self.batcher.since
        assert (by_key[0][0][0] + self.timeout if by_key else None) == self.batcher.deadline


TestSorting = Sorting.TestCase

"""Originals whose copies are not confirmed: held for a limited time, and not returned in a loop."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from aio_pika_batch.core.hold_policy import (
    AFTER_UNKNOWN,
    CHEAP_RETURNS,
    DoubtfulRoutes,
    Pending,
    Republish,
    Return,
    UnconfirmedPolicy,
)
from aio_pika_batch.core.publication import Outcome
from aio_pika_batch.core.retry import Backoff

SINCE = 100.0

seconds = st.floats(0.01, 100)
jitters = st.floats(0, 1, exclude_max=True)


@dataclass
class Situation:
    """A copy that failed, and the policy that decides what to do."""

    policy: UnconfirmedPolicy
    failures: int
    waited: float
    jitter: float
    held: int

    @property
    def now(self):
        return SINCE + self.waited

    @property
    def pauses(self):
        """The shortest and the longest possible pause."""
        return [self.policy.backoff.pause(self.failures, jitter) for jitter in (0.5, 1)]

    def decide(self):
        """The decision of the policy."""
        held = Pending(SINCE, self.failures)
        return self.policy.next_step(held, now=self.now, jitter=self.jitter, held=self.held)


situations = st.builds(
    Situation,
    st.builds(UnconfirmedPolicy, seconds, st.integers(1, 5), st.builds(Backoff, seconds, seconds)),
    failures=st.integers(1, 100),
    waited=st.just(0.0) | seconds,
    jitter=jitters,
    held=st.integers(1, 10),
)


@given(situations)
@example(Situation(UnconfirmedPolicy(1, 1, Backoff(8, 8)), 1, waited=0.5, jitter=0, held=2))
@example(Situation(UnconfirmedPolicy(1, 1, Backoff(8, 8)), 1, waited=2, jitter=0, held=1))
def test_an_original_is_never_held_too_long(situation):
    """Another attempt begins before the end, and a return is at the end at the latest."""
    end = max(situation.now, SINCE + situation.policy.hold_seconds)

    step = situation.decide()

    if isinstance(step, Return):
        assert situation.now <= step.at <= end
    else:
        assert situation.now < step.at < end


@given(situations)
def test_an_original_is_not_returned_at_once(situation):
    """At least half a pause has passed since its first failure, or the whole time: no busy loop."""
    shortest = min(situation.pauses[0], situation.policy.hold_seconds)

    step = situation.decide()

    assert step.at - SINCE >= shortest * 0.999
    assert step.at > SINCE


@given(situations)
def test_a_copy_is_not_published_again_before_half_of_the_longest_pause(situation):
    """Full jitter can be almost 0, which would be a busy loop."""
    shortest, longest = situation.pauses

    step = situation.decide()

    if isinstance(step, Republish):
        assert shortest * 0.999 <= step.at - situation.now <= longest * 1.001


@given(situations)
def test_a_copy_is_published_again_within_both_limits(situation):
    """Beyond one of them its original is returned."""
    policy = situation.policy

    step = situation.decide()

    if situation.held > policy.max_held or situation.waited >= policy.hold_seconds:
        assert isinstance(step, Return)
    elif situation.waited + situation.pauses[1] < policy.hold_seconds * 0.999:
        assert isinstance(step, Republish)


@given(situations)
def test_an_original_above_the_limit_is_returned_after_one_pause(situation):
    """Unless its time is over before that."""
    situation.held = situation.policy.max_held + 1

    step = situation.decide()

    assert step.at - situation.now <= situation.pauses[1] * 1.001


@pytest.mark.parametrize(
    ("failures", "now", "jitter", "held", "step"),
    [
        (1, 100, 0.0, 5, Republish(100.5)),
        (1, 100, 0.5, 5, Republish(100.75)),
        (1, 100, 0.0, 6, Return(100.5)),
        (4, 110, 0.0, 1, Republish(114)),
        (9, 125.5, 0.0, 1, Republish(129.5)),
        (9, 126, 0.0, 1, Return(130)),
        (9, 129, 0.0, 6, Return(130)),
        (9, 130, 0.0, 1, Return(130)),
        (9, 200, 0.0, 1, Return(200)),
    ],
)
def test_examples_of_steps(failures, now, jitter, held, step):
    """Held since 100, for 30 s at most, five at a time, pauses of 1, 2, 4, 8 s."""
    policy = UnconfirmedPolicy(hold_seconds=30, max_held=5, backoff=Backoff(1, 8))

    assert step == policy.next_step(Pending(SINCE, failures), now=now, jitter=jitter, held=held)


@pytest.mark.parametrize(("failures", "shortest"), [(1, 15), (2, 30), (9, 60)])
def test_what_the_broker_cannot_take_is_seldom_tried_again(failures, shortest):
    """Whatever the pauses between other attempts: only an operator can change that."""
    policy = UnconfirmedPolicy(30, 5, Backoff(1, 8), longest=600)
    pending = Pending(SINCE, failures, outcome=Outcome.UNPUBLISHABLE)

    step = policy.next_step(pending, now=SINCE, jitter=0.0, held=1)

    assert Republish(SINCE + shortest) == step


def test_an_original_is_held_as_long_as_it_takes_if_its_return_could_drop_it():
    """With one delivery left, although its time is over and too many are held."""
    policy = UnconfirmedPolicy(30, 5, Backoff(1, 8), delivery_limit=4)

    steps = [
        policy.next_step(Pending(SINCE, 1, deliveries=each), now=SINCE + 900, jitter=0.0, held=9)
        for each in (2, 3)
    ]

    assert [Return(SINCE + 900), Republish(SINCE + 900.5)] == steps


@given(
    st.integers(0, 30),
    st.integers(0, 30),
    st.sampled_from([Outcome.REFUSED, Outcome.UNKNOWN, Outcome.UNPUBLISHABLE, Outcome.UNSENT]),
    st.integers(1, 10),
    st.floats(0, 1e6),
)
def test_a_return_never_pushes_a_message_over_its_delivery_limit(
    deliveries, limit, outcome, held, waited
):
    """Near the limit it is held instead, and one more delivery is always left."""
    policy = UnconfirmedPolicy(30, 5, Backoff(1, 8), longest=600, delivery_limit=limit)
    pending = Pending(SINCE, 3, 1, outcome, deliveries)

    step = policy.next_step(pending, now=SINCE + waited, jitter=0.5, held=held)

    if isinstance(step, Return):
        assert deliveries + 1 < limit


@given(st.integers(CHEAP_RETURNS, 30), st.integers(1, 10), st.floats(0, 500))
def test_what_was_returned_often_is_held_much_longer(deliveries, held, waited):
    """Each return may count as a delivery."""
    policy = UnconfirmedPolicy(30, 5, Backoff(1, 8), longest=600)
    pending = Pending(SINCE, 3, deliveries=deliveries)

    step = policy.next_step(pending, now=SINCE + waited, jitter=0.5, held=held)

    assert isinstance(step, Republish) or step.at == SINCE + 600


def test_a_copy_that_may_be_stored_waits_much_longer():
    """Another copy may be one too many."""
    policy = UnconfirmedPolicy(3600, 5, Backoff(1, 8))
    refused, unknown = (
        policy.next_step(Pending(SINCE, 0).after(outcome), now=SINCE, jitter=0, held=1)
        for outcome in (Outcome.REFUSED, Outcome.UNKNOWN)
    )

    assert refused == Republish(SINCE + 0.5)
    assert unknown == Republish(SINCE + AFTER_UNKNOWN.base / 2)


def test_no_copy_is_sent_while_another_may_still_be_confirmed():
    """Then one at a time, after a pause, until one is answered."""
    doubts, route = DoubtfulRoutes(), ("", "q")
    assert doubts.admit(route, 0)
    assert doubts.admit(route, 0)
    doubts.listen(route)
    doubts.listen(route)
    assert not doubts.admit(route, 50)
    assert doubts.admit(("", "other"), 50)
    doubts.fail(route, now=70, jitter=0.9, was_listening=True)
    assert not doubts.admit(route, 100)
    doubts.fail(route, now=100, jitter=0.9, was_listening=True)
    assert not doubts.admit(route, 100)
    assert doubts.admit(route, 102)
    assert not doubts.admit(route, 102)
    doubts.release(route)
    assert doubts.admit(route, 102)
    doubts.clear(route)
    assert doubts.admit(route, 102)
    assert doubts.admit(route, 102)


def test_a_lost_connection_is_one_failure_for_all_its_copies():
    """The pause doesn't grow with their number."""
    doubts, route = DoubtfulRoutes(), ("", "q")
    for _ in range(100):
        doubts.fail(route, now=0, jitter=0)
    assert doubts.admit(route, 1)


def test_the_number_of_remembered_routes_is_limited():
    """Each message may have a routing key of its own."""
    doubts = DoubtfulRoutes()
    for number in range(5000):
        doubts.fail(("", str(number)), now=0, jitter=0)
    assert len(doubts._doubts) <= 1000

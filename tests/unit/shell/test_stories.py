"""Stories: what stays true of a whole consumer on the in-memory broker, whatever happens.

The stories and their invariants are shipped: `aio_pika_batch.testing.stories`.
`tests/integration/test_stories.py` plays the same ones on RabbitMQ.
"""

from __future__ import annotations

from dataclasses import replace

from hypothesis import event, example, given, settings
from hypothesis import strategies as st

from aio_pika_batch import MessageResult
from aio_pika_batch.core.settlement import Disposition
from aio_pika_batch.testing.stories import LATER, RAISE, Fault, FaultKind, Story, play_in_memory
from aio_pika_batch.testing.strategies import stories
from tests.stories import STORIES

ACK, NACK = MessageResult.ACK, MessageResult.NACK
REQUEUE, REQUEUE_IMMEDIATE = MessageResult.REQUEUE, MessageResult.REQUEUE_IMMEDIATE

versions = st.sampled_from(["3.10", "4.0", "4.3"])

LOST_AND_FOUND = Story(
    answers=((REQUEUE,), (NACK,), (RAISE,)),
    faults=(Fault(0.5, FaultKind.UNCONFIRMED, 5.0), Fault(3.0, FaultKind.CUT)),
)
UNCONFIRMED = (Fault(1.0, FaultKind.UNCONFIRMED, 5.0),)
AWAY = (Fault(0.0, FaultKind.AWAY, 40.0),)
CUT = (Fault(0.6, FaultKind.CUT),)
GIVEN_BACK = ((), (REQUEUE,), (REQUEUE_IMMEDIATE,), (), ())
STOPPED_AND_GIVEN_BACK = Story(
    answers=((), (), (), (), (REQUEUE_IMMEDIATE, REQUEUE)),
    size=1,
    attempts=1,
    breaker=0.3,
    quorum=True,
    stop_at=1e-12,
    restart_after=0.0,
)
LATE = (Fault(0.0, FaultKind.LATE, 40.0),)


@settings(max_examples=STORIES)
@given(stories(), versions)
@example(LOST_AND_FOUND, "4.3")
@example(Story(answers=((LATER,) * 4,) * 6, faults=UNCONFIRMED), "4.3")
@example(Story(answers=((REQUEUE, LATER),) * 6, faults=AWAY, stop_at=1.5), "4.0")
@example(Story(answers=((REQUEUE_IMMEDIATE,) * 4,) * 6, concurrency=3, stop_at=0.0), "3.10")
@example(replace(LOST_AND_FOUND, settle="yield", isolate=10, durations=(6.0,)), "4.3")
@example(replace(LOST_AND_FOUND, settle="atomic", isolate=1, durations=(1.0,)), "3.10")
@example(Story(answers=((), (RAISE,), (), (NACK,)), size=4, settle="atomic", isolate=10), "4.3")
@example(Story(answers=((RAISE,) * 2,) * 6, breaker=0.3, faults=CUT), "4.0")
@example(Story(answers=((REQUEUE,) * 4,) * 12, faults=LATE, stop_at=1.0), "4.3")
@example(Story(answers=((REQUEUE,) * 4,) * 9, quorum=True, stop_at=0.5, restart_after=0.0), "3.10")
@example(Story(answers=GIVEN_BACK, size=1, attempts=0, breaker=0.3, quorum=True), "3.10")
@example(Story(answers=((REQUEUE_IMMEDIATE,) * 3,), size=1, breaker=0.3, quorum=True), "4.0")
def test_the_invariants_hold_in_any_story(story, version):
    """Nothing is lost, acked without a reason, beyond its limits or left behind."""
    play_in_memory(story, version)
    event(f"{len(story.faults)} faults, {'to the end' if story.ends else 'stopped'}")


@settings(max_examples=STORIES)
@given(stories(), st.sampled_from(["4.0", "4.3"]))
@example(replace(LOST_AND_FOUND, quorum=True), "4.3")
@example(Story(answers=((LATER,) * 4,) * 6, quorum=True, faults=CUT), "4.0")
@example(Story(answers=((REQUEUE, LATER),) * 6, quorum=True, faults=AWAY, stop_at=1.5), "4.0")
@example(Story(answers=((NACK,),) * 40, quorum=True, size=1, concurrency=9, stop_at=0.3), "4.3")
@example(Story(answers=((RAISE,) * 2,) * 6, quorum=True, breaker=0.3, faults=CUT), "4.3")
@example(Story(answers=GIVEN_BACK, quorum=True, size=1, attempts=0, breaker=0.3), "4.0")
@example(STOPPED_AND_GIVEN_BACK, "4.0")
def test_the_invariants_hold_over_amqp_1_0(story, version):
    """Then retries and dead letters need no copies, apart from those of suspects."""
    played = play_in_memory(replace(story, quorum=True), version, "amqp10")
    # To other processes, what was requeued at once looks like a suspect, which isn't put back. It
    # needs three deliveries without a result; faults, stops and an open breaker cause others.
    returns_messages = story.stop_at is not None or story.breaker is not None
    least = 1 if story.faults or returns_messages else 3
    at_once = played.settled[Disposition.REQUEUE]
    others = played.confirmed - played.replaced
    assert all(at_once[body] >= least for body in others)
    event(f"{'retried' if played.modified else 'not retried'}, {len(story.faults)} faults")

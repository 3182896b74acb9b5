"""The invariants of stories: each can be broken, and something breaks only that one."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import asynccontextmanager
from dataclasses import replace
from inspect import isfunction

import pytest
from hypothesis import given

from aio_pika_batch import MessageResult
from aio_pika_batch.adapters.memory.session import MemorySession
from aio_pika_batch.core.publication import Outcome, Publication
from aio_pika_batch.core.settlement import Disposition, Settlement
from aio_pika_batch.core.topology import Queue, Topology
from aio_pika_batch.testing import BatchBroker, make_message
from aio_pika_batch.testing.stories import (
    INVARIANTS,
    LATER,
    RAISE,
    Fault,
    FaultKind,
    MemoryScene,
    Played,
    Story,
    StoryBroken,
    judge,
    play,
    play_in_memory,
)
from aio_pika_batch.testing.stories import story as words
from aio_pika_batch.testing.stories.player import RecordingTransport
from aio_pika_batch.testing.stories.story import (
    all_comes_to_its_end,
    attempts_are_bounded,
    batches_are_within_their_size,
    everything_handled_is_settled,
    everything_is_there_once,
    handlers_are_bounded,
    nothing_appears,
    nothing_is_acked_without_a_reason,
    nothing_is_discarded,
    nothing_is_handled_too_often,
    nothing_is_lost,
    nothing_left_was_handled,
    order_is_kept,
    there_are_no_complaints,
)
from aio_pika_batch.testing.strategies import stories
from aio_pika_batch.transport import AdjustableSession, PumpingSession, Subscription
from tests.unit.shell.scripted_transport import ScriptedTransport

ACK, NACK, REQUEUE = MessageResult.ACK, MessageResult.NACK, MessageResult.REQUEUE
TWO = Story(answers=((), (REQUEUE,)))
HURT = replace(TWO, faults=(Fault(1.0, FaultKind.CUT),))


def well() -> Played:
    """Return what happens with two messages, one of which is retried twice."""
    return Played(
        seen=Counter({b"0": 1, b"1": 2}),
        acks=Counter({b"0": 1, b"1": 1}),
        batches=[[b"0", b"1"], [b"1"]],
        retries=[0, 0, 1],
        most=1,
        settled={each: Counter() for each in Disposition}
        | {Disposition.ACK: Counter({b"0": 1, b"1": 2})},
        confirmed=Counter({b"1": 1}),
    )


def lost(played):
    """A message is nowhere."""
    played.acks.pop(b"0")


def foreign(played):
    """A dead letter was never published."""
    played.dead[b"9"] += 1


def acked(played):
    """An ack has no reason."""
    played.settled[Disposition.ACK][b"0"] += 1


def discarded(played):
    """A message is rejected."""
    played.settled[Disposition.REJECT][b"1"] += 1


def tried_again(played):
    """A message is retried four times instead of three."""
    played.retries.append(4)


def too_large(played):
    """A batch has four messages instead of three."""
    played.batches.append([b"0", b"1", b"0", b"1"])


def empty(played):
    """A batch is empty."""
    played.batches.append([])


def crowded(played):
    """Two handlers run where one may."""
    played.most = 2


def complained(played):
    """There is a complaint."""
    played.complaints.append("something")


def left(played):
    """A message is left in the queue."""
    played.waiting[b"1"] += 1


def sick(played):
    """The consumer is not healthy."""
    played.is_healthy = False


def twice(played):
    """A message is acked and dead-lettered."""
    played.dead[b"0"] += 1


def unsettled(played):
    """A copy's original is not acked."""
    played.settled[Disposition.ACK][b"1"] -= 1


def returned(played):
    """An ACK is not sent to the broker."""
    played.settled[Disposition.ACK][b"0"] -= 1


def once_more(played):
    """A message is handled again."""
    played.seen[b"0"] += 1


def overtaken(played):
    """The second message comes first."""
    played.batches[:0] = [[b"1"]]


@pytest.mark.parametrize(
    ("invariant", "breaking", "story"),
    [
        (nothing_is_lost, lost, HURT),
        (nothing_appears, foreign, HURT),
        (nothing_is_acked_without_a_reason, acked, HURT),
        (nothing_is_discarded, discarded, HURT),
        (attempts_are_bounded, tried_again, HURT),
        (batches_are_within_their_size, too_large, HURT),
        (batches_are_within_their_size, empty, HURT),
        (handlers_are_bounded, crowded, HURT),
        (there_are_no_complaints, complained, HURT),
        (all_comes_to_its_end, left, HURT),
        (all_comes_to_its_end, sick, HURT),
        (everything_is_there_once, twice, TWO),
        (everything_handled_is_settled, unsettled, TWO),
        (nothing_left_was_handled, returned, TWO),
        (nothing_is_handled_too_often, once_more, TWO),
        (order_is_kept, overtaken, TWO),
    ],
)
def test_each_invariant_can_be_broken(invariant, breaking, story):
    """The error contains the story."""
    judge(story, well())
    played = well()
    breaking(played)

    assert invariant(story, played)
    with pytest.raises(StoryBroken) as broken:
        judge(story, played)
    assert (invariant.__doc__ in str(broken.value), str(story) in str(broken.value)) == (True, True)


def test_every_invariant_is_checked():
    """None is defined and forgotten."""
    written = {
        each
        for each in globals().values()
        if isfunction(each) and each.__module__ == judge.__module__
    }
    assert set(INVARIANTS) == written - {judge}


@pytest.mark.parametrize("breaking", [twice, unsettled, returned, once_more, overtaken])
def test_with_faults_duplicates_and_reordering_are_allowed(breaking):
    """What breaks a story without faults only."""
    played = well()
    breaking(played)
    judge(HURT, played)


@pytest.mark.parametrize("how", [{"stop_at": 9.0}, {"breaker": 0.5}])
def test_returned_messages_of_a_quorum_queue_may_be_reordered(how):
    """They come before new messages, and after those returned earlier."""
    played = well()
    overtaken(played)
    judge(replace(TWO, quorum=True, **how), played)
    with pytest.raises(StoryBroken, match="in the order of the queue"):
        judge(replace(TWO, **how), played)


def test_a_stopped_story_may_leave_messages():
    """Those that were not handled yet."""
    played = well()
    played.seen[b"1"] -= 1
    played.acks.pop(b"1")
    played.settled[Disposition.ACK][b"1"] -= 1
    played.batches.pop()
    left(played)
    judge(replace(TWO, stop_at=1.0), played)


# -- playing ----------------------------------------------------------------------


def test_playing_records_everything():
    """From both sides of the port."""
    played = play_in_memory(Story(answers=((), (NACK,), (REQUEUE, RAISE), (LATER,)), size=2))

    assert {b"0": 1, b"1": 1, b"2": 3, b"3": 2} == played.seen
    assert {b"0": 1, b"2": 1, b"3": 1} == played.acks
    assert {b"1": 1} == played.dead
    assert {b"0": 1, b"1": 1, b"2": 3, b"3": 2} == played.settled[Disposition.ACK]
    assert {b"1": 1, b"2": 2, b"3": 1} == played.confirmed
    assert {0, 1, 2} == set(played.retries)
    assert not played.waiting
    assert [] == played.complaints


@given(stories())
def test_a_story_can_be_pasted_from_a_report(story):
    """As Python code, to play it again."""
    names = {**vars(words), "MessageResult": MessageResult}
    assert story == eval(str(story), names)  # noqa: S307  -- our own words


@given(stories(faults=(), max_messages=3))
def test_stories_can_be_drawn_without_faults(story):
    """Or with fewer messages."""
    assert () == story.faults
    assert len(story.answers) <= 3


async def test_a_transport_that_loses_settlements_is_detected(monkeypatch):
    """Acked messages come back when the session has ended."""

    async def lost(*_):
        pass

    monkeypatch.setattr(MemorySession, "settle", lost)
    story = replace(TWO, stop_at=10.0)
    with pytest.raises(StoryBroken, match="no acked message comes back"):
        judge(story, await play(story, MemoryScene(BatchBroker())))


async def test_nothing_is_done_while_a_session_is_being_closed(monkeypatch):
    """It may hold messages that are in no queue, so the scene must not come to rest."""
    transport = type(BatchBroker().transport)
    opened, closing = transport.session, 0

    @asynccontextmanager
    async def slow_to_close(*args):
        nonlocal closing
        async with opened(*args) as session:
            try:
                yield session
            finally:
                closing += 1
                await asyncio.sleep(5)
                closing -= 1

    monkeypatch.setattr(transport, "session", slow_to_close)
    seen = set()

    class Scene(MemoryScene):
        async def come_to_rest(self, done):
            for _ in range(100):
                seen.add((closing, done()))
                await asyncio.sleep(1)

    story = Story(answers=((REQUEUE, REQUEUE), (REQUEUE, REQUEUE)), breaker=0.3)
    judge(story, await play(story, Scene(BatchBroker())))
    assert {(1, False), (0, True)} <= seen
    assert (1, True) not in seen


# -- recording --------------------------------------------------------------------


async def test_nothing_is_done_after_the_cancel_of_a_session(script, record):
    """It may keep what it returns until its end."""
    async with record.session(subscription()) as session:
        assert not record.ending
        await session.cancel()
        assert {session} == record.ending
    assert not record.ending


async def test_nothing_is_done_until_a_session_is_closed(script, record):
    """Whether it was cancelled or not."""
    seen = []

    async def leave(*_):
        seen.append(len(record.ending))

    script.on_leave = leave
    async with record.session(subscription()):
        pass
    assert ([1], set()) == (seen, record.ending)


@pytest.fixture
async def script():
    """A scripted transport."""
    return ScriptedTransport()


@pytest.fixture
async def record(script):
    """A recording transport around the scripted one."""
    return RecordingTransport(script, Played())


def subscription(prefetch=0):
    """Return a subscription."""
    return Subscription(queue="jobs", prefetch=prefetch, consumer_tag="me")


@pytest.mark.parametrize("tags", [(1, 1), (1, 3)])
async def test_settling_a_tag_twice_or_before_delivery_is_a_complaint(script, record, tags):
    """Whether the session itself raises or not."""
    async with record.session(subscription()) as session:
        script.last.feed(b"a", b"b")
        await anext(aiter(session))
        await session.settle([Settlement(Disposition.ACK, tags)])
    assert [f"tag {tags[1]} was settled twice, or never delivered"] == record.played.complaints
    assert {b"a": 1} == record.played.settled[Disposition.ACK]


async def test_exceeding_prefetch_is_a_complaint(script, record):
    """Settled messages do not count."""
    async with record.session(subscription(prefetch=2)) as session:
        chunks = aiter(session)
        script.last.feed(b"a", b"b")
        await anext(chunks)
        await session.settle([Settlement(Disposition.RETURN, (1,))])
        script.last.feed(b"c")
        await anext(chunks)
        assert ([], 2) == (record.played.complaints, record.unsettled)
        script.last.feed(b"d")
        await anext(chunks)
        assert ["more than 2 messages were unsettled"] == record.played.complaints
    assert 0 == record.unsettled


async def test_decreasing_tags_are_a_complaint(script, record):
    """They increase within each session."""
    async with record.session(subscription()) as session:
        session.record([make_message(b"a", delivery_tag=2), make_message(b"b", delivery_tag=2)])
    assert ["tag 2 came out of order"] == record.played.complaints


async def test_only_confirmed_copies_count(script, record):
    """In the order of the publications."""
    script.outcomes = [Outcome.CONFIRMED, Outcome.UNKNOWN, Outcome.RETURNED, Outcome.REFUSED]
    async with record.publisher() as publisher:
        assert publisher.is_open
        await publisher.publish([Publication(body) for body in (b"a", b"b", b"c", b"d")])
    assert {b"a": 1} == record.played.confirmed


async def test_a_recording_transport_has_the_same_features(script, record, monkeypatch):
    """A version, a pump and a pause exist only if the wrapped transport has them."""

    async def pump(session, sink):
        async for chunk in session:
            sink(chunk)

    assert record.broker_version is None
    async with record.session(subscription()) as session:
        assert not isinstance(session, PumpingSession | AdjustableSession)

    monkeypatch.setattr(MemorySession, "pump", pump, raising=False)
    broker = BatchBroker("4.0")
    record = RecordingTransport(broker.transport, Played())
    await record.declare(Topology(queues=(Queue("jobs"),)))
    assert (4, 0) == record.broker_version[:2]
    broker.publish(b"a", routing_key="jobs")
    async with record.session(subscription()) as session:
        assert isinstance(session, PumpingSession)
        assert isinstance(session, AdjustableSession)
        await session.cancel()
        came = []
        await session.pump(came.extend)
        assert ([b"a"], 1) == ([message.body for message in came], record.unsettled)

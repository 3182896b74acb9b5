"""Listing, replaying and purging dead letters.

No dead letter may ever be lost. Stories are drawn in advance, and played on the in-memory broker.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import event, example, given
from hypothesis import strategies as st

from aio_pika_batch.adapters.memory import EventKind, PublishFault
from aio_pika_batch.dead_letters import Filter, look, purge, replay
from aio_pika_batch.errors import TopologyError, TransportError
from aio_pika_batch.testing import virtual_time
from aio_pika_batch.transport import VersionedTransport
from tests.unit.shell.helpers import QueueBroker, numbered

DLQ = "jobs.dlq"

RESULTS = ("confirmed", "refused", "unconfirmed", "lost")


def header(reason="rejected", exchange="", key="jobs", **others):
    """Return the dead-letter headers that the library writes."""
    return {
        "x-dead-letter-reason": reason,
        "x-original-exchange": exchange,
        "x-original-routing-key": key,
        "x-original-queue": "jobs",
        "x-dead-lettered-at": datetime.now(UTC),
        "x-retry-count": 3,
        **others,
    }


def opened(version="4.3", queue_type="classic", **arguments):
    """A broker with a queue and its dead-letter queue."""
    rabbit = QueueBroker(version)
    rabbit.declare()
    rabbit.declare(DLQ, x_queue_type=queue_type, **arguments)
    return rabbit


def bury(rabbit, *bodies, **how):
    """Put dead letters into the dead-letter queue."""
    rabbit.publish(*bodies, routing_key=DLQ, headers=header(**how))


# --- looking ---------------------------------------------------------------------


@pytest.mark.parametrize("version", ["3.8", "3.10", "4.0", "4.3"])
@pytest.mark.parametrize("queue_type", ["classic", "quorum"])
async def test_looking_changes_nothing(version, queue_type):
    """Afterwards all dead letters are there, in order."""
    rabbit = opened(version, queue_type)
    bury(rabbit, *numbered(6))
    looked = await look(rabbit.transport, DLQ, most=4)
    assert (6, [b"0", b"1", b"2", b"3"]) == (
        looked.ready,
        [letter.message.body for letter in looked.letters],
    )
    assert looked.ended is None
    assert {"rejected"} == {letter.death.reason for letter in looked.letters}
    assert numbered(6) == rabbit.waiting(DLQ)
    assert [] == rabbit.unsettled(DLQ)


async def test_numbers_and_times_need_no_letters_in_memory():
    """Those of a large queue would not fit. Progress is reported with what was seen."""
    rabbit = opened()
    old, new = (datetime(2020, 1, day, tzinfo=UTC) for day in (1, 2))
    for died in (new, old, new):
        bury(rabbit, *numbered(70), **{"x-dead-lettered-at": died})
    seen = []
    looked = await look(
        rabbit.transport,
        DLQ,
        most=None,
        keep=False,
        on_progress=lambda so_far: seen.append((so_far.seen, so_far.ready)),
    )
    assert [(100, 210), (200, 210), (210, 210)] == seen
    assert (0, 210, old, new) == (len(looked.letters), looked.seen, looked.oldest, looked.newest)
    assert {"rejected": 210} == dict(looked.reasons)


async def test_an_empty_queue_is_not_consumed():
    """Looking at it needs no consumer."""
    rabbit = opened()
    looked = await look(rabbit.transport, DLQ)
    assert (0, []) == (looked.ready, list(looked.letters))
    assert [] == rabbit.broker.journal.of(EventKind.CONSUMING)


async def test_looking_does_not_create_a_queue():
    """A missing queue stays missing."""
    rabbit = opened()
    with pytest.raises(TopologyError, match="nowhere"):
        await look(rabbit.transport, "nowhere")
    assert "nowhere" not in rabbit.broker.queues


@pytest.mark.parametrize("version", ["3.10", "4.0"])
async def test_looking_stops_before_the_delivery_limit(version):
    """Within five deliveries of the limit looking is refused, so the dead letter stays."""
    rabbit = opened(version, "quorum", x_delivery_limit=12)
    bury(rabbit, b"0")
    ends = [(await look(rabbit.transport, DLQ)).ended for _ in range(11)]
    assert [None] * 7 == ends[:7]
    assert all(each is not None and "drops it after 12" in each for each in ends[7:])
    assert [b"0"] == rabbit.waiting(DLQ)


async def test_since_4_3_looking_is_not_counted():
    """A nack returns the dead letters."""
    rabbit = opened("4.3", "quorum", x_delivery_limit=6)
    bury(rabbit, b"0")
    for _ in range(30):
        looked = await look(rabbit.transport, DLQ)
        assert [b"0"] == [letter.message.body for letter in looked.letters]


async def test_the_delivery_limit_can_be_given():
    """A limit that a policy sets can't be seen."""
    rabbit = opened("4.0", "quorum", x_delivery_limit=-1)
    bury(rabbit, b"0")
    for _ in range(30):
        assert (await look(rabbit.transport, DLQ)).ended is None
    looked = await look(rabbit.transport, DLQ, delivery_limit=33)
    assert [] == list(looked.letters)
    assert [b"0"] == rabbit.waiting(DLQ)


async def test_letters_with_another_consumer_are_not_waited_for():
    """The other consumer may keep them forever."""
    rabbit = opened()
    bury(rabbit, *numbered(3))
    transport = rabbit.transport
    count = transport.count

    async def too_many(queue):
        return await count(queue) + 2

    transport.count = too_many
    looked = await look(transport, DLQ)
    assert 3 == len(looked.letters)
    assert "2 more were in the queue" in (looked.ended or "")


class BasicTransport:
    """A transport with required methods only."""

    def __init__(self, rabbit):
        self._transport = rabbit.transport
        self.declare = rabbit.transport.declare
        self.session = rabbit.transport.session
        self.publisher = rabbit.transport.publisher


async def test_a_transport_without_count_and_version_works():
    """It is read until no more messages come."""
    rabbit = opened()
    bury(rabbit, *numbered(3))
    modest = BasicTransport(rabbit)
    assert not isinstance(modest, VersionedTransport)
    looked = await look(modest, DLQ)
    assert (None, 3, None) == (looked.ready, len(looked.letters), looked.ended)
    report = await replay(modest, DLQ)
    assert (None, 3, None) == (report.ready, report.done, report.ended)
    assert numbered(3) == rabbit.waiting()


# --- sending back ----------------------------------------------------------------


async def test_a_replayed_letter_counts_from_0():
    """With its original exchange and key, without a retry count or dead-letter headers."""
    rabbit = opened()
    rabbit.bind("jobs", "events", "order.created", kind="topic")
    bury(rabbit, b"0", exchange="events", key="order.created", tenant="acme")
    report = await replay(rabbit.transport, DLQ)
    assert (1, 1, 1, 0, {}, None) == (
        report.ready,
        report.seen,
        report.done,
        report.kept,
        dict(report.failed),
        report.ended,
    )
    [message] = rabbit.broker.ready("jobs")
    assert ("events", "order.created") == (message.exchange, message.routing_key)
    assert {"tenant": "acme"} == dict(message.headers)
    assert [] == rabbit.waiting(DLQ)


async def test_a_message_that_the_broker_dead_lettered_can_be_replayed():
    """Its `x-death` header is dropped, or the broker would detect a cycle."""
    for version in ("3.10", "4.3"):
        rabbit = QueueBroker(version)
        rabbit.declare(DLQ)
        rabbit.declare(x_dead_letter_exchange="", x_dead_letter_routing_key=DLQ, x_message_ttl=1000)
        rabbit.put(b"0")
        await asyncio.sleep(2)
        for _ in range(2):
            [letter] = (await look(rabbit.transport, DLQ)).letters
            assert ("expired", "jobs") == (letter.death.reason, letter.death.queue)
            assert 1 == (await replay(rabbit.transport, DLQ)).done
            assert [b"0"] == rabbit.waiting()
            await asyncio.sleep(2)
        assert [b"0"] == rabbit.waiting(DLQ)


@pytest.mark.parametrize(
    ("where", "limit", "expected"),
    [
        (Filter(), None, [b"0", b"1", b"2"]),
        (Filter(), 2, [b"0", b"1"]),
        (Filter(), 0, []),
        (Filter(reasons=frozenset({"exhausted"})), None, [b"1"]),
        (Filter(headers={"tenant": "acme"}), None, [b"2"]),
        (Filter(older_than=timedelta(hours=1)), None, [b"2"]),
        (Filter(newer_than=timedelta(hours=1)), 1, [b"0"]),
    ],
)
async def test_only_matching_letters_are_replayed(where, limit, expected):
    """The others stay, in order."""
    rabbit = opened()
    bury(rabbit, b"0")
    bury(rabbit, b"1", reason="exhausted")
    old = {"x-dead-lettered-at": datetime.now(UTC) - timedelta(hours=2)}
    bury(rabbit, b"2", tenant="acme", **old)
    dry = await replay(rabbit.transport, DLQ, where=where, limit=limit, dry_run=True)
    assert (len(expected), numbered(3)) == (dry.done, rabbit.waiting(DLQ))
    report = await replay(rabbit.transport, DLQ, where=where, limit=limit)
    assert expected == rabbit.waiting()
    assert [body for body in numbered(3) if body not in expected] == rabbit.waiting(DLQ)
    assert len(expected) == report.done


async def test_letters_that_cannot_be_replayed_stay():
    """A missing exchange, no bound queue or no origin; the others are replayed."""
    rabbit = opened()
    rabbit.bind("jobs", "events", "order.created")
    bury(rabbit, b"0", exchange="gone")
    bury(rabbit, b"1", exchange="events", key="nobody")
    rabbit.put(b"2", queue=DLQ)
    bury(rabbit, b"3")
    report = await replay(rabbit.transport, DLQ)
    assert [b"3"] == rabbit.waiting()
    assert numbered(3) == rabbit.waiting(DLQ)
    assert 1 == report.done
    reasons = sorted(report.failed)
    assert 3 == len(reasons)
    assert "gone" in reasons[0]
    assert "does not say" in reasons[1]
    assert "no queue is bound" in reasons[2]


@pytest.mark.parametrize("exchange", ["", "events"])
async def test_without_permission_to_publish_no_copy_is_sent(exchange):
    """Letters for other exchanges are replayed, and the reason names the permission."""
    rabbit = opened()
    rabbit.bind("jobs", "events", "order.created")
    bury(rabbit, b"0", b"2", exchange="events", key="order.created")
    bury(rabbit, b"1", b"3")
    rabbit.broker.faults.on_publish(PublishFault.FORBID, exchange=exchange)
    report = await replay(rabbit.transport, DLQ)
    [(reason, count)] = report.failed.items()
    assert (2, 2, None) == (report.done, count, report.ended)
    assert f"publishing to exchange '{exchange or 'amq.default'}'" in reason
    assert "ACCESS_REFUSED" in reason
    assert "write permission" in reason
    assert 2 == len(rabbit.waiting(DLQ))
    assert 2 == len(rabbit.waiting())


async def test_a_permission_that_is_revoked_meanwhile_leaves_no_copy_in_doubt():
    """The report says that the refused copy isn't stored, and not that it may be in both queues."""
    rabbit = opened()
    bury(rabbit, *numbered(101))

    def revoke(_):
        rabbit.broker.faults.on_publish(PublishFault.FORBID)

    report = await replay(rabbit.transport, DLQ, on_progress=revoke)
    [reason] = report.failed
    assert reason.startswith("refused by the broker")
    assert reason.endswith("it is not stored")
    assert "no permission" in reason
    assert "the broker refused a copy, and the channel for publishing was lost" == report.ended
    assert (100, 1) == (len(rabbit.waiting()), len(rabbit.waiting(DLQ)))


async def test_an_unconfirmed_copy_is_reported_as_possibly_in_both_queues():
    """It was stored, but not confirmed."""
    rabbit = opened()
    bury(rabbit, *numbered(3))
    rabbit.broker.faults.on_publish(PublishFault.UNCONFIRMED, times=1)
    report = await replay(rabbit.transport, DLQ)
    assert "unconfirmed copies: 1; these may be in both queues" == report.ended
    assert {1: 1} == Counter(report.failed.values())
    assert (2, 3, 1) == (report.done, len(rabbit.waiting()), len(rabbit.waiting(DLQ)))


async def test_the_limit_counts_replayed_letters_only():
    """One that can't be replayed leaves its place to the next."""
    rabbit = opened()
    bury(rabbit, b"0", key="nowhere")
    bury(rabbit, b"1")
    bury(rabbit, b"2", key="nowhere")
    bury(rabbit, *numbered(2, 3))
    report = await replay(rabbit.transport, DLQ, limit=2)
    assert (2, 4, 2) == (report.done, report.seen, sum(report.failed.values()))
    assert [b"1", b"3"] == rabbit.waiting()
    assert [b"0", b"2", b"4"] == rabbit.waiting(DLQ)


async def test_letters_can_be_replayed_to_their_queue_only():
    """Other queues of the exchange have handled the message already."""
    rabbit = opened()
    rabbit.declare("audit")
    rabbit.bind("jobs", "events", kind="fanout")
    rabbit.bind("audit", "events", kind="fanout")
    bury(rabbit, b"0", exchange="events", key="order.created")
    assert 1 == (await replay(rabbit.transport, DLQ, to_queue=True)).done
    assert ([b"0"], []) == (rabbit.waiting(), rabbit.waiting("audit"))


async def test_letters_that_die_again_meanwhile_are_not_replayed_again():
    """Only dead letters that were there at the beginning are replayed."""
    rabbit = opened()
    bury(rabbit, *numbered(3), key=DLQ)
    report = await replay(rabbit.transport, DLQ)
    assert (3, 3, None) == (report.seen, report.done, report.ended)
    assert numbered(3) == rabbit.waiting(DLQ)


async def test_a_replay_ends_early_if_too_many_letters_are_held():
    """Held letters take memory; the report says that there are more."""
    rabbit = opened()
    bury(rabbit, *numbered(5))
    bury(rabbit, b"5", reason="exhausted")
    where = Filter(reasons=frozenset({"exhausted"}))
    report = await replay(rabbit.transport, DLQ, where=where, scan=3)
    assert (0, 3) == (report.done, report.kept)
    assert "3 dead letters are held" in (report.ended or "")
    assert numbered(6) == rabbit.waiting(DLQ)


async def test_more_letters_than_may_be_held_can_be_replayed():
    """Replayed letters are no longer held."""
    rabbit = opened()
    bury(rabbit, *numbered(250))
    progress: list[int] = []
    report = await replay(
        rabbit.transport, DLQ, scan=10, on_progress=lambda report: progress.append(report.done)
    )
    assert (250, None) == (report.done, report.ended)
    assert numbered(250) == rabbit.waiting()
    assert sorted(progress) == progress
    assert 25 <= len(progress)


async def test_an_interrupted_replay_finishes_letters_in_flight():
    """No letter is in both queues."""
    rabbit = opened()
    bury(rabbit, *numbered(250))
    stop = asyncio.Event()
    report = await replay(rabbit.transport, DLQ, stop=stop, on_progress=lambda _: stop.set())
    assert (100, "interrupted") == (report.done, report.ended)
    assert numbered(100) == rabbit.waiting()
    assert numbered(150, 100) == rabbit.waiting(DLQ)


async def test_a_waiting_replay_can_be_interrupted():
    """Even if no message comes."""
    rabbit = opened()
    bury(rabbit, b"0")
    stop = asyncio.Event()

    async def too_many(_):
        return 2

    rabbit.transport.count = too_many
    asyncio.get_running_loop().call_later(1, stop.set)
    report = await replay(rabbit.transport, DLQ, stop=stop)
    assert (1, "interrupted") == (report.done, report.ended)


async def test_a_letter_near_its_delivery_limit_can_be_replayed_but_not_looked_at():
    """Replaying saves it; looking would cost it another delivery."""
    rabbit = opened("4.0", "quorum", x_delivery_limit=8)
    bury(rabbit, b"0")
    for _ in range(4):
        await look(rabbit.transport, DLQ)
    exhausted = Filter(reasons=frozenset({"exhausted"}))
    report = await replay(rabbit.transport, DLQ, where=exhausted)
    assert "drops it after 8" in (report.ended or "")
    assert [b"0"] == rabbit.waiting(DLQ)
    assert 1 == (await replay(rabbit.transport, DLQ)).done
    assert [b"0"] == rabbit.waiting()


# --- deleting --------------------------------------------------------------------


async def test_matching_letters_are_purged():
    """And counted. A dry run deletes nothing."""
    rabbit = opened()
    bury(rabbit, *numbered(2))
    bury(rabbit, b"2", reason="exhausted")
    where = Filter(reasons=frozenset({"rejected"}))
    progress: list[int] = []
    dry = await purge(rabbit.transport, DLQ, where=where, dry_run=True)
    assert (2, numbered(3)) == (dry.done, rabbit.waiting(DLQ))
    report = await purge(
        rabbit.transport, DLQ, where=where, on_progress=lambda report: progress.append(report.done)
    )
    assert (2, 1, [2]) == (report.done, report.kept, progress)
    assert [b"2"] == rabbit.waiting(DLQ)


# --- whatever happens ------------------------------------------------------------


@dataclass(frozen=True)
class Story:
    """All that happens.

    Attributes:
        letters: The reason of each, and whether its origin leads anywhere.
        faults: What happens to the first publications.
        cut_at: The broker's event at which all connections are cut.
        stop_at: The event at which the user presses Ctrl-C.
    """

    letters: tuple[tuple[str, bool], ...]
    reasons: frozenset[str] = frozenset()
    limit: int | None = None
    scan: int = 100
    faults: tuple[str, ...] = ()
    cut_at: int | None = None
    stop_at: int | None = None
    version: str = "4.3"
    queue_type: str = "classic"


stories = st.builds(
    Story,
    letters=st.lists(
        st.tuples(st.sampled_from(["rejected", "exhausted"]), st.booleans()), max_size=12
    ).map(tuple),
    reasons=st.frozensets(st.sampled_from(["rejected", "exhausted", "expired"])),
    limit=st.none() | st.integers(0, 12),
    scan=st.integers(1, 15),
    faults=st.lists(st.sampled_from(RESULTS), max_size=6).map(tuple),
    cut_at=st.none() | st.integers(0, 60),
    stop_at=st.none() | st.integers(0, 60),
    version=st.sampled_from(["3.8", "3.10", "4.0", "4.3"]),
    queue_type=st.sampled_from(["classic", "quorum"]),
)


@given(stories)
@example(Story((("rejected", True),) * 3, faults=("unconfirmed",)))
@example(Story((("rejected", True),) * 3, cut_at=12))
@example(Story((("rejected", False), ("exhausted", True)), reasons=frozenset({"exhausted"})))
def test_no_letter_is_lost(story):
    """Each is in the dead-letter queue or back at its origin, whatever is filtered, refused,
    returned, lost or cut. It is in both only if a confirm or an ack was lost.
    """
    virtual_time.run(play(story))


async def play(story):
    """Replay, and return where all letters are."""
    rabbit = opened(story.version, story.queue_type)
    bodies = numbered(len(story.letters))
    for body, (reason, leads) in zip(bodies, story.letters, strict=True):
        bury(rabbit, body, reason=reason, key="jobs" if leads else "nowhere")
    for fault in story.faults:
        how = {
            "refused": PublishFault.REFUSE,
            "unconfirmed": PublishFault.UNCONFIRMED,
            "lost": PublishFault.LOSE,
        }.get(fault)
        if how is not None:
            rabbit.broker.faults.on_publish(how, times=1)
    stop = asyncio.Event()
    watch(rabbit, story, stop)
    report = None
    try:
        report = await replay(
            rabbit.transport,
            DLQ,
            where=Filter(reasons=story.reasons),
            limit=story.limit,
            scan=story.scan,
            stop=stop,
        )
    except TransportError:
        event("connection lost")
    await asyncio.sleep(0)
    assert [] == rabbit.unsettled(DLQ)
    back, left = Counter(rabbit.waiting()), Counter(rabbit.waiting(DLQ))
    for body, (reason, leads) in zip(bodies, story.letters, strict=True):
        assert 1 <= back[body] + left[body] <= 2
        assert (back[body], left[body]) <= (1, 1)
        matches = leads and (not story.reasons or reason in story.reasons)
        assert matches or (0, 1) == (back[body], left[body])
    twice = sum(back[body] and left[body] for body in bodies)
    if "unconfirmed" not in story.faults and story.cut_at is None:
        assert 0 == twice
    if report is not None and story.cut_at is None:
        assert len(back) - twice == report.done
        assert sorted(left, key=int) == list(left) or story.queue_type == "quorum"


def watch(rabbit, story, stop):
    """Run a function at some event of the broker."""
    seen = 0
    note = rabbit.broker.journal.on_event

    def count(happened):
        nonlocal seen
        seen += 1
        note(happened)
        loop = asyncio.get_running_loop()
        if seen == story.cut_at:
            loop.call_soon(rabbit.cut)
        if seen == story.stop_at:
            loop.call_soon(stop.set)

    rabbit.broker.journal.on_event = count


async def test_dead_letters_are_read_so_that_they_can_be_copied(monkeypatch):
    """AMQP 1.0 doesn't show everything that a message contains."""
    rabbit = opened("4.3", "quorum")
    bury(rabbit, b"0")
    seen = []
    session = rabbit.transport.session

    def spy(subscription):
        seen.append(subscription.for_copies)
        return session(subscription)

    monkeypatch.setattr(rabbit.transport, "session", spy)
    await look(rabbit.transport, DLQ)
    await replay(rabbit.transport, DLQ)
    assert [True, True] == seen

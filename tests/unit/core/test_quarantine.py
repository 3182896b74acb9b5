"""Which messages may have crashed their process, and what counts against them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aio_pika_batch.core.message import (
    CRASH_COUNT,
    DELIVERY_COUNT,
    ORIGINAL_EXCHANGE,
    ORIGINAL_ROUTING_KEY,
    Message,
    Properties,
)
from aio_pika_batch.core.quarantine import (
    MAX_RECORDED,
    CrashPolicy,
    OwnRequeues,
    Suspicion,
    came_back,
    delivery_count,
)
from aio_pika_batch.core.results import Cause, MessageOutcome, MessageResult
from aio_pika_batch.core.retry import DeadLetterReason, RetryPolicy
from aio_pika_batch.core.settlement import Disposition
from aio_pika_batch.core.settlement_plan import FIRST_FAILED_AT, CopyKind, SettlementPlanner
from aio_pika_batch.core.topology_options import DeadLetterTarget
from aio_pika_batch.testing.strategies import UNDECODABLE
from tests.unit.core.strategies import NOW, QUEUE, StubSource, delivered

POLICY = CrashPolicy(3, 8)
NONE, SUSPECT = Suspicion.NONE, Suspicion.SUSPECT
CRASHED, WORN = Suspicion.CRASHED, Suspicion.WORN


def counted(count, *, mark=None, body=b"{}", tag=1, **properties):
    """A message that a quorum queue has counted so often."""
    headers = {} if mark is None else {CRASH_COUNT: mark}
    if count:
        headers[DELIVERY_COUNT] = count
    return Message(
        StubSource(), tag, bool(count), body, ("", QUEUE), Properties(headers=headers, **properties)
    )


def owned(counts, **message):
    """What a process knows whose handler requeued a message at these counts."""
    own = OwnRequeues()
    for count in counts:
        own.note(counted(count, **message))
    return own


@pytest.mark.parametrize(
    ("count", "mark", "suspicion"),
    [
        (0, None, NONE),
        (2, None, NONE),
        (3, None, SUSPECT),
        (7, None, SUSPECT),
        (8, None, CRASHED),
        (30, None, CRASHED),
        # A mark makes a suspect, whatever it says, and never a crashed message.
        (0, 1, NONE),
        (1, 2, SUSPECT),
        (0, 3, SUSPECT),
        (0, 10**6, SUSPECT),
        (4, 10**6, SUSPECT),
        (5, 3, CRASHED),
        (0, "no number", NONE),
        (0, -5, NONE),
    ],
)
def test_a_message_is_judged_by_its_returns(count, mark, suspicion):
    """Those of the broker's count and of a copy's mark."""
    assert suspicion is POLICY.judge(counted(count, mark=mark), OwnRequeues())


@pytest.mark.parametrize(
    ("count", "requeued", "suspicion"),
    [(4, 2, NONE), (4, 1, SUSPECT), (8, 1, SUSPECT), (8, 0, CRASHED), (20, 20, NONE)],
)
def test_what_handlers_requeued_here_counts_for_nothing(count, requeued, suspicion):
    """In this process."""
    assert suspicion is POLICY.judge(counted(count), owned(range(requeued)))


def test_what_is_known_follows_a_retry_that_needs_no_copy():
    """Of the message that is retried, and of no other."""
    own = owned(range(4))
    header = StubSource().retry_count_header
    own.note_retry(counted(4), {header: 1})
    own.note_retry(counted(4, body=b"another"), {header: 1})
    retried = Properties(headers={DELIVERY_COUNT: 5, header: 1})
    for body, suspicion in ((b"{}", NONE), (b"another", SUSPECT)):
        message = Message(StubSource(), 1, True, body, ("", QUEUE), retried)
        assert suspicion is POLICY.judge(message, own)


@pytest.mark.parametrize(
    ("count", "mark", "suspicion"),
    [(2, None, NONE), (3, None, WORN), (0, 3, SUSPECT), (1, 3, WORN), (30, None, WORN)],
)
def test_after_a_lost_connection_counts_are_not_believed(count, mark, suspicion):
    """Others may have lost theirs. A suspect that came back starts again."""
    message = counted(count, mark=mark)
    assert suspicion is POLICY.judge(message, OwnRequeues(), in_doubt=True)


@pytest.mark.parametrize(
    ("count", "mark", "may_return", "may_requeue"),
    [
        (0, None, True, True),
        (2, None, True, True),
        (3, None, False, True),
        (1, 2, False, True),
        (4, None, False, True),
        (5, None, False, False),
        (2, 3, False, False),
    ],
)
def test_a_suspect_is_not_returned(count, mark, may_return, may_requeue):
    """Its handler may want it back a few times more."""
    message = counted(count, mark=mark)
    assert (may_return, may_requeue) == (POLICY.may_return(message), POLICY.may_requeue(message))


@pytest.mark.parametrize(
    ("count", "requeued", "mark"), [(6, 0, 3), (6, 4, 2), (6, 6, None), (6, 9, None)]
)
def test_a_copy_is_marked_with_its_unexplained_returns(count, requeued, mark):
    """At most as a suspect: what follows must show more."""
    expected = {} if mark is None else {CRASH_COUNT: mark}
    assert expected == POLICY.mark(counted(count), owned(range(requeued)))


def test_headers_that_cannot_be_decoded_count_for_nothing():
    """The message is handled like any other."""
    message = Message(
        StubSource(), 1, True, b"", ("", QUEUE), Properties(undecodable={"headers": UNDECODABLE})
    )
    assert 0 == delivery_count(message)
    own = OwnRequeues()
    own.note(message)
    assert NONE is POLICY.judge(message, own)
    assert [message] == list(came_back([message]))


class RawSource(StubSource):
    """Decodes the header `x-crash-count` only."""

    def decode_headers(self, raw: bytes, /):
        return {CRASH_COUNT: 3} if CRASH_COUNT.encode() in raw else None


def raw(tag, *, redelivered=False, properties=b""):
    """A message whose properties are bytes."""
    return Message(RawSource(), tag, redelivered, b"", b"\0\0", properties)


def test_only_what_came_back_needs_a_look():
    """It is redelivered or marked; the others are not decoded."""
    chunk = [raw(1), raw(2, redelivered=True), raw(3)]
    assert [chunk[1]] == list(came_back(chunk))
    assert [] == list(came_back([raw(1), raw(2)]))
    assert [] == list(came_back([]))
    marked = [raw(1), raw(2, properties=b"...\x0dx-crash-countl...")]
    assert marked == list(came_back(marked))
    assert [NONE, SUSPECT] == [POLICY.judge(each, OwnRequeues()) for each in marked]


def test_a_decoded_message_is_found_by_its_mark():
    """As on the broker in memory."""
    chunk = [counted(0), counted(0, mark=3)]
    assert chunk[1:] == list(came_back(chunk))
    assert [] == list(came_back([counted(0), counted(0)]))


# --- what this process returned ------------------------------------------------------------


def test_a_return_explains_one_count():
    """The one that the broker adds for it, and none that came before."""
    assert [0, 1, 2, 2] == [owned([2, 3]).count(counted(count)) for count in (2, 3, 4, 30)]


def test_noting_a_return_twice_explains_it_once():
    """A connection may be lost before the broker knows of the first."""
    assert 1 == owned([0] * 5).count(counted(4))


@pytest.mark.parametrize(
    "other",
    [{"body": b"1"}, {"message_id": "1"}, {"correlation_id": "1"}, {"mark": 1}],
    ids=str,
)
def test_a_return_explains_nothing_of_another_message(other):
    """Messages are distinguished by their content, and a copy by its mark."""
    assert 0 == owned([0]).count(counted(1, **other))


def test_a_return_explains_nothing_of_another_route_or_retry():
    """Although the body is the same."""
    for route, headers in ((("e", "k"), {}), (("", QUEUE), {"x-retry-count": 1})):
        properties = Properties(headers={DELIVERY_COUNT: 1} | headers)
        message = Message(StubSource(), 1, True, b"{}", route, properties)
        assert 0 == owned([0]).count(message)


def test_a_message_that_starts_again_is_forgotten():
    """Otherwise its returns would explain those of its copy."""
    own = owned([0, 1])
    own.forget(counted(2))
    assert 0 == own.count(counted(9))
    own.forget(counted(2))


def test_the_record_is_bounded():
    """The message that was returned longest ago is forgotten first."""
    own = OwnRequeues()
    for number in range(MAX_RECORDED):
        own.note(counted(0, body=b"%d" % number))
    own.note(counted(1, body=b"0"))
    own.note(counted(0, body=b"new"))
    explained = [own.count(counted(2, body=body)) for body in (b"0", b"1", b"2", b"new")]
    assert [2, 0, 1, 1] == explained


def test_an_absurd_count_takes_no_memory():
    """A bit for each return would."""
    own = owned([10**18])
    assert [0, 1] == [own.count(counted(count)) for count in (1000, 10**6)]


# --- plans -----------------------------------------------------------------------------------


def a_planner(**more):
    """A planner for a queue that counts."""
    return SettlementPlanner(
        QUEUE, RetryPolicy(3, "x-retry-count"), DeadLetterTarget("dlx"), crashes=POLICY, **more
    )


def plan_one(planner, message, result, cause=Cause.HANDLER):
    """The plan for one message."""
    return planner.plan([MessageOutcome(message, result, cause)], NOW)


def test_a_crashed_message_is_dead_lettered_with_its_reason():
    """Its copy has no count."""
    [pending] = plan_one(a_planner(), counted(8, mark=3), MessageResult.NACK, Cause.CRASHED).copies
    assert DeadLetterReason.CRASHED is pending.reason
    headers = pending.copy.properties.headers
    assert "crashed" == headers["x-dead-letter-reason"]
    assert not {DELIVERY_COUNT, CRASH_COUNT} & headers.keys()


def test_without_a_destination_a_crashed_message_is_retried_as_a_suspect():
    """It must not take others along again."""
    planner = replace(a_planner(), dead_letters=None)
    [pending] = plan_one(planner, counted(8), MessageResult.NACK, Cause.CRASHED).copies
    assert pending.is_undeliverable
    assert 1 == pending.hold
    again = delivered(pending.copy)
    assert SUSPECT is POLICY.judge(again, OwnRequeues())
    [pending] = plan_one(planner, again, MessageResult.NACK, Cause.CRASHED).copies
    assert 2 == pending.hold
    # Other failures prove nothing.
    [pending] = plan_one(planner, counted(8), MessageResult.NACK, Cause.UNDECODABLE).copies
    assert CRASH_COUNT not in pending.copy.properties.headers


def test_requeue_immediate_counts_as_a_retry_before_it_looks_like_crashes():
    """So a message that always gets it is dead-lettered in the end, by a copy that is confirmed."""
    planner = a_planner()
    immediate = MessageResult.REQUEUE_IMMEDIATE
    plan = plan_one(planner, counted(4), immediate)
    assert [Disposition.REQUEUE] == [each.disposition for each in plan.settlements]
    [pending] = plan_one(planner, counted(5), immediate).copies
    again = delivered(pending.copy)
    assert (1, 0) == (again.retry_count, delivery_count(again))
    spent = Properties(headers={DELIVERY_COUNT: 5, "x-retry-count": 3})
    message = Message(StubSource(), 1, True, b"", ("", QUEUE), spent)
    [pending] = plan_one(planner, message, immediate).copies
    assert DeadLetterReason.EXHAUSTED is pending.reason


def test_requeue_immediate_is_left_to_a_broker_that_does_not_count():
    """As always."""
    planner = replace(a_planner(), crashes=None)
    plan = plan_one(planner, counted(100), MessageResult.REQUEUE_IMMEDIATE)
    assert [Disposition.REQUEUE] == [each.disposition for each in plan.settlements]


def test_a_requeued_message_has_no_mark():
    """It got a result, so it didn't crash its process."""
    [pending] = plan_one(a_planner(), counted(0, mark=3), MessageResult.REQUEUE).copies
    assert CRASH_COUNT not in pending.copy.properties.headers


def test_the_return_of_a_suspect_becomes_a_copy():
    """The others are returned."""
    messages = [counted(2, tag=1), counted(3, tag=2), counted(7, tag=3)]
    plan = a_planner().plan_returns(messages, NOW)
    assert [(Disposition.RETURN, (1,))] == [
        (each.disposition, each.tags) for each in plan.settlements
    ]
    assert [2, 3] == [each.tag for each in plan.copies]
    assert {CopyKind.FRESH_COUNT} == {each.kind for each in plan.copies}
    assert [3, 3] == [each.copy.properties.headers[CRASH_COUNT] for each in plan.copies]
    assert () == a_planner().plan_returns([counted(7)], NOW).settlements
    unguarded = replace(a_planner(), crashes=None).plan_returns(messages, NOW)
    assert [(1, 2, 3)] == [each.tags for each in unguarded.settlements]
    assert [] == unguarded.copies
    without = replace(a_planner(), crashes=None).plan_returns(
        messages, NOW, OwnRequeues(), replace_all=True
    )
    assert all(CRASH_COUNT not in each.copy.properties.headers for each in without.copies[:1])


def test_a_copy_instead_of_a_return_has_nothing_against_what_handlers_requeued():
    """Otherwise a message that was only requeued at once would be handled alone from then on."""
    message, own = counted(4), OwnRequeues()
    for count in range(4):
        own.note(counted(count))
    [pending] = a_planner().plan_returns([message], NOW, own).copies
    assert CRASH_COUNT not in pending.copy.properties.headers
    [pending] = a_planner().plan_returns([message], NOW).copies
    assert 3 == pending.copy.properties.headers[CRASH_COUNT]


def test_a_copy_with_a_fresh_count_is_the_same_message():
    """With its original route, and without a trace of a failure."""
    properties = Properties(headers={DELIVERY_COUNT: 7, "x-retry-count": 2, "a": 1}, message_id="m")
    message = Message(StubSource(), 1, True, b"body", ("orders", "new"), properties)
    own = OwnRequeues()
    for count in range(7):
        headers = properties.headers | {DELIVERY_COUNT: count}
        own.note(replaced(message, headers))
    [pending] = a_planner().plan_returns([message], NOW, own, replace_all=True).copies
    copy = pending.copy
    assert ("", QUEUE, b"body", "m") == (
        copy.exchange,
        copy.routing_key,
        copy.body,
        copy.properties.message_id,
    )
    headers = copy.properties.headers
    assert {
        "a": 1,
        "x-retry-count": 2,
        ORIGINAL_EXCHANGE: "orders",
        ORIGINAL_ROUTING_KEY: "new",
    } == headers
    assert FIRST_FAILED_AT not in headers


# --- laws ------------------------------------------------------------------------------------


class Fleet:
    """One message, the broker's count of it, and the processes that get it."""

    def __init__(self, policy: CrashPolicy, processes: int) -> None:
        self.policy = policy
        self.planner = replace(a_planner(), crashes=policy)
        self.records = [OwnRequeues() for _ in range(processes)]
        self.in_doubt = [False] * processes
        self.message = counted(0)
        self.crashes = 0

    def judged(self, process):
        """What a process decides when the message is delivered to it; a worn one is replaced."""
        own = self.records[process]
        suspicion = self.policy.judge(self.message, own, in_doubt=self.in_doubt[process])
        self.in_doubt[process] = False
        if suspicion is WORN:
            [copy] = self.planner.plan_returns([self.message], NOW, own, replace_all=True).copies
            own.forget(self.message)
            self.message = delivered(copy.copy)
        return suspicion

    def give_back(self, process):
        """The process returns it."""
        own = self.records[process]
        plan = self.planner.plan_returns([self.message], NOW, own)
        if plan.copies:
            own.forget(self.message)
            self.message = delivered(plan.copies[0].copy)
        else:
            self._count()

    def requeue(self, process):
        """The handler of the process wants it back at once."""
        plan = plan_one(self.planner, self.message, MessageResult.REQUEUE_IMMEDIATE)
        if plan.copies:
            self.message = delivered(plan.copies[0].copy)
        else:
            self.records[process].note(self.message)
            self._count()

    def lose(self, process):
        """The process loses its connection, and lives on."""
        self.in_doubt[process] = True
        self._count()

    def crash(self, process):
        """The process is killed by it, and replaced."""
        self.records[process] = OwnRequeues()
        self.crashes += 1
        self._count()

    def _count(self):
        headers = dict(self.message.headers)
        headers[DELIVERY_COUNT] = delivery_count(self.message) + 1
        self.message = replaced(self.message, headers)


def replaced(message, headers):
    """The message with other headers, redelivered."""
    properties = replace(message.properties, headers=headers)
    route = (message.exchange, message.routing_key)
    return Message(StubSource(), 1, True, message.body, route, properties)


policies = st.integers(1, 6).flatmap(
    lambda after: st.builds(CrashPolicy, st.just(after), st.integers(after + 1, after + 12))
)


@given(policies, st.data())
def test_returns_requeues_and_lost_connections_never_reach_the_limit(policy, data):
    """As long as fewer processes lose connections than the limit then leaves, and without knowing
    what each other did. Returns leave all of the way from suspicion to the limit; what handlers
    requeue at once, which only their own process can explain, leaves half of it.
    """
    processes = st.integers(0, 3)
    actions = data.draw(st.sampled_from(["bl", "blr"]))
    steps = data.draw(st.lists(st.tuples(processes, st.sampled_from(actions)), max_size=80))
    left = policy.limit - policy.suspect_after
    if "r" in actions:
        left -= left // 2
    fleet = Fleet(policy, 4)
    for process, step in steps:
        assert CRASHED is not fleet.judged(process)
        if step == "l" and process < left - 1:
            fleet.lose(process)
        elif step == "r":
            fleet.requeue(process)
        else:
            fleet.give_back(process)


@pytest.mark.parametrize(("action", "losses"), [("b", 5), ("r", 3)])
def test_how_many_processes_must_lose_a_healthy_message_in_a_row(action, losses):
    """As docs/guarantees.md states for the default limits: the next one takes it for a crash."""
    fleet = Fleet(POLICY, losses + 2)
    count = POLICY.suspect_after if action == "b" else (POLICY.suspect_after + POLICY.limit) // 2
    for _ in range(count):
        fleet.judged(0)
        fleet.give_back(0) if action == "b" else fleet.requeue(0)
    for process in range(1, losses + 1):
        assert CRASHED is not fleet.judged(process)
        fleet.lose(process)
    assert CRASHED is fleet.judged(losses + 1)


@given(policies, st.lists(st.integers(0, 3), max_size=40))
def test_a_message_that_always_crashes_its_process_reaches_the_limit(policy, deliveries):
    """After as many crashes, in whatever processes; it is a suspect before."""
    fleet = Fleet(policy, 4)
    for process in [*deliveries, *[0] * 20]:
        suspicion = fleet.judged(process)
        if fleet.crashes < policy.suspect_after:
            assert NONE is suspicion
        elif fleet.crashes < policy.limit:
            assert SUSPECT is suspicion
        else:
            assert CRASHED is suspicion
            return
        fleet.crash(process)
    pytest.fail("it never reached the limit")

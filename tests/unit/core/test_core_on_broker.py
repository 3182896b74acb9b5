"""The core against a model of a broker, with nothing in between that awaits.

A worker without the runtime: batcher, batch run, settlement planner and ledger, one call after the
other, on the in-memory broker. Batches overlap, copies are confirmed late or never, and connections
are cut between any two calls, not only where the runtime's tasks switch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from aio_pika_batch import MessageResult
from aio_pika_batch.adapters.memory import Broker, EventKind
from aio_pika_batch.core.batch_run import BatchRun, FailurePolicy, ResultCollector
from aio_pika_batch.core.batcher import Batch, Batcher
from aio_pika_batch.core.message import Message
from aio_pika_batch.core.results import Cause
from aio_pika_batch.core.retry import RetryPolicy
from aio_pika_batch.core.settlement import Disposition, Frame, Ledger, Settlement
from aio_pika_batch.core.settlement_plan import PendingCopy, SettlementPlanner
from aio_pika_batch.core.topology_options import DeadLetterTarget
from tests.unit.adapters.memory.client import Client, bodies
from tests.unit.core.strategies import NOW, StubSource

JOBS, DEAD = "jobs", "dead"
ACK = MessageResult.ACK

answers = st.lists(st.sampled_from(MessageResult), max_size=5)
turns = st.integers(0, 9)


@dataclass(frozen=True)
class Plan:
    """The settings of the worker, drawn once."""

    version: str
    quorum: bool
    size: int
    prefetch: int
    attempts: int
    is_atomic: bool
    isolate: int


plans = st.builds(
    Plan,
    version=st.sampled_from(["3.10", "4.0", "4.3"]),
    quorum=st.booleans(),
    size=st.integers(1, 4),
    prefetch=st.integers(1, 8),
    attempts=st.integers(0, 2),
    is_atomic=st.booleans(),
    isolate=st.sampled_from([0, 1, 5]),
)


@dataclass
class Running:
    """A batch that is being handled.

    Attributes:
        messages: Those of the run that is due.
        good: The tags that its handler has acked, and whose ACK counts.
    """

    run: BatchRun
    batch: Sequence[Message]
    messages: Sequence[Message]
    good: set[int] = field(default_factory=set)


class CoreOnBroker(RuleBasedStateMachine):
    """One worker. Lists replace the tasks of the runtime."""

    @initialize(plan=plans)
    def open(self, plan: Plan) -> None:
        self.plan = plan
        self.broker = Broker(plan.version)
        self.publisher = Client(self.broker, "publisher")
        self.publisher.queue(DEAD)
        limit = {"queue_type": "quorum", "delivery_limit": 1000} if plan.quorum else {}
        self.publisher.queue(JOBS, **limit)
        self.publisher.exchange("dlx", "fanout")
        self.publisher.bind(DEAD, "dlx")
        retry = RetryPolicy(plan.attempts, "x-retry-count")
        self.planner = SettlementPlanner(JOBS, retry, DeadLetterTarget("dlx"))
        self.policy = FailurePolicy(
            MessageResult.REQUEUE, {}, isolate=plan.isolate, is_atomic=plan.is_atomic
        )
        self.published = 0
        self.acked: Counter[bytes] = Counter()
        self.copied: Counter[bytes] = Counter()
        self.connect()

    def connect(self) -> None:
        """Begin a session. Nothing of the one before is kept."""
        self.client = Client(self.broker, "worker")
        self.client.consume(JOBS, prefetch=self.plan.prefetch)
        self.bodies: dict[int, bytes] = {}
        self.ledger = Ledger()
        self.batcher = Batcher(size=self.plan.size, timeout=0)
        self.runs: list[Running] = []
        self.copies: list[PendingCopy] = []

    # -- steps --

    @rule(count=st.integers(1, 4))
    def publish(self, count: int) -> None:
        for _ in range(count):
            self.broker.put(JOBS, b"%d" % self.published)
            self.published += 1

    @rule()
    def receive(self) -> None:
        messages = [
            Message(
                StubSource(),
                each.tag,
                each.redelivered,
                each.body,
                (each.exchange, each.routing_key),
                each.properties,
            )
            for each in self.client.deliveries()
        ]
        assert all(message.retry_count <= self.plan.attempts for message in messages)
        self.bodies |= {message.delivery_tag: message.body for message in messages}
        self.ledger.deliver([message.delivery_tag for message in messages])
        self.batcher.add(messages, 0)

    @rule()
    def hand_over(self) -> None:
        batch = self.batcher.poll(0)
        if batch is not None:
            self.begin(batch)

    def begin(self, batch: Batch) -> None:
        assert 0 < len(batch.messages) <= self.plan.size
        self.runs.append(Running(BatchRun(self.policy), batch.messages, batch.messages))

    @precondition(lambda self: self.runs)
    @rule(turn=turns, results=answers, cause=st.sampled_from([Cause.EXCEPTION, Cause.SHUTDOWN]))
    def end_a_run(self, turn: int, results: list[MessageResult], cause: Cause) -> None:
        """The handler yields these results, and fails if messages are left."""
        running = self.runs.pop(turn % len(self.runs))
        run, messages = running.run, running.messages
        collector = ResultCollector(messages)
        for result in results[: len(messages)]:
            collector.accept(result)
        failed = len(results) < len(messages)
        if not (failed and self.plan.is_atomic):
            pairs = zip(messages, results, strict=False)
            running.good |= {each.delivery_tag for each, result in pairs if result is ACK}
        run.record_run(collector, ValueError() if failed else None, cause)
        if failed and cause is Cause.SHUTDOWN:
            run.stop(ValueError(), cause)
        running.messages = run.next_run()
        if running.messages:
            self.runs.append(running)
        else:
            self.settle(running)

    def settle(self, running: Running) -> None:
        """Settle as the settler does, and publish copies."""
        run = running.run
        assert running.good == set(run.acked)
        decided = [each.message for each in run.not_acked] + run.returned
        tags = [*run.acked, *(each.delivery_tag for each in decided)]
        assert sorted(tags) == [each.delivery_tag for each in running.batch]
        assert Cause.SHUTDOWN not in {each.cause for each in run.not_acked}
        self.acked.update(self.bodies[tag] for tag in run.acked)
        settlements = [
            Settlement(Disposition.ACK, tuple(run.acked)),
            Settlement(Disposition.RETURN, tuple(each.delivery_tag for each in run.returned)),
        ]
        plan = self.planner.plan(run.not_acked, NOW)
        self.send(self.ledger.settle([*settlements, *plan.settlements]))
        self.copies += plan.copies

    @precondition(lambda self: self.copies)
    @rule(turn=turns, outcome=st.sampled_from(["confirmed", "unknown", "lost", "given back"]))
    def hear_of_a_copy(self, turn: int, outcome: str) -> None:
        """Ack the original if, and only if, its copy is confirmed."""
        pending = self.copies.pop(turn % len(self.copies))
        copy, tag = pending.copy, pending.tag
        if outcome in {"confirmed", "unknown"}:
            headers = copy.properties.headers
            answer = self.publisher.publish(
                copy.body, copy.routing_key, copy.exchange, mandatory=True, headers=headers
            )
            assert answer == "confirmed"
            if pending.reason is None:
                count = pending.outcome.message.retry_count
                assert copy.properties.headers["x-retry-count"] == count + 1
            self.copied[copy.body] += 1
        match outcome:
            case "confirmed":
                self.send(self.ledger.settle([Settlement(Disposition.ACK, (tag,))]))
            case "given back":
                self.send(self.ledger.settle([Settlement(Disposition.RETURN, (tag,))]))
            case _:
                self.copies.append(pending)

    @rule()
    def cut(self) -> None:
        """Lose the session. Its handlers and copies are dropped here."""
        self.broker.cut("worker")
        self.connect()

    def send(self, frames: list[Frame]) -> None:
        channel = self.client.channel
        for frame in frames:
            match frame.disposition:
                case Disposition.ACK:
                    channel.ack(frame.tag, multiple=frame.multiple)
                case Disposition.RETURN:
                    channel.nack(frame.tag, multiple=frame.multiple, requeue=True)
                case Disposition.REQUEUE | Disposition.REJECT:
                    channel.reject(frame.tag, requeue=frame.disposition is Disposition.REQUEUE)

    # -- invariants --

    @invariant()
    def nothing_is_lost(self) -> None:
        there = {*bodies(self.broker, JOBS), *bodies(self.broker, DEAD)}
        there |= {message.body for message in self.broker.unacked(JOBS)}
        assert {b"%d" % number for number in range(self.published)} == there | set(self.acked)
        assert [] == self.broker.journal.of(EventKind.DROPPED)

    @invariant()
    def nothing_is_acked_without_a_reason(self) -> None:
        done = Counter(each.body for each in self.broker.journal.of(EventKind.ACKED, queue=JOBS))
        assert done <= self.acked + self.copied

    @invariant()
    def both_sides_count_the_same(self) -> None:
        on_its_way = sum(1 for each in self.client.channel.received if hasattr(each, "tag"))
        unsettled = len(self.client.channel.unsettled)
        assert unsettled == len(self.ledger) + on_its_way <= self.plan.prefetch

    def teardown(self) -> None:
        """Without faults, all messages get an outcome."""
        if not hasattr(self, "plan"):
            return
        for _ in range(1000):
            if not self.broker.ready(JOBS) and not self.broker.unacked(JOBS):
                return
            self.receive()
            self.hand_over()
            while self.runs:
                self.end_a_run(0, [ACK] * self.plan.size, Cause.EXCEPTION)
            while self.copies:
                self.hear_of_a_copy(0, "confirmed")
        raise AssertionError("something is left for ever")


def test_the_core_keeps_its_laws():
    """Whatever happens between two of its steps."""
    run_state_machine_as_test(CoreOnBroker)

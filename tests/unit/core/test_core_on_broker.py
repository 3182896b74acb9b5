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
from aio_pika_batch.core.batch_run import BatchRun, FailurePolicy
from aio_pika_batch.core.batcher import Batch, Batcher
from aio_pika_batch.core.message import Message
from aio_pika_batch.core.results import Cause, ResultCollector
from aio_pika_batch.core.retry import RetryPolicy
from aio_pika_batch.core.settlement import Disposition, Frame, Ledger, Settlement
from aio_pika_batch.core.settlement_plan import DeadLetterTarget, PendingCopy, SettlementPlanner
from tests.unit.adapters.memory.client import Client, bodies
from tests.unit.core.strategies import NOW, StubSource

JOBS, DEAD = "jobs", "dead"
ACK = MessageResult.ACK

answers = st.lists(st.sampled_from(MessageResult), max_size=5)
turns = st.integers(0, 9)


@dataclass(frozen=True)
class Plan:
    """What the worker is like; drawn once."""

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
    """A batch at work.

    Attributes:
        messages: Of the run that is due.
        good: The tags that its handler has acked, and that no failure has made void.
    """

    trial: BatchRun
    batch: Sequence[Message]
    messages: Sequence[Message]
    good: set[int] = field(default_factory=set)


class CoreOnBroker(RuleBasedStateMachine):
    """One worker; what would be a task of the shell's is a list here."""

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
        self.router = SettlementPlanner(JOBS, retry, DeadLetterTarget("dlx"))
        self.policy = FailurePolicy(
            MessageResult.REQUEUE, {}, isolate=plan.isolate, is_atomic=plan.is_atomic
        )
        self.published = 0
        self.acked: Counter[bytes] = Counter()
        self.copied: Counter[bytes] = Counter()
        self.connect()

    def connect(self) -> None:
        """A session begins: nothing is left of the one before."""
        self.client = Client(self.broker, "worker")
        self.client.consume(JOBS, prefetch=self.plan.prefetch)
        self.bodies: dict[int, bytes] = {}
        self.ledger = Ledger()
        self.batcher = Batcher(size=self.plan.size, timeout=0)
        self.trials: list[Running] = []
        self.copies: list[PendingCopy] = []

    # -- what happens --

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
        self.trials.append(Running(BatchRun(self.policy), batch.messages, batch.messages))

    @precondition(lambda self: self.trials)
    @rule(turn=turns, said=answers, cause=st.sampled_from([Cause.EXCEPTION, Cause.SHUTDOWN]))
    def end_a_run(self, turn: int, said: list[MessageResult], cause: Cause) -> None:
        """The handler says so much, and fails if that was not all."""
        running = self.trials.pop(turn % len(self.trials))
        trial, messages = running.trial, running.messages
        collector = ResultCollector(messages)
        for result in said[: len(messages)]:
            collector.accept(result)
        failed = len(said) < len(messages)
        if not (failed and self.plan.is_atomic):
            pairs = zip(messages, said, strict=False)
            running.good |= {each.delivery_tag for each, result in pairs if result is ACK}
        trial.record_run(collector, ValueError() if failed else None, cause)
        if failed and cause is Cause.SHUTDOWN:
            trial.stop(ValueError(), cause)
        running.messages = trial.next_run()
        if running.messages:
            self.trials.append(running)
        else:
            self.settle(running)

    def settle(self, running: Running) -> None:
        """As a settler does; copies are on their way then."""
        trial = running.trial
        assert running.good == set(trial.acked)
        decided = [each.message for each in trial.not_acked] + trial.returned
        tags = [*trial.acked, *(each.delivery_tag for each in decided)]
        assert sorted(tags) == [each.delivery_tag for each in running.batch]
        assert Cause.SHUTDOWN not in {each.cause for each in trial.not_acked}
        self.acked.update(self.bodies[tag] for tag in trial.acked)
        settlements = [
            Settlement(Disposition.ACK, tuple(trial.acked)),
            Settlement(Disposition.RETURN, tuple(each.delivery_tag for each in trial.returned)),
        ]
        plan = self.router.plan(trial.not_acked, NOW)
        self.send(self.ledger.settle([*settlements, *plan.settlements]))
        self.copies += plan.copies

    @precondition(lambda self: self.copies)
    @rule(turn=turns, outcome=st.sampled_from(["confirmed", "unknown", "lost", "given back"]))
    def hear_of_a_copy(self, turn: int, outcome: str) -> None:
        """Its original is acked if it is confirmed, and only then."""
        republication = self.copies.pop(turn % len(self.copies))
        copy, tag = republication.copy, republication.tag
        if outcome in {"confirmed", "unknown"}:
            headers = copy.properties.headers
            said = self.publisher.publish(
                copy.body, copy.routing_key, copy.exchange, mandatory=True, headers=headers
            )
            assert said == "confirmed"
            if republication.reason is None:
                count = republication.outcome.message.retry_count
                assert copy.properties.headers["x-retry-count"] == count + 1
            self.copied[copy.body] += 1
        match outcome:
            case "confirmed":
                self.send(self.ledger.settle([Settlement(Disposition.ACK, (tag,))]))
            case "given back":
                self.send(self.ledger.settle([Settlement(Disposition.RETURN, (tag,))]))
            case _:
                self.copies.append(republication)

    @rule()
    def cut(self) -> None:
        """Handlers and copies of a session that is gone come to nothing here."""
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

    # -- what is always true --

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
        """Left alone, all of it comes to its end."""
        if not hasattr(self, "plan"):
            return
        for _ in range(1000):
            if not self.broker.ready(JOBS) and not self.broker.unacked(JOBS):
                return
            self.receive()
            self.hand_over()
            while self.trials:
                self.end_a_run(0, [ACK] * self.plan.size, Cause.EXCEPTION)
            while self.copies:
                self.hear_of_a_copy(0, "confirmed")
        raise AssertionError("something is left for ever")


def test_the_core_keeps_its_laws():
    """Whatever happens between two of its steps."""
    run_state_machine_as_test(CoreOnBroker)

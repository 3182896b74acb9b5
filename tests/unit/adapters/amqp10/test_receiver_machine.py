"""A link's whole life beside a model of its broker."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from aio_pika_batch.adapters.amqp10 import spec
from aio_pika_batch.adapters.amqp10.frames import (
    Frames10Parser,
    ReceivedRecord,
    TransferredMessages,
)
from aio_pika_batch.adapters.amqp10.receiver import (
    Answered,
    Attached,
    LinkEnded,
    LinkPhase,
    Receiver,
)
from aio_pika_batch.adapters.amqp10.settling import (
    ACCEPTED,
    FAILED,
    REJECTED,
    RELEASED,
    Decided,
    modified,
)
from aio_pika_batch.core.settlement import Modification
from aio_pika_batch.errors import SettlementError
from tests.unit.adapters.amqp10.broker import Broker
from tests.unit.adapters.amqp10.spoken import FRAME_MAX, SOURCE

OUTCOMES = {
    ACCEPTED: (spec.ACCEPTED, []),
    REJECTED: (spec.REJECTED, []),
    RELEASED: (spec.RELEASED, []),
    FAILED: (spec.MODIFIED, [True]),
    modified(Modification((), headers={"x-a": 1})): (spec.MODIFIED, [True, False, {"x-a": 1}]),
}
mostly_accepted = st.just(ACCEPTED) | st.sampled_from(list(OUTCOMES))
starts = st.sampled_from([0, 4294967291, 4294967292, 7])
places = st.integers(0, 100)


class Receiving(RuleBasedStateMachine):
    """Bytes go either way when a rule says so, in pieces, and the broker answers when it will."""

    @initialize(
        prefetch=st.integers(1, 6),
        count=starts,
        transfer=starts,
        first_id=st.sampled_from([0, 2**32 - 3]),
        frame_payload=st.sampled_from([None, 20]),
    )
    def attach(self, prefetch, count, transfer, first_id, frame_payload):
        self.prefetch = prefetch
        self.broker = Broker(count, transfer, first_id, frame_payload)
        self.link = Receiver(SOURCE, "l-1", prefetch)
        self.parser = Frames10Parser(FRAME_MAX)
        self.open: list[int] = []
        self.decided: dict[int, bytes] = {}
        self.asked: dict[int, set[int]] = {}
        self.stop_asked = 0
        self.is_silent = False
        self.bytes_go()
        self.bytes_come(10**6)
        assert self.link.phase is LinkPhase.OPEN

    # --- the line ------------------------------------------------------------------

    @rule()
    def bytes_go(self):
        data = b"".join(self.link.output)
        self.link.output.clear()
        self.broker.receive(data)

    @rule(size=st.integers(1, 500))
    def bytes_come(self, size):
        data = b"".join(self.broker.output)
        self.broker.output[:] = [data[size:]]
        for event in self.parser.feed(data[:size]):
            if isinstance(event, TransferredMessages):
                self.link.received()
                assert not self.is_silent, "a message after the answer to stop"
                for message in event.messages:
                    assert message.body == b"%d" % (message.delivery_tag - 1)
                    self.open.append(message.delivery_tag)
            else:
                assert isinstance(event, ReceivedRecord), event
                self.record_events(self.link.receive(event.channel, event.record))

    def record_events(self, event):
        match event:
            case Attached(transfers):
                self.parser.receive(transfers)
            case Answered(number):
                self.is_silent = self.is_silent or 0 < self.stop_asked <= number
                for each in [each for each in self.asked if each <= number]:
                    applied = self.broker.outcomes.keys() | self.broker.taken
                    assert {tag - 1 for tag in self.asked.pop(each)} <= applied
            case LinkEnded():
                raise AssertionError(event)

    # --- the broker ------------------------------------------------------------------

    @rule(count=st.integers(1, 10))
    def publish(self, count):
        self.broker.ready += count

    @rule()
    def the_broker_gives_credit_and_answers(self):
        self.broker.answer()

    @rule(count=st.integers(1, 10))
    def the_broker_delivers(self, count):
        for _ in range(count):
            self.broker.deliver()
        assert self.broker.most_unsettled <= self.prefetch

    @rule(count=st.integers(1, 4))
    def the_broker_takes_back(self, count):
        self.broker.take_back(count)

    @rule()
    def the_broker_tells_news(self):
        self.broker.become_active()
        self.broker.alarm()

    # --- the client ------------------------------------------------------------------

    @rule(some=st.lists(st.tuples(places, mostly_accepted), min_size=1, max_size=6))
    def settle_some(self, some):
        outcomes = {self.open[place % len(self.open)]: each for place, each in some if self.open}
        self.link.settle([Decided(outcome, (tag,)) for tag, outcome in outcomes.items()])
        self.decided.update(outcomes)
        self.open = [tag for tag in self.open if tag not in outcomes]

    @precondition(lambda self: self.open)
    @rule(outcome=mostly_accepted, size=st.integers(1, 6))
    def settle_the_oldest(self, outcome, size):
        tags, self.open = tuple(self.open[:size]), self.open[size:]
        self.link.settle([Decided(outcome, tags)])
        self.decided.update(dict.fromkeys(tags, outcome))

    @precondition(lambda self: self.decided)
    @rule(place=places)
    def settle_again(self, place):
        tag = list(self.decided)[place % len(self.decided)]
        before = len(self.link.output)
        with pytest.raises(SettlementError, match="settled already"):
            self.link.settle([Decided(ACCEPTED, (*self.open, tag))])
        assert before == len(self.link.output)

    @rule()
    def ask(self):
        number = self.link.ask()
        self.asked.setdefault(number, set()).update(self.decided)

    @rule()
    def stop(self):
        number = self.link.stop()
        self.stop_asked = self.stop_asked or number
        self.asked.setdefault(number, set()).update(self.decided)

    # --- in the end ------------------------------------------------------------------

    def teardown(self):
        if not hasattr(self, "broker"):
            return
        for _ in range(6):
            self.bytes_go()
            self.broker.answer()
            self.bytes_come(10**6)
        assert {} == self.asked, "every question is answered"
        still = {tag for tag in self.open if tag - 1 not in self.broker.taken}
        assert still == {each.number + 1 for each in self.broker.unsettled.values()}
        assert len(still) == len(self.link.unsettled)
        for tag, outcome in self.decided.items():
            if tag - 1 not in self.broker.taken:
                assert OUTCOMES[outcome] == self.broker.outcomes[tag - 1]
        if self.stop_asked:
            assert self.broker.credit == 0
        else:
            assert self.broker.credit == self.prefetch - len(still)
        self.link.detach()
        self.bytes_go()
        [detached] = [
            event.record
            for event in self.parser.feed(b"".join(self.broker.output))
            if isinstance(event, ReceivedRecord)
        ]
        assert LinkEnded(None) == self.link.receive(0, detached)
        assert self.link.phase is LinkPhase.ENDED
        self.link.settle([Decided(ACCEPTED, tuple(self.open))])
        assert [] == self.link.output


TestReceiving = Receiving.TestCase
TestReceiving.settings = settings(stateful_step_count=40)

"""The ledger over a whole session: deliveries, overlapping batches, and mistakes in between."""

from __future__ import annotations

from itertools import groupby

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from aio_pika_batch.core.settlement import RECENT, Disposition, Ledger, Settlement
from aio_pika_batch.errors import SettlementError
from tests.unit.core.channel import Channel
from tests.unit.core.strategies import dispositions

mostly_acks = st.just(Disposition.ACK) | dispositions
places = st.integers(0, 100)


class Session(RuleBasedStateMachine):
    """The ledger and a model of the channel, and the expected state of both."""

    def __init__(self):
        super().__init__()
        self.ledger = Ledger()
        self.channel = Channel()
        self.expected: dict[int, Disposition] = {}
        self.last = 0

    @initialize(recent=st.sampled_from([1, 3, RECENT]))
    def begin(self, recent):
        """Where older deliveries are kept makes no difference."""
        self.ledger = Ledger(recent)

    @rule(count=st.integers(1, 8))
    def deliver(self, count):
        fresh = range(self.last + 1, self.last + count + 1)
        self.last += count
        self.ledger.deliver(fresh)
        self.channel.deliver(fresh)

    @rule(some=st.lists(st.tuples(places, mostly_acks), min_size=1, max_size=8))
    def settle_some(self, some):
        """Settle any deliveries in any order: batches overlap, and handlers end at any time."""
        unsettled = [*self.channel.unsettled]
        decided = {
            unsettled[place % len(unsettled)]: disposition
            for place, disposition in some
            if unsettled
        }
        self.expected.update(decided)
        count = self.channel.frames

        self.channel.receive(
            self.ledger.settle([Settlement(decided[tag], (tag,)) for tag in decided])
        )

        assert self.channel.frames - count <= len(decided)

    @precondition(lambda self: self.channel.unsettled)
    @rule(disposition=mostly_acks, size=st.integers(1, 8))
    def settle_the_oldest_batch(self, disposition, size):
        """Settle a whole batch alike: one frame, if its kind has `multiple`."""
        oldest = self.channel.unsettled[:size]
        self.expected.update(dict.fromkeys(oldest, disposition))
        count = self.channel.frames

        self.channel.receive(self.ledger.settle([Settlement(disposition, tuple(oldest))]))

        joined = disposition in {Disposition.ACK, Disposition.RETURN}
        assert (1 if joined else len(oldest)) == self.channel.frames - count

    @rule(
        groups=st.lists(st.lists(st.tuples(places, mostly_acks), max_size=8), max_size=3),
        joined=st.booleans(),
    )
    def hold_some_and_release_them(self, groups, joined):
        """Decide deliveries one group after the other, and send the frames of all together."""
        left = [*self.channel.unsettled]
        held = {}
        for group in groups:
            decided = {}
            for place, disposition in group:
                if left:
                    decided[left.pop(place % len(left))] = disposition
            self.ledger.hold([Settlement(decided[tag], (tag,)) for tag in decided])
            held |= decided
            assert (len(held), len({*held.values()})) == (self.ledger.held, self.ledger.held_kinds)
            assert len(self.channel.unsettled) == len(self.ledger)
            for tag in held:
                with pytest.raises(SettlementError, match="settled already"):
                    self.ledger.settle([Settlement(Disposition.ACK, (tag,))])
        self.expected.update(held)
        frames = self.ledger.release(joined=joined)

        self.channel.receive(frames)

        assert self.ledger.held == 0
        assert len(frames) <= len(held)
        if not joined:
            runs = [
                disposition for disposition, _ in groupby(frames, lambda each: each.disposition)
            ]
            assert len(runs) == len({*held.values()})

    @precondition(lambda self: self.expected)
    @rule(place=places, disposition=dispositions)
    def settle_again(self, place, disposition):
        tag = list(self.expected)[place % len(self.expected)]

        with pytest.raises(SettlementError, match="settled already"):
            self.ledger.settle([Settlement(disposition, (*self.channel.unsettled, tag))])

    @rule(ahead=st.integers(1, 5), disposition=dispositions)
    def settle_what_never_came(self, ahead, disposition):
        with pytest.raises(SettlementError, match="never delivered"):
            self.ledger.settle(
                [Settlement(disposition, (*self.channel.unsettled, self.last + ahead))]
            )

    @invariant()
    def the_broker_received_exactly_the_decisions(self):
        assert self.expected == self.channel.settled

    @invariant()
    def both_sides_count_the_same(self):
        assert len(self.channel.unsettled) == len(self.ledger)


TestSession = Session.TestCase
TestSession.settings = settings(stateful_step_count=40)

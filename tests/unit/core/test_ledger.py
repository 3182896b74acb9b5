"""The ledger settles the decided deliveries, each once, with the fewest frames."""

from __future__ import annotations

import random
import tracemalloc
from itertools import groupby, pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from aio_pika_batch.core.settlement import Disposition, Frame, Ledger, Settlement
from aio_pika_batch.errors import SettlementError
from tests.unit.core.channel import Channel, ChannelClosed, fewest_frames
from tests.unit.core.strategies import dispositions

ACK, REJECT, REQUEUE, RETURN = (
    Disposition.ACK,
    Disposition.REJECT,
    Disposition.REQUEUE,
    Disposition.RETURN,
)

choices = st.none() | dispositions
joinable_choices = st.sampled_from([ACK, ACK, RETURN, RETURN, None])


def rows(max_size, of=choices):
    """The decision about each unsettled delivery, oldest first; None if there is none yet."""
    runs = st.lists(st.tuples(of, st.integers(1, 3)), max_size=max_size)
    return runs.map(
        lambda pieces: [choice for choice, length in pieces for _ in range(length)][:max_size]
    )


@st.composite
def calls(draw, row):
    """Settlements that mean the same as a row, in any order and grouping."""
    decided = [(tag, choice) for tag, choice in enumerate(row, 1) if choice is not None]
    shuffled = draw(st.permutations(decided))
    together = draw(st.booleans())
    if together:
        shuffled = sorted(shuffled, key=lambda pair: pair[1].value)
    return [
        Settlement(disposition, tuple(tag for tag, _ in some))
        for disposition, some in groupby(shuffled, key=lambda pair: pair[1])
    ]


rows_and_calls = rows(12).flatmap(lambda row: st.tuples(st.just(row), calls(row)))


def a_ledger(count):
    """A session with this many unsettled deliveries, the oldest with tag 1."""
    ledger = Ledger()
    ledger.deliver(range(1, count + 1))
    return ledger


def settle_row(row):
    """The frames for a row."""
    return a_ledger(len(row)).settle(
        [Settlement(choice, (tag,)) for tag, choice in enumerate(row, 1) if choice is not None]
    )


@given(rows_and_calls)
def test_exactly_the_decided_deliveries_are_settled(drawn):
    """Once each, as decided, and no others."""
    row, settlements = drawn
    channel = Channel(range(1, len(row) + 1))
    ledger = a_ledger(len(row))

    channel.receive(ledger.settle(settlements))

    decided = {tag: choice for tag, choice in enumerate(row, 1) if choice is not None}
    assert decided == channel.settled
    assert len(channel.unsettled) == len(ledger)


@given(rows_and_calls)
def test_the_order_and_the_grouping_of_the_settlements_do_not_matter(drawn):
    """The frames are the same."""
    row, settlements = drawn

    assert settle_row(row) == a_ledger(len(row)).settle(settlements)


@given(rows(6))
@example([ACK, REJECT, ACK, RETURN])
@example([RETURN, ACK, ACK, None, ACK])
@example([REQUEUE, RETURN, ACK, RETURN, RETURN])
def test_no_other_frames_are_fewer(row):
    """Compared with all sequences of frames."""
    wanted = {tag: choice for tag, choice in enumerate(row, 1) if choice is not None}

    assert fewest_frames(range(1, len(row) + 1), wanted) == len(settle_row(row))


@given(rows(9, joinable_choices))
@example([ACK, RETURN, ACK, RETURN, RETURN, ACK, RETURN, ACK, ACK])
@example([RETURN, RETURN, ACK, ACK, RETURN, ACK, RETURN, RETURN, ACK])
def test_acks_among_returns_are_divided_at_the_best_places(row):
    """A single frame is used exactly if it is cheaper than another segment."""
    wanted = {tag: choice for tag, choice in enumerate(row, 1) if choice is not None}

    assert fewest_frames(range(1, len(row) + 1), wanted) == len(settle_row(row))


@given(rows(40))
def test_multiple_is_set_only_if_a_frame_settles_several(row):
    """And only on methods that have the bit."""
    channel = Channel(range(1, len(row) + 1))

    for frame in settle_row(row):
        before = len(channel.unsettled)
        channel.receive([frame])
        assert frame.multiple is (before - len(channel.unsettled) > 1)


@given(rows(40))
def test_tags_of_frames_ascend_and_restart_at_most_once(row):
    """The broker searches for a tag from the oldest on, so ascending tags are cheapest."""
    tags = [frame.tag for frame in settle_row(row)]

    assert 1 >= sum(later < earlier for earlier, later in pairwise(tags))


@given(rows(8), rows(8), st.randoms(use_true_random=False))
def test_gaps_of_earlier_settlements_do_not_matter(first, second, chance):
    """Tags do not need to be consecutive."""
    ledger = a_ledger(len(first))
    channel = Channel(range(1, len(first) + 1))
    channel.receive(
        ledger.settle([Settlement(choice, (tag,)) for tag, choice in enumerate(first, 1) if choice])
    )
    fresh = range(len(first) + 1, len(first) + len(second) + 1)
    ledger.deliver(fresh)
    channel.deliver(fresh)
    left = [*channel.unsettled]
    decided = {tag: chance.choice(list(Disposition)) for tag in left if chance.random() < 0.8}
    count = channel.frames

    channel.receive(ledger.settle([Settlement(choice, (tag,)) for tag, choice in decided.items()]))

    assert decided == {tag: channel.settled[tag] for tag in left if tag in channel.settled}
    if len(left) <= 6:
        assert fewest_frames(left, decided) == channel.frames - count


@given(rows_and_calls, st.data())
def test_an_error_changes_nothing(drawn, data):
    """One wrong tag makes the whole call fail. Without that tag the same call succeeds."""
    row, settlements = drawn
    ledger = a_ledger(len(row))
    decided = [tag for tag, choice in enumerate(row, 1) if choice is not None]
    wrong = data.draw(st.sampled_from([*decided, 0, -1, len(row) + 1, len(row) + 1000]))
    at = data.draw(st.integers(0, len(settlements)))
    mistaken = [*settlements[:at], Settlement(data.draw(dispositions), (wrong,)), *settlements[at:]]

    with pytest.raises(SettlementError, match=f"delivery tag {wrong} "):
        ledger.settle(mistaken)

    assert len(row) == len(ledger)
    assert settle_row(row) == ledger.settle(settlements)


@given(rows_and_calls)
def test_a_second_settlement_raises(drawn):
    """A tag is settled once."""
    row, settlements = drawn
    ledger = a_ledger(len(row))
    ledger.settle(settlements)
    left = len(ledger)

    for settlement in settlements:
        with pytest.raises(SettlementError, match="settled already"):
            ledger.settle([settlement])

    assert left == len(ledger)


@pytest.mark.parametrize(
    ("tags", "why"),
    [
        ((3,), "delivery tag 3 .* settled already"),
        ((9,), "delivery tag 9 .* never delivered here"),
        ((0,), "delivery tag 0 .* never delivered here"),
        ((-1,), "delivery tag -1 .* never delivered here"),
        ((1, 2, 1), "delivery tag 1 is settled twice at once, as ack and as ack"),
    ],
)
def test_an_error_names_the_tag_and_the_reason(tags, why):
    """Settled already and never delivered are different mistakes."""
    ledger = a_ledger(4)
    ledger.settle([Settlement(RETURN, (3,))])

    with pytest.raises(SettlementError, match=why):
        ledger.settle([Settlement(ACK, tags)])

    assert 3 == len(ledger)


def test_two_dispositions_for_one_tag_are_both_named():
    """In the error."""
    with pytest.raises(SettlementError, match="as ack and as requeue"):
        a_ledger(2).settle([Settlement(ACK, (1,)), Settlement(REQUEUE, (1,))])


@pytest.mark.parametrize(
    ("row", "frames"),
    [
        ([], []),
        ([None, None], []),
        ([ACK], [Frame(ACK, 1)]),
        ([ACK] * 5, [Frame(ACK, 5, multiple=True)]),
        ([RETURN] * 5, [Frame(RETURN, 5, multiple=True)]),
        ([REJECT] * 2, [Frame(REJECT, 1), Frame(REJECT, 2)]),
        ([None, ACK, ACK], [Frame(ACK, 2), Frame(ACK, 3)]),
        ([ACK, ACK, None, ACK], [Frame(ACK, 4), Frame(ACK, 2, multiple=True)]),
        ([ACK, REQUEUE, ACK], [Frame(REQUEUE, 2), Frame(ACK, 3, multiple=True)]),
        ([ACK, ACK, REJECT], [Frame(REJECT, 3), Frame(ACK, 2, multiple=True)]),
        (
            [ACK, ACK, RETURN, RETURN],
            [Frame(ACK, 2, multiple=True), Frame(RETURN, 4, multiple=True)],
        ),
        ([ACK, RETURN, ACK, ACK], [Frame(RETURN, 2), Frame(ACK, 4, multiple=True)]),
    ],
)
def test_examples_of_frames(row, frames):
    """A row of decisions, and the frames."""
    assert frames == settle_row(row)


def test_a_thousand_acks_and_one_reject_are_two_frames():
    """A common batch, settled in any order."""
    good = [tag for tag in range(1, 1001) if tag != 500]
    random.Random(1).shuffle(good)
    ledger = a_ledger(1000)

    frames = ledger.settle([Settlement(ACK, tuple(good)), Settlement(REJECT, (500,))])

    assert [Frame(REJECT, 500), Frame(ACK, 1000, multiple=True)] == frames
    assert 0 == len(ledger)


def test_many_unsettled_deliveries_need_little_memory():
    """As when a queue of 100,000 messages is read, and none of them settled."""
    ledger = Ledger()
    tracemalloc.start()
    try:
        for first in range(1000, 101_000, 100):
            ledger.deliver(range(first, first + 100))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert peak < 5_000_000
    assert [Frame(REJECT, 1500)] == ledger.settle([Settlement(REJECT, (1500,))])
    ledger.hold([Settlement(ACK, tuple(tag for tag in range(1000, 51_000) if tag != 1500))])
    assert [Frame(ACK, 50_999, multiple=True)] == ledger.release(joined=True)
    assert 50_000 == len(ledger)


def test_empty_chunks_and_settlements_are_allowed():
    """They do nothing."""
    ledger = Ledger()
    ledger.deliver([])

    assert [] == ledger.settle([])
    assert [] == ledger.settle([Settlement(ACK, ())])
    assert [] == ledger.settle(iter([Settlement(ACK, ()), Settlement(REJECT, ())]))
    assert 0 == len(ledger)


@pytest.mark.parametrize(
    "frame",
    [
        Frame(ACK, 0, multiple=True),
        Frame(ACK, 3, multiple=True),
        Frame(RETURN, 5),
        Frame(REJECT, 2, multiple=True),
    ],
)
def test_the_model_of_the_broker_is_strict(frame):
    """What closes a channel on RabbitMQ closes it in the model, and settles nothing."""
    channel = Channel([1, 2, 4])

    with pytest.raises(ChannelClosed):
        channel.receive([frame])

    assert [1, 2, 4] == channel.unsettled

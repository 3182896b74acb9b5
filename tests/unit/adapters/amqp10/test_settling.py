"""Frames settle exactly what was decided, and write nothing that others choke on."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aio_pika_batch.adapters.amqp10 import spec
from aio_pika_batch.adapters.amqp10.codec import Described, Timestamp, read
from aio_pika_batch.adapters.amqp10.frames import Frames10Parser, ReceivedRecord
from aio_pika_batch.adapters.amqp10.performatives import DispositionFrame
from aio_pika_batch.adapters.amqp10.settling import (
    ACCEPTED,
    FAILED,
    OUTCOMES,
    REJECTED,
    RELEASED,
    Decided,
    OutcomeRun,
    Unsettled,
    modified,
    pack,
)
from aio_pika_batch.core import settlement
from aio_pika_batch.core.settlement import Modification
from aio_pika_batch.errors import SettlementError

KINDS = [ACCEPTED, REJECTED, RELEASED, FAILED]


def applied(runs: list[OutcomeRun], unsettled: set[int]) -> dict[int, bytes]:
    """What a broker makes of the frames: it skips what is settled."""
    outcomes: dict[int, bytes] = {}
    for run in runs:
        for tag in range(run.first, run.last + 1):
            if tag in unsettled:
                outcomes[tag] = run.outcome
                unsettled.discard(tag)
    return outcomes


@given(
    st.lists(st.lists(st.tuples(st.integers(1, 60), st.sampled_from(KINDS)), max_size=40)),
    st.lists(st.integers(1, 60), max_size=3),
)
def test_exactly_what_was_decided_is_settled(batches, taken_back):
    """Whatever stands between; and with no more frames than deliveries."""
    unsettled = Unsettled()
    unsettled.deliver(60)
    there = set(range(1, 61))
    for tag in taken_back:
        unsettled.take_back(tag, tag)
        there.discard(tag)
    decided_before: set[int] = set()
    for batch in batches:
        decided = {tag: kind for tag, kind in batch if tag not in decided_before}
        decided_before.update(decided)
        expected = {tag: kind for tag, kind in decided.items() if tag in there}

        runs = unsettled.settle([Decided(kind, (tag,)) for tag, kind in decided.items()])

        assert expected == applied(runs, there)
        assert len(runs) <= len(expected)
        assert len(there) == len(unsettled)


@pytest.mark.parametrize(
    ("kinds", "frames"),
    [
        ("a" * 100, 1),
        ("a" * 50 + "r" + "a" * 49, 2),
        ("ar" * 50, 51),
        ("arara", 3),
        ("abcba", 3),
        ("aabb", 2),
        ("a b a", 2),
        ("a  a", 1),
        ("abca", 3),
    ],
)
def test_few_frames_are_sent(kinds, frames):
    """The rarer outcomes first, and one frame over all; a space is a delivery settled before."""
    unsettled = Unsettled()
    unsettled.deliver(len(kinds))
    settled = tuple(tag for tag, kind in enumerate(kinds, 1) if kind == " ")
    if settled:
        unsettled.settle([Decided(ACCEPTED, settled)])

    runs = unsettled.settle(
        [Decided(kind.encode(), (tag,)) for tag, kind in enumerate(kinds, 1) if kind != " "]
    )

    assert frames == len(runs)


def test_the_longest_of_equally_common_outcomes_is_written_once():
    """A modification has all headers of a dead letter, and an acceptance has none."""
    unsettled = Unsettled()
    unsettled.deliver(8)
    runs = unsettled.settle([Decided(b"modified", (1, 3, 5, 7)), Decided(b"ok", (2, 4, 6, 8))])
    assert [*((b"ok", tag, tag) for tag in (2, 4, 6, 8)), (b"modified", 1, 7)] == runs


def test_many_different_outcomes_are_settled_quickly():
    """Each message with its own reason, mirrored: neither recursion nor time runs out."""
    unsettled = Unsettled()
    unsettled.deliver(4000)
    half = [b"%d" % number for number in range(2000)]
    decided = [Decided(kind, (tag,)) for tag, kind in enumerate([*half, *reversed(half)], 1)]

    assert 3999 == len(unsettled.settle(decided))


@pytest.mark.untraced
def test_one_unsettled_delivery_far_behind_costs_nothing():
    """Others come and go beside it, and are not walked through again."""
    unsettled = Unsettled()
    last = 1
    unsettled.deliver(1)
    for _ in range(200):
        unsettled.deliver(last + 1000)
        unsettled.settle([Decided(ACCEPTED, tuple(range(last + 1, last + 1001)))])
        last += 1000

    assert 1 == len(unsettled)
    unsettled.deliver(last + 1)
    assert [OutcomeRun(ACCEPTED, 1, last + 1)] == unsettled.settle(
        [Decided(ACCEPTED, (1, last + 1))]
    )


@pytest.mark.parametrize(
    ("decided", "why"),
    [
        ([Decided(ACCEPTED, (1, 2))], "delivery tag 1 cannot be settled: settled already"),
        ([Decided(ACCEPTED, (2,)), Decided(REJECTED, (6,))], "tag 6 .* never delivered here"),
        ([Decided(ACCEPTED, (2, 0))], "tag 0 .* never delivered here"),
        ([Decided(ACCEPTED, (2, 3)), Decided(REJECTED, (2,))], "tag 2 is settled twice at once"),
        ([Decided(ACCEPTED, (2, 2))], "tag 2 is settled twice at once"),
    ],
)
def test_what_cannot_be_settled_changes_nothing(decided, why):
    """All or nothing: the others of the same call can be settled afterwards."""
    unsettled = Unsettled()
    unsettled.deliver(5)
    unsettled.settle([Decided(ACCEPTED, (1,))])

    with pytest.raises(SettlementError, match=why):
        unsettled.settle(decided)

    assert [OutcomeRun(ACCEPTED, 2, 5)] == unsettled.settle([Decided(ACCEPTED, (2, 3, 4, 5))])


def test_what_was_taken_back_is_settled_in_silence_once():
    """It is delivered again, perhaps to another consumer; its handler could not know."""
    unsettled = Unsettled()
    unsettled.deliver(4)

    unsettled.take_back(2, 3)
    unsettled.take_back(2, 3)
    assert 2 == len(unsettled)
    assert [] == unsettled.settle([Decided(ACCEPTED, (2,))])
    assert [OutcomeRun(ACCEPTED, 1, 4)] == unsettled.settle([Decided(ACCEPTED, (1, 3, 4))])
    with pytest.raises(SettlementError, match="settled already"):
        unsettled.settle([Decided(ACCEPTED, (2,))])


# --- frames ------------------------------------------------------------------------


@given(
    st.sampled_from([*KINDS, modified(Modification((), headers={"x-a": "v" * 300}))])
    | st.integers(0, 250).map(lambda n: modified(Modification((), headers={"x-a": "v" * n}))),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**32 - 1),
    st.integers(0, 65535),
)
def test_a_frame_is_what_a_disposition_is(outcome, first, last, channel):
    """It is packed by hand, because there is one for each batch."""
    [frame] = Frames10Parser(131_072).feed(pack(OutcomeRun(outcome, 1, 2), first, last, channel))

    assert isinstance(frame, ReceivedRecord)
    assert channel == frame.channel
    state, _ = read(outcome, 0, len(outcome))
    assert frame.record == DispositionFrame(
        role=True, first=first, last=last, settled=True, state=state
    )


def test_the_frame_of_a_range_is_short():
    """Thirty bytes, which a broker has taken."""
    expected = "0000001e 02000000 005315 c01105 41 7000011170 70000111d3 41 00532445"
    assert bytes.fromhex(expected) == pack(OutcomeRun(ACCEPTED, 1, 2), 70000, 70099, 0)


# --- outcomes ----------------------------------------------------------------------


def outcome(returned: Modification) -> Described:
    """As the broker reads it."""
    raw = modified(returned)
    return read(raw, 0, len(raw))[0]


def test_each_disposition_of_the_core_has_its_outcome():
    """A failure is counted, what was not started is released."""
    read_outcomes = {kind: read(raw, 0, len(raw))[0] for kind, raw in OUTCOMES.items()}
    assert set(settlement.Disposition) == set(read_outcomes)
    assert Described(spec.ACCEPTED, []) == read_outcomes[settlement.Disposition.ACK]
    assert Described(spec.REJECTED, []) == read_outcomes[settlement.Disposition.REJECT]
    assert Described(spec.RELEASED, []) == read_outcomes[settlement.Disposition.RETURN]
    assert Described(spec.MODIFIED, [True]) == read_outcomes[settlement.Disposition.REQUEUE]


def test_a_native_return_says_when_why_and_where_to():
    """The time is rounded up to a millisecond, so that nothing comes too early."""
    until = datetime(2026, 1, 2, 3, 4, 5, 600_001, tzinfo=timezone(timedelta(hours=2)))
    milliseconds = Timestamp(until.astimezone(UTC).timestamp() * 1000 // 1 + 1)

    assert Described(spec.MODIFIED, [True, False]) == outcome(Modification((1,)))
    assert Described(spec.MODIFIED, [False, True, {"x-why": "é", "x-n": 2**62, "x-b": True}]) == (
        outcome(
            Modification(
                (1,), failed=False, dead=True, headers={"x-why": "é", "x-n": 2**62, "x-b": True}
            )
        )
    )
    delayed = outcome(Modification((1,), until=until))
    assert {"x-opt-delivery-time": milliseconds} == delayed.value[2]
    assert isinstance(delayed.value[2]["x-opt-delivery-time"], Timestamp)


@pytest.mark.parametrize(
    ("headers", "why"),
    [
        ({"x-a": 1.5}, "'x-a' .*float 1.5"),
        ({"x-a": None}, "'x-a' .*NoneType"),
        ({"x-a": b"b"}, "'x-a' .*bytes"),
        ({"x-a": [1]}, "'x-a' .*list"),
        ({"x-a": {"b": 1}}, "'x-a' .*dict"),
        ({"x-a": datetime.now(UTC)}, "'x-a' .*datetime"),
        ({"x-a": 2**63}, "64-bit int"),
        ({"x-a": "\ud800"}, "UTF-8"),
        ({"a": 1}, "must begin with x-"),
        ({"x-ü": 1}, "be ASCII"),
        ({"x-exchange": "e"}, "one of the broker's own"),
        ({"x-routing-key": "k"}, "broker's own"),
        ({"x-death": "k"}, "broker's own"),
        ({"x-basic-type": "k"}, "broker's own"),
        ({"x-a": "v" * 5000}, "headers of 50.. bytes .* 4096 are allowed"),
    ],
)
def test_a_header_that_later_readers_could_not_read_is_refused(headers, why):
    """A float would end the session of each consumer that gets the message, for ever."""
    with pytest.raises(SettlementError, match=why):
        modified(Modification((1,), headers=headers))

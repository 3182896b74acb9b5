"""Which result belongs to which message, and which results are invalid."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from aio_pika_batch.core.batch_run import ResultCollector
from aio_pika_batch.core.results import (
    MessageResult,
    Nack,
    Requeue,
    result_for,
)
from aio_pika_batch.errors import ResultError
from aio_pika_batch.testing.strategies import results
from tests.unit.core.strategies import a_message, some_messages

ACK, NACK = MessageResult.ACK, MessageResult.NACK
REQUEUE = MessageResult.REQUEUE


class Broken:
    """An object whose `repr()` raises."""

    def __repr__(self) -> str:
        raise RuntimeError


no_answers = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from(["ack", "nack", b"ack", MessageResult, Nack, (), (ACK,), [ACK, ACK]]),
    st.just(Broken()),
    st.builds(lambda: (a_message(), "ack")),
    st.builds(lambda: (ACK, a_message())),
    st.builds(lambda: (a_message(), ACK, ACK)),
    st.builds(a_message),
)


def state(collector):
    """The state of a collector."""
    return collector.count, collector.decided(), collector.undecided()


@given(st.integers(0, 5), st.lists(results | no_answers, max_size=6))
@example(2, [ACK, NACK])
@example(2, [ACK, NACK, ACK])
def test_items_that_come_together_are_accepted_like_single_ones(count, items):
    """Also those that are refused."""
    messages = some_messages(count)
    together, single = ResultCollector(messages), ResultCollector(messages)
    errors = []
    for accept in (
        lambda: together.accept_all(items),
        lambda: [single.accept(item) for item in items],
    ):
        try:
            accept()
        except ResultError as error:
            errors.append(str(error))
    assert len(set(errors)) <= 1
    assert len(errors) in (0, 2)
    assert state(together) == state(single)
    assert together.all_acked == single.all_acked


@st.composite
def answers(draw, max_size=6):
    """Messages, results for some of them, and the items to yield, in either form."""
    messages = some_messages(draw(st.integers(0, max_size)))
    if draw(st.booleans()):
        given_results = draw(st.lists(results, max_size=len(messages)))
        decided = list(zip(messages, given_results, strict=False))
        return messages, decided, given_results
    some = draw(st.permutations(range(len(messages))))[: draw(st.integers(0, len(messages)))]
    pairs = [(messages[at], draw(results)) for at in some]
    return messages, sorted(pairs, key=lambda pair: pair[0].delivery_tag), pairs


def collected(messages, yields):
    """A collector that has accepted these items."""
    collector = ResultCollector(messages)
    for item in yields:
        collector.accept(item)
    return collector


@given(answers())
def test_each_result_belongs_to_its_message(drawn):
    """The i-th result to the i-th message, or to the message of its pair."""
    messages, decided, yields = drawn

    assert decided == collected(messages, yields).decided()


@given(answers())
def test_each_message_is_either_decided_or_undecided(drawn):
    """In the order of the batch."""
    messages, _, yields = drawn
    collector = collected(messages, yields)

    decided = [message for message, _ in collector.decided()]
    undecided = collector.undecided()

    assert len(messages) == len(decided) + len(undecided)
    assert len(decided) == collector.count
    assert decided == [message for message in messages if message in decided]
    assert undecided == [message for message in messages if message not in decided]


@given(answers())
def test_a_missing_result_is_never_an_ack(drawn):
    """There are as many ACKs as were yielded."""
    messages, _, yields = drawn
    yielded = [
        item for item in yields if item is ACK or (isinstance(item, tuple) and item[1] is ACK)
    ]

    acked = [message for message, result in collected(messages, yields).decided() if result is ACK]

    assert len(yielded) == len(acked)


@given(st.lists(st.sampled_from([ACK, ACK, ACK, NACK]), max_size=5), st.integers(0, 1))
def test_all_acked_needs_an_ack_for_every_message(yields, missing):
    """It is a shortcut to the same decision."""
    collector = collected(some_messages(len(yields) + missing), yields)

    assert (not missing and NACK not in yields) is collector.all_acked
    assert collector.all_acked is (
        [ACK] * len(collector.messages) == [result for _, result in collector.decided()]
    )


def test_pairs_are_decided_in_the_order_of_the_batch():
    """Whatever the order in which the handler yields them."""
    first, second = messages = some_messages(2)
    collector = collected(messages, [(second, NACK), (first, ACK)])

    assert [(first, ACK), (second, NACK)] == collector.decided()


@given(answers())
def test_all_acked_agrees_with_decided(drawn):
    """In both forms."""
    messages, _, yields = drawn
    collector = collected(messages, yields)

    if collector.all_acked:
        assert [(message, ACK) for message in messages] == collector.decided()


@given(answers(), st.lists(st.integers(0, 6), max_size=3))
def test_each_result_is_taken_once(drawn, moments):
    """In the order of the batch, all of them in the end, and they stay decided."""
    messages, decided, yields = drawn
    collector = ResultCollector(messages)
    parts = []
    for at, item in enumerate(yields):
        parts += [collector.take() for moment in moments if moment == at]
        collector.accept(item)
    parts.append(collector.take())

    assert [] == collector.take()
    together = [pair for part in parts for pair in part]
    assert decided == sorted(together, key=lambda pair: pair[0].delivery_tag)
    assert all(part == sorted(part, key=lambda pair: pair[0].delivery_tag) for part in parts)
    assert decided == collector.decided()
    assert len(messages) == len(decided) + len(collector.undecided())


def test_all_acked_is_false_after_a_result_was_taken():
    """The shortcut is for a batch of which nothing is settled yet."""
    collector = collected(some_messages(2), [ACK])
    collector.take()
    collector.accept(ACK)

    assert not collector.all_acked
    assert [(collector.messages[1], ACK)] == collector.take()


@given(answers(), no_answers)
def test_an_invalid_result_raises_and_changes_nothing(drawn, item):
    """Earlier results stay."""
    messages, _, yields = drawn
    collector = collected(messages, yields)
    before = state(collector)

    with pytest.raises(ResultError, match="is not a result"):
        collector.accept(item)

    assert before == state(collector)


@given(answers(), results)
def test_a_message_of_another_batch_raises_and_changes_nothing(drawn, result):
    """Even if it is equal to one of this batch."""
    messages, _, yields = drawn
    collector = collected(messages, yields)
    before = state(collector)

    with pytest.raises(
        ResultError, match=r"<Message 1 .* is not in this batch|use one of the two forms"
    ):
        collector.accept((a_message(1), result))

    assert before == state(collector)


@given(st.lists(results, max_size=5), results)
@example([Nack("bad")], Nack("worse"))
@example([ACK], ACK)
def test_one_result_too_many_raises_and_changes_nothing(yields, result):
    """The error has the expected number."""
    count = len(yields)
    collector = collected(some_messages(count), yields)
    before = state(collector)

    with pytest.raises(ResultError, match=f"^result {count + 1}, .* for a batch of {count}:"):
        collector.accept(result)

    assert before == state(collector)


@given(answers().filter(lambda drawn: drawn[1]), results, st.data())
def test_a_second_result_for_a_message_raises_and_the_first_stays(drawn, result, data):
    """The first one may be settled already."""
    messages, decided, _ = drawn
    collector = collected(messages, decided)
    again, first = data.draw(st.sampled_from(decided))
    before = state(collector)

    with pytest.raises(ResultError, match="a second result") as caught:
        collector.accept((again, result))

    assert repr(again) in str(caught.value)
    assert repr(first) in str(caught.value)
    assert before == state(collector)


@given(results, results)
def test_the_two_forms_cannot_be_mixed(first, second):
    """The first result of a batch sets its form."""
    messages = some_messages(2)
    by_turn, by_name = ResultCollector(messages), ResultCollector(messages)
    by_turn.accept(first)
    by_name.accept((messages[1], first))

    with pytest.raises(ResultError, match="use one of the two forms for the whole batch"):
        by_turn.accept((messages[1], second))
    with pytest.raises(ResultError, match="use one of the two forms for the whole batch"):
        by_name.accept(second)

    assert [(messages[0], first)] == by_turn.decided()
    assert [(messages[1], first)] == by_name.decided()


def test_results_after_an_invalid_one_are_accepted():
    """They belong to the right messages."""
    messages = some_messages(3)
    collector = collected(messages, [ACK])
    with pytest.raises(ResultError):
        collector.accept("nack")

    collector.accept(Nack("bad"))

    assert [(messages[0], ACK), (messages[1], Nack("bad"))] == collector.decided()
    assert [messages[2]] == collector.undecided()


@pytest.mark.parametrize(
    ("item", "named"),
    [
        ("nack", "'nack' is"),
        (None, "None is"),
        (7, "7 is"),
        ("secret", "something of <class 'str'> is"),
        (b"secret", "something of <class 'bytes'> is"),
        ({"a": "secret"}, "something of <class 'dict'> is"),
        (10**10_000, "something of <class 'int'> is"),
        ((a_message(1, body=b"secret"), "ack"), "(<Message 1 "),
        ((a_message(1), b"secret"), "something of <class 'bytes'>) is"),
        (("secret", MessageResult.ACK), "(something of <class 'str'>, "),
        (Broken(), "test_results.Broken"),
    ],
    ids=lambda item: str(type(item)),
)
def test_an_error_describes_the_invalid_result_without_a_body(item, named):
    """It ends up in logs and dead letters, and calls no `__repr__` of other classes."""
    with pytest.raises(ResultError) as caught:
        ResultCollector(some_messages(1)).accept(item)

    assert named in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("wrong", [{"reason": b"secret"}, {"delay": "secret"}])
def test_an_invalid_reason_or_delay_is_not_shown(wrong):
    """It may be a body, and the error ends up in logs."""
    with pytest.raises(TypeError) as caught:
        Requeue(**wrong)
    assert "secret" not in str(caught.value)


class Family(Exception):
    """A base class."""


class Child(Family):
    """A subclass with one base class."""


class Mixed(KeyError, Family):
    """A subclass with two base classes."""


class Unrelated(Exception):
    """Without a base class in the table."""


LISTED = {Family: REQUEUE, Mixed: NACK, LookupError: ACK, Exception: NACK}


@pytest.mark.parametrize(
    ("error", "table", "result"),
    [
        (Family(), {Family: REQUEUE}, REQUEUE),
        (Child(), {Family: REQUEUE}, REQUEUE),
        (Child(), {Family: REQUEUE, Child: NACK}, NACK),
        (Child(), {Child: NACK, Family: REQUEUE}, NACK),
        (Child(), {Exception: NACK, Family: REQUEUE}, REQUEUE),
        (Mixed(), LISTED, NACK),
        (Mixed(), {Family: REQUEUE, LookupError: ACK}, ACK),
        (Unrelated(), {Family: REQUEUE}, None),
        (Unrelated(), {}, None),
        (KeyboardInterrupt(), {Exception: NACK}, None),
    ],
)
def test_the_most_specific_exception_class_is_used(error, table, result):
    """In Python's method resolution order, whatever the order of the table."""
    assert result is result_for(error, table)


classes = [Exception, LookupError, KeyError, Family, Child, Mixed, Unrelated]


@given(
    st.sampled_from(classes),
    st.dictionaries(st.sampled_from(classes), st.sampled_from(MessageResult)),
)
def test_no_more_specific_class_is_listed(cls, table):
    """The chosen class is a base class of the error, and no other listed base class is more
    specific.
    """
    bases = [each for each in table if issubclass(cls, each)]
    lowest = [
        table[base]
        for base in bases
        if not any(other is not base and issubclass(other, base) for other in bases)
    ]

    result = result_for(cls(), table)

    assert (result in lowest) if bases else (result is None)


def test_reasons_are_part_of_a_result():
    """Results with different reasons are different."""
    assert Nack("a") != Nack("b")
    assert Requeue("a") == Requeue("a")

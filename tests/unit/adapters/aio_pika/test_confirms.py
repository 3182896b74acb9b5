"""Each publication has its own outcome, in whatever order the broker answers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aio_pika_batch.adapters.aio_pika.confirms import (
    ConfirmTracker,
    PublishCall,
    outcome_after_close,
)
from aio_pika_batch.adapters.aio_pika.events import ChannelClosed, Confirm, ReturnedPublication
from aio_pika_batch.adapters.aio_pika.properties import encode
from aio_pika_batch.core.message import Properties
from aio_pika_batch.core.publication import Outcome

CONFIRMED, RETURNED, REFUSED, UNKNOWN, *_ = Outcome

ROUTE = (b"", b"q")
PLAIN = encode(Properties())


class Tracked:
    """A tracker with one call of *size* publications, sent *at_a_time* at once."""

    def __init__(self, size: int, bodies: list[bytes] | None = None, *, at_a_time: int = 1) -> None:
        self.tracker = ConfirmTracker()
        self.done = 0
        self.call = PublishCall([], [], [], [], self._finish)
        everything = bodies or [b"%d" % index for index in range(size)]
        for start in range(0, size, at_a_time):
            self.send([(body, ROUTE) for body in everything[start : start + at_a_time]])

    def send(
        self, publications: list[tuple[bytes, tuple[bytes, bytes]]], properties: bytes = PLAIN
    ) -> None:
        """Send more publications of the call, each a body and a route."""
        call, count = self.call, len(publications)
        call.bodies += [body for body, _ in publications]
        call.targets += [(b"", route) for _, route in publications]
        call.properties += [properties] * count
        call.outcomes += [None] * count
        call.missing += count
        self.tracker.track(call, len(call.bodies) - count, len(call.bodies))

    def _finish(self) -> None:
        self.done += 1

    @property
    def outcomes(self) -> list[Outcome | None]:
        return self.call.outcomes


def back(
    body: bytes, properties: bytes = PLAIN, route: tuple[bytes, bytes] = ROUTE
) -> ReturnedPublication:
    """A returned publication."""
    return ReturnedPublication(312, "NO_ROUTE", *route, properties, body)


def test_confirms_in_order() -> None:
    """One by one. The call is done with the last."""
    tracked = Tracked(2)

    tracked.tracker.confirm(Confirm(1, False, True))
    assert ([CONFIRMED, None], 0) == (tracked.outcomes, tracked.done)
    tracked.tracker.confirm(Confirm(2, False, False))

    assert ([CONFIRMED, REFUSED], 1) == (tracked.outcomes, tracked.done)
    assert len(tracked.tracker) == 0


@pytest.mark.parametrize("at_a_time", [1, 3, 5])
def test_multiple_settles_only_what_is_open(at_a_time: int) -> None:
    """Nacks of 4 and 5 come before an ack of all up to 5."""
    tracked = Tracked(5, at_a_time=at_a_time)

    tracked.tracker.confirm(Confirm(4, False, False))
    tracked.tracker.confirm(Confirm(5, False, False))
    tracked.tracker.confirm(Confirm(3, True, True))

    assert [CONFIRMED] * 3 + [REFUSED] * 2 == tracked.outcomes


@given(st.integers(1, 40), st.data())
def test_confirms_in_any_order_settle_the_right_publications(
    size: int, data: st.DataObject
) -> None:
    """Compared with a list that is searched from the start each time."""
    tracked = Tracked(size, at_a_time=data.draw(st.integers(1, size)))
    expected: list[Outcome | None] = [None] * size
    confirms = data.draw(
        st.lists(
            st.builds(Confirm, st.integers(1, size), st.booleans(), st.booleans()), max_size=20
        )
    )
    for confirm in confirms:
        tracked.tracker.confirm(confirm)
        for number in range(1 if confirm.multiple else confirm.tag, confirm.tag + 1):
            if expected[number - 1] is None:
                expected[number - 1] = CONFIRMED if confirm.accepted else REFUSED

    assert expected == tracked.outcomes
    assert expected.count(None) == len(tracked.tracker)
    assert (None not in expected) == tracked.done


@given(st.data())
def test_publications_returns_and_confirms_in_any_order(data: st.DataObject) -> None:
    """Compared with lists that are searched each time."""
    routes = [(b"", b"q"), (b"x", b"q")]
    size = data.draw(st.integers(1, 12))
    tracked = Tracked(0)
    entered: list[tuple[bytes, bytes]] = []
    came_back: set[int] = set()
    expected: list[Outcome | None] = []
    numbers = st.integers(1, size)
    confirms = st.builds(Confirm, numbers, st.booleans(), st.booleans())
    groups = st.lists(st.sampled_from(routes), min_size=1, max_size=3)
    for step in data.draw(st.lists(st.one_of(groups, numbers, confirms))):
        match step:
            case Confirm(tag, multiple, accepted):
                tracked.tracker.confirm(step)
                for number in range(1 if multiple else tag, min(tag, len(entered)) + 1):
                    if expected[number - 1] is None:
                        answer = CONFIRMED if accepted else REFUSED
                        expected[number - 1] = RETURNED if number in came_back else answer
            case int(number):
                if number <= len(entered) and expected[number - 1] is None:
                    tracked.tracker.mark_returned(back(b"%d" % number, route=entered[number - 1]))
                    if number in came_back:
                        # The broker never does that: then nothing is known of the others there.
                        came_back |= {
                            each
                            for each, route in enumerate(entered, 1)
                            if route == entered[number - 1] and expected[each - 1] is None
                        }
                    came_back.add(number)
            case group:
                entered += group
                expected += [None] * len(group)
                first = len(entered) - len(group) + 1
                tracked.send([(b"%d" % number, each) for number, each in enumerate(group, first)])

    assert expected == tracked.outcomes


def test_a_return_waits_for_its_own_confirm() -> None:
    """Other confirms come between."""
    tracked = Tracked(3)

    tracked.tracker.mark_returned(back(b"1"))
    tracked.tracker.confirm(Confirm(1, False, True))
    tracked.tracker.confirm(Confirm(3, True, True))

    assert [CONFIRMED, RETURNED, CONFIRMED] == tracked.outcomes


def test_two_equal_messages_are_returned_separately() -> None:
    """Two returns are for two publications."""
    tracked = Tracked(3, [b"same"] * 3)

    tracked.tracker.mark_returned(back(b"same"))
    tracked.tracker.mark_returned(back(b"same"))
    tracked.tracker.confirm(Confirm(3, True, True))

    assert [RETURNED, RETURNED, CONFIRMED] == tracked.outcomes


def test_a_return_with_sorted_headers_is_matched() -> None:
    """Newer brokers encode the table again, so its values are compared."""
    tracked = Tracked(0)
    for count in (1, 2):
        tracked.send([(b"", ROUTE)], encode(Properties(headers={"z": count, "a": 1.5})))

    tracked.tracker.mark_returned(back(b"", encode(Properties(headers={"a": 1.5, "z": 2}))))
    tracked.tracker.confirm(Confirm(2, True, True))

    assert [CONFIRMED, RETURNED] == tracked.outcomes


def test_a_return_without_a_match_marks_the_whole_route() -> None:
    """Duplicates rather than loss. Other routes aren't affected."""
    tracked = Tracked(2)
    tracked.send([(b"", (b"", b"elsewhere"))])

    tracked.tracker.mark_returned(back(b"changed on its way"))
    tracked.tracker.confirm(Confirm(3, True, True))

    assert [RETURNED, RETURNED, CONFIRMED] == tracked.outcomes


def test_a_return_to_an_unknown_route_is_ignored() -> None:
    """Nothing was published there."""
    tracked = Tracked(1)

    tracked.tracker.mark_returned(back(b"", route=(b"x", b"y")))
    tracked.tracker.confirm(Confirm(1, False, True))

    assert [CONFIRMED] == tracked.outcomes


def test_a_confirm_of_a_future_number_is_ignored() -> None:
    """However large the number is, it takes no time."""
    tracked = Tracked(1)

    tracked.tracker.confirm(Confirm(2**64 - 1, True, True))
    tracked.send([(b"", ROUTE)])

    assert [CONFIRMED, None] == tracked.outcomes
    tracked.tracker.confirm(Confirm(2, True, False))
    assert [CONFIRMED, REFUSED] == tracked.outcomes


@pytest.mark.parametrize("multiple", [True, False])
def test_a_second_confirm_is_ignored(*, multiple: bool) -> None:
    """The publication is settled already."""
    tracked = Tracked(1)
    for _ in range(2):
        tracked.tracker.confirm(Confirm(1, multiple, True))

    assert ([CONFIRMED], 1) == (tracked.outcomes, tracked.done)


def test_the_end_of_the_channel_settles_everything() -> None:
    """Returned publications stay returned. The given function decides about the others."""
    tracked = Tracked(3)
    tracked.tracker.confirm(Confirm(1, False, True))
    tracked.tracker.mark_returned(back(b"1"))

    tracked.tracker.end(lambda _route, body: REFUSED if body == b"0" else UNKNOWN)

    assert ([CONFIRMED, RETURNED, UNKNOWN], 1) == (tracked.outcomes, tracked.done)
    assert not tracked.tracker


@pytest.mark.parametrize(
    ("refused", "text"),
    [
        ([("", "a"), ("", "b")], "write access to exchange 'amq.default' in vhost '/' refused"),
        ([("shop", "a"), ("shop", "b")], "access to exchange 'shop' in vhost '/' refused"),
        ([("shop", "a")], "write access to topic 'a' in exchange 'shop' in vhost '/' refused"),
        ([], "something else"),
    ],
)
def test_a_missing_permission_refuses_what_it_concerns(
    refused: list[tuple[str, str]], text: str
) -> None:
    """Others that were in flight may have been stored before."""
    closed = ChannelClosed(403, f"ACCESS_REFUSED - {text} for user 'u'")
    outcome = outcome_after_close(closed, alone=False)

    routes = [("", "a"), ("", "b"), ("shop", "a"), ("shop", "b"), ("other", "a")]
    found = {
        (exchange, key): outcome((exchange.encode(), key.encode()), b"") for exchange, key in routes
    }

    assert {route: REFUSED if route in refused else UNKNOWN for route in routes} == found

"""Copies that must fit into a frame."""

from __future__ import annotations

from types import SimpleNamespace

from hypothesis import given
from hypothesis import strategies as st

from aio_pika_batch.adapters.aio_pika.properties import decode, decode_headers, encode, splice
from aio_pika_batch.core.message import Message, Properties
from aio_pika_batch.core.publication import (
    LONGEST_LIST,
    OMITTED,
    UNDECODABLE_HEADERS,
    Copy,
    fit,
    property_list_size,
)
from tests.unit.core.strategies import StubSource

OURS = {"x-retry-count": 3, "x-why": "w" * 50, "x-detail": "d" * 50}
SPARE = ("x-detail", "x-why")

values = st.one_of(
    st.text(max_size=40),
    st.binary(max_size=40),
    st.integers(-(2**63), 2**63 - 1),
    st.none(),
    st.booleans(),
    st.floats(allow_nan=False),
    st.lists(st.text(max_size=5), max_size=3),
    st.dictionaries(st.text(max_size=5), st.integers(0, 9), max_size=3),
)
headers = st.dictionaries(st.text(min_size=1, max_size=20), values, max_size=12)


def message(properties):
    """A delivered message."""
    return Message(StubSource(), 1, False, b"body", ("e", "k"), properties)


def copy_of(given_headers, *, may_omit):
    """A copy with three headers of ours, two of which may be left out."""
    properties = Properties(headers=given_headers, app_id="app")
    return Copy(message(properties), "", "q", dict(OURS), spare=SPARE, may_omit=may_omit)


def encoded_size(copy):
    """The size that an AMQP client would write."""
    return len(encode(copy.properties))


@given(headers, st.integers(0, 900), st.booleans())
def test_a_copy_fits_or_there_is_none(given_headers, limit, may_omit):
    """What it needs is kept, and what was left out of the original is listed."""
    copy = copy_of(given_headers, may_omit=may_omit)
    found = fit(copy, limit, encoded_size)
    if encoded_size(copy) <= limit:
        assert copy is found
    if found is None:
        return
    assert encoded_size(found) <= limit
    kept = found.properties.headers
    assert 3 == kept["x-retry-count"]
    missing = {name for name in given_headers if name not in kept and name not in OURS}
    assert may_omit or not missing
    listed = set(kept.get(OMITTED, []))
    assert missing == listed or (missing > listed - {"…"} and "…" in listed)


@given(headers)
def test_what_is_needed_fits_into_any_frame_that_can_hold_it(given_headers):
    """A dead letter drops all foreign headers if it has to."""
    needed = {"x-retry-count": 3}
    if given_headers:
        needed[OMITTED] = list(given_headers)
    limit = encoded_size(Copy(message(Properties(headers=needed, app_id="app")), "", "q", {}))

    assert fit(copy_of(given_headers, may_omit=True), limit, encoded_size) is not None


def test_our_own_headers_are_left_out_first_and_in_their_order():
    """Only as many as needed."""
    copy = copy_of({"theirs": "t" * 100}, may_omit=True)
    whole = encoded_size(copy)

    fitting = fit(copy, whole - 10, encoded_size)
    smaller = fit(copy, whole - 80, encoded_size)

    assert {"x-retry-count", "x-why", "theirs"} == set(fitting.properties.headers)
    assert {"x-retry-count", "theirs"} == set(smaller.properties.headers)


def test_then_the_largest_foreign_header_is_left_out_and_ours_fit_again():
    """A token of 130 KB takes the place of everything else."""
    copy = copy_of({"token": "t" * 131_000, "small": "s"}, may_omit=True)

    found = fit(copy, 131_000, encoded_size).properties.headers

    assert {**OURS, "small": "s", OMITTED: ["token"]} == found


def test_a_retry_keeps_all_headers_of_the_original():
    """The next attempt must see them, so there is no retry that fits."""
    assert fit(copy_of({"token": "t" * 1000}, may_omit=False), 1000, encoded_size) is None


def test_a_table_that_cannot_be_read_is_left_out_whole():
    """It would be kept in one header otherwise."""
    table = b"\x01x?" + b"." * 500
    raw = b"\x20\x00" + len(table).to_bytes(4, "big") + table
    source = SimpleNamespace(queue="q", decode_properties=decode, decode_headers=decode_headers)
    unreadable = Message(source, 1, False, b"body", ("e", "k"), raw)
    copy = Copy(unreadable, "", "q", dict(OURS), spare=SPARE, may_omit=True)

    def size(each):
        return len(splice(raw, each, b"guest"))

    found = fit(copy, 400, size)

    assert {**OURS, OMITTED: [UNDECODABLE_HEADERS]} == {**found.add}
    assert size(found) <= 400


def test_a_list_of_names_is_short():
    """Thousands of names would fill a frame again."""
    many = {f"header-{number:06}": "" for number in range(5000)}
    found = fit(copy_of(many, may_omit=True), 3000, encoded_size)

    [*names, last] = found.add[OMITTED]
    assert "…" == last
    assert sum(map(len, names)) <= LONGEST_LIST


def test_thousands_of_headers_take_no_second():
    """Each attempt encodes the whole list, so there are few."""
    calls = []

    def size(copy):
        calls.append(copy)
        return encoded_size(copy)

    many = {f"{number:06}": "v" * 10 for number in range(4000)}
    assert fit(copy_of(many, may_omit=True), 5000, size) is not None
    assert len(calls) < 40


@given(headers)
def test_a_size_without_encoding_is_at_least_that_with(given_headers):
    """So the broker in memory is stricter than a real one, but not by much."""
    properties = Properties(headers=given_headers, app_id="app", message_id="id", delivery_mode=2)
    exact = len(encode(properties))

    assert exact <= property_list_size(properties) <= exact + 40 + 20 * (1 + len(given_headers) * 4)


def test_a_copy_that_cannot_become_small_enough_has_no_smaller_one():
    """Not even without any foreign header."""
    assert fit(copy_of({"a": "a" * 99, "b": 1}, may_omit=True), 1, encoded_size) is None


def test_the_size_of_bytes_is_their_length():
    """Together with that of a text of the same name."""
    sizes = [property_list_size(Properties(headers={"n": each})) for each in (b"", b"12345", "")]
    assert [sizes[0], sizes[0] + 5, sizes[0]] == sizes

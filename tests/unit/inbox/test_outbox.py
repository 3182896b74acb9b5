"""Outboxes and relays, on a database in a file and a broker in memory."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime
from decimal import Decimal

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from aio_pika_batch import ConfigurationError, Publication
from aio_pika_batch.adapters.memory import PublishFault
from aio_pika_batch.core.message import DecodedSource
from aio_pika_batch.databases.outbox_table import LANES, lane_of
from aio_pika_batch.outbox import Outbox, OutboxRelay, OutboxRelaySettings
from aio_pika_batch.outbox.outbox import Row, row_of
from aio_pika_batch.outbox.relay import _waves
from tests.unit.inbox.sqlite import Connection
from tests.unit.shell.helpers import QUEUE, EventRecorder

SOURCE = DecodedSource("outbox", "", "x-retry-count", lambda: 0.0)


@pytest.fixture
async def outbox(connection):
    """With its table."""
    made = Outbox()
    await made.create(connection)
    await connection.commit()
    return made


def relay(outbox, path, rabbit, recorder=None, **given):
    """A relay to the broker."""
    return OutboxRelay(
        outbox,
        lambda: Connection(path),
        OutboxRelaySettings(url="memory://", **given),
        transport=rabbit.transport,
        observers=[recorder] if recorder else [],
    )


async def add(outbox, connection, *bodies, key=None, **given):
    """Add messages to the queue, and commit."""
    given = {"routing_key": QUEUE} | given
    publications = [Publication(each, **given) for each in bodies]
    await outbox.add(connection, publications, key=None if key is None else lambda _: key)
    await connection.commit()


async def test_a_relay_publishes_and_deletes(outbox, path, connection, rabbit):
    """It looks again every `poll_interval`."""
    async with relay(outbox, path, rabbit, poll_interval=2):
        await asyncio.sleep(0.5)
        await add(outbox, connection, b"0", b"1")
        await asyncio.sleep(1)
        assert [] == rabbit.waiting()
        await asyncio.sleep(1)
        assert [b"0", b"1"] == rabbit.waiting()
    assert 0 == await outbox.count(connection)


async def test_a_relay_logs_no_warnings_about_queues(outbox, path, rabbit, caplog):
    """A relay has none, and no dead letters."""
    async with relay(outbox, path, rabbit):
        pass
    assert [] == [each for each in caplog.records if each.levelname == "WARNING"]


async def test_a_refused_row_is_published_later(outbox, path, connection, rabbit, caplog):
    """After 1 s, 2 s, 4 s: the times between are not busy."""
    began = time.time()
    await add(outbox, connection, b"0", routing_key="nowhere")
    await add(outbox, connection, b"1")
    async with relay(outbox, path, rabbit):
        await asyncio.sleep(1)
        assert [b"1"] == rabbit.waiting()
        assert 1 == await outbox.count(connection)
    lines = [each.getMessage() for each in caplog.records if each.levelname == "WARNING"]
    assert all("rows=1 exchange= routing_key=nowhere outcome=returned" in each for each in lines)
    # Its pauses are measured by the clock on the wall, which may run ahead on a busy machine.
    assert 1 <= len(lines) <= 1 + time.time() - began


async def test_an_invalid_row_stays_and_holds_nothing_up(outbox, path, connection, rabbit, caplog):
    """An operator may correct it."""
    await add(outbox, connection, b"0", b"1")
    await connection.execute_fetchall(
        "UPDATE aio_pika_batch_outbox SET properties = 'no JSON' WHERE body = ?", [b"0"]
    )
    await connection.commit()
    async with relay(outbox, path, rabbit):
        await asyncio.sleep(1)
    assert [b"1"] == rabbit.waiting()
    assert 1 == await outbox.count(connection)
    assert "a row of the outbox is invalid" in caplog.text


async def test_a_row_that_cannot_be_encoded_is_tried_later(outbox, path, connection, rabbit):
    """Its headers don't fit into a frame. It stays, and the relay isn't busy with it."""
    await add(outbox, connection, b"0", headers={"x": "y" * 200_000})
    async with relay(outbox, path, rabbit):
        await asyncio.sleep(1)
        [row] = await connection.execute_fetchall("SELECT attempts FROM aio_pika_batch_outbox")
        # Its pause is measured by the clock on the wall, which may run ahead on a busy machine.
        assert 1 <= row[0] <= 3


async def test_a_lost_broker_costs_no_row_an_attempt(outbox, path, connection, rabbit):
    """The relay's worker waits for it, and observers see that."""
    recorder = EventRecorder()
    async with relay(outbox, path, rabbit, recorder) as running:
        with rabbit.down():
            await add(outbox, connection, b"0")
            await asyncio.sleep(5)
            assert not running.is_healthy
        await asyncio.sleep(60)
        assert running.is_healthy
    assert [b"0"] == rabbit.waiting()
    assert recorder.seen


async def test_an_unconfirmed_row_has_not_failed(outbox, path, connection, rabbit, caplog):
    """The broker has refused nothing, so the row is published again without a pause."""
    await add(outbox, connection, b"0")
    rabbit.broker.faults.on_publish(PublishFault.LOSE, times=1)
    async with relay(outbox, path, rabbit, publish_timeout=1, reconnect_delay=5):
        await asyncio.sleep(1.1)
        [row] = await connection.execute_fetchall("SELECT attempts FROM aio_pika_batch_outbox")
        assert (0,) == tuple(row)
        await asyncio.sleep(30)
    assert [b"0"] == rabbit.waiting()
    assert "not confirmed" not in caplog.text


async def test_a_drain_publishes_nothing_more(outbox, path, connection, rabbit):
    """What it has taken is finished; the rest stays."""
    await add(outbox, connection, *(b"%d" % number for number in range(100)))
    running = relay(outbox, path, rabbit, batch_size=10)
    await running.start()
    await running.stop()
    left = await outbox.count(connection)
    assert left + len(rabbit.waiting()) == 100
    assert left > 0


async def test_adding_needs_a_transaction(outbox):
    """Or else they would be published although the other effects fail."""
    connection = Connection(":memory:")
    connection._conn.isolation_level = None
    async with connection:
        with pytest.raises(ConfigurationError, match="there is no transaction"):
            await outbox.add(connection, [Publication(b"")])


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary()
    | st.decimals(allow_nan=False, allow_infinity=False)
    | st.datetimes(timezones=st.just(UTC)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@given(st.dictionaries(st.text(), values, max_size=4) | st.none(), st.none() | st.text(max_size=20))
@example({"$decimal": "1"}, None)
@example({"$$": {"$bytes": ["$x", {"$": None}]}}, None)
def test_a_row_is_what_was_published(headers, key):
    """Whatever its headers have."""
    publication = Publication(
        b"body", exchange="e", headers=headers, priority=3, message_id="id", mandatory=False
    )
    row = row_of(publication, key)
    columns = (1, *(row[each] for each in ("message_id", "exchange", "routing_key", "body")))
    made = Row(SOURCE, 1, (*columns, row["properties"], key))
    assert publication.properties == made.properties
    assert publication.mandatory == made.mandatory
    assert (headers or {}) == made.headers


def test_what_cannot_be_stored_is_refused():
    """When it is added, and not when it is published."""
    with pytest.raises(TypeError, match="object cannot be stored"):
        row_of(Publication(b"", headers={"x": object()}), None)


def test_a_plain_publication_has_no_properties_to_store():
    """But an id of its own."""
    row = row_of(Publication(bytearray(b"x"), routing_key="q"), None)
    assert row["properties"] is None
    assert row["body"] == b"x"
    columns = (1, *(row[each] for each in ("message_id", "exchange", "routing_key", "body")))
    published = [Row(SOURCE, tag, (*columns, None, None)).properties for tag in (1, 2)]
    assert [row["message_id"]] * 2 == [each.message_id for each in published]
    assert row["message_id"] != row_of(Publication(b"x"), None)["message_id"]


def test_special_values_are_stored_as_json():
    """So that they can be read in the table."""
    headers = {"when": datetime(2026, 1, 1, tzinfo=UTC), "much": Decimal("1.50"), "raw": b"\xff"}
    row = row_of(Publication(b"", headers=headers), None)
    assert (
        '{"headers": {"when": {"$datetime": "2026-01-01T00:00:00+00:00"},'
        ' "much": {"$decimal": "1.50"}, "raw": {"$bytes": "/w=="}}}' == row["properties"]
    )


@given(st.lists(st.none() | st.sampled_from("abc"), max_size=12))
def test_waves_have_each_key_once_and_keep_its_order(keys):
    """All rows are in one of them; those without a key in the first."""
    rows = [Row(SOURCE, at, (at, "", "", "", b"", None, key)) for at, key in enumerate(keys)]
    waves = _waves(rows)
    assert sorted(each.delivery_tag for wave in waves for each in wave) == list(range(len(keys)))
    for wave in waves:
        named = [each.key for each in wave if each.key is not None]
        assert len(set(named)) == len(named)
    for key in set(keys):
        order = [each.delivery_tag for wave in waves for each in wave if each.key == key]
        assert sorted(order) == order
        assert key is not None or set(order) == {
            each.delivery_tag for each in waves[0] if not each.key
        }


def test_lanes_are_the_same_everywhere():
    """Two relays of different versions must agree about them."""
    assert (61, 62, 64) == (lane_of("customer-1"), lane_of("é"), LANES)

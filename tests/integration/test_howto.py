"""Pages of docs/howto that need more than an in-memory broker do what they say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiosqlite

from aio_pika_batch.testing.broker import BatchBroker
from tests.integration.helpers import until

if TYPE_CHECKING:
    import asyncpg
    import pytest

HOWTO = Path(__file__).parents[2] / "docs" / "howto"
ORDERS: list[dict[str, Any]] = [{"number": number, "cents": 100} for number in range(50)]


def run(page: str, needs: str) -> dict[str, Any]:
    """Run those blocks of a page that need this, one after the other; returns their names."""
    names: dict[str, Any] = {"__name__": "howto"}
    _, *found = (HOWTO / page).read_text().split(f"<!-- test: on {needs} -->\n```python\n")
    for block in found:
        code = compile(block.partition("```")[0], page, "exec", dont_inherit=True)
        exec(code, names)  # noqa: S102  -- our own documentation
    return names


async def test_a_bulk_insert_writes_all_but_the_bad_rows(
    schema: tuple[asyncpg.Connection, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One row that the table does not take, and one that is written already, harm nobody else."""
    database, dsn = schema
    monkeypatch.setenv("DSN", dsn)
    names = run("bulk-insert.md", "postgres")
    await database.execute(
        "CREATE TABLE orders (number integer PRIMARY KEY, cents integer CHECK (cents > 0))"
    )
    await database.execute("INSERT INTO orders VALUES (7, 100)")

    async def written() -> bool:
        return await database.fetchval("SELECT count(*) FROM orders") == len(ORDERS)

    broker = BatchBroker()
    async with names["OrderWriter"](names["SETTINGS"], transport=broker.transport):
        for order in (*ORDERS, {"number": 50, "cents": 0}):
            broker.publish(json.dumps(order).encode(), routing_key="orders")
        await until(lambda: broker.broker.ready("orders.dead"))
        await until(written)

    [letter] = broker.drain("orders.dead")
    assert "CheckViolationError" in str(letter.headers["x-exception-type"])


def payments(*some: tuple[str, int], account: int = 1) -> list[tuple[bytes, str]]:
    """Bodies and ids."""
    return [(json.dumps({"cents": cents, "account": account}).encode(), key) for key, cents in some]


async def test_payments_in_sqlite_are_booked_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a consumer, and in the page's own test."""
    monkeypatch.chdir(tmp_path)
    names = run("exactly-once.md", "sqlite")
    await names["test_a_payment_that_is_delivered_twice_is_booked_once"]()

    settings = names["BatchConsumerSettings"](queue_name="payments", batch_timeout=0.1)
    broker = BatchBroker()
    async with names["Ledger"](settings, transport=broker.transport):
        for body, key in payments(("payment-1", 100), ("payment-2", 200), ("payment-2", 200)):
            broker.publish(body, routing_key="payments", message_id=key)
        await broker.settled()
    await names["prune"]()
    async with aiosqlite.connect("ledger.sqlite") as database:
        rows = await database.execute_fetchall("SELECT cents FROM payments")
        assert [(100,), (200,)] == list(rows)


async def test_payments_in_postgresql_are_booked_once(
    schema: tuple[asyncpg.Connection, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A payment to an account that comes later is booked later, and a bad one is never booked."""
    database, dsn = schema
    monkeypatch.setenv("DSN", dsn)
    names = run("exactly-once.md", "postgres")
    await database.execute("CREATE TABLE accounts (number integer PRIMARY KEY, cents integer)")
    await database.execute("INSERT INTO accounts VALUES (1, 0)")

    broker = BatchBroker()
    settings = names["SETTINGS"].replaced(batch_timeout=0.2)
    async with names["Payments"](settings, transport=broker.transport):
        booked = payments(("a", 100), ("b", 200), ("a", 100), ("c", -1), ("c", -1))
        for body, key in [*booked, *payments(("d", 400), account=2)]:
            broker.publish(body, routing_key="payments", message_id=key)
        await until(lambda: broker.broker.ready("payments.retry.1000"))
        await database.execute("INSERT INTO accounts VALUES (2, 0)")
        await broker.settled()

    rows = await database.fetch("SELECT cents FROM accounts ORDER BY number")
    assert [300, 400] == [row["cents"] for row in rows]
    letters = broker.drain("payments.dead")
    assert ["not a payment"] * 2 == [each.headers["x-dead-letter-detail"] for each in letters]


async def test_payments_in_a_session_are_booked_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a transaction of the user's."""
    monkeypatch.setenv("DSN", f"sqlite+aiosqlite:///{tmp_path / 'payments.sqlite'}")
    names = run("exactly-once.md", "session")
    settings = names["SETTINGS"].replaced(batch_timeout=0.1)
    broker = BatchBroker()
    async with names["Bookkeeper"](settings, transport=broker.transport):
        for body, key in payments(("a", 100), ("b", -1), ("a", 100), ("c", 300)):
            broker.publish(body, routing_key="payments", message_id=key)
        await broker.settled()
    async with aiosqlite.connect(tmp_path / "payments.sqlite") as database:
        rows = await database.execute_fetchall("SELECT cents FROM payments ORDER BY id")
        assert [(100,), (300,)] == list(rows)
    assert 1 == len(broker.drain("payments.dead"))


async def test_receipts_of_payments_are_published_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the relay of the page, after each commit."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AIO_PIKA_BATCH_URL", "memory://receipts")
    names = run("exactly-once.md", "outbox")
    broker = BatchBroker()
    names["ledger"]._transport = broker.transport
    names["ledger"].configure(batch_timeout=0.1)
    names["relay"]._transport._broker = broker.transport
    broker.declare("receipts")
    async with names["ledger"], names["relay"]:
        for body, key in payments(("a", 100), ("b", 200), ("a", 100)):
            broker.publish(body, routing_key="payments", message_id=key)
        await until(lambda: len(broker.broker.ready("receipts")) == 2)
    assert 2 == len(broker.drain("receipts"))

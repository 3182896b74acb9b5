"""Pages of docs/howto that need more than an in-memory broker do what they say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aio_pika_batch.testing.broker import BatchBroker
from tests.integration.helpers import until

if TYPE_CHECKING:
    import asyncpg
    import pytest

PAGE = Path(__file__).parents[2] / "docs" / "howto" / "bulk-insert.md"
ORDERS: list[dict[str, Any]] = [{"number": number, "cents": 100} for number in range(50)]


async def test_a_bulk_insert_writes_all_but_the_bad_rows(
    schema: tuple[asyncpg.Connection, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One row that the table does not take, and one that is written already, harm nobody else."""
    database, dsn = schema
    monkeypatch.setenv("DSN", dsn)
    names: dict[str, Any] = {"__name__": "bulk_insert"}
    source = PAGE.read_text().partition("<!-- test: on postgres -->\n```python\n")[2]
    exec(source.partition("```")[0], names)  # noqa: S102  -- our own documentation
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

"""Pages of docs/howto that need more than an in-memory broker do what they say."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiosqlite

from aio_pika_batch.testing.broker import BatchBroker
from aio_pika_batch.testing.rabbitmq.processes import kill_group, spawn
from tests.integration.helpers import PATIENCE, consumers, holds, publish, until

if TYPE_CHECKING:
    import asyncpg
    import pytest
    from aio_pika.abc import AbstractChannel

HOWTO = Path(__file__).parents[2] / "docs" / "howto"
DJANGO_PROJECT = {
    "manage.py": """
import os, sys
from django.core.management import execute_from_command_line

os.environ["DJANGO_SETTINGS_MODULE"] = "settings"
execute_from_command_line(sys.argv)
""",
    "settings.py": """
SECRET_KEY = "test"
INSTALLED_APPS = ["orders"]
DATABASES = {"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": "shop.sqlite"}}
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "handlers": {"console": {"class": "logging.StreamHandler"}},
    "root": {"handlers": ["console"], "level": "INFO"},
}
""",
    "orders/__init__.py": "",
    "orders/management/__init__.py": "",
    "orders/management/commands/__init__.py": "",
}
"""What `startproject` and `startapp` write, as far as it matters here."""

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
    """A row that the table refuses, and one that exists already, don't affect other rows."""
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


async def test_idempotent_handlers_have_one_effect(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tests of the page pass."""
    monkeypatch.chdir(tmp_path)
    names = run("idempotent-handlers.md", "sqlite")
    await names["test_an_old_state_changes_nothing"]()
    await names["test_a_payment_counts_once"]()


async def test_orders_are_stored_by_sqlalchemy(
    schema: tuple[asyncpg.Connection, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each once, and a row without a price is dead-lettered alone."""
    database, dsn = schema
    server, _, path = dsn.partition("?search_path=")
    driver = server.replace("postgresql://", "postgresql+psycopg://")
    monkeypatch.setenv("DATABASE_URL", f"{driver}?options=-csearch_path%3D{path}")
    names = run("sqlalchemy.md", "sqlalchemy")
    await names["test_an_order_is_stored_once"]()

    broker = BatchBroker()
    settings = names["SETTINGS"].replaced(batch_timeout=0.2)
    async with names["OrderImporter"](settings, transport=broker.transport):
        for order in (*ORDERS, ORDERS[7], {"number": 50, "cents": None}):
            broker.publish(json.dumps(order).encode(), routing_key="orders")
        await broker.settled()
    assert len(ORDERS) == await database.fetchval("SELECT count(*) FROM orders")
    assert 1 == len(broker.drain("orders.dead"))


async def test_a_command_of_django_stores_orders(
    tmp_path: Path, amqp_url: str, channel: AbstractChannel, name: str
) -> None:
    """The files of the page are a project: its test passes, and its command drains at SIGTERM."""
    page = (HOWTO / "django.md").read_text()
    block = r"<!-- test: on django; file (\S+) -->\n```python\n(.*?)```"
    for path, text in (DJANGO_PROJECT | dict(re.findall(block, page, re.DOTALL))).items():
        source = text.replace('="orders', f'="{name}')  # a queue of its own
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(source)
    environment = {**os.environ, "AIO_PIKA_BATCH_URL": amqp_url}

    def manage(*arguments: str) -> None:
        command = [sys.executable, "manage.py", *arguments]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert 0 == done.returncode, done.stderr

    manage("migrate", "--run-syncdb")
    manage("test", "orders")
    log = tmp_path / "log"
    command = [sys.executable, "manage.py", "consume_orders"]
    with log.open("wb") as output:
        consumer = spawn(command, cwd=tmp_path, env=environment, stdout=output)
    try:
        await until(lambda: b"consuming" in log.read_bytes(), what=log.read_text)
        bad = {"number": 50, "cents": -1}
        bodies = [json.dumps(order).encode() for order in (*ORDERS, ORDERS[7], bad)]
        await publish(channel, bodies, routing_key=name)
        await holds(amqp_url, f"{name}.dead", 1)
        await holds(amqp_url, name, 0)
        consumer.terminate()
        assert 0 == await asyncio.to_thread(consumer.wait, 2 * PATIENCE)
    finally:
        kill_group(consumer)
        for queue in (name, f"{name}.dead"):
            await channel.queue_delete(queue)
        await channel.exchange_delete(f"{name}.dlx")
    async with aiosqlite.connect(tmp_path / "shop.sqlite") as database:
        rows = await database.execute_fetchall("SELECT count(*) FROM orders_order")
        assert [(len(ORDERS),)] == list(rows)


async def test_a_consumer_replaces_a_loop_of_aio_pika(
    tmp_path: Path, amqp_url: str, channel: AbstractChannel, name: str
) -> None:
    """Both programs of the page consume from the same queue, which neither must delete."""
    page = (HOWTO.parent / "migrating.md").read_text()
    _, _, rest = page.partition("<!-- test: on aio-pika -->\n")
    programs = [block.partition("```")[0] for block in rest.split("```python\n")[1:3]]
    log = tmp_path / "log"
    try:
        for number, program in enumerate(programs):
            source = program.replace("amqp://guest:guest@localhost/", amqp_url)
            for each in ("orders", "shop", "order.created"):
                source = source.replace(f'"{each}', f'"{name}.{each}')
            (tmp_path / "program.py").write_text(source)
            command = [sys.executable, "-u", "program.py"]
            with log.open("ab") as output:
                process = spawn(command, cwd=tmp_path, stdout=output)
            try:
                await until(lambda: _consumes(amqp_url, f"{name}.orders"), what=log.read_text)
                await publish(
                    channel,
                    [b'{"id": %d}' % number],
                    exchange=f"{name}.shop",
                    routing_key=f"{name}.order.created",
                )
                line = f"order {number}"
                await until(lambda line=line: line in log.read_text(), what=log.read_text)
            finally:
                kill_group(process)
    finally:
        for queue in ("orders", "orders.dead"):
            await channel.queue_delete(f"{name}.{queue}")
        for exchange in ("shop", "orders.dlx"):
            await channel.exchange_delete(f"{name}.{exchange}")


async def _consumes(url: str, queue: str) -> bool:
    return await consumers(url, queue) == 1


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

"""Each log line looks as the page on observability shows it.

The page has a sample of every event, and one of these stories logs each sample.
"""

from __future__ import annotations

import ast
import asyncio
import logging
import re
import tempfile
from pathlib import Path

import pytest

import aio_pika_batch
from aio_pika_batch import Observer, Requeue, SessionLost, TopologyError
from aio_pika_batch.adapters.memory import ConnectFault, PublishFault
from aio_pika_batch.core.message import Properties
from aio_pika_batch.core.publication import Outcome
from aio_pika_batch.inbox import Inbox
from tests.unit.inbox.sqlite import Connection
from tests.unit.shell.helpers import (
    ACK,
    NACK,
    REQUEUE,
    QueueBroker,
    RecordingConsumer,
    ack,
    answering,
    first_then,
    numbered,
    taking,
)
from tests.unit.shell.scripted_transport import ScriptedTransport, raising

PAGE = Path(__file__).parents[3] / "docs" / "observability.md"
SOURCES = Path(aio_pika_batch.__file__).parent
LEVELS = ("debug", "info", "warning", "error", "exception")


class Importer(RecordingConsumer):
    """The consumer whose log is shown."""

    def __init__(self, *args, **given):
        super().__init__(*args, **{"queue_name": "orders", "batch_size": 3} | given)


def a_broker(*bodies, **properties):
    """A broker with some orders and a dead-letter queue."""
    rabbit = QueueBroker()
    rabbit.declare("orders")
    rabbit.put(*bodies, queue="orders", properties=Properties(**properties))
    return rabbit


async def a_life_with_a_lost_connection():
    """A connection is cut while a handler runs, and the broker is away for a while."""
    rabbit = a_broker(*numbered(3))
    async with Importer(taking(20), transport=rabbit.transport):
        await asyncio.sleep(1)
        rabbit.broker.faults.connect_fault = ConnectFault.UNREACHABLE
        rabbit.broker.cut()
        await asyncio.sleep(60)
        rabbit.broker.faults.connect_fault = ConnectFault.NONE
        await asyncio.sleep(60)


async def a_handler_that_fails():
    """Each time, until its messages are exhausted."""
    async with Importer(
        answering(error=KeyError("sku")), transport=a_broker(*numbered(3)).transport
    ):
        await asyncio.sleep(1)


async def bodies_that_are_not_json():
    """Each is dead-lettered."""

    async def decode(messages):
        for message in messages:
            message.json()
            yield ACK

    rabbit = a_broker(b"{x}")
    async with Importer(decode, transport=rabbit.transport, dead_letter_queue="orders.dead"):
        await asyncio.sleep(1)


async def a_handler_that_fails_for_good():
    """Its messages are dead-lettered together."""
    rabbit = a_broker(*numbered(3))
    async with Importer(
        answering(error=KeyError("sku")),
        transport=rabbit.transport,
        dead_letter_queue="orders.dead",
        unhandled_exception_action="NACK",
    ):
        await asyncio.sleep(1)


async def a_failing_message():
    """Isolation finds it in halves of the batch."""

    async def sunk(messages):
        if any(each.body == b"1" for each in messages):
            raise KeyError("sku")
        for _ in messages:
            yield ACK

    transport = a_broker(*numbered(3)).transport
    async with Importer(
        sunk, transport=transport, isolate_failures=True, unhandled_exception_action="NACK"
    ):
        await asyncio.sleep(1)


async def a_key_that_fails():
    """The message lacks the header with its key."""

    class Keyed(Importer):
        def batch_key(self, message):
            return message.headers["customer"]

    Keyed.__name__ = "Importer"
    transport = a_broker(b"0").transport
    async with Keyed(transport=transport, unhandled_exception_action="NACK"):
        await asyncio.sleep(1)


async def a_retry_count_that_is_none():
    """Another client has written the header."""
    rabbit = a_broker(b"0", headers={"x-retry-count": "many"})
    async with Importer(first_then(answering(REQUEUE), ack), transport=rabbit.transport):
        await asyncio.sleep(30)


async def copies_that_are_refused():
    """For longer than originals are held."""
    rabbit = a_broker(*numbered(3))
    rabbit.broker.faults.on_publish(PublishFault.REFUSE)
    async with Importer(
        answering(REQUEUE, REQUEUE, REQUEUE), transport=rabbit.transport, requeue_hold=1
    ):
        await asyncio.sleep(10)


async def a_publisher_that_cannot_connect():
    """The consuming connection exists, and the broker refuses another one."""
    rabbit = a_broker(*numbered(3))
    async with Importer(first_then(answering(REQUEUE, ACK, ACK), ack), transport=rabbit.transport):
        rabbit.broker.faults.connect_fault = ConnectFault.UNREACHABLE
        await asyncio.sleep(10)
        rabbit.broker.faults.connect_fault = ConnectFault.NONE
        await asyncio.sleep(10)


async def a_wait_queue_that_cannot_be_had():
    """The broker does not allow it."""
    script = ScriptedTransport()
    async with Importer(answering(Requeue(delay=5)), transport=script, batch_size=1):
        script.on_declare = raising(TopologyError("queue 'orders.retry.8000': not allowed"))
        script.last.feed(b"0")
        await asyncio.sleep(1)


async def an_outage_without_a_dead_letter_queue():
    """Messages are held, then they have no attempts left; others are bad."""
    for answer, given in (
        (answering(REQUEUE), {"requeue_delay": None}),
        (answering(REQUEUE), {"max_requeue_attempts": 0}),
        (answering(NACK), {}),
    ):
        rabbit = a_broker(*numbered(3))
        more = {"without_dead_letter": "retry"} | given
        async with Importer(answer, transport=rabbit.transport, **more):
            await asyncio.sleep(0.5)


async def what_cannot_be_settled():
    """Because of a bug: at once, and after a copy was confirmed at the second attempt."""
    for outcomes in ([], [Outcome.REFUSED]):
        script = ScriptedTransport()
        script.outcomes = outcomes
        script.on_settle = raising(ValueError("a bug"))
        async with Importer(
            answering(REQUEUE if outcomes else ACK), transport=script, batch_size=1
        ):
            script.last.feed(b"0")
            await asyncio.sleep(2)


async def a_publisher_that_closes_badly():
    """Its connection was cut."""
    script = ScriptedTransport()
    script.on_publisher_leave = raising(SessionLost("cut"))
    async with Importer(answering(REQUEUE), transport=script, batch_size=1):
        script.last.feed(b"0")
        await asyncio.sleep(1)


async def a_breaker():
    """From its opening to its closing."""
    rabbit = a_broker(*numbered(20))
    async with Importer(
        first_then(*[answering(error=KeyError("sku"))] * 7, ack),
        transport=rabbit.transport,
        breaker_threshold=0.5,
        requeue_delay=60,
    ):
        await asyncio.sleep(300)


async def an_observer_that_fails():
    """At its first event."""

    class Broken(Observer):
        def connected(self, origin, event):
            raise KeyError("sku")

    async with Importer(transport=a_broker().transport, observers=[Broken()]):
        pass


async def a_drain_that_is_cut_short():
    """By a handler that ignores its cancellation, by a second signal, by an endless `on_stop`."""

    class Stubborn(Importer):
        async def on_stop(self):
            await asyncio.sleep(3600)

    Stubborn.__name__ = "Importer"

    async def deaf(messages):
        end = asyncio.get_running_loop().time() + 60
        while asyncio.get_running_loop().time() < end:
            try:
                await asyncio.sleep(20)
            except asyncio.CancelledError:
                if len(messages) == 3:
                    raise
        yield ACK

    for bodies in (numbered(1), numbered(3)):
        consumer = Stubborn(
            deaf, transport=a_broker(*bodies).transport, batch_timeout=1, shutdown_timeout=2
        )
        await consumer.start()
        await asyncio.sleep(5)
        if len(bodies) == 3:
            consumer._lifecycle.abandon()
        await consumer.stop()
        await asyncio.sleep(100)


class Deadlock(Exception):
    """As PostgreSQL reports it."""

    sqlstate = "40P01"


class Unlucky(Connection):
    """Its first claim meets a deadlock."""

    async def execute_fetchall(self, sql, parameters=()):
        if sql.startswith("INSERT") and self.failures:
            raise self.failures.pop()
        return await super().execute_fetchall(sql, parameters)


Unlucky.__module__ = "aiosqlite.core"


async def an_inbox():
    """A claim meets a deadlock, a commit has an unknown outcome, and a message comes again."""
    inbox = Inbox("importer")
    Unlucky.failures = [Deadlock("deadlock detected")]
    commits = [raising(ConnectionResetError("lost"))]

    async def book(messages):
        async with Unlucky(path) as connection, inbox.transaction(connection, messages):
            if commits:
                connection.commit = commits.pop()
        for _ in messages:
            yield ACK

    rabbit = a_broker()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "test.sqlite")
        async with Connection(path) as connection:
            await inbox.create(connection)
        async with Importer(book, transport=rabbit.transport, batch_size=1):
            for _ in range(2):
                rabbit.publish(b"", routing_key="orders", message_id="order-1")
            await rabbit.settled()


STORIES = [
    a_life_with_a_lost_connection,
    a_handler_that_fails,
    a_failing_message,
    bodies_that_are_not_json,
    a_handler_that_fails_for_good,
    a_key_that_fails,
    a_retry_count_that_is_none,
    copies_that_are_refused,
    a_publisher_that_cannot_connect,
    a_wait_queue_that_cannot_be_had,
    an_outage_without_a_dead_letter_queue,
    what_cannot_be_settled,
    a_publisher_that_closes_badly,
    a_breaker,
    an_observer_that_fails,
    a_drain_that_is_cut_short,
    an_inbox,
]


def events():
    """Return every event that the shell can log: the constants in its source."""
    for path in SOURCES.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Call)
                and (
                    (
                        isinstance(node.func, ast.Attribute)
                        and node.func.attr in LEVELS
                        and ast.unparse(node.func.value).endswith("_log")
                    )
                    or (isinstance(node.func, ast.Name) and node.func.id == "tell")
                )
                and isinstance(node.args[0], ast.Constant)
            ):
                yield node.args[0].value


def samples():
    """Return every line that the page shows."""
    [block] = re.findall(r"<!-- log samples -->\n```\n(.*?)```", PAGE.read_text(), re.DOTALL)
    return block.splitlines()


@pytest.mark.usefixtures("jitter")
async def test_each_sample_is_logged_word_for_word(caplog):
    """One of the stories logs it."""
    caplog.set_level(logging.DEBUG, "aio_pika_batch")
    for story in STORIES:
        await story()
    logged = {
        f"{each.levelname:<8} {each.name}: {each.getMessage()}": each.event
        for each in caplog.records
        if each.name.startswith("aio_pika_batch") and hasattr(each, "event")
    }
    assert set() == set(events()) - {*logged.values()}, "no story tells it"
    shown = samples()
    assert [] == [line for line in shown if line not in logged]
    assert set() == set(events()) - {logged[line] for line in shown}, "no sample shows it"

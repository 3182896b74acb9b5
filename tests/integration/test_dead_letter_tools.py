"""Do dead letters survive being looked at, sent back and deleted, on a real broker and from a
terminal; and a replay that is killed?

Every command runs as a process, as its user would run it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest

from aio_pika_batch import BatchConsumer, BatchConsumerSettings, MessageResult, Nack
from aio_pika_batch.dead_letters import look
from aio_pika_batch.testing.rabbitmq.processes import kill_group, spawn
from aio_pika_batch.transport import Endpoint, open_transport
from tests.integration.helpers import holds, publish, ready, take_all, until

if TYPE_CHECKING:
    import subprocess
    from pathlib import Path

QUEUE_TYPES = pytest.mark.parametrize("queue_type", ["classic", "quorum"])

MODULE = """
from aio_pika_batch import BatchConsumer, BatchConsumerSettings, MessageResult

class Orders(BatchConsumer):
    async def process_messages(self, messages):
        for message in messages:
            yield MessageResult.ACK

orders = Orders(BatchConsumerSettings(**{settings!r}))
"""


@dataclass
class Command:
    """The command line, running."""

    process: subprocess.Popen[bytes]
    output: Path

    @property
    def said(self) -> str:
        return self.output.read_text()

    async def ended(self) -> int:
        """Wait for its end; return its exit code."""
        await until(lambda: self.process.poll() is not None, what=lambda: self.said)
        return self.process.returncode


@asynccontextmanager
async def command(folder: Path, *arguments: str):
    """Run the command line until the context is left."""
    output = folder / "output.txt"
    with output.open("wb") as out:
        process = spawn(
            [sys.executable, "-m", "aio_pika_batch", *arguments],
            cwd=folder,
            stdout=out,
            env={**os.environ, "COLUMNS": "80"},
        )
    try:
        yield Command(process, output)
    finally:
        kill_group(process)


async def said(folder: Path, *arguments: str, code: int = 0) -> str:
    """What a command says, once it has ended as it should."""
    async with command(folder, *arguments) as running:
        assert code == await running.ended(), running.said
        assert "Traceback" not in running.said
        return running.said


def module(folder: Path, url: str, queue: str, **settings: object) -> str:
    """Write a module with a consumer; return its target."""
    given = {"url": url, "queue_name": queue, **settings}
    (folder / "shop.py").write_text(MODULE.format(settings=given))
    return "shop:orders"


class Refusing(BatchConsumer):
    """Wants none of them."""

    async def process_messages(self, messages):
        for number, _ in enumerate(messages):
            yield Nack("no such order") if number % 2 else MessageResult.REQUEUE


def header(queue: str) -> dict[str, object]:
    """What a letter of ours says."""
    return {
        "x-dead-letter-reason": "rejected",
        "x-original-exchange": "",
        "x-original-routing-key": queue,
        "x-original-queue": queue,
        "x-dead-lettered-at": datetime.now(UTC),
    }


async def bury(channel, dlq: str, queue: str, count: int, queue_type: str, **more) -> list[bytes]:
    """Declare a queue and its dead-letter queue, and put letters there."""
    await channel.declare_queue(queue, durable=True)
    arguments = {"x-queue-type": queue_type, **more}
    await channel.declare_queue(dlq, durable=True, arguments=arguments)
    bodies = [b"%d" % number for number in range(count)]
    await publish(channel, bodies, routing_key=dlq, headers=header(queue))
    return bodies


async def test_from_the_handlers_no_back_to_work(amqp_url, name, channel, tmp_path):
    """List says why, show says what, replay brings back, purge deletes; as a user does it."""
    settings = {
        "queue_type": "quorum",
        "dead_letter_queue": f"{name}.dlq",
        "exchange_name": f"{name}.shop",
        "exchange_type": "topic",
        "routing_key": ["order.*"],
        "max_requeue_attempts": 1,
    }
    target = module(tmp_path, amqp_url, name, **settings)
    refusing = Refusing(BatchConsumerSettings(url=amqp_url, queue_name=name, **settings))
    async with refusing:
        for body in (b'{"order": 17}', b"\xff\x00"):
            await publish(channel, [body], exchange=f"{name}.shop", routing_key="order.created")
        await holds(amqp_url, f"{name}.dlq", 2)

    listed = await said(tmp_path, "dlq", "list", target)
    assert f"{name}.dlq" in listed
    assert "exhausted" in listed
    shown = await said(tmp_path, "dlq", "show", target)
    assert '"order": 17' in shown
    assert "ff 00" in shown
    assert f"to exchange '{name}.shop', key 'order.created'" in shown
    dry = await said(tmp_path, "dlq", "replay", target, "--dry-run")
    assert "2 of 2 letters would be replayed" in dry
    await holds(amqp_url, f"{name}.dlq", 2)
    told = await said(tmp_path, "dlq", "replay", target, "--limit", "1")
    assert "1 of 2 letters replayed" in told
    await holds(amqp_url, name, 1)
    [message] = await take_all(channel, name, 1)
    assert "order.created" == message.routing_key
    assert set() == set(message.headers) - {"x-delivery-count"}

    asked = await said(tmp_path, "dlq", "purge", target, code=2)
    assert "1 of 1 letters would be deleted" in asked
    assert "--yes" in asked
    await holds(amqp_url, f"{name}.dlq", 1)
    purged = await said(tmp_path, "dlq", "purge", target, "--yes")
    assert "1 of 1 letters deleted" in purged
    await holds(amqp_url, f"{name}.dlq", 0)


async def test_a_brokers_own_letters_can_be_replayed(amqp_url, name, channel, tmp_path):
    """It goes by what x-death says."""
    arguments = {
        "x-message-ttl": 1,
        "x-dead-letter-exchange": "",
        "x-dead-letter-routing-key": f"{name}.dlq",
    }
    await channel.declare_queue(f"{name}.dlq", durable=True)
    await channel.declare_queue(name, durable=True, arguments=arguments)
    where = ("--queue", f"{name}.dlq", "--url", amqp_url)
    await publish(channel, [b"0"], routing_key=name)
    for _ in range(2):  # and again: the broker must not take it for a cycle
        await holds(amqp_url, f"{name}.dlq", 1)
        assert "expired" in await said(tmp_path, "dlq", "list", *where)
        told = await said(tmp_path, "dlq", "replay", *where)
        assert "1 of 1 letters replayed" in told
    await holds(amqp_url, f"{name}.dlq", 1)


@QUEUE_TYPES
async def test_looking_keeps_letters_and_their_order(amqp_url, name, channel, queue_type):
    """As far as it is looked, and beyond."""
    dlq = f"{name}.dlq"
    bodies = await bury(channel, dlq, name, 6, queue_type)
    transport = open_transport(Endpoint(url=amqp_url))
    for _ in range(3):
        looked = await look(transport, dlq, most=4)
        assert bodies[:4] == [letter.message.body for letter in looked.letters]
        assert (6, None) == (looked.ready, looked.ended)
        await holds(amqp_url, dlq, 6)
    assert bodies == [message.body for message in await take_all(channel, dlq, 6)]


async def test_a_letter_is_never_looked_at_until_it_is_dropped(amqp_url, name, channel):
    """The broker says which limit there is, and looking ends five deliveries before."""
    dlq = f"{name}.dlq"
    await bury(channel, dlq, name, 1, "quorum", **{"x-delivery-limit": 7})
    transport = open_transport(Endpoint(url=amqp_url))
    ends = []
    for _ in range(6):
        ends.append((await look(transport, dlq)).ended)
        await holds(amqp_url, dlq, 1)
    counted = [each for each in ends if each is not None]
    assert all("drops it after 7" in each for each in counted)
    assert ends[:2] == [None, None]
    if transport.broker_version < (4, 3):
        assert 4 == len(counted)


# --- killed, and interrupted -----------------------------------------------------

MANY = 1000


@QUEUE_TYPES
async def test_a_replay_that_is_killed_loses_nothing(
    amqp_url, name, channel, proxy, tmp_path, queue_type
):
    """With kill -9, in the middle: every letter is there, or back, and can be replayed again."""
    dlq = f"{name}.dlq"
    bodies = await bury(channel, dlq, name, MANY, queue_type)
    proxy.latency(0.02)
    where = ("--queue", dlq)
    async with command(tmp_path, "dlq", "replay", *where, "--url", proxy.url(amqp_url)) as running:

        async def halfway() -> bool:
            assert running.process.poll() is None, running.said
            return 200 <= await ready(amqp_url, name)

        await until(halfway)
        running.process.send_signal(signal.SIGKILL)
        await running.ended()
    back = await ready(amqp_url, name)
    assert 200 <= back < MANY

    async def all_there() -> bool:
        return MANY <= await ready(amqp_url, name) + await ready(amqp_url, dlq)

    await until(all_there)
    await said(tmp_path, "dlq", "replay", *where, "--url", amqp_url)
    await holds(amqp_url, dlq, 0)
    there = [message.body for message in await take_all(channel, name, MANY)]
    assert set(bodies) == set(there)
    assert len(there) - MANY <= 100  # what was confirmed and not yet acknowledged


async def test_a_replay_that_is_interrupted_repeats_nothing(
    amqp_url, name, channel, proxy, tmp_path
):
    """Ctrl-C: what is on its way is confirmed, and acknowledged; the rest stays, in its order."""
    dlq = f"{name}.dlq"
    bodies = await bury(channel, dlq, name, MANY, "quorum")
    proxy.latency(0.02)
    async with command(
        tmp_path, "dlq", "replay", "--queue", dlq, "--url", proxy.url(amqp_url)
    ) as running:

        async def begun() -> bool:
            assert running.process.poll() is None, running.said
            return 0 < await ready(amqp_url, name)

        await until(begun)
        running.process.send_signal(signal.SIGINT)
        assert 130 == await running.ended(), running.said
        assert "interrupted" in running.said

    async def all_there() -> bool:
        return MANY == await ready(amqp_url, name) + await ready(amqp_url, dlq)

    await until(all_there)
    back = [message.body for message in await take_all(channel, name, 1)]
    left = [message.body for message in await take_all(channel, dlq, MANY - len(back))]
    assert bodies == back + left


# --- the topology ----------------------------------------------------------------


@pytest.mark.needs_node
async def test_rabbitmq_imports_what_a_consumer_needs(amqp_url, name, channel, rabbitmq, tmp_path):
    """`rabbitmqctl import_definitions`, and the consumer starts without declaring anything."""
    settings = {
        "queue_type": "quorum",
        "dead_letter_queue": f"{name}.dlq",
        "exchange_name": f"{name}.shop",
        "exchange_type": "topic",
        "routing_key": ["order.*"],
        "requeue_delay": 1.0,
        "declare": False,
    }
    target = module(tmp_path, amqp_url, name, **settings)
    missing = await said(tmp_path, "check", target, code=1)
    assert missing.count("error: ") == 7
    text = await said(tmp_path, "topology", target, "--format", "definitions")
    file = tmp_path / "definitions.json"
    file.write_text(text)
    rabbitmq.rabbitmqctl("import_definitions", str(file))
    checked = await said(tmp_path, "check", target)
    assert "error: " not in checked
    looked = await said(tmp_path, "topology", target, "--dry-run")
    assert "missing" not in looked
    assert "differs" not in looked
    consumer = Refusing(BatchConsumerSettings(url=amqp_url, queue_name=name, **settings))
    async with consumer:
        await publish(channel, [b"0"], exchange=f"{name}.shop", routing_key="order.created")
        await until(lambda: ready(amqp_url, f"{name}.retry.1000"))


async def test_apply_declares_and_a_dry_run_says_what_differs(amqp_url, name, channel, tmp_path):
    """In words that say which queue, and what to do."""
    target = module(tmp_path, amqp_url, name, dead_letter_queue=f"{name}.dlq")
    dry = await said(tmp_path, "topology", target, "--dry-run", "--format", "json")
    assert ["missing", "missing", "missing", "cannot be seen"] == [
        each["state"] for each in json.loads(dry)
    ]
    assert -1 == await ready(amqp_url, name)
    assert "Declared." in await said(tmp_path, "topology", target, "--apply")
    assert 0 == await ready(amqp_url, name)
    target = module(tmp_path, amqp_url, name, queue_arguments={"x-max-length": 7})
    for arguments in (("topology", target, "--dry-run"), ("check", target)):
        told = await said(tmp_path, *arguments, code=1)
        assert "inequivalent arg 'x-max-length'" in told


async def test_where_there_is_no_broker(tmp_path):
    """Exit code 3, and one line."""
    target = module(tmp_path, "amqp://guest:sesame@127.0.0.1:1/", "orders")
    for arguments in (
        ("check", target),
        ("topology", target, "--dry-run"),
        ("dlq", "list", "--queue", "q", "--url", "amqp://guest:sesame@127.0.0.1:1/"),
    ):
        told = await said(tmp_path, *arguments, code=3)
        assert 1 == len(told.splitlines())
        assert "sesame" not in told

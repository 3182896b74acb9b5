"""Tests of the `dlq` and `topology` commands on a real broker, also when a replay is killed.

Every command runs as a process.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest
from yarl import URL

from aio_pika_batch import (
    BatchConsumer,
    BatchConsumerSettings,
    MessageResult,
    Nack,
    queue_browser,
)
from aio_pika_batch.dead_letters import look
from aio_pika_batch.testing.rabbitmq.processes import kill_group, spawn
from aio_pika_batch.transport import Endpoint, open_transport
from tests.integration.helpers import (
    add_user,
    holds,
    publish,
    ready,
    take_all,
    until,
)

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
    """A running command."""

    process: subprocess.Popen[bytes]
    output: Path

    @property
    def text(self) -> str:
        return self.output.read_text()

    async def ended(self) -> int:
        """Wait until it exits, and return its exit code."""
        await until(lambda: self.process.poll() is not None, what=lambda: self.text)
        return self.process.returncode


@asynccontextmanager
async def command(folder: Path, *arguments: str):
    """Run a command until the context is left."""
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


async def output_of(folder: Path, *arguments: str, code: int = 0) -> str:
    """Run a command, check its exit code, and return its output."""
    async with command(folder, *arguments) as running:
        assert code == await running.ended(), running.text
        assert "Traceback" not in running.text
        return running.text


def module(folder: Path, url: str, queue: str, **settings: object) -> str:
    """Write a module with a consumer; return its target."""
    given = {"url": url, "queue_name": queue, **settings}
    (folder / "shop.py").write_text(MODULE.format(settings=given))
    return "shop:orders"


class Refusing(BatchConsumer):
    """Refuses every message."""

    async def process_messages(self, messages):
        for number, _ in enumerate(messages):
            yield Nack("no such order") if number % 2 else MessageResult.REQUEUE


def header(queue: str) -> dict[str, object]:
    """Return the headers of a dead letter."""
    return {
        "x-dead-letter-reason": "rejected",
        "x-original-exchange": "",
        "x-original-routing-key": queue,
        "x-original-queue": queue,
        "x-dead-lettered-at": datetime.now(UTC),
    }


async def dead_letter(
    channel, dlq: str, queue: str, count: int, queue_type: str, **more
) -> list[bytes]:
    """Declare a queue and its dead-letter queue, and publish dead letters."""
    await channel.declare_queue(queue, durable=True)
    arguments = {"x-queue-type": queue_type, **more}
    await channel.declare_queue(dlq, durable=True, arguments=arguments)
    bodies = [b"%d" % number for number in range(count)]
    await publish(channel, bodies, routing_key=dlq, headers=header(queue))
    return bodies


async def test_refused_messages_are_listed_shown_replayed_and_purged(
    amqp_url, name, channel, tmp_path
):
    """As a user does it."""
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

    listed = await output_of(tmp_path, "dlq", "list", target)
    assert f"{name}.dlq" in listed
    assert "exhausted" in listed
    shown = await output_of(tmp_path, "dlq", "show", target)
    assert '"order": 17' in shown
    assert "ff 00" in shown
    assert f"to exchange '{name}.shop', key 'order.created'" in shown
    dry = await output_of(tmp_path, "dlq", "replay", target, "--dry-run")
    assert "2 of 2 dead letters would be replayed" in dry
    await holds(amqp_url, f"{name}.dlq", 2)
    report = await output_of(tmp_path, "dlq", "replay", target, "--limit", "1")
    assert "1 of 2 dead letters replayed" in report
    await holds(amqp_url, name, 1)
    [message] = await take_all(channel, name, 1)
    assert "order.created" == message.routing_key
    assert set() == set(message.headers) - {"x-delivery-count"}

    asked = await output_of(tmp_path, "dlq", "purge", target, code=2)
    assert "1 of 1 dead letters would be deleted" in asked
    assert "--yes" in asked
    await holds(amqp_url, f"{name}.dlq", 1)
    purged = await output_of(tmp_path, "dlq", "purge", target, "--yes")
    assert "1 of 1 dead letters deleted" in purged
    await holds(amqp_url, f"{name}.dlq", 0)


@pytest.mark.long
async def test_messages_that_the_broker_dead_lettered_can_be_replayed(
    amqp_url, name, channel, tmp_path
):
    """Their origin is in x-death."""
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
        assert "expired" in await output_of(tmp_path, "dlq", "list", *where)
        report = await output_of(tmp_path, "dlq", "replay", *where)
        assert "1 of 1 dead letters replayed" in report
    await holds(amqp_url, f"{name}.dlq", 1)


@pytest.mark.long
@pytest.mark.needs_node
@pytest.mark.parametrize("exchange", ["", "shop"])
async def test_a_replay_without_permission_says_so(
    rabbitmq, amqp_url, name, channel, tmp_path, exchange
):
    """No copy is sent, and no letter may be in both queues."""
    dlq = f"{name}.dlq"
    shop = f"{name}.shop" if exchange else ""
    await dead_letter(channel, dlq, name, 0, "quorum")
    if shop:
        await channel.declare_exchange(shop, "topic", durable=True)
    headers = {**header(name), "x-original-exchange": shop}
    await publish(
        channel, [b"%d" % number for number in range(250)], routing_key=dlq, headers=headers
    )
    await asyncio.to_thread(add_user, rabbitmq, name, "secret", ".*", f"^{dlq}$", ".*")
    url = str(URL(amqp_url).with_user(name).with_password("secret"))
    text = await output_of(tmp_path, "dlq", "replay", "--queue", dlq, "--url", url, code=1)
    assert "0 of 250 dead letters replayed; 0 did not match, 250 failed" in text
    words = " ".join(text.split())
    assert f"250 stay in {dlq}: publishing to exchange '{shop or 'amq.default'}'" in words
    assert "write permission" in words
    assert "both" not in words
    await holds(amqp_url, dlq, 250)


@QUEUE_TYPES
async def test_looking_keeps_dead_letters_and_their_order(amqp_url, name, channel, queue_type):
    """Those that were read, and the others."""
    dlq = f"{name}.dlq"
    bodies = await dead_letter(channel, dlq, name, 6, queue_type)
    transport = open_transport(Endpoint(url=amqp_url))
    for _ in range(3):
        looked = await look(transport, dlq, most=4)
        assert bodies[:4] == [letter.message.body for letter in looked.letters]
        assert (6, None) == (looked.ready, looked.ended)
        await holds(amqp_url, dlq, 6)
    assert bodies == [message.body for message in await take_all(channel, dlq, 6)]


@QUEUE_TYPES
async def test_looking_at_many_keeps_their_order(monkeypatch, amqp_url, name, channel, queue_type):
    """Each part of them goes to a consumer of its own. A quorum queue orders 32 parts."""
    monkeypatch.setattr(queue_browser, "WINDOW", 5)
    monkeypatch.setattr(queue_browser, "RETURNED_AT_ONCE", 150)
    count = 150
    dlq = f"{name}.dlq"
    bodies = await dead_letter(channel, dlq, name, count, queue_type)
    transport = open_transport(Endpoint(url=amqp_url))
    for _ in range(2):
        looked = await look(transport, dlq, most=None)
        assert bodies == [letter.message.body for letter in looked.letters]
        await holds(amqp_url, dlq, count)


async def test_looking_stops_before_the_delivery_limit_drops_a_dead_letter(amqp_url, name, channel):
    """Five deliveries before the limit, which the broker reveals."""
    dlq = f"{name}.dlq"
    await dead_letter(channel, dlq, name, 1, "quorum", **{"x-delivery-limit": 7})
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


@pytest.mark.long
@QUEUE_TYPES
async def test_a_replay_that_is_killed_loses_nothing(
    amqp_url, name, channel, proxy, tmp_path, queue_type
):
    """By SIGKILL: every dead letter is in one of the queues, and can be replayed again."""
    dlq = f"{name}.dlq"
    bodies = await dead_letter(channel, dlq, name, MANY, queue_type)
    proxy.latency(0.1)  # so slow that it does not end before the signal
    where = ("--queue", dlq)
    async with command(tmp_path, "dlq", "replay", *where, "--url", proxy.url(amqp_url)) as running:

        async def halfway() -> bool:
            assert running.process.poll() is None, running.text
            return 200 <= await ready(amqp_url, name)

        await until(halfway)
        running.process.send_signal(signal.SIGKILL)
        await running.ended()
    back = await ready(amqp_url, name)
    assert 200 <= back < MANY

    async def all_there() -> bool:
        return MANY <= await ready(amqp_url, name) + await ready(amqp_url, dlq)

    await until(all_there)
    await output_of(tmp_path, "dlq", "replay", *where, "--url", amqp_url)
    await holds(amqp_url, dlq, 0)
    there = [message.body for message in await take_all(channel, name, MANY)]
    assert set(bodies) == set(there)
    assert len(there) - MANY <= 100  # confirmed, but not yet acknowledged


@pytest.mark.long
async def test_a_replay_that_is_interrupted_repeats_nothing(
    amqp_url, name, channel, proxy, tmp_path
):
    """By Ctrl-C: copies in progress are finished, and the rest stays in order."""
    dlq = f"{name}.dlq"
    bodies = await dead_letter(channel, dlq, name, MANY, "quorum")
    proxy.latency(0.1)  # so slow that it does not end before the signal
    async with command(
        tmp_path, "dlq", "replay", "--queue", dlq, "--url", proxy.url(amqp_url)
    ) as running:

        async def begun() -> bool:
            assert running.process.poll() is None, running.text
            return 0 < await ready(amqp_url, name)

        await until(begun)
        running.process.send_signal(signal.SIGINT)
        assert 130 == await running.ended(), running.text
        assert "interrupted" in running.text

    async def all_there() -> bool:
        return MANY == await ready(amqp_url, name) + await ready(amqp_url, dlq)

    await until(all_there)
    back = [message.body for message in await take_all(channel, name, 1)]
    left = [message.body for message in await take_all(channel, dlq, MANY - len(back))]
    assert bodies == back + left


# --- the topology ----------------------------------------------------------------


@pytest.mark.long
@pytest.mark.needs_node
async def test_rabbitmq_imports_the_definitions_of_a_consumer(
    amqp_url, name, channel, rabbitmq, tmp_path
):
    """Then the consumer starts without declaring anything."""
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
    missing = await output_of(tmp_path, "check", target, code=1)
    assert missing.count("error: ") == 7
    text = await output_of(tmp_path, "topology", target, "--format", "definitions")
    file = tmp_path / "definitions.json"
    file.write_text(text)
    rabbitmq.rabbitmqctl("import_definitions", str(file))
    checked = await output_of(tmp_path, "check", target)
    assert "error: " not in checked
    looked = await output_of(tmp_path, "topology", target, "--dry-run")
    assert "missing" not in looked
    assert "differs" not in looked
    consumer = Refusing(BatchConsumerSettings(url=amqp_url, queue_name=name, **settings))
    async with consumer:
        await publish(channel, [b"0"], exchange=f"{name}.shop", routing_key="order.created")
        await until(lambda: ready(amqp_url, f"{name}.retry.1000"))


@pytest.mark.long
async def test_apply_declares_and_a_dry_run_shows_what_differs(amqp_url, name, channel, tmp_path):
    """With the broker's words."""
    target = module(tmp_path, amqp_url, name, dead_letter_queue=f"{name}.dlq")
    dry = await output_of(tmp_path, "topology", target, "--dry-run", "--format", "json")
    assert ["missing", "missing", "missing", "cannot be seen"] == [
        each["state"] for each in json.loads(dry)
    ]
    assert -1 == await ready(amqp_url, name)
    assert "Declared." in await output_of(tmp_path, "topology", target, "--apply")
    assert 0 == await ready(amqp_url, name)
    target = module(tmp_path, amqp_url, name, queue_arguments={"x-max-length": 7})
    for arguments in (("topology", target, "--dry-run"), ("check", target)):
        report = await output_of(tmp_path, *arguments, code=1)
        assert "inequivalent arg 'x-max-length'" in report


async def test_commands_without_a_broker_exit_with_3(tmp_path):
    """With one line, and without the password."""
    target = module(tmp_path, "amqp://guest:sesame@127.0.0.1:1/", "orders")
    for arguments in (
        ("check", target),
        ("topology", target, "--dry-run"),
        ("dlq", "list", "--queue", "q", "--url", "amqp://guest:sesame@127.0.0.1:1/"),
    ):
        report = await output_of(tmp_path, *arguments, code=3)
        assert 1 == len(report.splitlines())
        assert "sesame" not in report

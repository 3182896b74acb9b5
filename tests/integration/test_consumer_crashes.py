"""A message that kills its process takes no other with it, and nothing else looks like one."""

from __future__ import annotations

import asyncio
import json
import signal
from collections import Counter

import pytest

from aio_pika_batch import BatchConsumer, BatchConsumerSettings, MessageResult
from tests.integration.helpers import (
    command_line,
    declare_dead_letters,
    holds,
    publish,
    ready,
    shop,
    take_all,
    until,
)

PREFIX = "AIO_PIKA_BATCH_"


async def test_a_message_that_kills_its_process_takes_no_other_with_it(
    channel, amqp_url, name, tmp_path
) -> None:
    """Two supervised processes handle the fifty others; it is dead-lettered as crashed."""
    dlx, dlq = await declare_dead_letters(channel, name)
    arguments = {"x-queue-type": "quorum"}
    await channel.declare_queue(name, durable=True, arguments=arguments)
    kinds = [*["good"] * 25, "lethal", *["good"] * 25]
    messages = [{"id": number, "kind": kind} for number, kind in enumerate(kinds)]
    await publish(channel, [json.dumps(each).encode() for each in messages], routing_key=name)
    settings = {
        f"{PREFIX}QUEUE_TYPE": "quorum",
        f"{PREFIX}BATCH_SIZE": "10",
        f"{PREFIX}BATCH_TIMEOUT": "0.1",
        f"{PREFIX}DEAD_LETTER_EXCHANGE": dlx,
        f"{PREFIX}BROKER_DEAD_LETTERS": "false",
    }
    run = shop("--processes", "2")
    async with command_line(tmp_path, *run, queue=name, url=amqp_url, **settings) as program:
        await holds(amqp_url, dlq, 1, within=120)
        good = {number for number in range(51) if number != 25}
        await until(lambda: set(program.of("done")) == good, what=lambda: program.printed)
        program.send(signal.SIGTERM)
        assert 0 == await program.ended(), program.printed
        assert "they aren't handled any more" in program.printed
    [letter] = await take_all(channel, dlq, 1)
    assert 25 == json.loads(letter.body)["id"]
    assert "crashed" == letter.headers["x-dead-letter-reason"]
    assert 0 == await ready(amqp_url, name)


@pytest.mark.long
@pytest.mark.usefixtures("on_both_wires")
async def test_cut_connections_and_restarts_dont_count_as_crashes(
    channel, amqp_url, name, proxy
) -> None:
    """Thirty cuts and ten restarts of two consumers, each of which has a memory of its own."""
    dlx, dlq = await declare_dead_letters(channel, name)
    handled: Counter[bytes] = Counter()

    class Slow(BatchConsumer):
        async def process_messages(self, messages):
            await asyncio.sleep(0.2)
            handled.update(message.body for message in messages)
            for _ in messages:
                yield MessageResult.ACK

    settings = BatchConsumerSettings(
        url=proxy.url(amqp_url),
        queue_name=name,
        queue_type="quorum",
        batch_size=3,
        batch_timeout=0.05,
        prefetch_count=20,
        reconnect_delay=0.05,
        dead_letter_exchange=dlx,
        broker_dead_letters=False,
    )
    bodies: list[bytes] = []
    for turn in range(10):
        both = [Slow(settings), Slow(settings)]
        for consumer in both:
            await consumer.start()
        more = [b"%d-%d" % (turn, number) for number in range(30)]
        bodies += more
        await publish(channel, more, routing_key=name)
        for _ in range(3):
            await asyncio.sleep(0.3)
            proxy.cut()
        for consumer in both:
            await consumer.stop()
    async with Slow(settings):
        await until(lambda: set(bodies) == set(handled), within=90)
    letters = await take_all(channel, dlq, await ready(amqp_url, dlq))
    assert [] == [each.headers for each in letters]

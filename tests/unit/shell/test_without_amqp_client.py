"""A consumer on `memory://` needs no AMQP client."""

from __future__ import annotations

import subprocess
import sys

STORY = """
import asyncio, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"aio_pika", "aiormq", "pamqp"}:
            raise ImportError(f"{name} is not installed")

sys.meta_path.insert(0, Refuse())

from aio_pika_batch import BatchConsumer, BatchConsumerSettings, ConfigurationError, MessageResult
from aio_pika_batch.testing.virtual_time import run

def settings(url):
    return BatchConsumerSettings(
        _env_file=None, url=url, queue_name="jobs", batch_size=3, dead_letter_queue="dead"
    )

class Importer(BatchConsumer):
    def __init__(self, *args):
        super().__init__(*args)
        self.seen = []

    async def _run_internal(self, channel, queue, settings, stop_event, log):
        await channel.declare_exchange("staging", type="fanout")
        await super()._run_internal(channel, queue, settings, stop_event, log)

    async def process_messages(self, messages):
        for message in messages:
            self.seen.append((message.body, message.retry_count))
            yield {b"0": MessageResult.ACK, b"1": MessageResult.NACK}.get(
                message.body, MessageResult.REQUEUE
            )

async def main():
    consumer = Importer(settings("memory://"))
    async with consumer:
        for number in range(3):
            await consumer.publish(b"%d" % number, routing_key="jobs")
        await asyncio.sleep(60)
    return consumer.seen

print(run(main()))
try:
    Importer(settings("amqp://guest:secret@localhost/"))
except ConfigurationError as error:
    print(error)
"""


def test_a_consumer_on_memory_runs_without_an_amqp_client():
    """One on `amqp://` says what is missing, without the password."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", STORY], capture_output=True, text=True, check=False
    )
    assert 0 == done.returncode, done.stderr
    seen, refused = done.stdout.splitlines()
    tries = [(b"2", count) for count in range(4)]
    assert str([(b"0", 0), (b"1", 0), *tries]) == seen
    assert "the transport for amqp:// cannot be imported" in refused
    assert "is not installed" in refused
    assert "secret" not in refused

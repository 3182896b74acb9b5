"""A pipeline: several sources, merged into one staging exchange, written by one writer.

Three SourceConsumers read from an exchange each and forward to the staging exchange; a
WriterConsumer drains the staging queue into a sink. Try it::

    python examples/fan_in/main.py
    python examples/fan_in/main.py --modern
    python examples/fan_in/main.py --url amqp://guest:guest@localhost/
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import secrets
import sys
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from typing import Any, TypeAlias

from aio_pika_batch import (
    BatchConsumer,
    BatchConsumerSettings,
    ConsumerSettings,
    Message,
    MessageResult,
    Outcome,
    Publication,
    Result,
    WorkerSession,
)
from aio_pika_batch.logs import KeywordLogger

Native: TypeAlias = Any  # aio-pika's own objects, or what stands in for them in memory

RUN = f"example.fan-in.{secrets.token_hex(4)}"
STAGING = f"{RUN}.staging"
SOURCES = [f"{RUN}.{kind}" for kind in ("user-events", "impressions", "search-logs")]
EVENTS_PER_SOURCE = 40


def envelope(source: str, message: Message) -> bytes:
    """Wrap a message, so that the writer knows where it came from."""
    return json.dumps({"source": source, "payload": message.body.decode()}).encode()


class SourceConsumer(BatchConsumer):
    """Reads from its exchange, forwards to staging, over the broker library's own channel."""

    async def _run_internal(
        self,
        channel: Native,
        queue: Native,
        settings: ConsumerSettings,
        stop_event: asyncio.Event,
        log: KeywordLogger,
    ) -> None:
        """Called for each session of each worker; `super()` consumes until the session ends."""
        self._staging = await channel.declare_exchange(STAGING, type="fanout", durable=True)
        await super()._run_internal(channel, queue, settings, stop_event, log)

    async def process_messages(self, messages: Sequence[Message]) -> AsyncIterator[Result]:
        """Forward one by one; what a failure leaves undecided is requeued."""
        message_class = native_message(self.settings.url)
        for message in messages:
            body = envelope(self.settings.exchange_name or "", message)
            await self._staging.publish(message_class(body=body), routing_key="")
            yield MessageResult.ACK


class ModernSourceConsumer(BatchConsumer):
    """The same with `publish_many`: one round trip per batch, and an outcome for each message."""

    async def on_session(self, session: WorkerSession) -> None:
        """Declare what the settings do not cover."""
        native = await session.native()
        await native.channel.declare_exchange(STAGING, type="fanout", durable=True)

    async def process_messages(self, messages: Sequence[Message]) -> AsyncIterator[Result]:
        """Forward all at once; an original goes only if the broker has confirmed its envelope."""
        source = self.settings.exchange_name or ""
        outcomes = await self.publish_many(
            [Publication(envelope(source, each), exchange=STAGING) for each in messages]
        )
        for outcome in outcomes:
            confirmed = outcome is Outcome.CONFIRMED
            yield MessageResult.ACK if confirmed else MessageResult.REQUEUE


class WriterConsumer(BatchConsumer):
    """Drains the staging queue into a sink."""

    async def on_start(self) -> None:
        """Open the sink."""
        self.written: Counter[str] = Counter()
        self.all_written = asyncio.Event()

    async def on_session(self, session: WorkerSession) -> None:
        """Keep the session, for cleaning up."""
        self._session = session

    async def process_messages(self, messages: Sequence[Message]) -> AsyncIterator[Result]:
        """Write all at once, and decide about each."""
        writes = (self.write_to_sink(each.body) for each in messages)
        for result in await asyncio.gather(*writes, return_exceptions=True):
            failed = isinstance(result, BaseException)
            yield MessageResult.REQUEUE if failed else MessageResult.ACK
        print(f"wrote {len(messages)}")
        if self.written.total() >= EVENTS_PER_SOURCE * len(SOURCES):
            self.all_written.set()

    async def write_to_sink(self, body: bytes) -> None:
        """Stand for Pub/Sub, a database, a bucket."""
        await asyncio.sleep(0.02)
        self.written[json.loads(body)["source"]] += 1

    async def clean_up(self) -> None:
        """Delete the exchanges of this run; the queues go with their last consumer."""
        native = await self._session.native()
        for name in (STAGING, *SOURCES):
            exchange = await native.channel.get_exchange(name)
            await exchange.delete()


def native_message(url: str) -> Native:
    """Return the class of the messages that the session's channel publishes."""
    if url.startswith("memory:"):
        from aio_pika_batch.adapters.memory import NativeMessage

        return NativeMessage
    import aio_pika

    return aio_pika.Message


async def main(url: str, source_class: type[BatchConsumer]) -> bool:
    """Run the pipeline dry, or until Ctrl-C; returns whether everything has been written."""
    writer = WriterConsumer(
        BatchConsumerSettings(
            url=url,
            queue_name=f"{STAGING}.writer",
            queue_auto_delete=True,  # so that nothing is left behind on a real broker
            exchange_name=STAGING,
            exchange_type="fanout",
            batch_size=50,
            batch_timeout=0.2,
        )
    )
    sources = [
        source_class(
            BatchConsumerSettings(
                url=url,
                queue_name=f"{name}.source",
                queue_auto_delete=True,
                exchange_name=name,
                exchange_type="fanout",
                batch_size=20,
                batch_timeout=0.1,
                num_workers=2,
            )
        )
        for name in SOURCES
    ]
    async with AsyncExitStack() as stack:
        # The writer first: an exchange without a queue has nowhere to put what it is sent. The
        # stack is left in reverse, so the sources drain before the writer does.
        await stack.enter_async_context(writer)
        stack.push_async_callback(writer.clean_up)
        for source in sources:
            await stack.enter_async_context(source)
        await writer.publish_many(
            [
                Publication(f"event {number}".encode(), exchange=name)
                for name in SOURCES
                for number in range(EVENTS_PER_SOURCE)
            ]
        )
        await writer.all_written.wait()
    for name in SOURCES:
        print(f"{name.removeprefix(RUN + '.'):>12}: {writer.written[name]} written")
    return all(writer.written[name] == EVENTS_PER_SOURCE for name in SOURCES)


if __name__ == "__main__":
    # No dead-letter exchange is fine here, and no reason to warn: samples may be discarded.
    logging.getLogger("aio_pika_batch").setLevel(logging.ERROR)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="memory://", help="broker (default: one in memory)")
    parser.add_argument("--modern", action="store_true", help="with on_session and publish_many")
    options = parser.parse_args()
    chosen = ModernSourceConsumer if options.modern else SourceConsumer
    try:
        sys.exit(0 if asyncio.run(main(options.url, chosen)) else 1)
    except KeyboardInterrupt:
        print("stopped")

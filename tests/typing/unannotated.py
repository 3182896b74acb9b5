"""Type checkers accept a program without annotations, as in the quick start."""

# mypy: allow-untyped-defs, allow-incomplete-defs
# pyright: standard

from __future__ import annotations

import asyncio
import json

from aio_pika_batch import (
    BatchConsumer,
    BatchConsumerSettings,
    Consumer,
    ConsumerSettings,
    MessageResult,
    Observer,
)


class MyConsumer(BatchConsumer):
    """A handler, hooks, and what hooks store."""

    async def on_start(self):
        self.seen = 0

    async def on_session(self, session):
        self.session = session

    async def process_messages(self, messages):
        for message in messages:
            try:
                json.loads(message.body)
            except json.JSONDecodeError:
                yield MessageResult.NACK
            else:
                self.seen += 1
                yield MessageResult.ACK


class OutOfOrder(BatchConsumer):
    """Pairs."""

    async def process_messages(self, messages):
        for message in reversed(messages):
            yield message, MessageResult.ACK


class MyOneByOne(Consumer):
    """One at a time."""

    async def process_message(self, message):
        return MessageResult.ACK if message.body else MessageResult.NACK


class Watcher(Observer):
    """An observer."""

    def settled(self, origin, event):
        print(origin.worker, event.counts)  # noqa: T201


async def main():
    """Run them all."""
    settings = BatchConsumerSettings(queue_name="orders", exchange_type="fanout", num_workers=6)
    await asyncio.gather(
        MyConsumer(settings, observers=[Watcher()]).run(),
        OutOfOrder(settings).run(),
        MyOneByOne(ConsumerSettings(queue_name="orders")).run(),
    )

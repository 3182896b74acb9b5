"""Handlers with an inbox and an outbox, as users type them: checked by mypy and pyright."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager
from datetime import timedelta
from typing import assert_type

from aio_pika_batch import BatchConsumer, Message, MessageResult, Nack, Publication, Result
from aio_pika_batch.inbox import Inbox
from aio_pika_batch.outbox import Outbox, OutboxRelay, OutboxRelaySettings


class Connection:
    """A driver's."""

    async def write(self, bodies: Sequence[bytes]) -> None:
        """Write effects."""


async def connect() -> Connection:
    """Open a connection."""
    return Connection()


def acquire() -> AbstractAsyncContextManager[Connection]:
    """Take one from a pool."""
    raise NotImplementedError


outbox = Outbox(table="shop.outbox")


class InOneTransaction(BatchConsumer):
    """The common case."""

    inbox = Inbox("orders", identity=lambda message: message.correlation_id, missing="process")
    connection: Connection

    async def process_messages(self, messages: Sequence[Message]) -> AsyncIterator[Result]:
        async with self.inbox.transaction(self.connection, messages) as batch:
            assert_type(batch.fresh, list[Message])
            batch.set_result(batch.fresh[0], Nack("unknown customer"))
            await self.connection.write([message.body for message in batch.fresh[1:]])
            receipts = [Publication(message.body, routing_key="receipts") for message in messages]
            await outbox.add(self.connection, receipts, key=lambda each: each.routing_key)
        assert_type(batch.results, Sequence[Result])
        for result in batch.results:
            yield result


class InItsOwn(BatchConsumer):
    """A claim in a transaction of the user's."""

    inbox = Inbox("orders")
    connection: Connection

    async def process_messages(self, messages: Sequence[Message]) -> AsyncIterator[Result]:
        fresh = await self.inbox.claim(self.connection, messages)
        assert_type(fresh, list[Message])
        await self.inbox.release(self.connection, fresh[:1])
        for _ in messages:
            yield MessageResult.ACK


async def around() -> None:
    """What stands around them."""
    connection = await connect()
    await InOneTransaction.inbox.create(connection)
    assert_type(InOneTransaction.inbox.schema("postgresql"), str)
    assert_type(await InItsOwn.inbox.prune(connection, older_than=timedelta(days=30)), int)
    assert_type(await outbox.count(connection), int)
    await OutboxRelay(outbox, connect, OutboxRelaySettings(batch_size=500)).run()
    async with OutboxRelay(outbox, acquire) as relay:
        assert_type(relay.settings, OutboxRelaySettings)
    Inbox("orders", missing="ignore")  # type: ignore[arg-type]

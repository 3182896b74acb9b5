"""Exactly-once effects: a table that records, in your transaction, which messages took effect.

RabbitMQ delivers at least once. A message that is delivered again after its effect was committed is
found in the table and dropped. One statement claims a whole batch.

Laws:

- A claim belongs to the transaction of its effect: both are committed, or neither.
- Claims are taken in the order of their ids, so that two batches never deadlock.
- A message that isn't acknowledged leaves no claim behind.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal, Self, cast

from aio_pika_batch.core.message import Message, message_ids
from aio_pika_batch.core.results import MessageResult, Result
from aio_pika_batch.databases.connections import (
    Database,
    DatabaseConnection,
    adapt,
    is_deadlock,
    is_refusal,
)
from aio_pika_batch.databases.inbox_table import LONGEST, InboxTable
from aio_pika_batch.errors import (
    ConfigurationError,
    MessageDecodeError,
    MissingMessageId,
    ResultError,
)
from aio_pika_batch.logs import KeywordLogger, format_error
from aio_pika_batch.runtime.handler import current_context

ATTEMPTS = 10
"""How often a transaction is begun if its claim meets a deadlock each time."""

_log = KeywordLogger(logging.getLogger("aio_pika_batch.inbox"))


@dataclass(frozen=True, slots=True)
class _Claimed:
    """The messages of a batch, after its claim.

    Attributes:
        fresh: Messages to handle.
        ids: Of those, the ones that were claimed, by id.
        repeated: Messages with the id of an earlier message in the batch, and that message.
        dropped: Messages that took effect in an earlier transaction.
    """

    fresh: list[Message]
    ids: dict[str, Message]
    repeated: list[tuple[Message, Message]]
    dropped: list[Message]


class Inbox:
    """Records in your transactions which messages took effect.

    A message is identified by its `message_id`, which its publisher must set, together with the
    consumer's name. Requeued and replayed copies keep it.

    Args:
        consumer: Whose effects these are, 1 to 255 characters. Consumers with different effects of
            the same messages need different names.
        table: May be shared by several consumers. Letters, digits and underscores, and one dot
            after a schema.
        identity: Returns the id of a message, instead of its `message_id`. At most 255 characters.
            If an id is used again, the inbox drops the later message.
        missing: What to do with a message that has no id: `"raise"` MissingMessageId, or
            `"process"` it without protection.

    Raises:
        ConfigurationError: The name or the table isn't allowed.
    """

    def __init__(
        self,
        consumer: str,
        *,
        table: str = "aio_pika_batch_inbox",
        identity: Callable[[Message], str | None] | None = None,
        missing: Literal["raise", "process"] = "raise",
    ) -> None:
        if missing not in ("raise", "process"):
            raise ConfigurationError(f"missing={missing!r}: must be 'raise' or 'process'")
        self.consumer = consumer
        self.table = table
        self._claims = InboxTable(consumer, table)
        self._identity = identity
        self._missing = missing

    def schema(self, database: Database | Literal["postgresql", "mysql", "sqlite"]) -> str:
        """Return the SQL that `create` runs, for your migrations.

        Args:
            database: `"mysql"` is for MariaDB too.
        """
        return self._claims.schema(Database(database))

    async def create(self, connection: object) -> None:
        """Create the table if it doesn't exist. Commit afterwards."""
        await self._claims.create(adapt(connection))

    async def claim(self, connection: object, messages: Sequence[Message]) -> list[Message]:
        """Claim messages in your transaction, and return those that have not taken effect yet.

        Write their effects, commit, and then yield ACK for all messages. An id that another open
        transaction has claimed is waited for.

        In a handler this needs `settle="atomic"`: otherwise an ACK that you yield before a commit
        that fails would lose the effect. :meth:`transaction` works with every `settle`.

        Args:
            connection: One with an open transaction: of asyncpg, psycopg (AsyncConnection),
                SQLAlchemy (AsyncConnection or AsyncSession) or aiosqlite.
            messages: Claim all messages of a transaction in one call. Several calls may deadlock.

        Returns:
            In the same order. Of several messages with one id, only the first.

        Raises:
            MissingMessageId: A message has no id.
            ConfigurationError: There is no transaction, or the driver isn't supported, or a handler
                calls this without `settle="atomic"`.
        """
        context = current_context.get()
        if context is not None and not context.is_atomic:
            raise ConfigurationError(
                "Inbox.claim() in a handler needs settle='atomic': with any other, an ACK counts"
                " even if the commit fails; use Inbox.transaction() instead"
            )
        database = adapt(connection)
        await _refuse_autocommit(database)
        found = await self._claim(database, messages)
        self._report([*found.dropped, *(message for message, _ in found.repeated)])
        return found.fresh

    async def release(self, connection: object, messages: Iterable[Message]) -> None:
        """Take back claims of the same transaction, of messages that you don't ACK.

        Args:
            messages: They must have no effect in the transaction.
        """
        ids = [each for each in self._ids(list(messages)) if each]
        await self._claims.delete(adapt(connection), ids)

    async def prune(self, connection: object, *, older_than: timedelta | float) -> int:
        """Delete old claims of this consumer, and return their number. Commit afterwards.

        A message that is delivered again after its claim was deleted takes effect again.

        Args:
            older_than: A timedelta or seconds. Longer than a message can wait in a queue or as a
                dead letter.
        """
        if isinstance(older_than, timedelta):
            older_than = older_than.total_seconds()
        return await self._claims.prune(adapt(connection), float(older_than))

    def transaction(self, connection: object, messages: Sequence[Message]) -> InboxTransaction:
        """Return a context that begins a transaction, claims messages in it, and commits.

        Write the effects of `fresh` in its block, and yield `results` after it::

            async with self.inbox.transaction(connection, messages) as batch:
                await write(connection, batch.fresh)
            for result in batch.results:
                yield result

        An exception rolls back both claims and effects. A deadlock between claims is retried.

        Args:
            connection: As for :meth:`claim`, but without an open transaction.
            messages: All messages of the handler, or some of them.

        Raises:
            ConfigurationError: The driver isn't supported.
        """
        return InboxTransaction(self, adapt(connection), messages)

    # -- internal ---------------------------------------------------------------------------------

    async def _claim(self, database: DatabaseConnection, messages: Sequence[Message]) -> _Claimed:
        keys = cast("list[str]", self._ids(messages))  # empty ones are looked for below
        # Backwards, because an id stands for its first message.
        ids = dict(zip(reversed(keys), reversed(messages), strict=True))
        if not all(ids):
            pairs = zip(keys, messages, strict=True)
            if self._missing == "raise":
                raise MissingMessageId(tuple(message for key, message in pairs if not key))
            ids = {key: message for key, message in ids.items() if key}
        _check(ids)
        present = await self._claims.insert(database, list(ids)) if ids else set()
        if len(ids) == len(messages) and not present:
            return _Claimed(list(messages), ids, [], [])
        found = _Claimed([], ids, [], [])
        for key, message in zip(keys, messages, strict=True):
            if key and (first := ids[key]) is not message:
                found.repeated.append((message, first))
            elif key in present:
                found.dropped.append(message)
            else:
                found.fresh.append(message)
        for key in present:
            del ids[key]
        return found

    def _ids(self, messages: Sequence[Message]) -> list[str | None]:
        if self._identity is None:
            return message_ids(messages)
        return list(map(self._identity, messages))

    def _report(self, dropped: Sequence[Message]) -> None:
        if not dropped:
            return
        _log.info(
            "dropped messages that took effect before",
            inbox=self.consumer,
            messages=len(dropped),
            first_id=self._ids(dropped[:1])[0],
        )
        context = current_context.get()
        if context is not None:
            context.dropped(self.consumer, dropped)


def _check(ids: Mapping[str, Message]) -> None:
    """Refuse ids that a database would cut or reject. The error concerns one message."""
    # Almost always all of them are allowed, so they are looked at together first.
    if max(map(len, ids), default=0) <= LONGEST and "\0" not in "".join(ids):
        return
    for key, message in ids.items():
        if len(key) > LONGEST or "\0" in key:
            why = f"an inbox takes {LONGEST} characters, not null: hash other ids in `identity`"
            raise MessageDecodeError(message, "message_id", why)


async def _refuse_autocommit(database: DatabaseConnection) -> None:
    if not await database.can_roll_back():
        raise ConfigurationError(
            "there is no transaction: a claim must be committed together with its effect; begin one"
            " first, or use Inbox.transaction()"
        )


class InboxTransaction:
    """The context of :meth:`Inbox.transaction`.

    Attributes:
        fresh: The messages that have not taken effect yet, in order. Write their effects.
    """

    def __init__(
        self, inbox: Inbox, database: DatabaseConnection, messages: Sequence[Message]
    ) -> None:
        self._inbox = inbox
        self._database = database
        self._messages = messages
        self._context = current_context.get()
        self._claimed = _Claimed([], {}, [], [])
        self._fresh_ids: frozenset[int] | None = None
        self._not_acked: dict[int, Result] = {}
        self._results: list[Result] | None = None
        self.fresh: list[Message] = []

    def set_result(self, message: Message, result: Result) -> None:
        """Set the result of a message that isn't ACKed. Don't write its effect.

        Its claim isn't committed, so it takes effect when it is delivered again.

        Args:
            message: One of `fresh`.
            result: For example REQUEUE or `Nack("unknown customer")`.

        Raises:
            ResultError: The message isn't one of `fresh`, or the block has ended.
        """
        if self._results is not None:
            raise ResultError("the transaction is committed: set results in its block")
        if self._fresh_ids is None:
            self._fresh_ids = frozenset(map(id, self._claimed.fresh))
        if id(message) not in self._fresh_ids:
            raise ResultError(f"{message!r} is not one of `fresh`: other messages are ACKed")
        if result is MessageResult.ACK:
            self._not_acked.pop(id(message), None)
        else:
            self._not_acked[id(message)] = result

    @property
    def results(self) -> Sequence[Result]:
        """A result for each message, in order, once the transaction is committed.

        Raises:
            ResultError: It isn't committed yet.
        """
        if self._results is None:
            raise ResultError(
                "the transaction is not committed yet: yield results after the `async with` block"
            )
        return self._results

    async def __aenter__(self) -> Self:
        database = self._database
        if database.in_transaction:
            raise ConfigurationError(
                "the connection has an open transaction, but Inbox.transaction() begins its own:"
                " commit the other one first, or use Inbox.claim() in it"
            )
        for attempt in range(ATTEMPTS):
            try:
                await database.begin()
                await _refuse_autocommit(database)
                self._claimed = await self._inbox._claim(database, self._messages)  # noqa: SLF001  -- its own
                break
            except BaseException as error:
                await self._roll_back()
                if not is_deadlock(error) or attempt == ATTEMPTS - 1:
                    raise
                self._log().debug("a claim met a deadlock", error=format_error(error))
            # Nothing but the claim was rolled back, so it can be tried again here.
            await asyncio.sleep(random.random() * 0.01 * 2**attempt)
        self.fresh = self._claimed.fresh
        if self._context is not None:
            self._context.begins_transaction()
        return self

    async def __aexit__(self, exc_type: type[BaseException] | None, *exc_info: object) -> None:
        try:
            if exc_type is None:
                await self._finish()
            else:
                await self._roll_back()
        finally:
            if self._context is not None:
                self._context.ends_transaction()

    async def _finish(self) -> None:
        not_acked, claimed, database = self._not_acked, self._claimed, self._database
        try:
            if not_acked:
                ids = [key for key, message in claimed.ids.items() if id(message) in not_acked]
                await self._inbox._claims.delete(database, ids)  # noqa: SLF001  -- its own
            await database.flush()
        except BaseException:
            await self._roll_back()
            raise
        cancelled = await self._commit()
        # ACKing a repeated message would lose it if the first one is rejected later.
        for message, first in claimed.repeated:
            if id(first) in not_acked:
                not_acked[id(message)] = not_acked[id(first)]
        results: list[Result] = [MessageResult.ACK] * len(self._messages)
        if not_acked:
            results = [not_acked.get(id(each), MessageResult.ACK) for each in self._messages]
        self._results = results
        self._decide(results)
        repeated = [message for message, _ in claimed.repeated if id(message) not in not_acked]
        self._inbox._report([*claimed.dropped, *repeated])  # noqa: SLF001  -- its own
        if cancelled is not None:
            raise cancelled

    async def _commit(self) -> asyncio.CancelledError | None:
        """Commit; if the handler is cancelled meanwhile, wait for the outcome.

        Returns:
            The cancellation.
        """
        committing = asyncio.ensure_future(self._database.commit())
        cancelled: asyncio.CancelledError | None = None
        while not committing.done():
            try:
                await asyncio.wait({committing})
            except asyncio.CancelledError as error:
                if cancelled is not None:
                    # Cancelled again: the session has been given up, so no result counts.
                    raise
                cancelled = error
        try:
            committing.result()
        except BaseException as error:
            if not is_refusal(error):
                # Delivered again, the messages show whether this was committed. Any other result
                # might dead-letter a message that took effect.
                self._decide([MessageResult.REQUEUE_IMMEDIATE] * len(self._messages))
                self._log().warning(
                    "the outcome of a commit is unknown; its messages are requeued",
                    error=format_error(error),
                )
            await self._roll_back()
            raise
        return cancelled

    def _log(self) -> KeywordLogger:
        return _log.bind(inbox=self._inbox.consumer, messages=len(self._messages))

    def _decide(self, results: Sequence[Result]) -> None:
        if self._context:
            self._context.commit(self._messages, results)

    async def _roll_back(self) -> None:
        # The error that led here is raised. A rollback fails if the connection is lost.
        with suppress(Exception):
            await self._database.rollback()

"""Publishes what waits in an outbox.

The relay's transport delivers rows of the outbox like the messages of a queue. So a relay is a
consumer like others: its workers reconnect with backoff, drain, and report health and metrics. To
acknowledge a row deletes it. What isn't acknowledged stays in the table.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any, TypeAlias, cast

from aio_pika_batch.consumer import BaseConsumer, WorkerSession
from aio_pika_batch.core.batch_run import FailurePolicy
from aio_pika_batch.core.message import DecodedSource, Message
from aio_pika_batch.core.publication import Outcome
from aio_pika_batch.core.results import MessageResult, Result
from aio_pika_batch.core.settlement import Disposition, Settlement
from aio_pika_batch.core.topology import Topology
from aio_pika_batch.databases.connections import DatabaseConnection, adapt, code_of
from aio_pika_batch.databases.outbox_table import OutboxTable
from aio_pika_batch.errors import (
    AccessRefused,
    BrokerUnavailable,
    ConfigurationError,
    SessionClosed,
    SessionLost,
    SettlementError,
    TopologyError,
    TransportError,
)
from aio_pika_batch.logs import KeywordLogger, format_error
from aio_pika_batch.observer import Observer
from aio_pika_batch.outbox.outbox import Outbox, Row
from aio_pika_batch.runtime.handler import Process, ResultsAtOnce
from aio_pika_batch.runtime.worker_config import WorkerConfig
from aio_pika_batch.settings.consumer_settings import OutboxRelaySettings
from aio_pika_batch.transport import Publisher, Session, Subscription, Transport

Connect: TypeAlias = Callable[[], AbstractAsyncContextManager[Any] | Awaitable[Any]]
"""Opens a connection to the database, such as `pool.acquire`, `engine.connect`, or a function that
calls `asyncpg.connect`."""

_FAILED = (Outcome.RETURNED, Outcome.REFUSED, Outcome.UNPUBLISHABLE)
"""Outcomes that are an attempt of their row. Unknown is the fault of the connection."""

_INVALID = (AttributeError, TypeError, ValueError)
"""What a row raises that was changed by hand, and isn't valid."""

_log = KeywordLogger(logging.getLogger("aio_pika_batch.outbox"))


class OutboxRelay(BaseConsumer[OutboxRelaySettings]):
    """Publishes the publications of an outbox in confirmed batches, and deletes them.

    It is a consumer of the outbox: `run`, `start` and `stop`, health, observers and `aio-pika-batch
    relay` work as for others. Run as many relays as you like; they share the work. After a crash
    some publications are published again, with the same `message_id`.

    Args:
        outbox: What it publishes.
        connect: Opens a connection to the database, such as `pool.acquire` or `engine.connect`.
        settings: None reads them from the environment.
        transport: Where to publish; None uses the one that serves the URL's scheme.
        observers: Notified of everything that happens.
    """

    settings_class = OutboxRelaySettings
    _has_queue = False

    def __init__(
        self,
        outbox: Outbox,
        connect: Connect,
        settings: OutboxRelaySettings | None = None,
        *,
        transport: Transport | None = None,
        observers: Sequence[Observer] = (),
    ) -> None:
        self._outbox = outbox
        self._connect = connect
        self._broker = transport
        super().__init__(settings, observers=observers)

    def _open_transport(self) -> Transport:
        broker = self._broker or super()._open_transport()
        rows, interval = self._outbox._rows, self.settings.poll_interval  # noqa: SLF001  -- its own
        return OutboxTransport(rows, self._connect, broker, interval)

    async def on_session(self, session: WorkerSession) -> None:
        """Keep the session of this worker."""
        self._source = cast("OutboxSession", session._session)  # noqa: SLF001  -- our own

    def _process(self) -> Process:
        return lambda rows: ResultsAtOnce(self._source.publish(rows))

    def _check_class(self) -> None:
        """Every subclass will do."""

    def _config(self) -> WorkerConfig:
        # A row has no other way than to be published, and no queue to be requeued to.
        failure = FailurePolicy(MessageResult.REQUEUE_IMMEDIATE, {})
        return replace(super()._config(), failure=failure)


class OutboxTransport:
    """Reads from an outbox, and publishes to a broker.

    Args:
        broker: Where to publish.
        poll_interval: Seconds between two looks at an empty table.
    """

    def __init__(
        self, table: OutboxTable, connect: Connect, broker: Transport, poll_interval: float
    ) -> None:
        self._table = table
        self._connect = connect
        self._broker = broker
        self._poll_interval = poll_interval

    async def declare(self, topology: Topology) -> None:
        """Check that the table exists, and that the broker can be reached."""
        del topology
        async with self._database() as database:
            try:
                await self._table.check(database)
            except Exception as error:
                if code_of(error) is None:
                    raise BrokerUnavailable(f"the outbox: {format_error(error)}") from error
                raise TopologyError(
                    f"the outbox's table cannot be read; create it by Outbox.create(), or by your"
                    f" migrations: {format_error(error)}"
                ) from error
        await self._broker.declare(Topology())

    @asynccontextmanager
    async def session(self, subscription: Subscription) -> AsyncIterator[Session]:
        """Open a connection to the broker and one to the database, and deliver rows."""
        async with self._broker.publisher() as publisher, self._database() as database:
            session = OutboxSession(
                self._table, database, publisher, subscription, self._poll_interval
            )
            try:
                yield session
            finally:
                await session.end()

    def publisher(self) -> AbstractAsyncContextManager[Publisher]:
        """Open a connection to the broker."""
        return self._broker.publisher()

    @asynccontextmanager
    async def _database(self) -> AsyncIterator[DatabaseConnection]:
        context = self._connect()
        close: Callable[[], Awaitable[object]]
        try:
            if isinstance(context, AbstractAsyncContextManager):
                connection = await context.__aenter__()
                close = partial(context.__aexit__, None, None, None)
            else:
                connection = await context
                close = connection.close
        except Exception as error:
            code = code_of(error)
            refused = isinstance(code, str) and code.startswith(("28", "3D"))
            kind = AccessRefused if refused else BrokerUnavailable
            raise kind(f"the outbox's database: {format_error(error)}") from error
        try:
            yield adapt(connection)
        finally:
            with suppress(Exception):  # of a connection that is lost
                await close()


class OutboxSession:
    """One connection to the database, whose transaction locks the rows that are delivered."""

    def __init__(
        self,
        table: OutboxTable,
        database: DatabaseConnection,
        publisher: Publisher,
        subscription: Subscription,
        poll_interval: float,
    ) -> None:
        self._table = table
        self._database = database
        self._publisher = publisher
        self._limit = subscription.prefetch
        self._poll_interval = poll_interval
        self._source = DecodedSource(
            subscription.queue,
            subscription.consumer_tag,
            subscription.retry_count_header,
            time.time,
        )
        self._owner = uuid.uuid4().hex
        # The keys of the rows that are delivered, and which of these can't be published, and which
        # could not be, by delivery tag.
        self._row_ids: dict[int, int] = {}
        self._invalid: set[int] = set()
        self._failed: set[int] = set()
        self._tag = 0
        self._lock = asyncio.Lock()
        self._wake = asyncio.Event()
        self._is_cancelled = False
        self._has_ended = False

    # -- the port ---------------------------------------------------------------------------------

    async def __aiter__(self) -> AsyncIterator[Sequence[Message]]:
        while not self._is_cancelled:
            self._refuse_if_ended()
            if not self._publisher.is_open:
                raise SessionLost("the outbox's connection to the broker is lost")
            self._wake.clear()
            rows = await self._take()
            if rows:
                yield rows
                while self._row_ids and not self._is_cancelled:
                    await self._wake.wait()
                    self._wake.clear()
            else:
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._wake.wait(), self._poll_interval)

    async def cancel(self) -> None:
        """Take no more rows."""
        self._is_cancelled = True
        self._wake.set()

    async def settle(self, settlements: Sequence[Settlement]) -> None:
        """Delete acknowledged rows, and commit once all rows that were taken are settled."""
        self._refuse_if_ended()
        row_ids, failed_tags = self._row_ids, self._failed
        tags = [tag for each in settlements for tag in each.tags]
        settled_tags = set(tags)
        if len(settled_tags) < len(tags) or not row_ids.keys() >= settled_tags:
            raise SettlementError("a row was settled twice, or never delivered")
        acked: list[int] = []
        failed: list[int] = []
        for each in settlements:
            if each.disposition is Disposition.ACK:
                acked += [row_ids[tag] for tag in each.tags]
            else:
                failed += [row_ids[tag] for tag in each.tags if tag in failed_tags]
        async with self._lock:
            is_last = len(tags) == len(row_ids)
            with _lost("rows could not be deleted"):
                await self._write(acked, failed, is_last=is_last)
            for tag in tags:
                del row_ids[tag]
        self._wake.set()

    # -- for the relay ----------------------------------------------------------------------------

    async def publish(self, rows: Sequence[Row]) -> Sequence[Result]:
        """Publish rows. One that isn't confirmed stays in the table.

        Rows with a key are published one after another, each once the one before is confirmed. A
        row whose predecessor isn't confirmed isn't published.
        """
        # By delivery tag.
        unconfirmed: set[int] = set()
        failed: list[tuple[Row, Outcome]] = []
        blocked: set[str | bytes] = set()
        for wave in _waves(rows):
            if unconfirmed and not self._publisher.is_open:
                unconfirmed.update(row.delivery_tag for row in wave)
                continue
            due: Sequence[Row] = wave
            if blocked or self._invalid:
                due = [
                    row
                    for row in wave
                    if row.key not in blocked and row.delivery_tag not in self._invalid
                ]
            outcomes = await self._publisher.publish(due)
            if outcomes.count(Outcome.CONFIRMED) == len(wave):
                # The common case: rows are not looked at one by one.
                continue
            answers = list(zip(due, outcomes, strict=True))
            failed += [(row, outcome) for row, outcome in answers if outcome in _FAILED]
            confirmed = {
                row.delivery_tag for row, outcome in answers if outcome is Outcome.CONFIRMED
            }
            left = [row for row in wave if row.delivery_tag not in confirmed]
            unconfirmed.update(row.delivery_tag for row in left)
            blocked.update(row.key for row in left if row.key is not None)
        if failed:
            self._failed.update(row.delivery_tag for row, _ in failed)
            first, outcome = failed[0]
            _log.warning(
                "publications are not confirmed; they are published again later",
                rows=len(failed),
                exchange=first.exchange,
                routing_key=first.routing_key,
                outcome=outcome.value,
            )
        ack, requeue = MessageResult.ACK, MessageResult.REQUEUE_IMMEDIATE
        if not unconfirmed:
            return [ack] * len(rows)
        return [requeue if row.delivery_tag in unconfirmed else ack for row in rows]

    # -- inside -----------------------------------------------------------------------------------

    def _refuse_if_ended(self) -> None:
        if self._has_ended:
            raise SessionClosed("the session with the outbox has ended")

    async def _take(self) -> Sequence[Row]:
        async with self._lock:
            with _lost("the outbox could not be read"):
                await self._database.begin()
                found = await self._table.take(
                    self._database, self._limit, owner=self._owner, now=time.time()
                )
                if not found or not self._table.locks_rows(self._database):
                    await self._database.commit()
            first = self._tag + 1
            self._tag += len(found)
            self._row_ids = {tag: columns[0] for tag, columns in enumerate(found, first)}
            self._invalid, self._failed = set(), set()
            found.reverse()
            # Each record is freed before the next row is created: the fewer objects there are, the
            # less often does the garbage collector visit them all.
            rows = []
            for tag in self._row_ids:
                columns = found.pop()
                try:
                    row = Row(self._source, tag, columns)
                except _INVALID as error:
                    row = self._invalid_row(tag, columns, error)
                rows.append(row)
        return rows

    def _invalid_row(self, tag: int, columns: Sequence[Any], error: Exception) -> Row:
        # It stays: deleting it could lose what can still be corrected.
        row_id, *route_and_body, _stored, key = columns
        _log.error("a row of the outbox is invalid", id=row_id, error=error)
        self._invalid.add(tag)
        self._failed.add(tag)
        return Row(self._source, tag, (row_id, *route_and_body, None, key))

    async def _write(self, acked: Sequence[int], failed: Sequence[int], *, is_last: bool) -> None:
        database = self._database
        holds = self._table.locks_rows(database)
        if not holds:
            await database.begin()
        if acked:
            await self._table.delete(database, acked)
        if failed:
            await self._table.postpone(database, failed)
        if is_last or not holds:
            await database.commit()

    async def end(self) -> None:
        """Release the rows that are left."""
        self._has_ended = True
        self._wake.set()
        with suppress(Exception):  # of a connection that is lost
            if self._database.in_transaction:
                await self._database.rollback()
            await self._table.release(self._database, owner=self._owner)


@contextmanager
def _lost(what: str) -> Iterator[None]:
    """Turn the errors of a database into the loss of the session."""
    try:
        yield
    except (TransportError, ConfigurationError):
        raise
    except Exception as error:
        raise SessionLost(f"{what}: {format_error(error)}") from error


def _waves(rows: Sequence[Row]) -> list[list[Row]]:
    """Divide rows so that each wave has at most one row of each key, in their order."""
    waves = [[row for row in rows if row.key is None]]
    seen: dict[str | bytes, int] = {}
    for row in rows if len(waves[0]) < len(rows) else ():
        if row.key is None:
            continue
        at = seen.get(row.key, -1) + 1
        seen[row.key] = at
        if at == len(waves):
            waves.append([])
        waves[at].append(row)
    return waves

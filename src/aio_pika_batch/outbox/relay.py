"""Publishes what waits in an outbox."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

from aio_pika_batch.consumer import BaseConsumer, WorkerSession
from aio_pika_batch.core.batch_run import FailurePolicy
from aio_pika_batch.core.results import MessageResult, Result
from aio_pika_batch.observer import Observer
from aio_pika_batch.outbox.outbox import Outbox
from aio_pika_batch.outbox.rows import Row
from aio_pika_batch.outbox.session import Connect, OutboxSession, OutboxTransport
from aio_pika_batch.runtime.handler import Process, ResultsAtOnce
from aio_pika_batch.runtime.worker_config import WorkerConfig
from aio_pika_batch.settings.consumer_settings import OutboxRelaySettings
from aio_pika_batch.transport import Transport


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

    async def _publish(self, rows: Sequence[Row]) -> Sequence[Result]:
        """Publish rows; one that isn't confirmed stays in the table."""
        unconfirmed = await self._source.publish(rows)
        if not unconfirmed:
            # The common case: rows are not looked at one by one.
            return [MessageResult.ACK] * len(rows)
        tags = {row.delivery_tag for row in unconfirmed}
        ack, requeue = MessageResult.ACK, MessageResult.REQUEUE_IMMEDIATE
        return [requeue if row.delivery_tag in tags else ack for row in rows]

    def _process(self) -> Process:
        return lambda rows: ResultsAtOnce(self._publish(rows))

    def _check_class(self) -> None:
        """Every subclass will do."""

    def _config(self) -> WorkerConfig:
        # A row has no other way than to be published, and no queue to be requeued to.
        failure = FailurePolicy(MessageResult.REQUEUE_IMMEDIATE, {})
        return replace(super()._config(), failure=failure)

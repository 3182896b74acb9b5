"""Publishes messages exactly when a transaction commits, in confirmed batches."""

from aio_pika_batch.outbox.outbox import Outbox
from aio_pika_batch.outbox.relay import OutboxRelay
from aio_pika_batch.settings.consumer_settings import OutboxRelaySettings

__all__ = ["Outbox", "OutboxRelay", "OutboxRelaySettings"]

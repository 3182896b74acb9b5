"""Settings of an outbox relay."""

from __future__ import annotations

from pydantic import Field

from aio_pika_batch.settings.consumer_settings import BatchConsumerSettings
from aio_pika_batch.settings.fields import Count, Name, Seconds


class OutboxRelaySettings(BatchConsumerSettings):
    """Settings of an :class:`~aio_pika_batch.outbox.OutboxRelay`.

    Those of a consumer that are about the broker's URL, workers, timeouts, reconnecting and TLS
    apply. Those about queues, retries and dead letters don't.
    """

    queue_name: Name = Field(default="outbox", description="Names the outbox in logs and metrics.")
    batch_size: Count = Field(default=1000, description="Maximum number of rows in a batch.")
    batch_timeout: Seconds = Field(
        default=0.001, description="Rows are taken in batches, so there is nothing to wait for."
    )
    poll_interval: Seconds = Field(
        default=0.2, description="Time between two looks at an empty outbox."
    )

    @property
    def effective_prefetch(self) -> int:
        """The number of rows that are taken at once."""
        return self.batch_size

"""Settings of a consumer, and what the library derives from them."""

from aio_pika_batch.settings.consumer_settings import (
    BatchConsumerSettings,
    ConsumerSettings,
    Source,
    plain_url,
)
from aio_pika_batch.settings.relay_settings import OutboxRelaySettings

__all__ = [
    "BatchConsumerSettings",
    "ConsumerSettings",
    "OutboxRelaySettings",
    "Source",
    "plain_url",
]

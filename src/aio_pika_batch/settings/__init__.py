"""Settings of a consumer, and what the library derives from them."""

from aio_pika_batch.settings.consumer_settings import (
    BatchConsumerSettings,
    ConsumerSettings,
    OutboxRelaySettings,
    Source,
    plain_url,
)

__all__ = [
    "BatchConsumerSettings",
    "ConsumerSettings",
    "OutboxRelaySettings",
    "Source",
    "plain_url",
]

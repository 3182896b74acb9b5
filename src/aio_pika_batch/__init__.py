"""Batch consumer for RabbitMQ: collect a batch, yield one result per message.

Subclass :class:`BatchConsumer`, override `process_messages`, run it. Nothing of aio-pika is
imported before a consumer with an `amqp://` URL is made, and little else before it is asked for.
"""

from typing import TYPE_CHECKING

from aio_pika_batch.front import lazy_exports

__all__ = [
    "AccessRefused",
    "AioPikaBatchError",
    "BatchConsumer",
    "BatchConsumerSettings",
    "BrokerUnavailable",
    "Cause",
    "ConfigurationError",
    "Consumer",
    "ConsumerSettings",
    "ConsumerStatus",
    "DeadLetterReason",
    "DrainIncomplete",
    "HandlerTimeout",
    "HealthServer",
    "Message",
    "MessageDecodeError",
    "MessageResult",
    "Nack",
    "Observer",
    "Outcome",
    "Publication",
    "PublishError",
    "Requeue",
    "Result",
    "ResultError",
    "SessionClosed",
    "SessionLost",
    "SettlementError",
    "StartInterrupted",
    "TopologyError",
    "TransportError",
    "Trigger",
    "WorkerSession",
    "WorkerState",
    "WorkerStatus",
]

if TYPE_CHECKING:
    from aio_pika_batch.batch_settings import BatchConsumerSettings
    from aio_pika_batch.consumer import BatchConsumer, Consumer
    from aio_pika_batch.core.batcher import Trigger
    from aio_pika_batch.core.message import Message
    from aio_pika_batch.core.publication import Outcome, Publication
    from aio_pika_batch.core.results import Cause, MessageResult, Nack, Requeue, Result
    from aio_pika_batch.core.retry import DeadLetterReason
    from aio_pika_batch.errors import (
        AccessRefused,
        AioPikaBatchError,
        BrokerUnavailable,
        ConfigurationError,
        DrainIncomplete,
        HandlerTimeout,
        MessageDecodeError,
        PublishError,
        ResultError,
        SessionClosed,
        SessionLost,
        SettlementError,
        StartInterrupted,
        TopologyError,
        TransportError,
    )
    from aio_pika_batch.health.server import HealthServer
    from aio_pika_batch.hooks import WorkerSession
    from aio_pika_batch.observer import Observer
    from aio_pika_batch.settings import ConsumerSettings
    from aio_pika_batch.status import ConsumerStatus, WorkerState, WorkerStatus
else:
    _ROOMS = (
        "errors",
        "core.message",
        "core.publication",
        "core.batcher",
        "core.results",
        "core.retry",
        "observer",
        "status",
        "settings",
        "batch_settings",
        "health",
        "hooks",
        "consumer",
    )
    __getattr__, __dir__ = lazy_exports(__name__, __all__, _ROOMS)

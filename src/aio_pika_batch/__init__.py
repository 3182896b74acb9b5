"""Batch consumer for RabbitMQ: collect a batch, yield one result per message.

Subclass :class:`BatchConsumer`, override `process_messages`, and run it. Names are imported when
they are first used, aio-pika when a consumer with an `amqp://` URL is created.
"""

from typing import TYPE_CHECKING

from aio_pika_batch._lazy import lazy_exports

__all__ = [
    "RETRY_COUNT_HEADER",
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
    "MessagePublisher",
    "MessageResult",
    "MissingMessageId",
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
    "Yield",
    "open_publisher",
]

if TYPE_CHECKING:
    __version__: str
    from aio_pika_batch.consumer import BatchConsumer, Consumer, WorkerSession, Yield
    from aio_pika_batch.core.batcher import Trigger
    from aio_pika_batch.core.message import RETRY_COUNT_HEADER, Message
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
        MissingMessageId,
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
    from aio_pika_batch.observer import Observer
    from aio_pika_batch.publisher import MessagePublisher, open_publisher
    from aio_pika_batch.settings import BatchConsumerSettings, ConsumerSettings
    from aio_pika_batch.status import ConsumerStatus, WorkerState, WorkerStatus
else:
    __getattr__, __dir__ = lazy_exports(
        __name__,
        {
            "RETRY_COUNT_HEADER": "core.message",
            "AccessRefused": "errors",
            "AioPikaBatchError": "errors",
            "BatchConsumer": "consumer",
            "BatchConsumerSettings": "settings",
            "BrokerUnavailable": "errors",
            "Cause": "core.results",
            "ConfigurationError": "errors",
            "Consumer": "consumer",
            "ConsumerSettings": "settings",
            "ConsumerStatus": "status",
            "DeadLetterReason": "core.retry",
            "DrainIncomplete": "errors",
            "HandlerTimeout": "errors",
            "HealthServer": "health.server",
            "Message": "core.message",
            "MessageDecodeError": "errors",
            "MessagePublisher": "publisher",
            "MessageResult": "core.results",
            "MissingMessageId": "errors",
            "Nack": "core.results",
            "Observer": "observer",
            "Outcome": "core.publication",
            "Publication": "core.publication",
            "PublishError": "errors",
            "Requeue": "core.results",
            "Result": "core.results",
            "ResultError": "errors",
            "SessionClosed": "errors",
            "SessionLost": "errors",
            "SettlementError": "errors",
            "StartInterrupted": "errors",
            "TopologyError": "errors",
            "TransportError": "errors",
            "Trigger": "core.batcher",
            "WorkerSession": "consumer",
            "WorkerState": "status",
            "WorkerStatus": "status",
            "Yield": "consumer",
            "open_publisher": "publisher",
        },
    )

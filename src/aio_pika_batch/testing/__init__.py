"""Tools to test consumers without a broker and without waiting; the library's tests use them, too.

- :func:`process` runs a handler on messages, and returns what a worker would do with them.
- :class:`BatchBroker` is an in-memory RabbitMQ; the fixture `batch_broker` provides one.
- `virtual_time` is an event loop on which sleeping takes no time.
- `strategies` draws messages, results and stories for hypothesis.
- `stories` plays stories, in memory or on any broker, and checks what must stay true.
- The fixture `batch_rabbitmq` provides a real RabbitMQ.
"""

from typing import TYPE_CHECKING

from aio_pika_batch._lazy import lazy_exports

__all__ = [
    "BatchBroker",
    "BatchOutcome",
    "DeadLetter",
    "RequeuedMessage",
    "make_message",
    "process",
]

if TYPE_CHECKING:
    from aio_pika_batch.testing.broker import BatchBroker
    from aio_pika_batch.testing.messages import make_message
    from aio_pika_batch.testing.processing import (
        BatchOutcome,
        DeadLetter,
        RequeuedMessage,
        process,
    )
else:
    __getattr__, __dir__ = lazy_exports(
        __name__,
        {
            "BatchBroker": "broker",
            "BatchOutcome": "processing",
            "DeadLetter": "processing",
            "RequeuedMessage": "processing",
            "make_message": "messages",
            "process": "processing",
        },
    )

"""What helps to test consumers without a broker and without waiting; our own tests use it.

- :func:`process` hands messages to a handler, and tells what would become of them.
- :class:`BatchBroker` is a RabbitMQ in memory; the fixture `batch_broker` is one.
- `virtual_time` lets hours pass in no time, and names what hangs.
- `strategies` draws messages, results and whole stories, for hypothesis.
- `stories` plays these, in memory or on any broker, and judges what was seen.
- The fixture `batch_rabbitmq` is a real RabbitMQ.
"""

from typing import TYPE_CHECKING

from aio_pika_batch.front import lazy_exports

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
    _ROOMS = ("messages", "broker", "processing")
    __getattr__, __dir__ = lazy_exports(__name__, __all__, _ROOMS)

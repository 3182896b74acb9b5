"""A strict RabbitMQ in memory, for tests, demos and `memory://` URLs."""

from aio_pika_batch.adapters.memory.broker import Broker
from aio_pika_batch.adapters.memory.faults import ConnectFault, EventKind, PublishFault
from aio_pika_batch.adapters.memory.native import NativeMessage
from aio_pika_batch.adapters.memory.transport import MemoryTransport, open_transport

__all__ = [
    "Broker",
    "ConnectFault",
    "EventKind",
    "MemoryTransport",
    "NativeMessage",
    "PublishFault",
    "open_transport",
]

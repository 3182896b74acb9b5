"""A strict RabbitMQ in memory, and the port on top of it: for tests, demos and `memory://` URLs."""

from aio_pika_batch.adapters.memory.broker import Broker
from aio_pika_batch.adapters.memory.faults import ConnectFault, PublishFault
from aio_pika_batch.adapters.memory.journal import EventKind
from aio_pika_batch.adapters.memory.native import Message
from aio_pika_batch.adapters.memory.transport import MemoryTransport, open_transport

__all__ = [
    "Broker",
    "ConnectFault",
    "EventKind",
    "MemoryTransport",
    "Message",
    "PublishFault",
    "open_transport",
]

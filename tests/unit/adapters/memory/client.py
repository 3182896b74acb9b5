"""A client of the broker in memory, for tests that need no event loop."""

from __future__ import annotations

from typing import Any

from aio_pika_batch.adapters.memory.broker import Broker
from aio_pika_batch.adapters.memory.channel import ConfirmFrame, DeliverFrame
from aio_pika_batch.adapters.memory.stored_message import check_publication
from aio_pika_batch.core.message import Properties


class Client:
    """One connection with one channel."""

    def __init__(self, broker: Broker, name: str = "client") -> None:
        self.broker = broker
        self.connection = broker.connect(name)
        self.channel = self.connection.channel()

    def queue(
        self,
        name: str,
        *,
        durable: bool = True,
        exclusive: bool = False,
        auto_delete: bool = False,
        **arguments: Any,
    ) -> str:
        """Declare a queue; arguments are written without their `x-`, and with underscores."""
        with self.channel.operation() as vhost:
            return vhost.declare_queue(
                name,
                durable=durable,
                exclusive=exclusive,
                auto_delete=auto_delete,
                arguments={f"x-{key.replace('_', '-')}": val for key, val in arguments.items()},
                connection=self.connection,
            ).name

    def exchange(
        self,
        name: str,
        type_: str = "direct",
        *,
        durable: bool = True,
        auto_delete: bool = False,
        **arguments: Any,
    ) -> str:
        with self.channel.operation() as vhost:
            vhost.declare_exchange(
                name,
                type_,
                durable=durable,
                auto_delete=auto_delete,
                arguments={key.replace("_", "-"): value for key, value in arguments.items()},
            )
        return name

    def bind(self, queue: str, exchange: str, key: str = "", arguments: Any = None) -> None:
        with self.channel.operation() as vhost:
            vhost.bind(vhost.queue(queue, self.connection), exchange, key, arguments or {})

    def unbind(self, queue: str, exchange: str, key: str = "", arguments: Any = None) -> None:
        with self.channel.operation() as vhost:
            vhost.unbind(vhost.queue(queue, self.connection), exchange, key, arguments or {})

    def publish(
        self,
        body: bytes,
        key: str,
        exchange: str = "",
        *,
        mandatory: bool = False,
        **properties: Any,
    ) -> str:
        """Publish; return `confirmed`, `refused` or `returned`, or `silence` without a confirm."""
        kept = self.channel.take()
        number = self.channel.publish(
            check_publication(exchange, key, body, Properties(**properties)), mandatory=mandatory
        )
        others, outcome = [], "silence"
        for frame in self.channel.take():
            match frame:
                case ConfirmFrame(of, result) if of == number:
                    outcome = result.value
                case _:
                    others.append(frame)
        self.channel.received = kept + others
        return outcome

    def consume(
        self,
        queue: str,
        tag: str = "consumer",
        *,
        prefetch: int = 0,
        exclusive: bool = False,
        **arguments: Any,
    ) -> None:
        self.channel.qos(prefetch)
        self.channel.consume(
            queue,
            tag,
            exclusive=exclusive,
            arguments={f"x-{key.replace('_', '-')}": value for key, value in arguments.items()},
        )

    def deliveries(self) -> list[DeliverFrame]:
        """Return the deliveries since the last call."""
        return [each for each in self.channel.take() if isinstance(each, DeliverFrame)]

    def bodies(self) -> list[bytes]:
        return [delivery.body for delivery in self.deliveries()]

    def get(self, queue: str) -> DeliverFrame:
        """Take one message, and leave it unacked."""
        self.consume(queue, "getter", prefetch=1)
        self.channel.cancel("getter")
        (delivery,) = self.deliveries()
        return delivery


def bodies(broker: Broker, queue: str) -> list[bytes]:
    """Return the bodies of the ready messages of a queue."""
    return [message.body for message in broker.ready(queue)]

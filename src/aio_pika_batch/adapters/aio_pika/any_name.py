"""Requests of pamqp for every name that RabbitMQ accepts.

pamqp refuses names of queues and exchanges that don't match its pattern, such as those with an
umlaut or a quotation mark. RabbitMQ takes any text of at most 255 bytes.
"""

from __future__ import annotations

from pamqp.commands import Basic, Exchange, Queue


class _AnyName:
    def validate(self) -> None:
        """Accept every name. Settings and the topology have checked its length."""


class ExchangeDeclare(_AnyName, Exchange.Declare):
    """`exchange.declare` of any name."""


class QueueDeclare(_AnyName, Queue.Declare):
    """`queue.declare` of any name."""


class QueueBind(_AnyName, Queue.Bind):
    """`queue.bind` of any names."""


class BasicConsume(_AnyName, Basic.Consume):
    """`basic.consume` of any queue."""

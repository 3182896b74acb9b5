"""How is a real RabbitMQ had for one test run? By what is shipped for users' tests, too."""

from __future__ import annotations

from aio_pika_batch.testing.rabbitmq.node import Epmd, RabbitMQ

__all__ = ["Epmd", "RabbitMQ"]

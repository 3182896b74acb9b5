"""Which ports are free, and does a broker answer there yet? What is shipped knows."""

from __future__ import annotations

from aio_pika_batch.testing.rabbitmq.ports import LOCALHOST, free_port, greeting

__all__ = ["LOCALHOST", "free_port", "greeting"]

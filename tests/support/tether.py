"""How does a child process die with the test run that started it? As any node's of a test does."""

from __future__ import annotations

from aio_pika_batch.testing.rabbitmq.tether import kill_group, spawn

__all__ = ["kill_group", "spawn"]

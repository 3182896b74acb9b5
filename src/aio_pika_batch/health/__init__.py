"""Health endpoints of a process: `/livez`, `/readyz`, `/metrics` and `/status`."""

from aio_pika_batch.health.server import HealthServer

__all__ = ["HealthServer"]

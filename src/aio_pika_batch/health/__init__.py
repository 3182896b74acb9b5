"""Health endpoints of a process: /livez, /readyz, /metrics, /status."""

from aio_pika_batch.health.server import LOOPBACK, HealthServer, endpoints

__all__ = ["LOOPBACK", "HealthServer", "endpoints"]

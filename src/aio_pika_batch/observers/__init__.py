"""Observers for what others watch with: Prometheus and OpenTelemetry.

Each needs the extra of its name (`prometheus`, `otel`), and is imported by its module's name::

    from aio_pika_batch.observers.prometheus import PrometheusObserver
    from aio_pika_batch.observers.otel import OpenTelemetryObserver
"""

"""Observers for Prometheus and OpenTelemetry.

Each needs the extra of its name (`prometheus`, `otel`). Import it from its module::

    from aio_pika_batch.observers.prometheus import PrometheusObserver
    from aio_pika_batch.observers.otel import OpenTelemetryObserver
"""

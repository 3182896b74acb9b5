"""py-amqp, the client under Celery: one multiple ack for a hundred messages."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

import amqp

from benchmarks.protocol import Job, Meter, compete


def run(job: Job, meter: Meter) -> None:
    """Consume until everything is measured."""
    url = urlsplit(job.url)
    unacked = size = 0
    is_done = False

    def handle(message: Any) -> None:  # noqa: ANN401  -- amqp has no types
        nonlocal unacked, size, is_done
        size += len(message.body)
        unacked += 1
        if unacked == job.batch:
            unacked = 0
            channel.basic_ack(message.delivery_tag, multiple=True)
            is_done = meter.count(job.batch)

    with amqp.Connection(
        f"{url.hostname}:{url.port}", userid=url.username, password=url.password
    ) as connection:
        channel = connection.channel()
        channel.basic_qos(0, job.prefetch, False)  # noqa: FBT003  -- as amqp names nothing else
        channel.basic_consume(job.queue, callback=handle)
        while not is_done:
            connection.drain_events()


if __name__ == "__main__":
    compete(run, "amqp")

"""pika's BlockingConnection: one multiple ack for a hundred messages."""

from __future__ import annotations

import pika

from benchmarks.protocol import Job, Meter, compete


def run(job: Job, meter: Meter) -> None:
    """Consume until everything is measured."""
    connection = pika.BlockingConnection(pika.URLParameters(job.url))
    channel = connection.channel()
    channel.basic_qos(prefetch_count=job.prefetch)
    unacked = size = 0
    for method, _, body in channel.consume(job.queue):
        size += len(body)
        unacked += 1
        if unacked == job.batch:
            unacked = 0
            channel.basic_ack(method.delivery_tag, multiple=True)
            if meter.count(job.batch):
                break
    connection.close()


if __name__ == "__main__":
    compete(run, "pika")

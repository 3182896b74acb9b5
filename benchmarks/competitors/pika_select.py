"""pika's SelectConnection, its fastest form: one multiple ack for a hundred messages."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pika

from benchmarks.protocol import Job, Meter, compete

if TYPE_CHECKING:
    from pika.channel import Channel
    from pika.spec import Basic, BasicProperties


def run(job: Job, meter: Meter) -> None:
    """Consume until everything is measured."""
    unacked = size = 0

    def handle(
        channel: Channel, method: Basic.Deliver, properties: BasicProperties, body: bytes
    ) -> None:
        del properties
        nonlocal unacked, size
        size += len(body)
        unacked += 1
        if unacked == job.batch:
            unacked = 0
            channel.basic_ack(method.delivery_tag, multiple=True)
            if meter.count(job.batch) and connection.is_open:
                connection.close()

    def on_channel(channel: Channel) -> None:
        channel.basic_qos(
            prefetch_count=job.prefetch,
            callback=lambda _: channel.basic_consume(job.queue, handle),
        )

    connection = pika.SelectConnection(
        pika.URLParameters(job.url),
        on_open_callback=lambda opened: opened.channel(on_open_callback=on_channel),
        on_close_callback=lambda closed, _: closed.ioloop.stop(),
    )
    connection.ioloop.start()


if __name__ == "__main__":
    compete(run, "pika")

"""pika, publishing with confirms.

Tasks: ``blocking``, a BlockingConnection, which waits for each; ``select``, a SelectConnection with
a hundred on their way at a time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pika

from benchmarks.protocol import Job, Meter, compete

if TYPE_CHECKING:
    from pika.channel import Channel
    from pika.frame import Method


def properties(number: int) -> pika.BasicProperties:
    """Those of one message."""
    return pika.BasicProperties(
        headers={"tenant": number, "trace": "4bf92f3577b34da6a3ce929d0e0e4736"}, delivery_mode=2
    )


def blocking(job: Job, meter: Meter) -> None:
    """Publish one after another."""
    connection = pika.BlockingConnection(pika.URLParameters(job.url))
    channel = connection.channel()
    channel.confirm_delivery()
    is_done = False
    while not is_done:
        for number in range(job.batch):
            channel.basic_publish("", job.queue, job.payload, properties(number), mandatory=True)
        is_done = meter.count(job.batch)
    connection.close()


def select(job: Job, meter: Meter) -> None:
    """Publish a hundred, wait for all confirmations, and so on."""
    published = confirmed = 0

    def publish(channel: Channel) -> None:
        nonlocal published
        for number in range(job.batch):
            channel.basic_publish("", job.queue, job.payload, properties(number), mandatory=True)
        published += job.batch

    def on_channel(channel: Channel) -> None:
        unconfirmed: set[int] = set()

        def on_confirm(frame: Method) -> None:
            nonlocal confirmed
            tag = frame.method.delivery_tag
            if frame.method.multiple:
                unconfirmed.difference_update([each for each in unconfirmed if each <= tag])
            else:
                unconfirmed.discard(tag)
            if not unconfirmed:
                confirmed = published
                if meter.count(job.batch):
                    connection.close()
                else:
                    again()

        def again() -> None:
            unconfirmed.update(range(published + 1, published + job.batch + 1))
            publish(channel)

        channel.confirm_delivery(on_confirm, callback=lambda _: again())

    connection = pika.SelectConnection(
        pika.URLParameters(job.url),
        on_open_callback=lambda opened: opened.channel(on_open_callback=on_channel),
        on_close_callback=lambda closed, _: closed.ioloop.stop(),
    )
    connection.ioloop.start()
    if confirmed != published:
        raise RuntimeError(f"{confirmed} of {published} were confirmed")


def run(job: Job, meter: Meter) -> None:
    """Publish until everything is measured."""
    {"blocking": blocking, "select": select}[job.task](job, meter)


if __name__ == "__main__":
    compete(run, "pika")

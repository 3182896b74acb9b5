"""py-amqp, publishing with confirms, one after another: it knows no other way."""

from __future__ import annotations

from urllib.parse import urlsplit

import amqp

from benchmarks.protocol import Job, Meter, compete


def run(job: Job, meter: Meter) -> None:
    """Publish until everything is measured."""
    url = urlsplit(job.url)
    with amqp.Connection(
        f"{url.hostname}:{url.port}",
        userid=url.username,
        password=url.password,
        confirm_publish=True,
    ) as connection:
        channel = connection.channel()
        is_done = False
        while not is_done:
            for number in range(job.batch):
                message = amqp.Message(
                    job.payload,
                    application_headers={
                        "tenant": number,
                        "trace": "4bf92f3577b34da6a3ce929d0e0e4736",
                    },
                    delivery_mode=2,
                )
                channel.basic_publish(message, routing_key=job.queue, mandatory=True)
            is_done = meter.count(job.batch)


if __name__ == "__main__":
    compete(run, "amqp")

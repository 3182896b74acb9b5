"""RabbitMQ's own client for AMQP 1.0, which accepts each message."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rabbitmq_amqp_python_client import AMQPMessagingHandler, Environment

from benchmarks.protocol import Job, Meter, compete

if TYPE_CHECKING:
    from rabbitmq_amqp_python_client import Event


class Done(Exception):
    """Everything is measured."""


class Handler(AMQPMessagingHandler):  # type: ignore[misc]  -- the package has no types
    """Accepts, and counts."""

    def __init__(self, meter: Meter) -> None:
        super().__init__()
        self.meter = meter
        self.size = 0

    def on_amqp_message(self, event: Event) -> None:
        """Accept."""
        self.size += len(event.message.body)
        self.delivery_context.accept(event)
        if self.meter.count(1):
            raise Done


def run(job: Job, meter: Meter) -> None:
    """Consume until everything is measured."""
    connection = Environment(uri=job.url).connection()
    connection.dial()
    consumer = connection.consumer(f"/queues/{job.queue}", message_handler=Handler(meter))
    try:
        consumer.run()
    except Done:
        pass
    finally:
        connection.close()


if __name__ == "__main__":
    compete(run, "rabbitmq-amqp-python-client")

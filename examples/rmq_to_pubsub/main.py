"""From a queue into Google Pub/Sub, in requests of many messages, each key in its order.

If Pub/Sub can't take a message now, it is retried in place. A message that Pub/Sub refuses is found
by running the batch in halves, and becomes a dead letter. Try it, with an emulator::

    python examples/rmq_to_pubsub/main.py --samples

`RMQ_TO_PUBSUB_URL` says where the broker is, `PUBSUB_EMULATOR_HOST` where an emulator is (without
it, Google's client finds the service and its credentials in its own way); every other setting can
be set by the environment as `RMQ_TO_PUBSUB_…`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence

from google.api_core.exceptions import AlreadyExists, GoogleAPICallError, InvalidArgument
from google.cloud import pubsub_v1
from google.cloud.pubsub_v1.publisher.exceptions import (
    MessageTooLargeError,
    PublishToPausedOrderingKeyException,
)
from pydantic_settings import SettingsConfigDict

from aio_pika_batch import (
    BatchConsumer,
    BatchConsumerSettings,
    Message,
    MessageResult,
    Nack,
    Observer,
    Publication,
    Requeue,
    Result,
    WorkerSession,
)
from aio_pika_batch.observer import DeadLettered, Origin, Settled

KEY = "ordering-key"
"""The header that holds a message's ordering key; without it, a message has no order."""

PAUSING = (GoogleAPICallError, PublishToPausedOrderingKeyException)
"""Errors after which the client has paused the ordering key, or soon will."""

# Pub/Sub takes no message that has neither data nor attributes.
SAMPLES = [Publication(b"%d" % n, headers={KEY: f"customer-{n % 7}"}) for n in range(200)]
SAMPLES += [Publication(b"news") for _ in range(50)]
SAMPLES[33] = Publication(b"", headers={KEY: "customer-5"})
SAMPLES[220] = Publication(b"")


class Settings(BatchConsumerSettings):
    """The library's settings with defaults of our own, and three more."""

    model_config = SettingsConfigDict(env_prefix="RMQ_TO_PUBSUB_")

    queue_name: str = "outgoing"
    dead_letter_queue: str = "outgoing.dead"
    batch_size: int = 500
    batch_timeout: float = 0.5
    concurrency: int = 8
    ordered_by_key: bool = True
    isolate_failures: bool = True
    max_requeue_attempts: int = 20
    requeue_delay: float = 1.0
    requeue_delay_max: float = 60.0
    project: str = "example"
    topic: str = "outgoing"
    max_latency: float = 0.01


class Forwarder(BatchConsumer):
    """Publishes to a topic."""

    settings: Settings

    # Pub/Sub refuses a request with one bad message as a whole. It is repeated in halves, in order,
    # until the bad one stands alone, and then this applies to it.
    exception_results = {InvalidArgument: MessageResult.NACK}  # noqa: RUF012

    samples: Sequence[Publication] = ()

    async def on_start(self) -> None:
        """Connect, and see that there is a topic."""
        self.publisher = pubsub_v1.PublisherClient(
            batch_settings=pubsub_v1.types.BatchSettings(
                max_messages=self.settings.batch_size, max_latency=self.settings.max_latency
            ),
            # Without retries of its own: a retry is ours, and in order.
            publisher_options=pubsub_v1.types.PublisherOptions(
                enable_message_ordering=True, retry=None, timeout=10
            ),
        )
        self.topic = self.publisher.topic_path(self.settings.project, self.settings.topic)
        with contextlib.suppress(AlreadyExists):
            await asyncio.to_thread(self.publisher.create_topic, name=self.topic)

    async def on_stop(self) -> None:
        """Disconnect."""
        await asyncio.to_thread(self.publisher.stop)

    async def on_session(self, session: WorkerSession) -> None:
        """Fill the queue with samples, if asked to."""
        samples, self.samples = self.samples, ()
        await self.publish_many(
            [
                Publication(each.body, routing_key=session.queue_name, headers=each.headers)
                for each in samples
            ]
        )

    def batch_key(self, message: Message) -> str | None:
        """A batch holds one key's messages, and the next one waits for it."""
        return ordering_key(message) or None

    async def process_messages(
        self, messages: Sequence[Message]
    ) -> AsyncIterator[tuple[Message, Result]]:
        """Publish all at once, and yield a result for each."""
        outcomes = await self._publish(messages)
        refused: InvalidArgument | None = None
        for message, outcome in zip(messages, outcomes, strict=True):
            if isinstance(outcome, InvalidArgument):
                refused = outcome
            else:
                yield message, result_of(outcome)
        if refused is not None:
            raise refused

    async def _publish(self, messages: Sequence[Message]) -> list[str | BaseException]:
        """Return an identifier of Pub/Sub's, or an error, for each message."""
        pending = [asyncio.ensure_future(self._publish_one(message)) for message in messages]
        outcomes = await asyncio.gather(*pending, return_exceptions=True)
        key = ordering_key(messages[0])
        if key and any(isinstance(outcome, PAUSING) for outcome in outcomes):
            await self._resume(key)
        return outcomes

    async def _resume(self, key: str) -> None:
        """Resume a key: after a failure the client takes no more messages for it until then.

        Some versions of the client pause the key only after the futures of its messages have
        failed, and refuse to resume a key that isn't paused yet.
        """
        while True:
            try:
                self.publisher.resume_publish(self.topic, key)
            except RuntimeError:  # not paused yet
                await asyncio.sleep(0.01)
            else:
                return

    async def _publish_one(self, message: Message) -> str:
        attributes = {
            name: value
            for name, value in message.headers.items()
            if isinstance(value, str) and name != KEY
        }
        if message.message_id:
            attributes["message_id"] = message.message_id
        future = self.publisher.publish(
            self.topic, message.body, ordering_key=ordering_key(message), **attributes
        )
        return await asyncio.wrap_future(future)


def ordering_key(message: Message) -> str:
    """Return the message's ordering key, or an empty text as Pub/Sub has it."""
    return str(message.headers.get(KEY, ""))


def result_of(outcome: str | BaseException) -> Result:
    """Return what an outcome means for the message.

    Raises:
        BaseException: An unknown error.
    """
    match outcome:
        case str():
            return MessageResult.ACK
        case MessageTooLargeError():
            return Nack(str(outcome))
        case GoogleAPICallError():
            # Away, overloaded, over its quota, without the topic or the permission: all of these
            # may pass, and none is the message's fault.
            return Requeue(f"{type(outcome).__name__} from Pub/Sub")
        case PublishToPausedOrderingKeyException() | RuntimeError() | AssertionError():
            # An earlier request with this key failed while a batch was handed to the client. The
            # client then cancels what it has not sent yet (a RuntimeError), and refuses the rest.
            # Until it has paused the key, it refuses with an AssertionError.
            return Requeue("an earlier message with this ordering key failed")
        case _:
            raise outcome


class Books(Observer):
    """Counts finished messages, and stops the forwarder when all are done."""

    def __init__(self, expected: int) -> None:
        self.expected = expected
        self.published = self.dead = 0
        self.forwarder: Forwarder | None = None

    def settled(self, origin: Origin, event: Settled) -> None:
        """Count acknowledged messages."""
        del origin
        self.published += sum(
            count for (result, _), count in event.counts.items() if result is MessageResult.ACK
        )
        self._check()

    def dead_lettered(self, origin: Origin, event: DeadLettered) -> None:
        """Count a message that Pub/Sub refuses."""
        del origin
        self.dead += 1
        print(f"{event.reason.value}: {len(event.message.body)} bytes", flush=True)
        self._check()

    def _check(self) -> None:
        if self.forwarder and self.expected and self.published + self.dead >= self.expected:
            self.forwarder.request_stop()


async def main(samples: Sequence[Publication]) -> None:
    """Run until Ctrl-C, or until all samples have come to their end."""
    books = Books(expected=len(samples))
    forwarder = books.forwarder = Forwarder(Settings(), observers=[books])
    forwarder.samples = samples
    await forwarder.run()
    print(f"{books.published} messages published, {books.dead} dead letters")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--samples", action="store_true", help="publish 250 messages, 2 of them bad, and end"
    )
    asyncio.run(main(SAMPLES if parser.parse_args().samples else ()))

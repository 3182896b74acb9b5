"""From a queue into Google Pub/Sub, in requests of many messages, each key in its order.

What Pub/Sub cannot take now is tried again in its place; what it will never take is looked for in
halves, and is a dead letter. Try it, with an emulator::

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

# Pub/Sub takes no message that has neither data nor attributes.
SAMPLES = [Publication(b"%d" % n, headers={KEY: f"customer-{n % 7}"}) for n in range(200)]
SAMPLES += [Publication(b"news") for _ in range(50)]
SAMPLES[33] = Publication(b"", headers={KEY: "customer-5"})
SAMPLES[220] = Publication(b"")


class Settings(BatchConsumerSettings):
    """The library's settings with defaults of our own, and two more."""

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


class Forwarder(BatchConsumer):
    """Publishes to a topic."""

    settings: Settings

    # A request with one bad message is refused as a whole: it is repeated in halves until the bad
    # one stands alone, and then this holds for it.
    exception_results = {InvalidArgument: MessageResult.NACK}  # noqa: RUF012

    samples: Sequence[Publication] = ()

    async def on_start(self) -> None:
        """Connect, and see that there is a topic."""
        self.publisher = pubsub_v1.PublisherClient(
            batch_settings=pubsub_v1.types.BatchSettings(
                max_messages=self.settings.batch_size, max_latency=0.01
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
        """Publish all at once, and tell what became of each."""
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
        if key and any(isinstance(outcome, GoogleAPICallError) for outcome in outcomes):
            await self._resume(key)
        return outcomes

    async def _resume(self, key: str) -> None:
        """Go on with a key: the client takes nothing more for it until it is told that we know.

        It pauses the key a moment after its messages have failed, and must not be told before.
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
        BaseException: It is none of those that are known.
    """
    match outcome:
        case str():
            return MessageResult.ACK
        case MessageTooLargeError():
            return Nack(str(outcome))
        case GoogleAPICallError() | PublishToPausedOrderingKeyException():
            # Away, overloaded, over its quota, without the topic or the permission: all of these
            # may pass, and none is the message's fault.
            return Requeue(f"{type(outcome).__name__} from Pub/Sub")
        case _:
            raise outcome


class Books(Observer):
    """Counts what has come to its end, and stops the forwarder when that is everything."""

    def __init__(self, expected: int) -> None:
        self.expected = expected
        self.published = self.dead = 0
        self.forwarder: Forwarder | None = None

    def settled(self, origin: Origin, event: Settled) -> None:
        """The broker has been told."""
        del origin
        self.published += sum(
            count for (result, _), count in event.counts.items() if result is MessageResult.ACK
        )
        self._check()

    def dead_lettered(self, origin: Origin, event: DeadLettered) -> None:
        """A message that Pub/Sub refuses is with the dead letters."""
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

"""Code that users wrote for the first releases still works.

It has the shapes that their description taught, with the placeholders filled in. It runs on a real
RabbitMQ, and on the in-memory broker, which accepts aio-pika's own objects, too.
"""

from __future__ import annotations

import asyncio
import json
import signal
from collections import Counter
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
from aio_pika import ExchangeType
from aio_pika import Message as OutgoingMessage
from aio_pika.abc import AbstractIncomingMessage
from pydantic_settings import SettingsConfigDict

from aio_pika_batch import (
    BatchConsumer,
    BatchConsumerSettings,
    Consumer,
    ConsumerSettings,
    MessageResult,
    Publication,
)
from aio_pika_batch.transport import Endpoint, open_transport
from tests.integration.helpers import PATIENCE

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from aio_pika_batch import Message
    from aio_pika_batch.consumer import BaseConsumer


class ServiceUnavailableError(Exception):
    """Stands for what a service raises when it is down."""


@pytest.fixture(params=["rabbitmq", "memory"])
def url(request: pytest.FixtureRequest) -> str:
    """Each test runs on both brokers."""
    if request.param == "memory":
        return "memory://"
    found: str = request.getfixturevalue("amqp_url")
    return found


async def feed(
    url: str, bodies: Sequence[bytes], *, exchange: str = "", routing_key: str = ""
) -> None:
    """Publish as another program would."""
    async with open_transport(Endpoint(url=url)).publisher() as publisher:
        await publisher.publish(
            [Publication(body, exchange=exchange, routing_key=routing_key) for body in bodies]
        )


async def until(condition: Callable[[], bool]) -> None:
    """Wait until a condition is true."""
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110  -- what is watched knows nothing of events
            await asyncio.sleep(0.01)


@asynccontextmanager
async def running(*consumers: BaseConsumer) -> AsyncIterator[None]:
    """Run consumers as a program does, until a SIGTERM at the end."""
    runs = asyncio.gather(*(consumer.run() for consumer in consumers))
    await until(lambda: runs.done() or all(each.is_healthy for each in consumers))
    try:
        yield
    finally:
        if not runs.done():
            signal.raise_signal(signal.SIGTERM)
        async with asyncio.timeout(PATIENCE):
            await runs


async def test_quick_start(url: str, name: str) -> None:
    """Good data are forwarded, bad data dead-lettered, and an outage is retried."""
    published: list[int] = []
    outages = {3, 42}

    async def publish(data: int) -> None:
        await asyncio.sleep(0)
        if data in outages:
            outages.remove(data)
            raise ServiceUnavailableError
        published.append(data)

    class MyConsumer(BatchConsumer):
        async def process_messages(self, messages):
            for message in messages:
                try:
                    await publish(json.loads(message.body))
                    yield MessageResult.ACK
                except json.JSONDecodeError:
                    yield MessageResult.NACK
                except ServiceUnavailableError:
                    yield MessageResult.REQUEUE

    class Dead(Consumer):
        bodies: list[bytes] = []  # noqa: RUF012

        async def process_message(self, message):
            self.bodies.append(message.body)
            return MessageResult.ACK

    dead = Dead(ConsumerSettings(url=url, queue_name=f"{name}.dead", exchange_name=f"{name}.dlx"))
    consumer = MyConsumer(
        BatchConsumerSettings(
            url=url,
            queue_name=name,
            exchange_name=f"{name}.exchange",
            exchange_type="fanout",
            batch_size=50,
            batch_timeout=0.1,
            prefetch_count=300,
            num_workers=6,
            queue_arguments={
                "x-dead-letter-exchange": f"{name}.dlx",
                "x-dead-letter-routing-key": f"{name}.dead",
            },
        )
    )
    async with dead, running(consumer):
        bodies = [json.dumps(number).encode() for number in range(100)]
        await feed(url, [*bodies, b"{bad"], exchange=f"{name}.exchange")
        await until(lambda: len(published) >= 100 and bool(dead.bodies))

    assert list(range(100)) == sorted(published)
    assert [b"{bad"] == dead.bodies
    assert not outages


@pytest.mark.parametrize("failures", [3, 4])
async def test_requeue_counts_and_gives_up(url: str, name: str, failures: int) -> None:
    """By default three retries, counted in `x-retry-count`; the fourth failure is the last."""
    counts: list[int] = []
    done = asyncio.Event()

    class Flaky(BatchConsumer):
        async def process_messages(self, messages):
            for message in messages:
                counts.append(int(message.headers.get("x-retry-count", 0)))
                if len(counts) <= failures:
                    yield MessageResult.REQUEUE
                else:
                    yield MessageResult.ACK
                if len(counts) > 3:
                    done.set()

    settings = BatchConsumerSettings(url=url, queue_name=name, batch_size=1)
    async with running(Flaky(settings)), asyncio.timeout(PATIENCE):
        await feed(url, [b"x"], routing_key=name)
        await done.wait()
        await asyncio.sleep(0.2)

    assert [0, 1, 2, 3] == counts


async def test_fan_in_pipeline(url: str, name: str) -> None:
    """Three sources with six workers each, one staging exchange, a writer: each event arrives."""
    staging = f"{name}.staging"
    written: Counter[str] = Counter()
    outages = 5

    async def write_to_sink(body: bytes) -> None:
        nonlocal outages
        await asyncio.sleep(0.01)
        if outages:
            outages -= 1
            raise ServiceUnavailableError
        envelope = json.loads(body)
        written[f"{envelope['source']}/{envelope['payload']}"] += 1

    class SourceConsumer(BatchConsumer):
        async def _run_internal(self, channel, queue, settings, stop_event, log):
            self._staging = await channel.declare_exchange(
                staging, type=ExchangeType.FANOUT, durable=True
            )
            await super()._run_internal(channel, queue, settings, stop_event, log)

        async def process_messages(self, messages):
            for message in messages:
                envelope = {"source": self.settings.exchange_name, "payload": message.body.decode()}
                await self._staging.publish(
                    OutgoingMessage(body=json.dumps(envelope).encode()), routing_key=""
                )
                yield MessageResult.ACK

    class WriterConsumer(BatchConsumer):
        async def process_messages(self, messages):
            results = await asyncio.gather(
                *[write_to_sink(message.body) for message in messages], return_exceptions=True
            )
            for result in results:
                if isinstance(result, Exception):
                    yield MessageResult.REQUEUE
                else:
                    yield MessageResult.ACK

    exchanges = [f"{name}.user-events", f"{name}.impressions", f"{name}.search-logs"]
    consumers: list[BatchConsumer] = [
        SourceConsumer(
            BatchConsumerSettings(
                url=url,
                queue_name=f"ingestor:{exchange}",
                exchange_name=exchange,
                exchange_type="fanout",
                batch_size=50,
                batch_timeout=0.1,
                num_workers=6,
                prefetch_count=300,
            )
        )
        for exchange in exchanges
    ]
    consumers.append(
        WriterConsumer(
            BatchConsumerSettings(
                url=url,
                queue_name=f"{name}.staging-writer",
                exchange_name=staging,
                exchange_type="fanout",
                batch_size=100,
                batch_timeout=0.1,
                num_workers=4,
                prefetch_count=400,
            )
        )
    )
    async with running(*consumers):
        for exchange in exchanges:
            await feed(url, [b"%d" % number for number in range(200)], exchange=exchange)
        await until(lambda: len(written) >= 600)

    assert {f"{e}/{n}": 1 for e in exchanges for n in range(200)} == written


async def test_run_internal_stores_objects_for_each_worker(url: str, name: str) -> None:
    """Attributes on `self` belong to the worker; the stop event and the log can be used."""
    channels: list[object] = []
    stop_events = set()

    class Sessions(BatchConsumer):
        async def _run_internal(self, channel, queue, settings, stop_event, log):
            assert not hasattr(self, "channel")
            self.channel = channel
            channels.append(channel)
            stop_events.add(stop_event.is_set())
            log.info("session", queue=queue.name, size=settings.batch_size)
            await super()._run_internal(channel, queue, settings, stop_event, log)

        async def process_messages(self, messages):
            for _ in messages:
                yield MessageResult.ACK

    async with running(Sessions(BatchConsumerSettings(url=url, queue_name=name, num_workers=3))):
        pass

    assert 3 == len({id(each) for each in channels})
    assert {False} == stop_events


async def test_hooks_open_what_handlers_use(url: str, name: str) -> None:
    """Each worker has what `on_start` has opened; all of a batch is sent at the same time."""
    opened: list[str] = []

    class Session:
        async def post(self, body: bytes) -> bool:
            await asyncio.sleep(0.01)
            opened.append("post")
            return json.loads(body) is not None

        async def close(self) -> None:
            opened.append("closed")

    class HttpPublisher(BatchConsumer):
        http: Session | None = None

        async def on_start(self):
            self.http = Session()

        async def on_stop(self):
            await self.http.close()

        async def process_messages(self, messages: list[AbstractIncomingMessage]):
            posts = [self.http.post(message.body) for message in messages]
            for result in await asyncio.gather(*posts, return_exceptions=True):
                if result is True:
                    yield MessageResult.ACK
                elif isinstance(result, Exception):
                    yield MessageResult.REQUEUE
                else:
                    yield MessageResult.NACK

    settings = BatchConsumerSettings(url=url, queue_name=name, batch_timeout=0.1, num_workers=4)
    async with running(HttpPublisher(settings)):
        await feed(url, [b"%d" % number for number in range(100)], routing_key=name)
        await until(lambda: len(opened) == 100)

    assert ["post"] * 100 + ["closed"] == opened


async def test_single_message_consumer(url: str, name: str) -> None:
    """One message in, one result out."""
    saved: list[object] = []

    async def save(data: object) -> None:
        await asyncio.sleep(0)
        saved.append(data)

    class MyConsumer(Consumer):
        async def process_message(self, message: Message) -> MessageResult:
            await save(json.loads(message.body))
            return MessageResult.ACK

    settings = ConsumerSettings(url=url, queue_name=name, exchange_name=f"{name}.exchange")
    async with running(MyConsumer(settings)):
        await feed(url, [b"1", b"2", b"3"], exchange=f"{name}.exchange", routing_key=name)
        await until(lambda: len(saved) >= 3)

    assert [1, 2, 3] == saved


async def test_settings_from_the_environment(
    url: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A subclass with its own prefix reads its own variables."""
    monkeypatch.setenv("MY_APP_QUEUE_NAME", name)
    monkeypatch.setenv("MY_APP_BATCH_SIZE", "3")
    monkeypatch.setenv("MY_APP_URL", url)
    monkeypatch.setenv("MY_APP_UNHANDLED_EXCEPTION_ACTION", "NACK")

    class MySettings(BatchConsumerSettings):
        model_config = SettingsConfigDict(env_prefix="MY_APP_")

    sizes: list[int] = []

    class MyConsumer(BatchConsumer):
        async def process_messages(self, messages):
            sizes.append(len(messages))
            for _ in messages:
                yield MessageResult.ACK

    settings = MySettings()
    assert MessageResult.NACK is settings.unhandled_exception_action
    async with running(MyConsumer(settings)):
        await feed(url, [b"x"] * 6, routing_key=name)
        await until(lambda: sum(sizes) >= 6)

    assert [3, 3] == sizes


class Quiet(BatchConsumer):
    """Counts its hooks; acks everything."""

    started = stopped = 0

    async def on_start(self):
        self.started += 1

    async def on_stop(self):
        self.stopped += 1

    async def process_messages(self, messages):
        for _ in messages:
            yield MessageResult.ACK


async def test_three_ways_to_run(url: str, name: str) -> None:
    """`run` until a signal, `start` and `stop`, `async with`; also one after the other."""
    consumer = Quiet(BatchConsumerSettings(url=url, queue_name=name, num_workers=2))
    states = [(consumer.is_running, consumer.is_healthy)]

    async with running(consumer):
        states.append((consumer.is_running, consumer.is_healthy))
    states.append((consumer.is_running, consumer.is_healthy))

    await consumer.start()
    states.append((consumer.is_running, consumer.is_healthy))
    await consumer.stop()
    states.append((consumer.is_running, consumer.is_healthy))

    async with consumer:
        states.append((consumer.is_running, consumer.is_healthy))
    states.append((consumer.is_running, consumer.is_healthy))

    assert [(False, False), *[(True, True), (False, False)] * 3] == states
    assert (3, 3) == (consumer.started, consumer.stopped)

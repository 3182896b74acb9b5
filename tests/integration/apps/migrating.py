"""What a program of 0.1.0 sees: ``migrating.py URL QUEUE CASE SETTINGS`` prints it.

`test_migrating.py` runs each case with 0.1.0 and with this version.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import io
import json
import logging
import os
import signal
import sys
import time
from contextlib import asynccontextmanager
from pathlib import Path

import aio_pika

from aio_pika_batch import BatchConsumer, BatchConsumerSettings, MessageResult

ACK, NACK, REQUEUE = MessageResult.ACK, MessageResult.NACK, MessageResult.REQUEUE

URL, NAME, CASE = sys.argv[1:4]
MORE = json.loads(sys.argv[4])
"""Settings of the new version that let it behave as before."""


def settings(**given):
    """Settings for the queue of this run."""
    return BatchConsumerSettings(
        **{"url": URL, "queue_name": NAME, "batch_timeout": 0.1, **given, **MORE}
    )


class Ack(BatchConsumer):
    """Acknowledges everything."""

    async def process_messages(self, messages):
        for _ in messages:
            yield ACK


@asynccontextmanager
async def running(consumer):
    """Run a consumer in a way that both versions know, from the time its queue exists."""
    async with consumer:
        await until(lambda: consumer.is_healthy)
        await asyncio.sleep(0.3)
        yield consumer


async def until(condition, seconds=10):
    """Wait until a condition is true, but not forever; return whether it is."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:  # noqa: ASYNC110  -- there is no event
        await asyncio.sleep(0.02)
    return condition()


@asynccontextmanager
async def channel():
    """Open a channel of another client."""
    connection = await aio_pika.connect(URL)
    async with connection:
        yield await connection.channel()


async def publish(*bodies, **properties):
    """Publish to the queue."""
    async with channel() as found:
        for body in bodies:
            await found.default_exchange.publish(aio_pika.Message(body, **properties), NAME)


async def ready(queue=NAME):
    """Count the ready messages."""
    async with channel() as found:
        declared = await found.declare_queue(queue, passive=True)
        return declared.declaration_result.message_count


async def start_returns():
    """Whether `start()` returns while the consumer runs."""
    consumer = Ack(settings())
    starting = asyncio.create_task(consumer.start())
    done, _ = await asyncio.wait({starting}, timeout=3)
    await consumer.stop()
    await asyncio.wait({starting}, timeout=3)
    return bool(done)


async def a_block():
    """Whether the consumer consumes when the body of `async with` begins."""
    async with Ack(settings()) as consumer:
        return consumer.is_healthy


async def variables():
    """The names of the variables that the settings read."""
    given = {"QUEUE_NAME": "old", "AIO_PIKA_BATCH_QUEUE_NAME": "new"}
    os.environ.update(given)

    class Settings(BatchConsumerSettings):
        model_config = BatchConsumerSettings.model_config | MORE

    return Settings().queue_name


async def a_missing_setting():
    """The class of the error."""
    try:
        BatchConsumerSettings()
    except ValueError as error:
        return type(error).__name__
    except Exception as error:  # noqa: BLE001  -- whatever it is
        return f"no ValueError: {type(error).__name__}"


async def instances():
    """How many instances three workers have."""
    made = []

    class Counted(Ack):
        def __init__(self, *given):
            super().__init__(*given)
            made.append(self)

    async with running(Counted(settings(num_workers=3))):
        pass
    return len(made)


async def connections():
    """How many connections three workers have."""

    def sockets():
        links = [os.path.realpath(each) for each in Path("/proc/self/fd").iterdir()]
        return sum("/socket:" in each for each in links)

    before = sockets()
    async with running(Ack(settings(num_workers=3))):
        return sockets() - before


async def a_message():
    """Which methods of aio-pika a message has, and an attribute of each other kind."""
    seen = []

    class Reader(BatchConsumer):
        async def process_messages(self, messages):
            for message in messages:
                names = ("ack", "nack", "reject", "process", "channel", "body_size")
                seen.append([name for name in names if hasattr(message, name)])
                yield ACK

    async with running(Reader(settings())):
        await publish(b"1")
        await until(lambda: seen)
    return seen[0]


async def the_log():
    """Who writes the log."""
    found = []

    class Logging(Ack):
        async def _run_internal(self, channel, queue, settings, stop_event, log):
            found.append(type(log).__module__.partition(".")[0])
            await super()._run_internal(channel, queue, settings, stop_event, log)

    async with running(Logging(settings())):
        pass
    return [found[0], "structlog" in sys.modules]


async def modules():
    """Which of the modules can be imported."""
    names = ("batch_consumer", "consumer", "result", "retry", "settings", "worker")
    found = []
    for name in names:
        try:
            importlib.import_module(f"aio_pika_batch.{name}")
            found.append(name)
        except ImportError:
            pass
    return found


async def a_dead_letter():
    """Which headers a message has that was rejected."""
    async with channel() as found:
        await found.declare_queue(f"{NAME}.dead")
    dead = {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": f"{NAME}.dead"}

    class Rejecting(BatchConsumer):
        async def process_messages(self, messages):
            for _ in messages:
                yield NACK

    async with running(Rejecting(settings(queue_arguments=dead))):
        await publish(b"1")
        async with channel() as found:
            queue = await found.get_queue(f"{NAME}.dead")
            while (letter := await queue.get(fail=False, no_ack=True)) is None:  # noqa: ASYNC110
                await asyncio.sleep(0.1)
    return [name for name in ("x-death", "x-dead-letter-reason") if name in letter.headers]


async def a_retry():
    """How soon the second attempt follows the first one, and what its copy has kept."""
    seen = []

    class Flaky(BatchConsumer):
        async def process_messages(self, messages):
            for message in messages:
                seen.append((time.monotonic(), message.user_id))
                yield ACK if len(seen) > 1 else REQUEUE

    async with running(Flaky(settings())):
        await publish(b"1", user_id="guest")
        await until(lambda: len(seen) > 1)
    return [seen[1][0] - seen[0][0] >= 0.4, seen[1][1]]


async def full_batches():
    """The size of the largest batch, if `prefetch_count` is left out."""
    sizes = []

    class Sizes(BatchConsumer):
        async def process_messages(self, messages):
            sizes.append(len(messages))
            for _ in messages:
                yield ACK

    async with channel() as found:
        await found.declare_queue(NAME, durable=True)
    await publish(*[b"1"] * 30)
    async with running(Sizes(settings(batch_size=30, batch_timeout=1))):
        await until(lambda: sum(sizes) == 30)
    return max(sizes)


async def no_attempts_left():
    """What is in the queue at the end if a message has failed for good, without a destination."""
    seen = []

    class Failing(BatchConsumer):
        async def process_messages(self, messages):
            for message in messages:
                seen.append(message)
                yield REQUEUE

    async with running(Failing(settings(max_requeue_attempts=0))):
        await publish(b"1")
        await until(lambda: seen)
        await asyncio.sleep(0.3)
    return await ready()


async def a_missing_result():
    """How often a message is handled in 4 s if it gets no result the first time."""
    seen = []

    class Forgetful(BatchConsumer):
        async def process_messages(self, messages):
            for message in messages:
                seen.append(message)
                if len(seen) > 1:
                    yield ACK

    async with running(Forgetful(settings())):
        await publish(b"1")
        await until(lambda: len(seen) > 1, seconds=4)
    return len(seen)


async def a_result_too_many():
    """Whether the log has an error if a handler yields two results for one message."""
    text = io.StringIO()
    logging.basicConfig(stream=text)
    seen = []

    class Generous(BatchConsumer):
        async def process_messages(self, messages):
            seen.append(messages)
            yield ACK
            yield ACK

    async with running(Generous(settings())):
        await publish(b"1")
        await until(lambda: seen)
        await asyncio.sleep(0.3)
    return "ERROR" in text.getvalue()


async def hooks():
    """How often `on_stop` runs if a signal ends `run`."""
    stopped = []

    class Hooks(Ack):
        async def on_stop(self):
            stopped.append(1)

    consumer = Hooks(settings())
    task = asyncio.create_task(consumer.run())
    await until(lambda: consumer.is_healthy)
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.wait({task}, timeout=10)
    await asyncio.sleep(0.3)
    return len(stopped)


async def a_batch_at_the_stop():
    """How many messages come again if a handler is at work when `stop` is called."""
    began = asyncio.Event()

    class Slow(BatchConsumer):
        async def process_messages(self, messages):
            began.set()
            await asyncio.sleep(1)
            for _ in messages:
                yield ACK

    async with running(Slow(settings(batch_size=3, batch_timeout=5))):
        await publish(b"1", b"2", b"3")
        await began.wait()
    await asyncio.sleep(0.3)
    return await ready()


async def a_refusal():
    """What `start` raises within 3 s if the queue exists with other arguments."""
    async with channel() as found:
        await found.declare_queue(NAME, durable=False, auto_delete=True)
        consumer = Ack(settings())
        starting = asyncio.create_task(consumer.start())
        await asyncio.wait({starting}, timeout=3)
        if not starting.done():
            starting.cancel()
            await consumer.stop()
            return None
        return type(starting.exception()).__name__


async def joins():
    """Whether the consumer can declare its queue, and consume."""
    consumer = Ack(settings())
    starting = asyncio.create_task(consumer.start())
    found = await until(lambda: consumer.is_healthy, seconds=3)
    await consumer.stop()
    await asyncio.wait({starting}, timeout=3)
    return found


async def health():
    """Whether a consumer is healthy that has lost its connection, and can't connect again."""
    host, port = URL.partition("@")[2].strip("/").split(":")
    writers = []

    async def copy(reader, writer):
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
        writer.close()

    async def forward(reader, writer):
        to_reader, to_writer = await asyncio.open_connection(host, port)
        writers.extend((writer, to_writer))
        await asyncio.gather(copy(reader, to_writer), copy(to_reader, writer))

    server = await asyncio.start_server(forward, "127.0.0.1", 0)
    url = URL.replace(f":{port}", f":{server.sockets[0].getsockname()[1]}")
    async with running(Ack(settings(url=url))) as consumer:
        server.close()
        for writer in writers:
            writer.transport.abort()
        await asyncio.sleep(1)
        return consumer.is_healthy


if __name__ == "__main__":
    result = asyncio.run(globals()[CASE]())
    print(json.dumps(result))  # noqa: T201

"""Starting and stopping a consumer, from any task, hook or handler."""

from __future__ import annotations

import asyncio

import pytest

from aio_pika_batch import (
    ConfigurationError,
    ConsumerStatus,
    PublishError,
    SessionClosed,
    StartInterrupted,
    WorkerState,
)
from tests.unit.shell.helpers import ACK, RecordingConsumer, ack, numbered, taking
from tests.unit.shell.scripted_transport import ScriptedTransport, never


class Hooked(RecordingConsumer):
    """Records its hooks, each of which can be given something to wait for."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.events = []
        self.starting = self.stopping = lambda: asyncio.sleep(0)

    async def on_start(self):
        self.events.append("on_start")
        await self.starting()
        self.events.append("started")

    async def on_stop(self):
        self.events.append("on_stop")
        await self.stopping()
        self.events.append("stopped")


async def test_start_returns_once_every_worker_consumes(rabbit):
    """And not before."""
    script = ScriptedTransport()
    script.on_open = lambda: asyncio.sleep(len(script.times("open")))
    consumer = RecordingConsumer(transport=script, num_workers=3)
    assert not consumer.is_running
    await consumer.start()
    assert 3 == asyncio.get_running_loop().time()
    assert consumer.is_running
    assert consumer.is_healthy
    assert {WorkerState.CONSUMING} == {each.state for each in consumer.status().workers}
    await consumer.stop()
    assert not consumer.is_running
    assert not consumer.is_healthy
    stopped = ConsumerStatus(
        "RecordingConsumer", "jobs", False, False, (), costliest_setting="batch_size"
    )
    assert stopped == consumer.status()


async def test_async_with_starts_and_stops(rabbit):
    """Also if its body raises."""
    consumer = RecordingConsumer(transport=rabbit.transport)

    async def body():
        async with consumer as entered:
            assert entered is consumer
            assert consumer.is_running
            raise KeyError

    with pytest.raises(KeyError):
        await body()
    assert not consumer.is_running
    assert [] == rabbit.broker.connections


async def test_run_returns_after_stop_and_the_drain(rabbit):
    """Any task may call `stop`."""
    rabbit.put(*numbered(3))
    consumer = RecordingConsumer(taking(10), transport=rabbit.transport, batch_size=3)
    running = asyncio.create_task(consumer.run())
    await asyncio.sleep(1)
    stopping = asyncio.create_task(consumer.stop())
    await running
    await stopping
    assert 10 == asyncio.get_running_loop().time()
    assert [] == rabbit.waiting()


async def test_a_cancelled_run_drains(rabbit):
    """A task group that fails loses no message in progress."""
    rabbit.put(*numbered(3))
    consumer = Hooked(taking(10), transport=rabbit.transport, batch_size=3)
    running = asyncio.create_task(consumer.run())
    await asyncio.sleep(1)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert 10 == asyncio.get_running_loop().time()
    assert [] == rabbit.waiting()
    assert ["on_start", "started", "on_stop", "stopped"] == consumer.events


async def test_a_cancelled_start_leaves_nothing_behind(rabbit):
    """Neither a worker nor a connection."""
    script = ScriptedTransport()
    script.on_open = never
    consumer = Hooked(transport=script)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(5):
            await consumer.start()
    assert not consumer.is_running
    assert ["on_start", "started", "on_stop", "stopped"] == consumer.events


async def test_stop_may_be_called_repeatedly_and_concurrently(rabbit):
    """Each call returns when the one drain is done; on a stopped consumer it does nothing."""
    rabbit.put(*numbered(3))
    consumer = Hooked(taking(10), transport=rabbit.transport, batch_size=3)
    await consumer.stop()
    await consumer.start()
    await asyncio.sleep(1)
    await asyncio.gather(*(consumer.stop() for _ in range(3)))
    assert 10 == asyncio.get_running_loop().time()
    await consumer.stop()
    assert ["on_start", "started", "on_stop", "stopped"] == consumer.events


async def test_a_cancelled_stop_does_not_cancel_the_drain(rabbit):
    """Its caller may have a timeout."""
    rabbit.put(*numbered(3))
    consumer = Hooked(taking(10), transport=rabbit.transport, batch_size=3)
    await consumer.start()
    await asyncio.sleep(1)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1):
            await consumer.stop()
    assert consumer.is_running
    await consumer.stop()
    assert 10 == asyncio.get_running_loop().time()
    assert [] == rabbit.waiting()


async def test_a_stopped_consumer_can_be_started_again(rabbit):
    """Any number of times, with its hooks each time."""
    consumer = Hooked(transport=rabbit.transport, batch_size=1)
    for number in range(3):
        async with consumer:
            rabbit.put(b"%d" % number)
            await asyncio.sleep(1)
    assert numbered(3) == consumer.handled
    assert ["on_start", "started", "on_stop", "stopped"] * 3 == consumer.events


async def test_a_running_consumer_cannot_be_started_again(rabbit):
    """Neither while it runs nor while it drains; the running consumer is not affected."""
    rabbit.put(*numbered(3))
    consumer = Hooked(taking(10), transport=rabbit.transport, batch_size=3)
    async with consumer:
        await asyncio.sleep(1)
        for again in (consumer.start, consumer.run):
            with pytest.raises(ConfigurationError, match="running already"):
                await again()
        assert consumer.is_healthy
        stopping = asyncio.create_task(consumer.stop())
        await asyncio.sleep(1)
        with pytest.raises(ConfigurationError, match="running already"):
            await consumer.start()
        await stopping
    assert ["on_start", "started", "on_stop", "stopped"] == consumer.events


@pytest.mark.parametrize("how", ["start", "run"])
async def test_a_stop_during_the_start_interrupts_it(how):
    """`start` raises, `run` returns, and `on_stop` is called, since `on_start` was."""
    script = ScriptedTransport()
    script.on_open = never
    consumer = Hooked(transport=script)
    starting = asyncio.create_task(getattr(consumer, how)())
    await asyncio.sleep(1)
    await consumer.stop()
    assert not consumer.is_running
    if how == "start":
        with pytest.raises(StartInterrupted):
            await starting
    else:
        await starting
    assert ["on_start", "started", "on_stop", "stopped"] == consumer.events
    assert 1 == asyncio.get_running_loop().time()


async def test_a_stop_during_on_start_waits_for_it(rabbit):
    """`on_stop` runs if `on_start` finished, to close what it has opened."""
    consumer = Hooked(transport=rabbit.transport)
    consumer.starting = lambda: asyncio.sleep(10)
    starting = asyncio.create_task(consumer.start())
    await asyncio.sleep(1)
    await asyncio.gather(consumer.stop(), consumer.stop())
    assert not consumer.is_running
    with pytest.raises(StartInterrupted):
        await starting
    assert ["on_start", "started", "on_stop", "stopped"] == consumer.events
    assert 10 == asyncio.get_running_loop().time()
    assert [] == rabbit.broker.connections


async def test_a_stop_cuts_off_an_on_start_that_takes_too_long(rabbit):
    """After `shutdown_timeout`; since it has not finished, there is no `on_stop`."""
    consumer = Hooked(transport=rabbit.transport, shutdown_timeout=10)
    consumer.starting = never
    starting = asyncio.create_task(consumer.start())
    await asyncio.sleep(1)
    await consumer.stop()
    with pytest.raises(StartInterrupted):
        await starting
    assert ["on_start"] == consumer.events
    assert 11 == asyncio.get_running_loop().time()
    assert not consumer.is_running


async def test_on_stop_runs_only_if_on_start_finished(rabbit):
    """If `on_start` fails, there is nothing to close."""
    consumer = Hooked(transport=rabbit.transport)
    error = KeyError("no database")

    async def fail():
        raise error

    consumer.starting = fail
    with pytest.raises(KeyError) as raised:
        await consumer.start()
    assert raised.value is error
    assert ["on_start"] == consumer.events
    assert not consumer.is_running
    consumer.starting = lambda: asyncio.sleep(0)
    async with consumer:
        assert consumer.is_running
    assert ["on_start", "on_start", "started", "on_stop", "stopped"] == consumer.events


async def test_an_exception_of_on_stop_is_raised(rabbit):
    """Everything is closed nevertheless."""
    consumer = Hooked(transport=rabbit.transport)

    async def fail():
        raise KeyError

    consumer.stopping = fail
    await consumer.start()
    with pytest.raises(KeyError):
        await consumer.stop()
    assert not consumer.is_running
    assert [] == rabbit.broker.connections


@pytest.mark.parametrize("where", ["handler", "a task of the handler's"])
async def test_a_handler_may_stop_its_consumer(rabbit, where):
    """`stop` does not wait for the drain, which waits for the handler; its results count."""
    rabbit.put(*numbered(3))

    async def answer(messages):
        if where == "handler":
            await consumer.stop()
        else:
            await asyncio.gather(consumer.stop())
        for _ in messages:
            yield ACK

    consumer = Hooked(answer, transport=rabbit.transport, batch_size=3)
    await consumer.run()
    assert 0 == asyncio.get_running_loop().time()
    assert [] == rabbit.waiting()
    assert ["on_start", "started", "on_stop", "stopped"] == consumer.events


@pytest.mark.parametrize("hook", ["on_start", "on_stop", "on_session", "_run_internal"])
async def test_a_hook_may_stop_its_consumer(rabbit, hook):
    """In any hook `stop` returns at once, as it would wait for itself."""

    class Stops(Hooked):
        pass

    original = getattr(Stops, hook)

    async def stop_first(self, *args, **kwargs):
        await consumer.stop()
        await original(self, *args, **kwargs)

    setattr(Stops, hook, stop_first)
    consumer = Stops(transport=rabbit.transport)
    if hook == "on_stop":
        await consumer.start()
        await consumer.stop()
    else:
        await consumer.run()
    assert 0 == asyncio.get_running_loop().time()
    assert ["on_start", "started", "on_stop", "stopped"] == consumer.events
    assert not consumer.is_running
    assert [] == rabbit.broker.connections


async def test_a_stop_by_a_handler_completes_without_a_waiter(rabbit):
    """After `start`, too: the consumer stops by itself."""

    async def answer(messages):
        await consumer.stop()
        yield ACK

    consumer = Hooked(answer, transport=rabbit.transport, batch_size=1, num_workers=2)
    await consumer.start()
    rabbit.put(b"0")
    await asyncio.sleep(5)
    assert not consumer.is_running
    assert ["on_start", "started", "on_stop", "stopped"] == consumer.events


async def test_publishing_needs_a_running_consumer(rabbit):
    """Hooks may publish, too."""
    consumer = Hooked(transport=rabbit.transport, batch_size=2)
    with pytest.raises(SessionClosed, match="between start and stop"):
        await consumer.publish(b"0", routing_key="jobs")
    rabbit.declare("elsewhere")
    publish = lambda: consumer.publish(b"0", routing_key="elsewhere")  # noqa: E731
    consumer.starting = consumer.stopping = publish
    async with consumer:
        await publish()
    assert [b"0"] * 3 == rabbit.waiting("elsewhere")
    with pytest.raises(SessionClosed):
        await consumer.publish(b"0", routing_key="elsewhere")


async def test_a_publication_that_outlives_its_consumer_leaves_no_connection_behind():
    """Even if its connection is opened only after the stop."""
    script = ScriptedTransport()
    script.on_publisher = lambda: asyncio.sleep(10)
    consumer = RecordingConsumer(ack, transport=script)
    await consumer.start()
    publishing = asyncio.create_task(consumer.publish(b"0", routing_key="jobs"))
    await asyncio.sleep(1)
    await consumer.stop()
    with pytest.raises(PublishError):
        await publishing
    await asyncio.sleep(60)
    assert script.steps.count("publisher") == script.steps.count("leave publisher")


async def test_settings_can_be_replaced_before_the_start(rabbit):
    """As a command line does; explicit values stay, and invalid ones are refused."""
    consumer = RecordingConsumer(transport=rabbit.transport, batch_size=7)
    consumer.configure(num_workers=2)
    consumer.configure()
    assert (7, 2) == (consumer.settings.batch_size, consumer.settings.num_workers)
    with pytest.raises(ConfigurationError, match="num_workers"):
        consumer.configure(num_workers=0)
    async with consumer:
        assert 2 == len(consumer.status().workers)
        with pytest.raises(ConfigurationError, match="before its start only"):
            consumer.configure(num_workers=1)


async def test_another_url_gets_another_transport(rabbit):
    """A transport that was passed in belongs to the old URL."""
    consumer = RecordingConsumer(transport=rabbit.transport)
    consumer.configure(url="memory://elsewhere")
    rabbit.put(b"0")
    async with consumer:
        await asyncio.sleep(1)
    assert [] == consumer.handled
    assert [b"0"] == rabbit.waiting()

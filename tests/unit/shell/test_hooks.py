"""Session hooks: when they run, on which instance, and what happens if one fails."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import pytest

from aio_pika_batch import (
    ConfigurationError,
    SessionClosed,
    SessionLost,
    WorkerSession,
    WorkerState,
)
from aio_pika_batch.logs import KeywordLogger
from aio_pika_batch.observer import Lost
from tests.unit.shell.helpers import ACK, EventRecorder, RecordingConsumer, numbered
from tests.unit.shell.scripted_transport import ScriptedTransport, never


class Sessions(RecordingConsumer):
    """Records the calls of its session hook, and the instances."""

    seen = ()

    async def on_session(self, session):
        type(self).seen = (*type(self).seen, (self, session))


class Legacy(RecordingConsumer):
    """Overrides `_run_internal`, as users have always done."""

    calls = ()

    async def _run_internal(self, channel, queue, settings, stop_event, log):
        type(self).calls = (*type(self).calls, (self, channel, queue, settings, stop_event, log))
        self.exchange = await channel.declare_exchange("staging", type="fanout", durable=True)
        await super()._run_internal(channel, queue, settings, stop_event, log)


@pytest.fixture(autouse=True)
def forget():
    """Clear the records of the classes before each test."""
    Sessions.seen = Legacy.calls = ()


async def test_on_session_is_called_for_each_session_of_each_worker(rabbit):
    """Before its first message, with its number."""
    handled = []

    class Slow(Sessions):
        async def on_session(self, session):
            await super().on_session(session)
            await asyncio.sleep(1)
            handled.extend(self.batches)

    rabbit.put(b"0")
    async with Slow(transport=rabbit.transport, num_workers=2, batch_size=1) as consumer:
        await asyncio.sleep(0.1)
        assert ([], [[b"0"]]) == (handled, consumer.batches)
        assert [(0, 1), (1, 1)] == [(each.worker, each.epoch) for _, each in Slow.seen]
        rabbit.broker.cut()
        await asyncio.sleep(5)
        told = sorted((each.worker, each.epoch) for _, each in Slow.seen)
        assert [(0, 1), (0, 2), (1, 1), (1, 2)] == told
        assert {"jobs"} == {each.queue_name for _, each in Slow.seen}


@pytest.mark.parametrize("cls", [Sessions, Legacy])
async def test_each_worker_has_its_own_instance(rabbit, cls):
    """Worker 0 is the instance itself; the others are copies made after `on_start`."""

    class Starting(cls):
        async def on_start(self):
            self.pool = object()

    consumer = Starting(transport=rabbit.transport, num_workers=3)
    async with consumer:
        notes = Starting.seen if cls is Sessions else Starting.calls
        instances = [note[0] for note in notes]
        assert instances[0] is consumer
        assert 3 == len({id(each) for each in instances})
        assert {consumer.pool} == {each.pool for each in instances}
        assert {type(consumer)} == {type(each) for each in instances}


async def test_a_worker_uses_what_its_own_session_stored(rabbit):
    """Attributes that a session sets on `self` are seen by this worker's handler only."""

    class Keeps(RecordingConsumer):
        used = ()

        async def on_session(self, session):
            self.name = session.worker

        async def process_messages(self, messages):
            await asyncio.sleep(1)
            for message in messages:
                type(self).used = (*type(self).used, (message.consumer_tag[-5:], self.name))
                yield ACK

    rabbit.put(*numbered(6))
    async with Keeps(transport=rabbit.transport, num_workers=2, batch_size=1, prefetch_count=1):
        await asyncio.sleep(10)
    assert {("w0-e1", 0), ("w1-e1", 1)} == set(Keeps.used)


async def test_without_hooks_there_is_one_instance(rabbit):
    """Nothing is copied without need."""
    async with RecordingConsumer(transport=rabbit.transport, num_workers=3) as consumer:
        instances = consumer._instances()
        assert {consumer} == {each.process.__self__ for each in instances}


async def test_stop_on_a_copy_stops_the_consumer(rabbit):
    """On whatever instance a handler or a task runs, there is one drain and one `on_stop`."""

    class Stops(Sessions):
        stopped = ()

        async def on_stop(self):
            type(self).stopped = (*type(self).stopped, self)

    consumer = Stops(transport=rabbit.transport, num_workers=2)
    await consumer.start()
    clone = Stops.seen[1][0]
    assert clone is not consumer
    await asyncio.create_task(clone.stop())
    assert (consumer,) == Stops.stopped
    assert not consumer.is_running
    assert not clone.is_running
    await consumer.stop()
    assert (consumer,) == Stops.stopped
    async with consumer:
        assert consumer.is_healthy
    assert (consumer, consumer) == Stops.stopped


async def test_run_internal_is_called_by_keyword_once_for_each_session(rabbit):
    """With the broker library's channel and queue, the settings, the stop event and a logger."""
    rabbit.declare("sink")
    async with Legacy(transport=rabbit.transport, batch_size=1) as consumer:
        assert "staging" in rabbit.broker.vhost.exchanges
        [(instance, channel, queue, settings, stop_event, log)] = Legacy.calls
        assert instance is consumer
        assert "jobs" == queue.name
        assert settings is consumer.settings
        assert not stop_event.is_set()
        assert isinstance(log, KeywordLogger)
        log.info("declared", exchange="staging")
        sink = await channel.get_queue("sink")
        await sink.bind(consumer.exchange)
        rabbit.put(*numbered(2))
        await asyncio.sleep(1)
        assert numbered(2) == consumer.handled
        rabbit.broker.cut()
        await asyncio.sleep(5)
        assert 2 == len(Legacy.calls)
    assert stop_event.is_set()
    assert [] == rabbit.broker.connections


async def test_the_users_channel_is_not_the_consuming_one(rabbit):
    """An error on it closes that channel only, and costs no message."""
    async with Legacy(transport=rabbit.transport, batch_size=1) as consumer:
        channel = Legacy.calls[0][1]
        with pytest.raises(Exception, match="NOT_FOUND"):
            await channel.get_queue("no such queue")
        rabbit.put(b"0")
        await asyncio.sleep(1)
        assert [b"0"] == consumer.handled
        assert 1 == consumer.status().workers[0].epoch


async def test_on_session_can_use_the_broker_librarys_objects(rabbit):
    """`native` opens them once."""

    class Native(RecordingConsumer):
        async def on_session(self, session):
            self.native = [await session.native(), await session.native()]

    async with Native(transport=rabbit.transport) as consumer:
        first, second = consumer.native
        assert first is second
        assert "jobs" == first.queue.name


async def test_a_transport_without_native_objects_raises_an_error():
    """At start, since the first session needs them."""
    script = ScriptedTransport()
    with pytest.raises(ConfigurationError, match="ScriptedSession has no channel"):
        await Legacy(transport=script).start()
    assert 1 == len(script.times("open"))


@pytest.mark.parametrize("hook", ["on_session", "_run_internal"])
async def test_a_hook_that_fails_in_the_first_session_is_fatal(rabbit, hook):
    """The error will not go away by itself."""

    class Fails(RecordingConsumer):
        pass

    async def fail(self, *_, **__):
        raise KeyError("no such table")

    setattr(Fails, hook, fail)
    consumer = Fails(transport=rabbit.transport)
    with pytest.raises(KeyError, match="no such table"):
        await consumer.run()
    assert not consumer.is_running
    assert [] == rabbit.broker.connections


async def test_a_hook_that_fails_later_is_retried(rabbit, caplog):
    """With one traceback in the log; the worker reconnects until the hook succeeds."""

    class Fails(RecordingConsumer):
        wrong = None

        async def on_session(self, session):
            if self.wrong is not None:
                raise self.wrong

    recorder = EventRecorder()
    async with Fails(transport=rabbit.transport, observers=[recorder]) as consumer:
        Fails.wrong = KeyError("no such table")
        rabbit.broker.cut()
        await asyncio.sleep(300)
        assert not consumer.is_healthy
        assert 1 == len([each for each in caplog.records if each.exc_info])
        Fails.wrong = None
        await asyncio.sleep(31)
        assert consumer.is_healthy
    assert {SessionLost, KeyError} == {type(event.error) for event in recorder.of(Lost)}


@pytest.mark.parametrize("hook", ["on_session", "_run_internal"])
async def test_a_foreign_cancellation_does_not_end_the_worker(rabbit, hook):
    """Client libraries cancel their own futures when a connection is lost."""

    class Cancelled(RecordingConsumer):
        wrong = False

    original = getattr(Cancelled, hook)

    async def sometimes(self, *args, **kwargs):
        if Cancelled.wrong:
            raise asyncio.CancelledError
        await original(self, *args, **kwargs)

    setattr(Cancelled, hook, sometimes)
    async with Cancelled(transport=rabbit.transport) as consumer:
        Cancelled.wrong = True
        rabbit.broker.cut()
        await asyncio.sleep(60)
        assert WorkerState.STOPPED is not consumer.status().workers[0].state
        Cancelled.wrong = False
        await asyncio.sleep(31)
        assert consumer.is_healthy


async def test_a_run_internal_without_super_is_an_error_at_start(rabbit):
    """It would silently consume nothing."""

    class Forgets(RecordingConsumer):
        async def _run_internal(self, channel, queue, settings, stop_event, log):
            pass

    with pytest.raises(ConfigurationError, match="super"):
        await Forgets(transport=rabbit.transport).start()


async def test_run_internal_can_clean_up_after_its_session(rabbit):
    """It gets an exception when the session has ended."""

    class After(RecordingConsumer):
        events = ()

        async def _run_internal(self, **kwargs):
            try:
                await super()._run_internal(**kwargs)
            except SessionLost:
                type(self).events = (*self.events, "lost")
                raise
            finally:
                type(self).events = (*self.events, "after")

    async with After(transport=rabbit.transport) as consumer:
        rabbit.broker.cut()
        await asyncio.sleep(5)
        assert ("lost", "after") == After.events
        assert consumer.is_healthy
    assert ("lost", "after", "after") == After.events


async def test_a_run_internal_that_swallows_the_exception_counts_as_a_lost_session(rabbit, jitter):
    """The worker reconnects nevertheless."""

    class Swallows(RecordingConsumer):
        async def _run_internal(self, **kwargs):
            with suppress(SessionLost):
                await super()._run_internal(**kwargs)

    async with Swallows(transport=rabbit.transport) as consumer:
        rabbit.broker.cut()
        await asyncio.sleep(5)
        assert consumer.is_healthy
        assert 2 == consumer.status().workers[0].epoch


async def test_run_internal_cannot_be_called_outside_a_session(rabbit):
    """There is nothing to consume."""
    consumer = RecordingConsumer(transport=rabbit.transport)
    with pytest.raises(SessionClosed, match="called by the library"):
        await consumer._run_internal(None, None, consumer.settings, asyncio.Event(), consumer._log)


async def test_a_hook_that_does_not_end_is_cut_off(rabbit):
    """A drain takes at most `shutdown_timeout`, whatever a user's hook waits for."""

    class Hangs(RecordingConsumer):
        async def on_session(self, session):
            if session.epoch > 1:
                await never()

    consumer = Hangs(transport=rabbit.transport, shutdown_timeout=10)
    await consumer.start()
    rabbit.broker.cut()
    await asyncio.sleep(30)
    assert not consumer.is_healthy
    await consumer.stop()
    assert 40 == asyncio.get_running_loop().time()
    assert [] == rabbit.broker.connections


def test_a_worker_session_is_a_value():
    """It can be compared, and shows no secret."""
    session = WorkerSession(0, 1, "jobs", None)
    assert WorkerSession(0, 1, "jobs", None) == session

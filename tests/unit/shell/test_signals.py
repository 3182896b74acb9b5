"""SIGINT and SIGTERM: the first drains all consumers of a process, the second abandons that."""

from __future__ import annotations

import asyncio
import functools
import os
import signal
import threading

import pytest

from aio_pika_batch import DrainIncomplete
from aio_pika_batch.runtime.shutdown import SIGNALS, SignalDispatcher, process_signals
from aio_pika_batch.testing import virtual_time
from tests.unit.shell.helpers import RecordingConsumer, numbered, taking
from tests.unit.shell.scripted_transport import ScriptedTransport, never


@pytest.fixture(autouse=True)
def handlers():
    """Signal handlers of the test, which must be restored afterwards."""
    heard = []
    before = {
        number: signal.signal(number, lambda number, _: heard.append(number)) for number in SIGNALS
    }
    mine = {number: signal.getsignal(number) for number in SIGNALS}
    yield heard
    assert mine == {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number=signal.SIGTERM):
    """Send a signal to this process."""
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", SIGNALS)
async def test_the_first_signal_drains(rabbit, number):
    """`run` returns afterwards, and nothing is lost."""
    rabbit.put(*numbered(3))
    consumer = RecordingConsumer(taking(10), transport=rabbit.transport, batch_size=3)
    running = asyncio.create_task(consumer.run())
    await asyncio.sleep(1)
    send(number)
    await running
    assert 10 == asyncio.get_running_loop().time()
    assert [] == rabbit.waiting()


async def test_the_second_signal_abandons_the_drain(rabbit):
    """At once; messages in handlers come back, and `run` says how many."""
    rabbit.put(*numbered(6))
    consumer = RecordingConsumer(
        taking(20), transport=rabbit.transport, batch_size=3, concurrency=2, num_workers=2
    )
    running = asyncio.create_task(consumer.run())
    await asyncio.sleep(1)
    send()
    await asyncio.sleep(1)
    send()
    await asyncio.sleep(0)
    send()
    with pytest.raises(DrainIncomplete, match="6 messages were still being handled"):
        await running
    assert 2 == asyncio.get_running_loop().time()
    assert numbered(6) == rabbit.waiting()
    assert [] == rabbit.broker.connections


async def test_an_abandoned_drain_is_incomplete_even_without_running_handlers():
    """The broker may not have received every settlement."""
    script = ScriptedTransport()
    consumer = RecordingConsumer(transport=script)
    running = asyncio.create_task(consumer.run())
    await asyncio.sleep(1)
    script.on_cancel = never
    send()
    await asyncio.sleep(1)
    send()
    with pytest.raises(DrainIncomplete):
        await running
    assert 2 == asyncio.get_running_loop().time()


async def test_on_stop_runs_after_an_abandoned_drain(rabbit):
    """A third signal cuts it off."""

    class Slow(RecordingConsumer):
        events = ()

        async def on_stop(self):
            type(self).events = (*self.events, "on_stop")
            await asyncio.sleep(3600)
            type(self).events = (*self.events, "never")

    rabbit.put(*numbered(3))
    consumer = Slow(taking(20), transport=rabbit.transport, batch_size=3)
    running = asyncio.create_task(consumer.run())
    await asyncio.sleep(1)
    send()
    await asyncio.sleep(1)
    send()
    await asyncio.sleep(0.5)
    assert ("on_stop",) == Slow.events
    send()
    with pytest.raises(DrainIncomplete):
        await running
    assert 2.5 == asyncio.get_running_loop().time()
    assert ("on_stop",) == Slow.events


async def test_a_signal_interrupts_the_wait_for_a_broker():
    """`run` returns, since nothing has started."""
    script = ScriptedTransport()
    script.on_declare = never
    running = asyncio.create_task(RecordingConsumer(transport=script).run())
    await asyncio.sleep(1)
    send()
    await running
    assert 1 == asyncio.get_running_loop().time()


@pytest.mark.parametrize("hook", ["on_start", "on_session"])
async def test_a_second_signal_interrupts_a_hook_at_the_start(rabbit, hook):
    """Otherwise only SIGKILL would."""

    class Hangs(RecordingConsumer):
        pass

    setattr(Hangs, hook, never)
    running = asyncio.create_task(Hangs(transport=rabbit.transport).run())
    await asyncio.sleep(1)
    send()
    await asyncio.sleep(1)
    send()
    await running
    assert 2 == asyncio.get_running_loop().time()
    assert [] == rabbit.broker.connections


async def test_several_consumers_stop_at_one_signal(rabbit):
    """A second one abandons those that still drain."""
    rabbit.declare("more")
    rabbit.put(*numbered(3))
    rabbit.put(*numbered(3), queue="more")
    quick = RecordingConsumer(taking(5), transport=rabbit.transport, batch_size=3)
    slow = RecordingConsumer(
        taking(20), transport=rabbit.transport, queue_name="more", batch_size=3
    )
    running = [asyncio.create_task(each.run()) for each in (quick, slow)]
    await asyncio.sleep(1)
    send()
    await running[0]
    assert 5 == asyncio.get_running_loop().time()
    await asyncio.sleep(1)
    send()
    with pytest.raises(DrainIncomplete):
        await running[1]
    assert ([], numbered(3)) == (rabbit.waiting(), rabbit.waiting("more"))


async def test_a_consumer_started_after_a_signal_drains_at_the_next(rabbit):
    """The first signal that a consumer gets asks it to drain, whatever others got before."""
    rabbit.declare("more")
    rabbit.put(*numbered(3))
    first = asyncio.create_task(
        RecordingConsumer(taking(20), transport=rabbit.transport, batch_size=3).run()
    )
    await asyncio.sleep(1)
    send()
    await asyncio.sleep(1)
    rabbit.put(*numbered(3), queue="more")
    late = RecordingConsumer(taking(5), transport=rabbit.transport, queue_name="more", batch_size=3)
    second = asyncio.create_task(late.run())
    await asyncio.sleep(1)
    send()
    with pytest.raises(DrainIncomplete):
        await first
    await second
    assert [] == rabbit.waiting("more")


async def test_only_run_sets_signal_handlers(rabbit, handlers):
    """`start` sets none, so that an application can use its own."""
    async with RecordingConsumer(transport=rabbit.transport):
        send()
        await asyncio.sleep(1)
        assert [signal.SIGTERM] == handlers
        handlers.clear()


async def test_outside_the_main_thread_no_handlers_are_set():
    """Python does not allow it there; the consumer runs nevertheless."""
    script = ScriptedTransport()
    consumer = RecordingConsumer(transport=script)

    async def main():
        running = asyncio.create_task(consumer.run())
        await asyncio.sleep(1)
        set_there.append(signal.getsignal(signal.SIGTERM))
        await consumer.stop()
        await running

    set_there = []
    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=lambda: virtual_time.run(main()))
    thread.start()
    thread.join()
    assert [before] == set_there
    assert ["cancel", "leave"] == script.steps[2:]


async def test_a_handler_that_python_does_not_know_is_replaced_by_the_default(monkeypatch):
    """A handler that was set by C code cannot be restored."""
    restored = {}
    monkeypatch.setattr(
        signal, "signal", lambda number, handler: restored.update({number: handler})
    )
    monkeypatch.setattr(signal, "getsignal", restored.get)
    dispatcher = SignalDispatcher()
    with dispatcher.listen(lambda: None, lambda: None):
        assert {dispatcher._on_signal} == set(restored.values())
    assert {signal.SIG_DFL} == set(restored.values())


async def test_drain_and_abandon_do_the_same_as_signals(rabbit):
    """`drain` is a first signal, and does nothing the second time; `abandon` is a second signal."""
    rabbit.put(*numbered(3))
    consumer = RecordingConsumer(taking(20), transport=rabbit.transport, batch_size=3)
    running = asyncio.create_task(consumer.run())
    await asyncio.sleep(1)
    process_signals.drain()
    process_signals.drain()
    await asyncio.sleep(5)
    assert not running.done()
    process_signals.abandon()
    with pytest.raises(DrainIncomplete):
        await running
    assert 6 == asyncio.get_running_loop().time() // 1


async def test_abandon_works_without_a_drain_before(rabbit):
    """It need not come second."""
    rabbit.put(*numbered(3))
    consumer = RecordingConsumer(taking(20), transport=rabbit.transport, batch_size=3)
    running = asyncio.create_task(consumer.run())
    await asyncio.sleep(1)
    process_signals.abandon()
    with pytest.raises(DrainIncomplete):
        await running


async def test_signals_only_drain_a_supervised_process(handlers):
    """Also one that comes before there is a consumer; none abandons the drain."""
    dispatcher = SignalDispatcher()
    before = {number: signal.getsignal(number) for number in SIGNALS}
    heard = []
    try:
        dispatcher.only_drain()
        send()
        with dispatcher.listen(lambda: heard.append("drain"), lambda: heard.append("abandon")):
            await asyncio.sleep(0)
            assert ["drain"] == heard
            send()
            send(signal.SIGINT)
            await asyncio.sleep(0)
            assert ["drain"] == heard
            dispatcher.abandon()
            await asyncio.sleep(0)
            assert ["drain", "abandon"] == heard
        send()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
async def test_the_handler_of_the_program_is_called_after_the_drain(rabbit, handlers, number):
    """Once, however often the signal came, and only that of the signal."""
    rabbit.put(*numbered(3))
    consumers = [RecordingConsumer(taking(5), transport=rabbit.transport) for _ in range(2)]
    running = asyncio.gather(*(each.run() for each in consumers))
    await asyncio.sleep(6)
    send(number)
    await asyncio.sleep(2)
    assert not running.done()
    assert [] == handlers
    await running
    assert [number] == handlers


async def test_without_a_signal_no_handler_is_called(rabbit, handlers):
    """The program has stopped the consumer itself."""
    consumer = RecordingConsumer(transport=rabbit.transport)
    running = asyncio.create_task(consumer.run())
    await asyncio.sleep(1)
    await consumer.stop()
    await running
    assert [] == handlers


async def test_handlers_of_python_are_not_called(rabbit):
    """They would turn a graceful shutdown into a KeyboardInterrupt."""
    runner = asyncio.Runner()
    for handler in (
        signal.default_int_handler,
        functools.partial(runner._on_sigint, main_task=None),
        signal.SIG_DFL,
        signal.SIG_IGN,
    ):
        previous = signal.signal(signal.SIGINT, handler)
        running = asyncio.create_task(RecordingConsumer(transport=rabbit.transport).run())
        await asyncio.sleep(1)
        send(signal.SIGINT)
        await running
        assert handler == signal.signal(signal.SIGINT, previous)


async def test_a_handler_that_was_set_meanwhile_stays(rabbit):
    """A web server may set its own after the consumer has started."""
    later = []
    previous = signal.getsignal(signal.SIGTERM)
    running = asyncio.create_task(RecordingConsumer(transport=rabbit.transport).run())
    await asyncio.sleep(1)
    signal.signal(signal.SIGTERM, lambda *_: later.append(1))
    consumer_handler = signal.getsignal(signal.SIGINT)
    send(signal.SIGINT)
    await running
    assert consumer_handler != signal.getsignal(signal.SIGINT)
    send(signal.SIGTERM)
    await asyncio.sleep(1)
    assert [1] == later
    signal.signal(signal.SIGTERM, previous)


async def test_run_leaves_signals_alone_if_asked(rabbit, handlers):
    """The program stops the consumer itself."""
    consumer = RecordingConsumer(transport=rabbit.transport)
    running = asyncio.create_task(consumer.run(signals=False))
    await asyncio.sleep(1)
    send()
    await asyncio.sleep(1)
    assert consumer.is_healthy
    assert [signal.SIGTERM] == handlers
    await consumer.stop()
    await running


async def test_a_forked_child_has_the_handlers_of_the_program(rabbit):
    """`terminate()` ends it; it drains no consumer."""
    consumer = RecordingConsumer(transport=rabbit.transport)
    running = asyncio.create_task(consumer.run())
    await asyncio.sleep(1)
    before = process_signals._previous
    child = os.fork()
    if not child:
        mine = {number: signal.getsignal(number) for number in SIGNALS}
        os._exit(0 if mine == before and not process_signals._listeners else 1)
    assert (child, 0) == os.waitpid(child, 0)  # noqa: ASYNC222  -- it ends at once
    assert consumer.is_healthy
    await consumer.stop()
    await running

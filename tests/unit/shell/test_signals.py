"""What do SIGINT and SIGTERM do to the consumers of a process?"""

from __future__ import annotations

import asyncio
import os
import signal
import threading

import pytest

from aio_pika_batch import DrainIncomplete
from aio_pika_batch.runtime.signals import SIGNALS, SignalDispatcher, process_signals
from aio_pika_batch.testing import virtual_time
from tests.unit.shell.helpers import RecordingConsumer, numbered, taking
from tests.unit.shell.scripted_transport import ScriptedTransport, never


@pytest.fixture(autouse=True)
def handlers():
    """Handlers of the test's own, which must stand again afterwards."""
    heard = []
    before = {number: signal.signal(number, lambda *_: heard.append(1)) for number in SIGNALS}
    mine = {number: signal.getsignal(number) for number in SIGNALS}
    yield heard
    assert mine == {number: signal.getsignal(number) for number in SIGNALS}
    assert [] == heard
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number=signal.SIGTERM):
    """Send this process a signal."""
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", SIGNALS)
async def test_the_first_signal_drains(rabbit, number):
    """`run` returns after it, and nothing is lost."""
    rabbit.put(*numbered(3))
    consumer = RecordingConsumer(taking(10), transport=rabbit.transport, batch_size=3)
    running = asyncio.create_task(consumer.run())
    await asyncio.sleep(1)
    send(number)
    await running
    assert 10 == asyncio.get_running_loop().time()
    assert [] == rabbit.waiting()


async def test_the_second_signal_abandons_the_drain(rabbit):
    """At once; what was in mid-handling comes back, and `run` says how much it is."""
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
    with pytest.raises(DrainIncomplete, match="6 messages were in mid-handling"):
        await running
    assert 2 == asyncio.get_running_loop().time()
    assert numbered(6) == rabbit.waiting()
    assert [] == rabbit.broker.connections


async def test_an_abandoned_drain_is_incomplete_though_nothing_is_at_work():
    """The broker may not have heard of everything."""
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


async def test_an_on_stop_is_run_after_an_abandoned_drain_too(rabbit):
    """But a third signal's patience with it is at an end."""

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
    """`run` returns: nothing was begun."""
    script = ScriptedTransport()
    script.on_declare = never
    running = asyncio.create_task(RecordingConsumer(transport=script).run())
    await asyncio.sleep(1)
    send()
    await running
    assert 1 == asyncio.get_running_loop().time()


@pytest.mark.parametrize("hook", ["on_start", "on_session"])
async def test_a_second_signal_interrupts_a_hook_at_the_start(rabbit, hook):
    """Otherwise nothing but SIGKILL would."""

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
    """And a second one abandons those that still drain."""
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


async def test_one_that_started_after_a_signal_drains_at_the_next(rabbit):
    """Each consumer's first signal asks it to drain, whoever heard another before."""
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


async def test_signals_are_run_s_business_only(rabbit, handlers):
    """`start` sets no handlers: whoever uses it has handlers of his own."""
    async with RecordingConsumer(transport=rabbit.transport):
        send()
        await asyncio.sleep(1)
        assert [1] == handlers
        handlers.clear()


async def test_outside_the_main_thread_no_handlers_are_set():
    """Python does not allow it there; the consumer runs all the same."""
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
    """One that was set by C code cannot be put back."""
    restored = {}
    monkeypatch.setattr(
        signal, "signal", lambda number, handler: restored.update({number: handler})
    )
    desk = SignalDispatcher()
    with desk.listen(lambda: None, lambda: None):
        assert {desk._on_signal} == set(restored.values())
    assert {signal.SIG_DFL} == set(restored.values())


async def test_others_may_ask_as_signals_do(rabbit):
    """`drain` is a first signal, and again nothing new; `abandon` is a second one."""
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


async def test_abandon_is_heard_by_those_who_were_never_asked_to_drain(rabbit):
    """It need not come second."""
    rabbit.put(*numbered(3))
    consumer = RecordingConsumer(taking(20), transport=rabbit.transport, batch_size=3)
    running = asyncio.create_task(consumer.run())
    await asyncio.sleep(1)
    process_signals.abandon()
    with pytest.raises(DrainIncomplete):
        await running

"""`batch_key` and `batch_max_bytes`: which messages share a batch."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import ClassVar

import pytest

from aio_pika_batch import (
    BatchConsumer,
    Cause,
    ConfigurationError,
    Consumer,
    MessageResult,
    Trigger,
)
from aio_pika_batch.adapters.memory import EventKind
from aio_pika_batch.observer import BatchCut, HandlerError, Settled
from tests.unit.shell.helpers import (
    ACK,
    NACK,
    REQUEUE,
    EventRecorder,
    RecordingConsumer,
    SingleConsumer,
    ack,
    bodies,
    numbered,
    settings,
    taking,
)
from tests.unit.shell.scripted_transport import ScriptedSession, ScriptedTransport


class Keyed(RecordingConsumer):
    """Its key is the first letter of a body; `?` has none."""

    def batch_key(self, message):
        letter = message.body[:1].decode()
        return None if letter == "?" else letter


async def test_a_batch_holds_messages_of_one_key(rabbit):
    """Each key fills its own batches in queue order; the rest waits for its timeout."""
    rabbit.put(b"a1", b"b1", b"a2", b"c1", b"b2", b"a3")
    recorder = EventRecorder()
    async with Keyed(
        transport=rabbit.transport, observers=[recorder], batch_size=2, prefetch_count=50
    ) as consumer:
        await asyncio.sleep(1)
        assert [[b"a1", b"a2"], [b"b1", b"b2"]] == consumer.batches
        assert 2 == consumer.status().workers[0].buffered
        await asyncio.sleep(5)
    assert [[b"c1"], [b"a3"]] == consumer.batches[2:]
    assert [0, 0, 5, 5] == consumer.times
    triggers = [event.trigger for event in recorder.of(BatchCut)]
    assert [Trigger.SIZE, Trigger.SIZE, Trigger.TIMEOUT, Trigger.TIMEOUT] == triggers


async def test_messages_without_a_key_share_batches(rabbit):
    """None means no key."""
    rabbit.put(b"?1", b"a1", b"?2")
    async with Keyed(transport=rabbit.transport, batch_size=2, batch_timeout=1) as consumer:
        await asyncio.sleep(2)
    assert [[b"?1", b"?2"], [b"a1"]] == consumer.batches


async def test_an_exhausted_prefetch_cuts_the_batches_of_all_keys(rabbit):
    """Nothing more can come, so no batch waits for its timeout, however many keys there are."""
    rabbit.put(b"a1", b"b1", b"c1", b"a2")
    recorder = EventRecorder()
    async with Keyed(
        taking(1),
        transport=rabbit.transport,
        observers=[recorder],
        batch_size=5,
        prefetch_count=4,
        batch_timeout=60,
        concurrency=4,
    ) as consumer:
        await asyncio.sleep(0.5)
        assert [[b"a1", b"a2"], [b"b1"], [b"c1"]] == consumer.batches
    assert {Trigger.PREFETCH} == {event.trigger for event in recorder.of(BatchCut)}


@pytest.mark.parametrize("keyed", [False, True])
async def test_a_batch_has_at_most_batch_max_bytes(rabbit, keyed):
    """A longer message gets its own batch, with or without keys."""
    rabbit.put(b"aaaa", b"aaaa", b"aaaa", b"a" * 50, b"a")
    recorder = EventRecorder()
    kind = Keyed if keyed else RecordingConsumer
    async with kind(
        transport=rabbit.transport, observers=[recorder], batch_max_bytes=10, batch_timeout=3
    ) as consumer:
        await asyncio.sleep(1)
        assert [[b"aaaa", b"aaaa"], [b"aaaa"], [b"a" * 50]] == consumer.batches
        await asyncio.sleep(3)
    assert [[b"a"]] == consumer.batches[3:]
    triggers = [event.trigger.value for event in recorder.of(BatchCut)]
    assert ["bytes", "bytes", "bytes", "timeout"] == triggers


async def test_batches_of_a_key_may_overlap_without_ordered_by_key(rabbit):
    """Then a key only says which messages share a batch."""
    rabbit.put(b"a1", b"a2", b"a3")
    async with Keyed(
        taking(5), transport=rabbit.transport, batch_size=1, concurrency=3
    ) as consumer:
        await asyncio.sleep(6)
    assert [0, 0, 0] == consumer.times


async def test_a_stop_hands_over_one_key_for_each_free_slot(rabbit):
    """Messages of other keys are returned, and come again."""
    rabbit.put(b"a1", b"b1", b"a2", b"c1")
    consumer = Keyed(transport=rabbit.transport, batch_timeout=60, concurrency=2)
    async with consumer:
        await asyncio.sleep(1)
    assert [[b"a1", b"a2"], [b"b1"]] == consumer.batches
    assert [b"c1"] == rabbit.waiting()


# --- a batch_key that fails ---------------------------------------------------------


class Choosy(Keyed):
    """Raises for some messages."""

    exception_results: ClassVar = {LookupError: MessageResult.NACK}

    def batch_key(self, message):
        if message.body.startswith(b"!"):
            raise KeyError(message.body)
        if message.body.startswith(b"*"):
            raise RuntimeError("what is this?")
        if message.body.startswith(b"["):
            return [message.body]
        return message.json()["key"]


async def handled_by_choosy(rabbit, *some, ordered=False, **given):
    """Give messages to a `Choosy`, and return it with its recorder."""
    rabbit.declare("dead")
    rabbit.bind("dead", "dlx", "", kind="fanout")
    rabbit.put(*some)
    recorder = EventRecorder()
    async with Choosy(
        transport=rabbit.transport,
        observers=[recorder],
        dead_letter_exchange="dlx",
        batch_timeout=1,
        ordered_by_key=ordered,
        **given,
    ) as consumer:
        await asyncio.sleep(10)
        assert consumer.is_healthy
        assert 1 == consumer.status().workers[0].epoch
    assert [] == rabbit.unsettled()
    assert [] == rabbit.waiting()
    return consumer, recorder


@pytest.mark.parametrize("ordered", [False, True])
async def test_a_message_whose_key_cannot_be_decoded_is_dead_lettered(rabbit, ordered, caplog):
    """Alone; the others are handled, and one log line says so."""
    good = [b'{"key": 1, "n": 1}', b'{"key": 1, "n": 2}']
    consumer, recorder = await handled_by_choosy(
        rabbit, good[0], b"oops", good[1], b"ouch", ordered=ordered
    )
    assert [good] == consumer.batches
    assert [b"oops", b"ouch"] == rabbit.waiting("dead")
    letters = rabbit.broker.ready("dead")
    assert ["undecodable"] * 2 == [each.headers["x-dead-letter-reason"] for each in letters]
    counts = sum((Counter(event.counts) for event in recorder.of(Settled)), Counter())
    assert {(NACK, Cause.UNDECODABLE): 2, (ACK, Cause.HANDLER): 2} == counts
    assert [[b"oops"], [b"ouch"]] == [bodies(each.messages) for each in recorder.of(HandlerError)]
    errors = [each for each in caplog.records if each.levelname == "ERROR"]
    assert 1 == len(errors)
    assert "batch_key failed" in errors[0].getMessage()
    assert errors[0].exc_info


async def test_exceptions_of_batch_key_are_treated_like_those_of_a_handler(rabbit):
    """`exception_results` applies first; an unhashable key is an error, too."""
    consumer, _ = await handled_by_choosy(rabbit, b"!", b"*", b"[", max_requeue_attempts=2)
    assert [] == consumer.batches
    letters = {each.body: each.headers for each in rabbit.broker.ready("dead")}
    assert "handler-error" == letters[b"!"]["x-dead-letter-reason"]
    assert "builtins.KeyError" == letters[b"!"]["x-exception-type"]
    assert 0 == letters[b"!"]["x-retry-count"]
    for body, kind in ((b"*", "builtins.RuntimeError"), (b"[", "builtins.TypeError")):
        assert "exhausted" == letters[body]["x-dead-letter-reason"]
        assert kind == letters[body]["x-exception-type"]
        assert 2 == letters[body]["x-retry-count"]


async def test_results_of_a_failed_batch_key_for_a_lost_session_are_not_sent():
    """The next session gets these messages again."""
    script = ScriptedTransport()
    script.on_publish = lambda *_: asyncio.sleep(1)
    async with Choosy(ack, transport=script) as consumer:
        first = script.last
        first.feed(b"*")
        await asyncio.sleep(0.5)
        first.end()
        await asyncio.sleep(5)
        assert 2 == consumer.status().workers[0].epoch
    assert [] == script.details("settle")


async def test_batch_key_runs_in_a_task_of_the_library(monkeypatch):
    """A session that could pump is iterated: pumped messages come in a client's callback."""

    class Pumping(ScriptedSession):
        async def pump(self, sink):
            pytest.fail("it was asked to pump")

    monkeypatch.setattr("tests.unit.shell.scripted_transport.ScriptedSession", Pumping)
    script = ScriptedTransport()
    async with Keyed(transport=script, batch_timeout=1) as consumer:
        script.last.feed(b"a1")
        await asyncio.sleep(2)
    assert [[b"a1"]] == consumer.batches


async def test_batch_key_is_called_once_for_each_message(rabbit):
    """However often the message is looked at."""
    asked = []

    class Asking(RecordingConsumer):
        def batch_key(self, message):
            asked.append(message.body)
            return message.body

    rabbit.put(*numbered(5))
    async with Asking(transport=rabbit.transport, batch_timeout=1, ordered_by_key=True):
        await asyncio.sleep(2)
    assert numbered(5) == asked


# --- what cannot work -----------------------------------------------------------------


def test_a_batch_key_that_is_a_coroutine_is_refused():
    """Awaiting it for each message would hold up all others."""

    class Waiting(RecordingConsumer):
        async def batch_key(self, message):
            return message.body

    with pytest.raises(ConfigurationError, match=r"Waiting\.batch_key is a coroutine"):
        Waiting(transport=None)


@pytest.mark.parametrize("base", [BatchConsumer, Consumer])
def test_ordered_by_key_needs_a_batch_key(base):
    """It is checked at construction, for both kinds of consumer."""

    class Keyless(base):
        async def process_messages(self, messages):
            yield ACK

        async def process_message(self, message):
            return ACK

    with pytest.raises(ConfigurationError, match="Keyless has no keys: override batch_key"):
        Keyless(settings(ordered_by_key=True))


async def test_a_consumer_of_single_messages_may_have_keys(rabbit):
    """They have no effect without `ordered_by_key`."""
    times = {}

    class KeyedSingleConsumer(SingleConsumer):
        def batch_key(self, message):
            return message.body[:1]

    async def answer(message):
        times[message.body] = asyncio.get_running_loop().time()
        await asyncio.sleep(1)
        return ACK

    for ordered in (False, True):
        rabbit.put(b"a1", b"a2", b"b1", b"a3")
        began = asyncio.get_running_loop().time()
        async with KeyedSingleConsumer(
            answer, transport=rabbit.transport, concurrency=4, ordered_by_key=ordered
        ):
            await asyncio.sleep(5)
        assert {
            b"a1": 0,
            b"a2": 1 if ordered else 0,
            b"a3": 2 if ordered else 0,
            b"b1": 0,
        } == {body: round(time - began) for body, time in times.items()}
    assert 8 == len(rabbit.times(EventKind.ACKED))


async def test_a_requeue_without_ordered_by_key_goes_to_the_back_of_the_queue(rabbit):
    """Keys alone hold nothing."""
    rabbit.put(b"a1", b"a2")
    seen = []

    async def answer(messages):
        for message in messages:
            seen.append((message.body, message.retry_count))
            yield REQUEUE if message.body == b"a1" and not message.retry_count else ACK

    async with Keyed(answer, transport=rabbit.transport, batch_size=1, batch_timeout=1):
        await asyncio.sleep(3)
    assert [(b"a1", 0), (b"a2", 0), (b"a1", 1)] == seen

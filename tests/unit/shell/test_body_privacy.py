"""Message bodies appear nowhere but in the handler, whatever goes wrong.

A body is the business of its publisher and its handler. The library passes it on, and writes it
nowhere.
"""

from __future__ import annotations

import asyncio
import logging

import pytest

from aio_pika_batch import MessageResult, Nack, Publication, Requeue
from aio_pika_batch.observer import BatchHandled, HandlerError
from tests.unit.shell.helpers import (
    ACK,
    NACK,
    REQUEUE,
    EventRecorder,
    RecordingConsumer,
    ack,
    answering,
    taking,
)

BODY = b"B0DY-of-0rder-\xff\xfe-c0nfidential"
# Nothing that a path, a time or the number of a thread could contain: records have those, too.
NEEDLES = ("B0DY", "0rder", "c0nfidential", repr(BODY)[2:-1])


def fails(messages):
    """A handler that fails in a common way."""
    raise RuntimeError(f"cannot write {messages[0]!r}")


async def failing(messages):
    """The same in a generator."""
    fails(messages)
    yield ACK


async def yields_the_body(messages):
    """A common mistake."""
    for message in messages:
        yield message.body


async def yields_a_pair(messages):
    """Another common mistake."""
    for message in messages:
        yield message, message.body


async def yields_a_key(messages):
    """Yields the body instead of the message."""
    for message in messages:
        yield message.body, ACK


async def gives_a_wrong_reason(messages):
    """Passes a reason that is not a string."""
    for message in messages:
        yield Nack(message.body)


async def gives_a_wrong_delay(messages):
    """Passes a delay that is not a number."""
    for message in messages:
        yield Requeue(delay=message.body)


async def reads_json(messages):
    """Decodes a body that is not JSON."""
    for message in messages:
        message.json()
        yield ACK


async def chains(messages):
    """As `reads_json`, and raises another exception from it."""
    try:
        messages[0].json()
    except ValueError as error:
        msg = f"{messages!r} would not do"
        raise LookupError(msg) from error
    yield ACK


async def requeues_text(messages):
    """Yields an invalid result."""
    for message in messages:
        yield message.body.decode(errors="replace")


def shown(caplog, recorder, letters, consumer):
    """Return everything that was logged or written."""
    texts = [caplog.text, repr(consumer), repr(consumer.status())]
    texts += [repr(vars(record)) for record in caplog.records]
    texts += [repr(event) for _, event in recorder.seen]
    texts += [f"{letter.headers!r} {letter.properties!r}" for letter in letters]
    for _, event in recorder.seen:
        if isinstance(event, HandlerError | BatchHandled) and event.error is not None:
            texts += [str(event.error), repr(event.error)]
    return texts


@pytest.mark.parametrize(
    ("answer", "given"),
    [
        (ack, {}),
        (answering(NACK), {}),
        (answering(Nack("why")), {}),
        (answering(REQUEUE), {"max_requeue_attempts": 0}),
        (answering(MessageResult.REQUEUE, error=RuntimeError("late")), {"max_requeue_attempts": 0}),
        (answering(), {}),
        (answering(ACK, ACK), {"settle": "atomic"}),
        (failing, {}),
        (failing, {"isolate_failures": True}),
        (yields_the_body, {}),
        (yields_a_pair, {}),
        (yields_a_key, {}),
        (requeues_text, {}),
        (gives_a_wrong_reason, {}),
        (gives_a_wrong_delay, {}),
        (reads_json, {}),
        (chains, {}),
        (taking(60), {"process_timeout": 1}),
    ],
)
async def test_a_body_is_not_logged_or_stored_elsewhere(rabbit, caplog, answer, given):
    """Not in logs at any level, headers, representations of events, errors or snapshots."""
    caplog.set_level(logging.DEBUG)
    recorder = EventRecorder()
    rabbit.declare("dead")
    rabbit.bind("dead", "dlx", "#", kind="fanout")
    rabbit.put(BODY)
    consumer = RecordingConsumer(
        answer,
        transport=rabbit.transport,
        observers=[recorder],
        batch_size=1,
        dead_letter_exchange="dlx",
        **{"unhandled_exception_action": NACK} | given,
    )
    async with consumer:
        await asyncio.sleep(10)
        texts = shown(caplog, recorder, rabbit.broker.ready("dead"), consumer)

    assert [] == [text for text in texts if any(needle in text for needle in NEEDLES)]
    assert answer is ack or [BODY] == [letter.body for letter in rabbit.broker.ready("dead")]


async def test_the_text_of_a_handlers_exception_is_truncated(rabbit, caplog):
    """A dead letter contains 1 KiB of it, a log line 4 KiB."""
    body = b"b" * 1_000_000
    rabbit.declare("dead")
    rabbit.bind("dead", "dlx", "#", kind="fanout")
    rabbit.put(body)
    answer = answering(error=ValueError(f"no row: {body.decode()}"))
    async with RecordingConsumer(
        answer,
        transport=rabbit.transport,
        dead_letter_exchange="dlx",
        batch_size=1,
        unhandled_exception_action=NACK,
    ):
        await asyncio.sleep(10)
    [letter] = rabbit.broker.ready("dead")

    assert 1024 == len(letter.headers["x-exception-message"].encode())
    assert 2048 > len(repr(letter.headers))
    assert 5000 > max(len(record.getMessage()) for record in caplog.records)


def test_a_publication_does_not_show_its_body():
    """Its representation may end up in logs."""
    assert "B0DY" not in repr([Publication(BODY, routing_key="q")])

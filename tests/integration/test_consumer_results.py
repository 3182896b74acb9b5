"""Missing, extra and invalid results, on the in-memory broker and on RabbitMQ."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from dataclasses import dataclass, field

import pytest

from aio_pika_batch import (
    BatchConsumer,
    BatchConsumerSettings,
    Cause,
    Consumer,
    ConsumerSettings,
    MessageResult,
    Nack,
    Publication,
    Requeue,
)
from tests.integration.helpers import Recorder, until

ACK, NACK, REQUEUE = MessageResult.ACK, MessageResult.NACK, MessageResult.REQUEUE

BODIES = [b"0", b"1", b"2", b"3", b"4"]


@pytest.fixture(params=["memory", "rabbitmq"])
def url(request) -> str:
    """Both brokers, one after the other."""
    if request.param == "memory":
        return "memory://results"
    return request.getfixturevalue("amqp_url")


@dataclass
class Outcome:
    """What happened to the messages of one run."""

    acked: list[bytes] = field(default_factory=list)
    dead: dict[bytes, dict] = field(default_factory=dict)
    batches: list[list[bytes]] = field(default_factory=list)
    recorder: Recorder = field(default_factory=Recorder)

    @property
    def alive(self) -> set[bytes]:
        return {*BODIES} - {*self.dead}


class DeadLetterReader(Consumer):
    """Receives the dead letters."""

    def __init__(self, settings, fate) -> None:
        super().__init__(settings)
        self._fate = fate

    async def process_message(self, message):
        self._fate.dead[message.body] = dict(message.headers)
        return ACK


async def run(url, name, handler, *, exception_results=None, **settings) -> Outcome:
    """Let *handler*, a `process_messages`, handle five messages, at first in one batch."""
    fate = Outcome()

    class Tested(BatchConsumer):
        async def process_messages(self, messages):
            fate.batches.append([message.body for message in messages])
            async for item in handler(self, messages):
                yield item

    Tested.exception_results = exception_results or {}
    undertaker = DeadLetterReader(ConsumerSettings(url=url, queue_name=f"{name}.dlq"), fate)
    consumer = Tested(
        BatchConsumerSettings(
            **{
                "url": url,
                "queue_name": name,
                "batch_size": 5,
                # The first batch is full before. A test that retries some of it has a shorter one.
                "batch_timeout": 5.0,
                "max_requeue_attempts": 2,
                "dead_letter_queue": f"{name}.dlq",
                "unhandled_exception_action": NACK,
                **settings,
            }
        ),
        observers=[fate.recorder],
    )
    async with undertaker, consumer:
        outcomes = await undertaker.publish_many(
            [Publication(body, routing_key=name) for body in BODIES]
        )
        assert {"confirmed"} == {outcome.value for outcome in outcomes}
        results = fate.recorder.results
        await until(
            lambda: results["ACK"] + len(fate.dead) == len(BODIES),
            what=lambda: (results, fate.dead),
        )
        await until(lambda: not consumer.status().workers[0].in_hand)
    return fate


def errors_logged(caplog) -> str:
    """Return what the library has logged as an error."""
    return "\n".join(each.getMessage() for each in caplog.records if each.levelname == "ERROR")


def traced(caplog) -> list[str]:
    """Return the exceptions that were logged with a traceback."""
    return [each.exc_info[0].__name__ for each in caplog.records if each.exc_info]


# --- too few, too many, nonsense ------------------------------------------------


async def _too_few(consumer, messages):
    for _ in messages[:3]:
        yield ACK


async def _nothing_at_all(consumer, messages):
    for _ in ():
        yield ACK


async def _text(consumer, messages):
    yield ACK
    yield ACK
    yield ACK
    yield "ack"
    yield ACK


async def _none(consumer, messages):
    for each in messages:
        yield ACK if each.body < b"3" else None


async def _true(consumer, messages):
    for each in messages:
        yield ACK if each.body < b"3" else True


async def _a_class(consumer, messages):
    for each in messages:
        yield ACK if each.body < b"3" else Requeue


async def _twice(consumer, messages):
    for each in messages[:3]:
        yield each, ACK
    yield messages[1], NACK
    yield messages[4], ACK


async def _foreign(consumer, messages):
    for each in messages[:3]:
        yield each, ACK
    yield object(), ACK


async def _mixed_forms(consumer, messages):
    for _ in messages[:3]:
        yield ACK
    yield messages[3], ACK


async def _mixed_the_other_way(consumer, messages):
    for each in messages[:3]:
        yield each, ACK
    yield ACK


async def _raises_after_three(consumer, messages):
    for _ in messages[:3]:
        yield ACK
    raise LookupError("the table is gone")


@pytest.mark.parametrize(
    ("handler", "says"),
    [
        (_too_few, "3 results for 5 messages"),
        (_text, "'ack'"),
        (_none, "None"),
        (_true, "True"),
        (_a_class, "Requeue"),
        (_twice, "second result"),
        (_foreign, "object"),
        (_mixed_forms, "use one of the two forms"),
        (_mixed_the_other_way, "use one of the two forms"),
        (_raises_after_three, "the table is gone"),
    ],
)
async def test_valid_results_count_and_the_rest_gets_the_action(
    url, name, caplog, handler, says
) -> None:
    """Three messages are acked; the other two are not, whatever was yielded for them."""
    fate = await run(url, name, handler)
    assert {b"0", b"1", b"2"} == fate.alive
    assert {b"3", b"4"} == fate.dead.keys()
    assert 3 == fate.recorder.results["ACK"]
    assert says in errors_logged(caplog)
    assert 1 == len(fate.recorder.errors)
    for headers in fate.dead.values():
        assert "handler-error" == headers["x-dead-letter-reason"]
    assert [BODIES] == fate.batches


async def test_a_handler_that_yields_nothing_acks_nothing(url, name, caplog) -> None:
    """All five get the action."""
    fate = await run(url, name, _nothing_at_all)
    assert set() == fate.alive
    assert "0 results for 5 messages" in errors_logged(caplog)
    assert {Cause.MISSING.value: 5} == fate.recorder.causes


async def _too_many(consumer, messages):
    for each in messages:
        yield ACK if each.body < b"3" else NACK
    yield ACK
    yield ACK


async def _raises_at_the_end(consumer, messages):
    for each in messages:
        yield ACK if each.body < b"3" else NACK
    raise LookupError("too late")


@pytest.mark.parametrize(
    ("handler", "says"), [(_too_many, "batch of 5"), (_raises_at_the_end, "too late")]
)
async def test_an_error_after_the_last_result_changes_nothing(
    url, name, caplog, handler, says
) -> None:
    """All are decided; the error is still logged and counted."""
    fate = await run(url, name, handler)
    assert {b"0", b"1", b"2"} == fate.alive
    assert {"rejected"} == {each["x-dead-letter-reason"] for each in fate.dead.values()}
    assert says in errors_logged(caplog)
    assert 1 == len(fate.recorder.errors)


async def test_an_exception_is_logged_once_per_batch_with_its_traceback(url, name, caplog) -> None:
    """And the dead letter has it."""
    fate = await run(url, name, _raises_after_three)
    assert ["LookupError"] == traced(caplog)
    for headers in fate.dead.values():
        assert "LookupError" in headers["x-exception-type"]
        assert "the table is gone" == headers["x-exception-message"]


async def test_the_text_of_an_exception_can_be_left_out(url, name) -> None:
    """It may be confidential; its type stays."""
    fate = await run(url, name, _raises_after_three, dead_letter_exception_message=False)
    for headers in fate.dead.values():
        assert "LookupError" in headers["x-exception-type"]
        assert "x-exception-message" not in headers


# --- by default: again ------------------------------------------------------------


async def test_by_default_undecided_messages_are_retried_until_exhausted(url, name) -> None:
    """Twice, then dead-lettered; acked messages are not handled again."""
    attempts: Counter[bytes] = Counter()

    async def never_the_last_two(consumer, messages):
        attempts.update(message.body for message in messages)
        for message in messages:
            if message.body >= b"3":
                raise RuntimeError("down")
            yield ACK

    fate = await run(
        url, name, never_the_last_two, batch_timeout=0.2, unhandled_exception_action=REQUEUE
    )
    assert {b"3", b"4"} == fate.dead.keys()
    assert {b"0": 1, b"1": 1, b"2": 1, b"3": 3, b"4": 3} == attempts
    assert {"exhausted"} == {each["x-dead-letter-reason"] for each in fate.dead.values()}
    assert {2} == {each["x-retry-count"] for each in fate.dead.values()}


async def test_requeue_immediate_is_not_counted(url, name) -> None:
    """From the front of the queue, as often as the handler yields it."""
    attempts: Counter[bytes] = Counter()

    async def at_the_sixth(consumer, messages):
        for message in messages:
            attempts[message.body] += 1
            assert message.retry_count == 0
            again = message.body == b"2" and attempts[message.body] < 6
            yield MessageResult.REQUEUE_IMMEDIATE if again else ACK

    fate = await run(url, name, at_the_sixth, batch_timeout=0.2)
    assert {b"0": 1, b"1": 1, b"2": 6, b"3": 1, b"4": 1} == attempts
    assert {} == fate.dead


# --- exceptions with results of their own -------------------------------------------


@pytest.mark.parametrize(
    ("raised", "dead", "acked"),
    [
        (KeyError("k"), set(), 5),
        (IndexError("i"), {b"3", b"4"}, 3),
        (ValueError("v"), {b"3", b"4"}, 3),
    ],
)
async def test_exception_results_the_most_specific_class_wins(
    url, name, raised, dead, acked
) -> None:
    """KeyError is listed itself, IndexError by its base, ValueError not at all."""

    async def raises(consumer, messages):
        for _ in messages[:3]:
            yield ACK
        raise raised

    fate = await run(
        url,
        name,
        raises,
        exception_results={LookupError: NACK, KeyError: ACK},
        unhandled_exception_action=NACK,
    )
    assert dead == fate.dead.keys()
    assert acked == fate.recorder.results["ACK"]


# --- out of order, with reasons -----------------------------------------------------


async def test_pairs_may_come_in_any_order(url, name) -> None:
    """As they are finished."""

    async def backwards(consumer, messages):
        for message in reversed(messages):
            yield message, NACK if message.body in {b"1", b"3"} else ACK

    fate = await run(url, name, backwards)
    assert {b"1", b"3"} == fate.dead.keys()


async def test_reasons_reach_the_dead_letter(url, name) -> None:
    """Of a rejection, and of the last retry."""

    async def reasons(consumer, messages):
        for message in messages:
            match message.body:
                case b"1":
                    yield Nack(reason="no such customer")
                case b"2":
                    yield Requeue(reason="service down")
                case _:
                    yield ACK

    fate = await run(url, name, reasons, batch_timeout=0.2)
    assert {
        b"1": ("rejected", "no such customer"),
        b"2": ("exhausted", "service down"),
    } == {
        body: (each["x-dead-letter-reason"], each["x-dead-letter-detail"])
        for body, each in fate.dead.items()
    }


# --- time limits --------------------------------------------------------------------


async def test_a_handler_that_takes_too_long_is_cut_off(url, name, caplog) -> None:
    """Results yielded in time count; the rest gets the action."""

    async def hangs(consumer, messages):
        for _ in messages[:3]:
            yield ACK
        await asyncio.Event().wait()

    fate = await run(url, name, hangs, process_timeout=1.0)
    assert {b"3", b"4"} == fate.dead.keys()
    assert 3 == fate.recorder.results["ACK"]
    assert "process_timeout" in errors_logged(caplog)
    assert {"handler-error"} == {each["x-dead-letter-reason"] for each in fate.dead.values()}


# --- what cannot be decoded -----------------------------------------------------------


async def test_a_body_that_is_not_json_affects_that_message_only(url, name) -> None:
    """Only this message is dead-lettered; the other undecided ones are run again at once."""
    turns = itertools.count()

    async def reads(consumer, messages):
        turn = next(turns)
        for message in messages:
            if message.body == b"2" and turn == 0:
                message.body = b"{"
            message.json()
            yield ACK

    fate = await run(url, name, reads)
    assert {b"{"} == fate.dead.keys()
    assert "undecodable" == fate.dead[b"{"]["x-dead-letter-reason"]
    assert [BODIES, [b"3", b"4"]] == fate.batches


# --- one by one -----------------------------------------------------------------------


async def test_a_consumer_of_single_messages_returns_or_raises(url, name) -> None:
    """`concurrency` of them run at once, and no more."""
    fate = Outcome()
    running = most = 0

    class Single(Consumer):
        exception_results = {KeyError: NACK}  # noqa: RUF012

        async def process_message(self, message):
            nonlocal running, most
            running += 1
            most = max(most, running)
            try:
                await asyncio.sleep(0.05)
                match message.body:
                    case b"1":
                        return NACK
                    case b"2":
                        raise KeyError("k")
                    case b"3" if message.retry_count == 0:
                        raise RuntimeError("once")
                    case b"4":
                        return None
                return ACK
            finally:
                running -= 1

    undertaker = DeadLetterReader(ConsumerSettings(url=url, queue_name=f"{name}.dlq"), fate)
    consumer = Single(
        ConsumerSettings(
            url=url,
            queue_name=name,
            concurrency=3,
            max_requeue_attempts=1,
            dead_letter_queue=f"{name}.dlq",
        ),
        observers=[fate.recorder],
    )
    async with undertaker, consumer:
        await undertaker.publish_many([Publication(body, routing_key=name) for body in BODIES])
        await until(lambda: fate.recorder.results["ACK"] == 2 and len(fate.dead) == 3)
    assert 3 == most
    assert {b"1": "rejected", b"2": "handler-error", b"4": "exhausted"} == {
        body: each["x-dead-letter-reason"] for body, each in fate.dead.items()
    }

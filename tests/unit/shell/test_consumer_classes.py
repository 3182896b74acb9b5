"""Mistakes in a consumer's class or in its arguments are refused when it is made."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import ClassVar, Generic, TypeVar

import pytest
from pydantic_settings import SettingsConfigDict

from aio_pika_batch import (
    BatchConsumer,
    BatchConsumerSettings,
    ConfigurationError,
    Consumer,
    ConsumerSettings,
    MessageResult,
    Nack,
    Requeue,
)
from aio_pika_batch.adapters.memory import EventKind
from aio_pika_batch.testing import process
from aio_pika_batch.testing.virtual_time import run
from tests.unit.shell.helpers import numbered, settings

ACK = MessageResult.ACK
S = TypeVar("S", bound=BatchConsumerSettings)
T = TypeVar("T")


class Mine(BatchConsumerSettings):
    """Settings with a field and a prefix of their own."""

    model_config = SettingsConfigDict(env_prefix="MINE_", env_file=None)
    database: str = "orders"


class Importer(BatchConsumer[Mine]):
    """Says which settings it has."""

    async def process_messages(self, messages):
        for message in messages:
            yield ACK if message.body.decode() == self.settings.database else MessageResult.NACK


class Single(Consumer[Mine]):
    """The same for single messages."""

    async def process_message(self, message):
        return ACK


class Base(BatchConsumer[S], Generic[T, S]):
    """A generic base class of one's own."""

    async def process_messages(self, messages):
        for _ in messages:
            yield ACK


class Derived(Base[int, Mine]):
    """Names the settings for its base class."""


class Plain(BatchConsumer):
    """Says nothing."""

    async def process_messages(self, messages):
        for _ in messages:
            yield ACK


@pytest.mark.parametrize("cls", [Importer, Single, Derived, type("Later", (Importer,), {})])
def test_settings_come_from_the_environment_as_the_class_names_them(cls, monkeypatch):
    """The parameter of the class is the class of the settings."""
    monkeypatch.setenv("MINE_QUEUE_NAME", "mine")
    monkeypatch.setenv("MINE_URL", "memory://")
    monkeypatch.setenv("MINE_DATABASE", "elsewhere")
    consumer = cls()
    assert ("mine", "elsewhere") == (consumer.settings.queue_name, consumer.settings.database)


def test_a_class_attribute_names_the_settings_too():
    """It counts more than the parameter."""

    class Other(Mine):
        pass

    class Chooses(Importer):
        settings_class = Other

    assert (Other, Mine, BatchConsumerSettings) == (
        Chooses.settings_class,
        Importer.settings_class,
        Plain.settings_class,
    )


def test_every_batch_is_a_list():
    """As the signature promises, also if a part of a batch runs again."""
    kinds = []

    class Looks(BatchConsumer):
        async def process_messages(self, messages):
            kinds.append(type(messages))
            for message in messages:
                if message.body == b"bad":
                    raise ValueError(message)
                yield ACK

    consumer = Looks(settings(batch_size=4, isolate_failures=True))
    run(process(consumer, [b"1", b"2", b"bad", b"3", b"4"]))
    assert {list} == set(kinds)
    assert 2 < len(kinds)


SECRET = "amqp://guest:secret@broker/"


@pytest.mark.parametrize(
    ("cls", "given", "text"),
    [
        (Plain, {"queue_name": "q"}, r"Plain\(BatchConsumerSettings\(\*\*settings\)\)"),
        (Plain, SECRET, r"not a str; use Plain\(BatchConsumerSettings\(url=…"),
        (Plain, BatchConsumerSettings, "not the class BatchConsumerSettings"),
        (Plain, ConsumerSettings(url="memory://", queue_name="q"), "ConsumerSettings'>"),
        (Importer, settings(), "needs an instance of Mine, not .*BatchConsumerSettings'>"),
        (Single, settings(), "needs an instance of Mine"),
        (Plain, 7, "not something of <class 'int'>"),
    ],
)
def test_something_else_in_place_of_settings_is_refused(cls, given, text):
    """The error says what to pass, and shows no secret."""
    with pytest.raises(ConfigurationError, match=text) as error:
        cls(given)
    assert "secret" not in str(error.value)


class Forgets(Plain):
    """Doesn't call `super().__init__`."""

    def __init__(self, some):
        self.settings = some


@dataclass
class Data(Plain):
    """Its `__init__` is generated."""

    settings: BatchConsumerSettings


async def enter(consumer):
    """Start and stop."""
    async with consumer:
        pass


async def handle(consumer):
    """As a test does."""
    await process(consumer, [b"1"])


@pytest.mark.parametrize(
    "use",
    [
        lambda consumer: run(enter(consumer)),
        lambda consumer: run(consumer.run()),
        lambda consumer: run(handle(consumer)),
        lambda consumer: consumer.status(),
        lambda consumer: consumer.is_healthy,
        lambda consumer: consumer.request_stop(),
        lambda consumer: consumer.configure(batch_size=1),
        lambda consumer: consumer.observe(None),
    ],
)
@pytest.mark.parametrize(
    ("cls", "text"), [(Forgets, "has not called"), (Data, "has.*: a dataclass never")]
)
def test_a_consumer_that_was_not_initialized_says_so(cls, text, use):
    """Whatever is called first."""
    with pytest.raises(ConfigurationError, match=rf"{cls.__name__}.__init__ {text}"):
        use(cls(settings()))


def made_of(base, name, function):
    """Return the class of a consumer that has this function as a method."""
    return type("Wrong", (base,), {name: function})


async def coroutine(self, messages):
    """It returns what it should yield."""
    return [ACK for _ in messages]


def generator(self, messages):
    """It isn't async."""
    yield ACK


async def one_too_few(self):
    """It takes no messages."""
    yield ACK


async def one_too_many(self, messages, more):
    """It takes more than messages."""
    yield ACK


async def yields_one(self, message):
    """It should return."""
    yield ACK


async def returns_one(self):
    """It takes no message."""
    return ACK


def plain(self, *_):
    """It isn't async."""


@pytest.mark.parametrize(
    ("base", "name", "function", "text"),
    [
        (BatchConsumer, "other", plain, "must override process_messages, an async"),
        (BatchConsumer, "process_message", plain, "process_message is a Consumer's"),
        (BatchConsumer, "process_messages", coroutine, "has no `yield`.*that yields"),
        (BatchConsumer, "process_messages", generator, "is not async.*that yields"),
        (
            BatchConsumer,
            "process_messages",
            one_too_few,
            r"process_messages\(\) must take self and",
        ),
        (BatchConsumer, "process_messages", one_too_many, "missing a required argument: 'more'"),
        (Consumer, "other", plain, "must override process_message, a coroutine$"),
        (Consumer, "process_messages", coroutine, "process_messages is a BatchConsumer's"),
        (Consumer, "process_message", yields_one, "has a `yield`.*that returns"),
        (Consumer, "process_message", generator, "has a `yield`.*that returns"),
        (
            Consumer,
            "process_message",
            returns_one,
            r"process_message\(\) must take self and message",
        ),
        (Plain, "on_start", plain, "write `async def on_start`"),
        (Plain, "on_stop", yields_one, "write `async def on_stop`"),
        (Plain, "on_session", plain, "write `async def on_session`"),
    ],
)
def test_a_method_that_cannot_work_is_refused(base, name, function, text):
    """When the consumer is made, with what to write instead."""
    with pytest.raises(ConfigurationError, match=rf"Wrong[\s\S]*{text}"):
        made_of(base, name, function)(settings())


@pytest.mark.parametrize(
    ("table", "text"),
    [
        ({KeyError: "nack"}, r"exception_results\[KeyError\] is .*use a MessageResult, Nack"),
        ({KeyError: Nack}, r"exception_results\[KeyError\] is .*use a MessageResult, Nack"),
        ({"KeyError": ACK}, "exception_results: 'KeyError' is not a class of exceptions"),
        ({KeyError(): ACK}, r"exception_results: KeyError\(\) is not a class of exceptions"),
    ],
)
def test_a_result_of_an_exception_that_is_none_is_refused(table, text):
    """When the consumer is made, not when the exception is raised."""
    wrong = type("Wrong", (Plain,), {"exception_results": table})
    with pytest.raises(ConfigurationError, match=text):
        wrong(settings())


async def test_an_exception_can_have_a_result_with_a_reason():
    """It is written into the dead letter, as if the handler had yielded it."""

    class Reasoned(BatchConsumer):
        exception_results: ClassVar = {
            KeyError: Nack(reason="no customer"),
            OSError: Requeue(delay=30),
        }

        async def process_messages(self, messages):
            for message in messages:
                raise KeyError if message.body == b"bad" else OSError
            yield ACK

    outcome = await process(Reasoned(settings(dead_letter_queue="dead")), [b"bad"])
    [dead] = outcome.dead_lettered
    assert dead.headers["x-dead-letter-detail"] == "no customer"
    outcome = await process(Reasoned(settings()), [b"down"])
    assert [Requeue(delay=30)] == outcome.results


async def yields(*results):
    """Yield these."""
    for each in results:
        yield each


async def forgets(self, message):
    """It has no `return`."""


async def returns_text(self, message):
    """It returns no result."""
    return "ack"


async def returns_pair(self, message):
    """It returns what the other class yields."""
    return message, ACK


def returns_ack(self, message):
    """It isn't async."""
    return ACK


WRONG_BATCHES = {
    "a list": (
        lambda self, messages: [ACK for _ in messages],
        "returned something of.*list.*yields",
    ),
    "None": (lambda self, messages: None, "returned None: it must be an `async def` that yields"),
    "a coroutine": (lambda self, messages: forgets(self, None), "returned something of.*coroutine"),
    "yield without a result": (lambda self, messages: yields(None), "None is not a result: yield"),
}
WRONG_SINGLES = {
    "no return": (forgets, "returned None, which is not a result: return a MessageResult"),
    "not async": (returns_ack, "it must be an `async def`"),
}
WRONG = [(BatchConsumer, "process_messages", *each) for each in WRONG_BATCHES.values()]
WRONG += [(Consumer, "process_message", *each) for each in WRONG_SINGLES.values()]
NAMES = [*WRONG_BATCHES, *WRONG_SINGLES]


@pytest.mark.parametrize(("base", "name", "function", "text"), WRONG, ids=NAMES)
@pytest.mark.parametrize("workers", [1, 3])
async def test_a_handler_that_cannot_work_ends_the_consumer(
    rabbit, caplog, base, name, function, text, workers
):
    """`run` raises what is wrong with the code; no message counts as failed."""
    given = {"num_workers": workers, "concurrency": 2, "dead_letter_queue": "dead"}
    consumer = made_of(base, name, function)(settings(**given), transport=rabbit.transport)
    rabbit.put(*numbered(9))
    with pytest.raises(ConfigurationError, match=f"Wrong can't handle messages: .*{text}") as error:
        await consumer.run()
    assert "yield" not in str(error.value) or base is BatchConsumer
    assert numbered(9) == sorted(rabbit.waiting())
    assert [] == rabbit.broker.journal.of(EventKind.PUBLISHED, EventKind.ACKED)
    [line] = [each for each in caplog.records if each.levelname == "ERROR"]
    assert line.getMessage().startswith("the handler can't work: the consumer stops")


@pytest.mark.parametrize("function", [returns_text, returns_pair, forgets])
async def test_an_error_about_one_message_speaks_of_returning(function):
    """`yield` is for the other class."""

    class Wrong(Consumer):
        async def process_message(self, message):
            return await function(self, message) if message.body == b"bad" else ACK

    outcome = await process(Wrong(settings()), [b"good", b"bad"])
    [error] = outcome.errors
    assert "which is not a result: return a MessageResult" in str(error)
    assert "yield" not in str(error)


@pytest.mark.parametrize(("base", "name", "function", "text"), WRONG, ids=NAMES)
async def test_a_test_of_a_handler_that_cannot_work_fails(base, name, function, text):
    """`process` raises the same."""
    consumer = made_of(base, name, function)(settings())
    with pytest.raises(ConfigurationError, match=text):
        await process(consumer, [b"1", b"2"])


async def test_a_consumer_that_ended_by_itself_can_be_left(rabbit):
    """`async with` doesn't repeat the error; health shows it."""
    rabbit.put(b"1")
    async with made_of(Consumer, "process_message", forgets)(
        settings(), transport=rabbit.transport
    ) as consumer:
        await asyncio.sleep(10)
        assert not consumer.is_running
        assert not consumer.is_healthy
    assert [b"1"] == rabbit.waiting()


async def test_a_handler_that_has_worked_fails_its_batch_only(rabbit):
    """Later an invalid result may be due to a message."""

    class Sometimes(Consumer):
        async def process_message(self, message):
            return None if message.body == b"3" else ACK

    rabbit.put(*numbered(6))
    async with Sometimes(
        settings(dead_letter_queue="dead", max_requeue_attempts=0, batch_size=1),
        transport=rabbit.transport,
    ) as consumer:
        await rabbit.settled()
        assert consumer.is_healthy
    assert [b"3"] == [each.body for each in rabbit.drain("dead")]
    assert [] == rabbit.waiting()


def take_out(messages):
    """As people work through a list."""
    while messages:
        yield messages.pop()


def largest_first(messages):
    """Sorted in place."""
    messages.sort(key=lambda message: message.body, reverse=True)
    yield from messages


@pytest.mark.parametrize("settle", ["batch", "yield", "atomic"])
@pytest.mark.parametrize("change", [take_out, largest_first])
async def test_a_result_never_goes_to_another_message(rabbit, change, settle):
    """A handler that changes its list of messages can't yield results by position."""

    class Changes(BatchConsumer):
        async def process_messages(self, messages):
            for message in change(messages):
                yield MessageResult.NACK if message.body == b"2" else ACK
                await asyncio.sleep(1)

    rabbit.put(*numbered(5))
    consumer = Changes(settings(settle=settle), transport=rabbit.transport)
    with pytest.raises(ConfigurationError, match=r"changed its list .* yield \(message, result\)"):
        await consumer.run()
    assert numbered(5) == sorted(rabbit.waiting())


async def test_a_changed_list_does_no_harm_to_pairs():
    """Nor where every message is acknowledged."""

    class Pairs(BatchConsumer):
        async def process_messages(self, messages):
            for message in take_out(messages):
                yield message, MessageResult.NACK if message.body == b"2" else ACK

    class Acks(BatchConsumer):
        async def process_messages(self, messages):
            for _ in take_out(messages):
                yield ACK

    pairs = await process(Pairs(settings()), numbered(5))
    acks = await process(Acks(settings()), numbered(5))
    assert ([b"2"], 5) == ([each.body for each in pairs.nacked], len(acks.acked))

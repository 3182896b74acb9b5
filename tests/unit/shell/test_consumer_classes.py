"""Mistakes in a consumer's class or in its arguments are refused when it is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

import pytest
from pydantic_settings import SettingsConfigDict

from aio_pika_batch import (
    BatchConsumer,
    BatchConsumerSettings,
    ConfigurationError,
    Consumer,
    ConsumerSettings,
    MessageResult,
)
from aio_pika_batch.testing import process
from aio_pika_batch.testing.virtual_time import run
from tests.unit.shell.helpers import settings

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
    """Handlers are told so, also when a part of a batch is run again."""
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

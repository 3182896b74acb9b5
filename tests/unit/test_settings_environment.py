"""Settings from the environment: lists, misspelt variables, and settings in other settings."""

from __future__ import annotations

import json
import logging
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import AmqpDsn, BaseModel, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from aio_pika_batch import BatchConsumerSettings, ConfigurationError, Consumer, MessageResult
from aio_pika_batch.cli.check import _offline
from aio_pika_batch.settings.derived import endpoint, topology_options

OURS = "AIO_PIKA_BATCH_"
MEMORY = {"url": "memory://", "queue_name": "jobs", "_env_file": None}


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    """An environment without settings."""
    monkeypatch.chdir(tmp_path)
    for name in [each for each in os.environ if each.startswith(OURS)]:
        monkeypatch.delenv(name)
    return monkeypatch


def keys_of(text):
    """Return the routing keys that a text stands for."""
    made = BatchConsumerSettings(**MEMORY, exchange_name="events", routing_key=text)
    return topology_options(made).routing_keys


@pytest.mark.parametrize(
    "text",
    [
        "order.new,order.paid",
        " order.new , order.paid ",
        '["order.new", "order.paid"]',
        "['order.new','order.paid']",
        "[ 'order.new' , \"order.paid\", ]",
    ],
)
def test_several_routing_keys_can_be_written_in_several_ways(environment, text):
    """As people write lists."""
    environment.setenv(OURS + "ROUTING_KEY", text)
    made = BatchConsumerSettings(**MEMORY, exchange_name="events")
    assert ("order.new", "order.paid") == topology_options(made).routing_keys
    assert ("order.new", "order.paid") == keys_of(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        '["order.new", "order.paid"',
        '["order.new" "order.paid"]',
        "[order.new, order.paid]",
        "order.new;order.paid",
        "order.new order.paid",
        "order.new,,order.paid",
        "order.new,",
        "('order.new', 'order.paid')",
        "{'order.new'}",
        "'order.new,order.paid'",
        '"order.new","order.paid"',
        "- order.new\n- order.paid",
    ],
)
def test_unclear_routing_keys_are_refused(environment, text):
    """None is bound as a key that no message has."""
    environment.setenv(OURS + "ROUTING_KEY", text)
    with pytest.raises(ConfigurationError, match="routing_key"):
        BatchConsumerSettings(**MEMORY, exchange_name="events")


@given(st.lists(st.text(max_size=60), min_size=1))
def test_every_routing_key_can_be_written_as_json(keys):
    """Also one with a comma, and an empty one."""
    made = BatchConsumerSettings(**MEMORY, routing_key=json.dumps(keys))
    assert tuple(keys) == topology_options(made).routing_keys
    assert tuple(keys) == topology_options(made.replaced(batch_size=3)).routing_keys


def test_an_empty_key_may_be_meant():
    """Fanout and headers exchanges don't look at it; in a list it is explicit."""
    for kind in ("fanout", "headers"):
        BatchConsumerSettings(**MEMORY, exchange_name="e", exchange_type=kind, routing_key="")
    assert ("",) == keys_of([""])


@pytest.mark.parametrize(
    ("variable", "meant"),
    [
        ("BATCH_SISE", "BATCH_SIZE"),
        ("QUEUENAME", "QUEUE_NAME"),
        ("WORKERS", "NUM_WORKERS"),
        ("PREFETCH", "PREFETCH_COUNT"),
        ("POLL_INTERVALL", "POLL_INTERVAL"),
    ],
)
def test_a_misspelt_variable_is_reported(environment, caplog, variable, meant):
    """By settings when they are made, and by `check`; once."""
    environment.setenv(OURS + variable, "5")
    made = BatchConsumerSettings(**MEMORY).replaced(batch_size=3)
    line = f"{OURS}{variable} is not a setting: did you mean {OURS}{meant}?"
    assert [line] == [each.getMessage() for each in caplog.records]

    class Quiet(Consumer):
        async def process_message(self, message):
            return MessageResult.ACK

    assert line in [each.text for each in _offline(Quiet(made))]


def test_a_misspelt_variable_in_a_file_is_reported(tmp_path, caplog):
    """As one in the environment."""
    (tmp_path / ".env").write_text(f"{OURS}BATCHSIZE=5\n")
    BatchConsumerSettings(url="memory://", queue_name="jobs")
    assert "did you mean AIO_PIKA_BATCH_BATCH_SIZE?" in caplog.text


def test_a_missing_setting_is_reported_with_what_was_written_instead(environment):
    """The error contains the correction."""
    environment.setenv(OURS + "QUEUE_NAM", "jobs")
    environment.setenv("QUEUE_NAME", "jobs")
    with pytest.raises(ConfigurationError) as error:
        BatchConsumerSettings(_env_file=None)
    assert "AIO_PIKA_BATCH_QUEUE_NAM is not a setting" in str(error.value)
    assert "QUEUE_NAME is not read: settings need their prefix" in str(error.value)


def test_our_url_is_reported_where_a_class_has_another_prefix(environment, caplog):
    """The consumer would connect to localhost. Other settings may be those of another consumer."""

    class Shop(BatchConsumerSettings):
        model_config = SettingsConfigDict(env_prefix="SHOP_")

    environment.setenv(OURS + "URL", "amqp://guest:secret@broker/")
    environment.setenv(OURS + "BATCH_SIZE", "50")
    Shop(queue_name="jobs", _env_file=None)
    [line] = caplog.messages
    assert line == f"{OURS}URL is not read: these settings have another prefix, SHOP_URL"
    caplog.clear()
    Shop(queue_name="jobs", url="memory://", _env_file=None)
    environment.setenv("SHOP_URL", "memory://")
    Shop(queue_name="jobs", _env_file=None)
    assert [] == caplog.messages


def test_variables_of_0_1_0_are_reported(environment, caplog):
    """It read them without a prefix. A URL that isn't a broker's doesn't count."""
    environment.setenv("URL", "https://example.org")
    environment.setenv("BATCH_SIZE", "50")
    BatchConsumerSettings(**MEMORY)
    [line] = caplog.messages
    assert "BATCH_SIZE is not read: settings need their prefix, AIO_PIKA_BATCH_BATCH_SIZE" == line
    caplog.clear()
    environment.setenv("URL", "amqp://guest:secret@broker/")
    BatchConsumerSettings(queue_name="jobs", batch_size=50, _env_file=None)
    [line] = caplog.messages
    assert line.startswith("URL is not read")
    assert "secret" not in line
    caplog.clear()
    environment.setenv(OURS + "URL", "memory://")
    environment.setenv(OURS + "BATCH_SIZE", "7")
    BatchConsumerSettings(queue_name="jobs", _env_file=None)
    assert [] == caplog.messages


def test_variables_that_mean_something_else_are_not_reported(environment, caplog):
    """Settings of another kind of consumer, the fixtures', and an application's own."""

    class Mine(BatchConsumerSettings):
        model_config = SettingsConfigDict(env_prefix="SHOP_", env_file=None)

    environment.setenv(OURS + "POLL_INTERVAL", "1")
    environment.setenv(OURS + "TEST_URL", "amqp://")
    environment.setenv("SHOP_DATABASE", "x")
    environment.setenv("SHOP_URLS", "x")
    environment.setenv("QUEUE_NAME", "x")
    Mine(url="memory://", queue_name="jobs")
    environment.delenv("QUEUE_NAME")
    BatchConsumerSettings(**MEMORY)
    assert [] == [each for each in caplog.records if logging.WARNING <= each.levelno]


class App(BaseSettings):
    """An application's settings, with those of a consumer in them."""

    model_config = SettingsConfigDict(env_prefix="APP_", env_nested_delimiter="__")
    rabbit: BatchConsumerSettings


class Inner(BaseModel):
    """A model between them."""

    rabbit: BatchConsumerSettings


class Outer(BaseSettings):
    """Settings two levels down."""

    model_config = SettingsConfigDict(env_prefix="APP_", env_nested_delimiter="__")
    inner: Inner


@pytest.mark.parametrize(("cls", "prefix"), [(App, "APP_RABBIT__"), (Outer, "APP_INNER__RABBIT__")])
def test_settings_in_other_settings_name_the_variable_that_was_read(environment, cls, prefix):
    """And show no secret."""
    environment.setenv(prefix + "URL", "amqp://guest:secret@broker/")
    environment.setenv(prefix + "QUEUE_NAME", "jobs")
    environment.setenv(prefix + "ROUTING_KEY", "a,b")
    made = cls()
    rabbit = made.rabbit if cls is App else made.inner.rabbit
    assert ("a", "b") == topology_options(rabbit).routing_keys
    assert "secret" not in repr(made)
    environment.setenv(prefix + "BATCH_SIZE", "0")
    with pytest.raises(ValidationError) as error:
        cls()
    text = str(error.value)
    assert "batch_size: Input should be greater than or equal to 1" in text
    assert f"(in the environment: {prefix}BATCH_SIZE)" in text
    assert OURS not in text
    assert "secret" not in text


def test_a_missing_setting_in_other_settings_shows_no_secret(environment):
    """Pydantic would show the whole table."""
    environment.setenv("APP_RABBIT__URL", "amqp://guest:secret@broker/")
    with pytest.raises(ValidationError, match="queue_name: Field required") as error:
        App()
    assert "secret" not in str(error.value)
    with pytest.raises(ValidationError) as error:
        App(rabbit={"url": "http://guest:secret@broker/", "queue_name": "q"})
    assert "secret" not in str(error.value)


class Renamed(BatchConsumerSettings):
    """Reads the URL from another variable."""

    url: str = Field(validation_alias="RABBIT_URL")


class Typed(BatchConsumerSettings):
    """Checks the URL by pydantic."""

    url: AmqpDsn


class Secret(BatchConsumerSettings):
    """Hides the URL by pydantic."""

    url: SecretStr


class Beside(BatchConsumerSettings):
    """Has further URLs, and a secret."""

    database: str = "postgresql://app:secret@db/shop"
    others: list[str] = ["redis://:secret@cache/0"]  # noqa: RUF012
    token: int = 0


SECRET_URL = "amqp://guest:secret@broker/v"


@pytest.mark.parametrize(
    ("cls", "given"),
    [
        (Renamed, {"RABBIT_URL": SECRET_URL}),
        (Typed, {"url": SECRET_URL}),
        (Secret, {"url": SECRET_URL}),
        (Beside, {"url": SECRET_URL}),
    ],
)
def test_a_subclass_shows_no_password(cls, given):
    """Whatever it does with the URL."""
    made = cls(queue_name="jobs", _env_file=None, **given)
    assert "secret" not in f"{made!r} {made}"
    assert SECRET_URL == endpoint(made, "Importer").url
    for wrong in ({"queue_name": 7}, {"batch_size": SECRET_URL}, {"token": "secret"}):
        if wrong.keys() <= cls.model_fields.keys():
            with pytest.raises(ConfigurationError) as error:
                cls(**{"queue_name": "jobs", "_env_file": None} | given | wrong)
            assert "secret" not in str(error.value)
    wrong = {name: ["secret"] for name in given}
    with pytest.raises(ConfigurationError) as error:
        cls(queue_name="jobs", _env_file=None, **wrong)
    assert "secret" not in str(error.value)


def test_a_custom_setting_that_isnt_json_is_a_configuration_error(environment):
    """And isn't shown."""
    environment.setenv(OURS + "OTHERS", "[secret")
    with pytest.raises(ConfigurationError, match="others") as error:
        Beside(**MEMORY)
    assert "secret" not in str(error.value)

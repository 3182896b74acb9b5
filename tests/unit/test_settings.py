"""What can be configured, and from where, and the errors for invalid values."""

from __future__ import annotations

import inspect
import string
from enum import Enum, StrEnum
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic_settings import SettingsConfigDict

from aio_pika_batch import (
    BatchConsumerSettings,
    ConfigurationError,
    Consumer,
    ConsumerSettings,
    MessageResult,
)
from aio_pika_batch.masking import mask_url
from aio_pika_batch.runtime.worker_config import WorkerConfig
from aio_pika_batch.settings.derived import topology_options

MEMORY = {"_env_file": None, "url": "memory://", "queue_name": "jobs"}

DEFAULTS = {
    "url": "amqp://guest:guest@localhost:5672/",
    "exchange_name": None,
    "exchange_type": "direct",
    "routing_key": None,
    "prefetch_count": 10,
    "num_workers": 1,
    "batch_size": 10,
    "batch_timeout": 5.0,
    "batch_max_bytes": None,
    "ordered_by_key": False,
    "max_requeue_attempts": 3,
    "unhandled_exception_action": MessageResult.REQUEUE,
    "queue_durable": True,
    "exchange_durable": True,
    "queue_arguments": None,
    "process_timeout": None,
    "retry_count_header": "x-retry-count",
    "requeue_delay": None,
    "without_dead_letter": "retry",
    "requeue_backoff": 2.0,
    "requeue_delay_max": 300.0,
    "requeue_hold": 30.0,
    "reconnect_delay": 0.5,
    "reconnect_delay_max": 30.0,
    "connect_timeout": 10.0,
    "heartbeat": 30,
    "publish_timeout": 10.0,
    "shutdown_timeout": 25.0,
    "stuck_after": None,
    "settle": "batch",
    "settle_interval": 0.1,
    "isolate_failures": False,
    "isolate_limit": 10,
    "concurrency": 1,
    "declare": True,
    "dead_letter_exchange_type": None,
    "broker_dead_letters": True,
    "exchange_auto_delete": False,
    "exchange_internal": False,
    "exchange_arguments": None,
    "dead_letter_exception_message": True,
    "crash_suspect_after": 3,
    "crash_limit": 8,
}

COUNTS = ("batch_size", "batch_max_bytes", "num_workers", "concurrency", "isolate_limit")
TIMES = (
    "batch_timeout",
    "settle_interval",
    "process_timeout",
    "requeue_delay_max",
    "requeue_hold",
    "connect_timeout",
    "publish_timeout",
    "reconnect_delay",
    "reconnect_delay_max",
    "shutdown_timeout",
    "stuck_after",
)
NAMES = (
    "queue_name",
    "exchange_name",
    "dead_letter_exchange",
    "dead_letter_queue",
    "dead_letter_routing_key",
    "retry_count_header",
    "routing_key",
)

WRONG = [
    *((name, value, "greater than or equal to 1") for name in COUNTS for value in (0, -1)),
    *((name, "many", "valid integer") for name in COUNTS),
    *((name, 1.5, "valid integer") for name in COUNTS),
    *((name, value, "greater than 0") for name in TIMES for value in (0, -0.1)),
    *((name, value, "finite") for name in TIMES for value in (float("inf"), float("nan"))),
    *((name, "x" * 256, "255") for name in NAMES),
    *((name, "ü" * 128, "255 bytes") for name in NAMES),
    ("routing_key", ["fine", "x" * 256], "255 bytes"),
    ("routing_key", 5, "valid string"),
    ("queue_name", "", "at least 1 character"),
    ("retry_count_header", "", "at least 1 character"),
    ("dead_letter_exchange", "", "at least 1 character"),
    ("dead_letter_queue", "", "at least 1 character"),
    ("prefetch_count", -1, "greater than or equal to 0"),
    ("prefetch_count", 65536, "less than or equal to 65535"),
    ("max_requeue_attempts", -1, "greater than or equal to 0"),
    ("requeue_delay", -1, "greater than or equal to 0"),
    ("requeue_delay", 0.0001, "0, or at least 0.001"),
    ("requeue_delay", float("inf"), "finite"),
    ("requeue_delay_max", 4_294_968, "less than or equal to 4294967"),
    ("requeue_backoff", 0.9, "greater than or equal to 1"),
    ("requeue_backoff", float("nan"), "finite"),
    ("heartbeat", 0, "greater than or equal to 1"),
    ("heartbeat", 65536, "less than or equal to 65535"),
    ("exchange_type", "direkt", "direct, fanout, topic, headers"),
    ("dead_letter_exchange_type", "", "direct, fanout, topic, headers"),
    ("queue_type", "stream", "'classic' or 'quorum'"),
    ("settle", "each", "'batch', 'yield' or 'atomic'"),
    ("unhandled_exception_action", MessageResult.ACK, "REQUEUE, NACK or REQUEUE_IMMEDIATE"),
    ("unhandled_exception_action", "ignore", "ACK, NACK, REQUEUE, REQUEUE_IMMEDIATE"),
    ("unhandled_exception_action", 5, "unhandled_exception_action"),
    ("url", "http://host", "amqp://, amqps://, memory://"),
    ("url", "localhost", "start with one of amqp://"),
    ("url", "", "start with one of"),
    ("url", 5, "valid string"),
    ("queue_arguments", "x", "dictionary"),
    ("queue_durable", "perhaps", "boolean"),
]


@pytest.mark.parametrize(
    ("name", "value", "allowed"), WRONG, ids=lambda each: repr(each)[:30] if each != "" else "empty"
)
def test_nonsense_is_refused_with_the_field_and_what_is_allowed(name, value, allowed):
    """At construction, with the variable's name for operators."""
    with pytest.raises(ConfigurationError) as raised:
        BatchConsumerSettings(**MEMORY | {name: value})
    told = str(raised.value)
    assert told.startswith(f"BatchConsumerSettings: {name}")
    assert allowed in told
    assert f"AIO_PIKA_BATCH_{name.upper()}" in told


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"queue_type": "quorum", "queue_arguments": {"x-queue-type": "classic"}}, "queue_type"),
        ({"queue_exclusive": True, "num_workers": 2}, "num_workers=2"),
        ({"ordered_by_key": True, "num_workers": 2}, "num_workers=2 cannot keep the order"),
        ({"queue_exclusive": True, "declare": False}, "declare=False"),
        ({"reconnect_delay": 60}, "reconnect_delay_max"),
        (
            {"requeue_delay": 60, "requeue_delay_max": 30},
            "requeue_delay=60 .* requeue_delay_max=30",
        ),
        ({"requeue_delay": 1, "requeue_backoff": 1.01}, "by a factor of 1.01"),
        ({"requeue_delay": 1, "queue_name": "q" * 243}, "255 bytes.* a shorter queue_name"),
        ({"ssl_keyfile": "key.pem"}, "ssl_certfile"),
        ({"ssl_key_password": "secret"}, "ssl_key_password without ssl_certfile"),
    ],
)
def test_what_does_not_fit_together_is_refused(given, told):
    """With both names."""
    with pytest.raises(ConfigurationError, match=told):
        BatchConsumerSettings(**MEMORY | given)


@pytest.mark.parametrize(
    "given",
    [
        {"queue_type": "quorum", "queue_arguments": {"x-queue-type": "quorum"}},
        {"queue_type": "quorum", "queue_arguments": {"x-max-length": 1}},
        {"ssl_certfile": "cert.pem", "ssl_keyfile": "key.pem"},
        {"prefetch_count": 65535},
        {"prefetch_count": 0},
        {"max_requeue_attempts": 0},
        {"exchange_type": "x-consistent-hash"},
        {"unhandled_exception_action": "nack"},
        {"queue_name": "ü" * 127},
        {"requeue_delay": 1.0, "queue_name": "q" * 242},
        {"requeue_delay": 1.0, "requeue_backoff": 1.0},
        {"requeue_delay": 4_294_967.0, "requeue_delay_max": 4_294_967.0},
        {"requeue_delay_max": 0.001},
    ],
)
def test_what_is_at_the_edge_is_taken(given):
    """Ranges include their ends."""
    made = BatchConsumerSettings(**MEMORY | given)
    for name, value in given.items():
        if name != "unhandled_exception_action":
            assert value == getattr(made, name)
    if "unhandled_exception_action" in given:
        assert MessageResult.NACK is made.unhandled_exception_action


def test_the_password_of_a_key_is_never_shown(monkeypatch):
    """Right or wrong, from code or from the environment."""
    monkeypatch.setenv("AIO_PIKA_BATCH_SSL_KEY_PASSWORD", "s3cret")
    made = BatchConsumerSettings(**MEMORY, ssl_certfile="cert.pem")
    assert "s3cret" == made.ssl_key_password.get_secret_value()
    assert "s3cret" not in f"{made!r} {made!s} {made.model_dump()} {made.model_dump_json()}"
    with pytest.raises(ConfigurationError) as raised:
        BatchConsumerSettings(**MEMORY, ssl_certfile="cert.pem", ssl_key_password=536_536)
    assert "ssl_key_password" in str(raised.value)
    assert "536" not in str(raised.value)


def test_several_mistakes_are_reported_at_once():
    """A line each."""
    with pytest.raises(ConfigurationError) as raised:
        BatchConsumerSettings(**MEMORY | {"batch_size": 0, "num_workers": 0})
    first, second = str(raised.value).removeprefix("BatchConsumerSettings: ").split("\n  ")
    assert {"batch_size", "num_workers"} == {each.partition(":")[0] for each in (first, second)}


def test_an_unknown_name_is_refused_with_the_likely_one():
    """Only in code: the environment also contains other programs' variables."""
    with pytest.raises(ConfigurationError, match="'batchsize'; did you mean 'batch_size'"):
        BatchConsumerSettings(**MEMORY, batchsize=5)
    with pytest.raises(ConfigurationError, match=r"no setting 'colour'$"):
        BatchConsumerSettings(**MEMORY, colour="red")


def test_the_queue_must_be_named(monkeypatch):
    """It has no default."""
    with pytest.raises(ConfigurationError, match=r"queue_name.*AIO_PIKA_BATCH_QUEUE_NAME"):
        BatchConsumerSettings(_env_file=None)


def test_the_defaults_are_those_that_users_know():
    """Changing one is changing what programs do."""
    made = BatchConsumerSettings(_env_file=None, queue_name="jobs")
    assert DEFAULTS == {name: getattr(made, name) for name in DEFAULTS}


def test_the_environment_is_read(monkeypatch):
    """Under the default prefix; lists and tables as JSON, results by name; code comes first."""
    for name, value in {
        "QUEUE_NAME": "from-environment",
        "BATCH_SIZE": "7",
        "URL": "memory://there",
        "UNHANDLED_EXCEPTION_ACTION": "requeue_immediate",
        "QUEUE_ARGUMENTS": '{"x-max-length": 5}',
        "ROUTING_KEY": '["a", "b"]',
        "FOREIGN": "ignored",
    }.items():
        monkeypatch.setenv(f"AIO_PIKA_BATCH_{name}", value)
    made = BatchConsumerSettings(_env_file=None)
    assert ("from-environment", 7) == (made.queue_name, made.batch_size)
    assert MessageResult.REQUEUE_IMMEDIATE is made.unhandled_exception_action
    assert {"x-max-length": 5} == made.queue_arguments
    assert ("a", "b") == topology_options(made).routing_keys
    assert 9 == BatchConsumerSettings(_env_file=None, batch_size=9).batch_size


@pytest.mark.parametrize("key", ["order.created", "5", "true", "1.50", "null", "#", "*.b"])
def test_a_routing_key_in_the_environment_is_a_string(monkeypatch, key):
    """Also one that would be something else in JSON."""
    monkeypatch.setenv("AIO_PIKA_BATCH_ROUTING_KEY", key)
    assert (key,) == topology_options(BatchConsumerSettings(**MEMORY)).routing_keys


def test_a_variable_that_cannot_be_parsed_is_named(monkeypatch):
    """As every other mistake is."""
    monkeypatch.setenv("AIO_PIKA_BATCH_QUEUE_ARGUMENTS", "{x-max-length: 5}")
    with pytest.raises(ConfigurationError, match=r"queue_arguments: .*dictionary"):
        BatchConsumerSettings(**MEMORY)


def test_a_file_is_read_where_the_environment_is_silent(monkeypatch, tmp_path):
    """`.env` in the working directory; foreign keys are ignored."""
    monkeypatch.chdir(tmp_path)
    Path(".env").write_text(
        "AIO_PIKA_BATCH_QUEUE_NAME=from-file\nAIO_PIKA_BATCH_BATCH_SIZE=3\nOTHER=1\n",
        encoding="utf-8",
    )
    monkeypatch.setenv("AIO_PIKA_BATCH_BATCH_SIZE", "4")
    made = BatchConsumerSettings(url="memory://")
    assert ("from-file", 4) == (made.queue_name, made.batch_size)


def test_a_subclass_has_a_prefix_of_its_own(monkeypatch):
    """And errors name it."""

    class Mine(BatchConsumerSettings):
        model_config = SettingsConfigDict(env_prefix="MY_APP_", env_file=None)

    monkeypatch.setenv("MY_APP_QUEUE_NAME", "mine")
    monkeypatch.setenv("AIO_PIKA_BATCH_BATCH_SIZE", "3")
    made = Mine(url="memory://")
    assert ("mine", 10) == (made.queue_name, made.batch_size)
    with pytest.raises(ConfigurationError, match=r"Mine: batch_size.*MY_APP_BATCH_SIZE"):
        Mine(url="memory://", batch_size=0)


def test_a_consumer_takes_its_settings_from_the_environment(monkeypatch, tmp_path):
    """Those of its `settings_class`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MY_APP_QUEUE_NAME", "mine")
    monkeypatch.setenv("MY_APP_URL", "memory://")

    class Mine(ConsumerSettings):
        model_config = SettingsConfigDict(env_prefix="MY_APP_")

    class Reads(Consumer):
        settings_class = Mine

        async def process_message(self, message):
            return MessageResult.ACK

    consumer = Reads()
    assert "mine" == consumer.settings.queue_name
    assert isinstance(consumer.settings, Mine)


def test_an_exchange_type_may_be_an_enum():
    """`aio_pika.ExchangeType.FANOUT`, as users have always written it."""

    class ExchangeType(StrEnum):
        FANOUT = "fanout"

    class Plain(Enum):
        TOPIC = "topic"

    made = BatchConsumerSettings(
        **MEMORY, exchange_type=ExchangeType.FANOUT, dead_letter_exchange_type=Plain.TOPIC
    )
    assert ("fanout", "topic") == (made.exchange_type, made.dead_letter_exchange_type)
    assert type(made.exchange_type) is str


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, 20),
        ({"batch_size": 1}, 10),
        ({"batch_size": 100}, 200),
        ({"batch_size": 100, "concurrency": 3}, 400),
        ({"batch_size": 60_000}, 65_535),
        ({"prefetch_count": 10}, 10),
        ({"prefetch_count": 0}, 0),
        ({"prefetch_count": 5, "batch_size": 100}, 5),
    ],
)
def test_prefetch_left_unset_follows_the_batches(given, expected):
    """And what is set is used, also if it is the default."""
    assert expected == BatchConsumerSettings(**MEMORY | given).effective_prefetch


def test_prefetch_of_a_consumer_of_single_messages():
    """A batch of one, and nothing is collected."""
    made = ConsumerSettings(**MEMORY, concurrency=20)
    config = WorkerConfig.from_settings(made, {})
    assert (21, 1, 0) == (config.prefetch, config.batch_size, config.batch_timeout)


@pytest.mark.parametrize(
    ("settle", "is_early", "is_atomic"),
    [("batch", False, False), ("yield", True, False), ("atomic", False, True)],
)
def test_each_way_to_settle_is_what_it_says(settle, is_early, is_atomic):
    """The interval is for yields only."""
    config = WorkerConfig.from_settings(BatchConsumerSettings(**MEMORY, settle=settle), {})
    assert (is_early, is_atomic) == (config.pace is not None, config.failure.is_atomic)


def test_failing_messages_are_isolated_only_if_asked_for():
    """As many as the limit says. A single message needs none, and its failure voids its ACK."""
    assert [0, 10, 3] == [
        WorkerConfig.from_settings(BatchConsumerSettings(**MEMORY, **given), {}).failure.isolate
        for given in (
            {"isolate_limit": 5},
            {"isolate_failures": True},
            {"isolate_failures": True, "isolate_limit": 3},
        )
    ]
    single = WorkerConfig.from_settings(ConsumerSettings(**MEMORY), {})
    assert (None, True, 0) == (single.pace, single.failure.is_atomic, single.failure.isolate)


ESSENTIAL = ["url", "queue_name"]
OF_BATCHES = [
    "batch_size",
    "batch_timeout",
    "batch_max_bytes",
    "settle",
    "settle_interval",
    "isolate_failures",
    "isolate_limit",
]


def test_settings_are_listed_with_the_essential_ones_first():
    """In signatures, in `check` and in completion; both kinds in the same order."""
    single, batches = list(ConsumerSettings.model_fields), list(BatchConsumerSettings.model_fields)
    assert [*ESSENTIAL, *OF_BATCHES] == batches[: len(ESSENTIAL) + len(OF_BATCHES)]
    assert single == [name for name in batches if name not in OF_BATCHES]
    assert batches == list(inspect.signature(BatchConsumerSettings).parameters)


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, 900), ({"process_timeout": 7}, 14), ({"process_timeout": 7, "stuck_after": 3}, 3)],
)
def test_when_a_worker_counts_as_stuck(given, expected):
    """As configured, or twice the time-out, or a quarter of an hour."""
    assert expected == BatchConsumerSettings(**MEMORY | given).effective_stuck_after


passwords = st.text(string.ascii_letters + string.digits + ":/@#?%,;=&+ é", min_size=1)
ANOTHER = "another"


def shown(url):
    """All that may be shown of settings."""
    made = ConsumerSettings(_env_file=None, queue_name="jobs", url=url)
    return [repr(made), str(made), f"{made}", "%s %r" % (made, made), repr([made])]  # noqa: UP031


def complaint(url, **values):
    """Return the error for a wrong URL."""
    with pytest.raises(ConfigurationError) as raised:
        BatchConsumerSettings(_env_file=None, queue_name="jobs", url=url, **values)
    return str(raised.value), repr(raised.value)


@settings(max_examples=20)
@given(passwords, st.sampled_from(["amqp://u:{}@h:5672/v", "amqp://u:{0}@h1,amqps://u:{0}@h2/"]))
@example("Zq,b://cqZ", "amqp://u:{}@h:5672/v")
@example("Zqa/bcd@qZ", "amqp://u:{}@h:5672/v")
def test_a_password_is_never_shown(password, url):
    """Valid in a URL or not: what is shown is the same for all passwords; the rest is there."""
    assert shown(url.format(password)) == shown(url.format(ANOTHER))
    assert "://u:***@h" in shown(url.format(password))[0]


@settings(max_examples=20)
@given(passwords, st.sampled_from(["u:{}@h", "http://u:{}@h/", "u:{}://h", "://{}@h"]))
@example("Zq://abcdqZ", "u:{}@h")
def test_a_password_in_a_wrong_url_is_not_told_either(password, url):
    """Whatever is wrong with it, and with other settings beside it."""
    for values in ({}, {"batch_size": 0}):
        told = complaint(url.format(password), **values)
        assert told == complaint(url.format(ANOTHER), **values)


@pytest.mark.parametrize(
    ("url", "masked"),
    [
        ("amqp://u:p@h/v", "amqp://u:***@h/v"),
        ("amqp://u@h/v", "amqp://u@h/v"),
        ("amqp://h1:5672,h2:5672/v", "amqp://h1:5672,h2:5672/v"),
        ("amqp://u:p@h1,h2/v", "amqp://u:***@h1,h2/v"),
        ("amqp://h:5672/,amqp://u:p@h2/", "amqp://h:5672/,amqp://u:***@h2/"),
        ("amqp://[::1]:5672/,amqp://u:p@h2/", "amqp://[::1]:5672/,amqp://u:***@h2/"),
        ("amqp://u:p@h1/, amqps://v:q@h2/", "amqp://u:***@h1/, amqps://v:***@h2/"),
        ("memory://name", "memory://name"),
        ("amqp://h/v?password=p@q&name=n", "amqp://h/v?password=***&name=n"),
        ("amqp://u:p@h?a=b;auth_TOKEN=p,q", "amqp://u:***@h?a=b;auth_TOKEN=***"),
        ("amqp://h?secret=p,amqp://u:p@g?pwd=p", "amqp://h?secret=***,amqp://u:***@g?pwd=***"),
        ("amqps://h?keyfile=/k&cafile=/c", "amqps://h?keyfile=/k&cafile=/c"),
        ("amqp://u:p", "amqp://u:***@"),
        ("amqp://u:p,amqp://q@h", "amqp://u:***@h"),
        ("no url at all", "no url at all"),
    ],
)
def test_only_the_password_is_masked(url, masked):
    """Hosts and users help an operator."""
    assert masked == mask_url(url)

"""The library's logger: context, levels, and what it never does."""

from __future__ import annotations

import asyncio
import io
import logging
import sys
from contextlib import contextmanager
from typing import ClassVar

import pytest
import structlog

import aio_pika_batch
from aio_pika_batch import BatchConsumer, BatchConsumerSettings, MessageResult
from aio_pika_batch.adapters.memory import Broker, MemoryTransport
from aio_pika_batch.logs import KeywordLogger, format_error
from aio_pika_batch.testing import BatchBroker, virtual_time
from tests.unit.shell.helpers import RecordingConsumer, ack
from tests.unit.shell.scripted_transport import ScriptedTransport


class Odd(RuntimeError):
    """An exception whose `__str__` raises."""

    def __str__(self):
        raise AttributeError


@pytest.fixture
def log(caplog):
    """A logger with some context."""
    caplog.set_level(logging.DEBUG)
    return KeywordLogger(logging.getLogger("aio_pika_batch.test"), queue="jobs")


def test_keywords_become_part_of_the_line(log, caplog):
    """They are attributes of the record, too, for formatters."""
    log.info("declared", exchange="staging")
    [record] = caplog.records
    assert "declared [queue=jobs exchange=staging]" == record.getMessage()
    assert "declared" == record.event
    assert ("jobs", "staging") == (record.queue, record.exchange)
    assert ("aio_pika_batch.test", __name__.rpartition(".")[2]) == (record.name, record.module)


def test_an_exception_in_the_context_is_truncated():
    """Its text may contain a message body."""
    assert "KeyError: 'x'" == format_error(KeyError("x"))
    long = format_error(ValueError("b" * 10_000_000))
    assert long.endswith("b… (10000000 characters)")
    assert 5000 > len(long)


def test_a_keyword_with_a_reserved_name_is_renamed(log, caplog):
    """`logging` refuses to overwrite attributes of its records."""
    log.info("declared", name="x", args=1, message="y")
    [record] = caplog.records
    assert ("x", 1, "y") == (record.name_, record.args_, record.message_)
    assert "declared" == record.event


@pytest.mark.parametrize("level", ["debug", "info", "warning", "error"])
def test_each_level_has_a_method(log, caplog, level):
    """As in any logger."""
    getattr(log, level)("sent")
    [record] = caplog.records
    assert level.upper() == record.levelname
    assert record.exc_info is None


def test_an_exception_is_logged_with_its_traceback(log, caplog):
    """The current exception, or the one that is given."""
    error = KeyError("x")
    try:
        raise error
    except KeyError:
        log.exception("failed", batch=1)
    log.error("failed", exc_info=error)
    log.warning("failed", exc_info=error)
    assert {error} == {record.exc_info[1] for record in caplog.records}
    assert ["ERROR", "ERROR", "WARNING"] == [record.levelname for record in caplog.records]


def test_bind_returns_a_new_logger(log, caplog):
    """The old logger keeps its own context; later context wins."""
    log.bind(worker=1, queue="other").info("sent", worker=2)
    log.info("sent")
    assert ["sent [queue=other worker=2]", "sent [queue=jobs]"] == [
        record.getMessage() for record in caplog.records
    ]


def test_disabled_levels_format_nothing(caplog):
    """A line below the level costs nothing."""
    caplog.set_level(logging.INFO)

    class Unread:
        def __str__(self):
            raise AssertionError

    KeywordLogger(logging.getLogger("aio_pika_batch.test")).debug("sent", value=Unread())
    assert [] == caplog.records


def test_percent_signs_are_logged_unchanged(caplog):
    """Events and context are not format strings."""
    KeywordLogger(logging.getLogger("aio_pika_batch.test")).warning("100 %s", key="%d")
    assert "100 %s [key=%d]" == caplog.records[0].getMessage()


def test_without_context_there_are_no_brackets(caplog):
    """The line is the event alone."""
    KeywordLogger(logging.getLogger("aio_pika_batch.test")).warning("sent")
    assert "sent" == caplog.records[0].getMessage()


def test_a_value_whose_str_raises_is_logged_nevertheless(log, caplog):
    """It must not suppress the log line."""
    log.warning("failed", error=Odd())
    assert "failed [queue=jobs error=(no text: str() raised AttributeError)]" == (
        caplog.records[0].getMessage()
    )
    assert "Odd: (no text: str() raised AttributeError)" == format_error(Odd())
    assert "KeyError: 'x'" == format_error(KeyError("x"))


async def test_the_library_configures_no_logger(rabbit):
    """The program decides what is logged, and where."""
    root = logging.getLogger("aio_pika_batch")
    async with RecordingConsumer(transport=rabbit.transport):
        pass
    assert aio_pika_batch.__name__ == root.name
    for name in ("aio_pika_batch", "aio_pika_batch.consumer"):
        logger = logging.getLogger(name)
        assert ([], logging.NOTSET, True) == (logger.handlers, logger.level, logger.propagate)


async def test_a_consumers_life_is_a_few_log_lines(rabbit, caplog):
    """One for each change, with consumer, queue and worker, and no needless warning."""
    caplog.set_level(logging.INFO)
    rabbit.broker.delete_queue("jobs")
    async with RecordingConsumer(
        transport=rabbit.transport,
        queue_type="quorum",
        queue_arguments={"x-dead-letter-exchange": "jobs.dlx"},
        dead_letter_queue="dead",
    ):
        pass
    events = ["consuming", "the consumer is running", "draining", "stopped"]
    assert events == [record.event for record in caplog.records]
    first = caplog.records[0]
    assert ("RecordingConsumer", "jobs", 0, 1) == (
        first.consumer,
        first.queue,
        first.worker,
        first.epoch,
    )


@pytest.mark.parametrize(
    ("given", "told_of"),
    [
        ({"prefetch_count": 5, "batch_size": 10}, "prefetch_count=5"),
        ({"dead_letter_queue": None, "queue_arguments": {}}, "delivered too often"),
        ({"dead_letter_queue": None, "queue_arguments": {}}, "no dead-letter destination"),
        ({"max_requeue_attempts": 21}, "below max_requeue_attempts=21"),
        ({"batch_size": 10, "process_timeout": 1000}, "held for 2000 s"),
        ({"batch_timeout": 3600}, "held for 3600 s"),
        ({"consumer_arguments": {"x-consumer-timeout": 1000}}, "the broker waits for 1 s"),
        ({"queue_type": "classic"}, "is a classic queue: a message"),
        (
            {
                "queue_arguments": {"x-dead-letter-exchange": "jobs.dlx", "x-message-ttl": 6000},
                "requeue_delay": 1,
            },
            "retries may take 7 s",
        ),
    ],
)
async def test_risky_settings_are_logged_at_start(rabbit, caplog, given, told_of):
    """One WARNING each, at each start."""
    rabbit.broker.delete_queue("jobs")
    sound = {
        "queue_type": "quorum",
        "queue_arguments": {"x-dead-letter-exchange": "jobs.dlx"},
        "dead_letter_queue": "dead",
    }
    consumer = RecordingConsumer(transport=rabbit.transport, **sound | given)
    for _ in range(2):
        caplog.clear()
        async with consumer:
            pass
        warnings = [each for each in caplog.records if each.levelno == logging.WARNING]
        assert 1 == sum(told_of in warning.getMessage() for warning in warnings)
        assert len(warnings) == (2 if given.get("dead_letter_queue", "") is None else 1)


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"dead_letter_queue": "jobs.dead", "batch_size": 100},
        {"dead_letter_queue": "jobs.dead", "queue_type": "quorum", "requeue_delay": 1},
    ],
)
@pytest.mark.parametrize("version", ["3.10", "4.3"])
async def test_no_default_is_warned_of(caplog, given, version):
    """What could be better is a line at INFO, and only where a setting is left out."""

    class Importer(BatchConsumer):
        process_messages = staticmethod(ack)

    caplog.set_level(logging.INFO)
    settings = BatchConsumerSettings(url="memory://", queue_name="jobs", _env_file=None, **given)
    async with Importer(settings, transport=MemoryTransport(Broker(version))):
        pass
    assert [] == [each for each in caplog.records if each.levelno > logging.INFO]
    hints = [each for each in caplog.records if "; set " in each.getMessage()]
    assert len(hints) == 2 - len({"dead_letter_queue", "queue_type"} & given.keys())


class Stream(io.StringIO):
    """A stream that may be a terminal."""

    def __init__(self, *, is_terminal):
        super().__init__()
        self.is_terminal = is_terminal

    def isatty(self):
        """Whether it is one."""
        return self.is_terminal


@contextmanager
def unconfigured(stream):
    """Logging as a program has it that configures nothing; standard error is this stream."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logging.getLogger(), "handlers", [])
        patch.setattr(sys, "stderr", stream)
        yield patch
    logging.root.manager._clear_cache()


async def printed(rabbit, *, is_terminal=True, case="", **given):
    """Start and stop a consumer; return the lines on standard error."""
    rabbit.broker.delete_queue("jobs")
    with unconfigured(Stream(is_terminal=is_terminal)) as patch:
        match case:
            case "a handler":
                logging.getLogger().handlers.append(logging.NullHandler())
            case "a level":
                patch.setattr(logging.getLogger("aio_pika_batch"), "level", logging.ERROR)
            case "disabled":
                patch.setattr(logging.root.manager, "disable", logging.CRITICAL)
        logging.root.manager._clear_cache()
        async with RecordingConsumer(transport=rabbit.transport, **given):
            pass
        return sys.stderr.getvalue().splitlines()


async def test_a_terminal_shows_that_a_consumer_is_running(rabbit):
    """From where, as what and with which settings, without a configuration of logging."""
    given = {"dead_letter_queue": "dead", "batch_size": 50, "num_workers": 3}
    [line] = await printed(rabbit, url="memory://u:secret@one", **given)
    assert line == (
        "INFO aio_pika_batch.consumer: the consumer is running [consumer=RecordingConsumer"
        " queue=jobs broker=memory://u:***@one batch_size=50 batch_timeout=5 s workers=3"
        " concurrency=1 prefetch=100]"
    )


async def test_a_terminal_shows_it_when_the_broker_comes(rabbit):
    """Not before the first worker consumes, and once."""
    consumer = RecordingConsumer(transport=rabbit.transport, dead_letter_queue="dead")
    with unconfigured(Stream(is_terminal=True)):
        with rabbit.down():
            await consumer.start(wait=False)
            await rabbit.advance(60)
            assert "is running" not in sys.stderr.getvalue()
        for _ in range(2):
            await rabbit.advance(60)
            rabbit.cut()
        await consumer.stop()
        assert 1 == sys.stderr.getvalue().count("is running")


@pytest.mark.parametrize("case", ["no terminal", "a handler", "a level", "disabled"])
async def test_otherwise_nothing_is_shown(rabbit, case):
    """Neither in a file, nor if the program configures logging."""
    is_terminal = case != "no terminal"
    given = {"dead_letter_queue": "dead"}
    assert [] == await printed(rabbit, is_terminal=is_terminal, case=case, **given)


@pytest.mark.parametrize("is_closed", [False, True])
async def test_a_program_without_standard_error_starts(rabbit, is_closed):
    """Or with one that was closed."""
    stream = Stream(is_terminal=True)
    stream.close()
    rabbit.broker.delete_queue("jobs")
    consumer = RecordingConsumer(transport=rabbit.transport, dead_letter_queue="dead")
    with unconfigured(stream if is_closed else None):
        async with consumer:
            assert consumer.is_healthy


async def test_warnings_show_their_level(rabbit):
    """Without a configuration logging prints the text alone."""
    [line] = await printed(rabbit, is_terminal=False)
    assert line.startswith("WARNING aio_pika_batch.consumer: no dead-letter destination is known")


@pytest.mark.parametrize("given", ["setting", "table"])
async def test_endless_redelivery_is_warned_about(rabbit, caplog, given):
    """If the setting or `exception_results` has REQUEUE_IMMEDIATE."""

    class Mapped(RecordingConsumer):
        exception_results: ClassVar = (
            {KeyError: MessageResult.REQUEUE_IMMEDIATE} if given == "table" else {}
        )

    more = {"unhandled_exception_action": "REQUEUE_IMMEDIATE"} if given == "setting" else {}
    async with Mapped(transport=rabbit.transport, dead_letter_queue="dead", **more):
        pass
    assert 1 == sum("its handler fail" in each.getMessage() for each in caplog.records)


@pytest.mark.parametrize(("version", "told"), [("3.10", True), ("4.0", False), ("4.3", False)])
async def test_version_dependent_warnings_follow_the_first_connection(caplog, version, told):
    """Quorum queues have a default limit since 4.0."""
    transport = MemoryTransport(Broker(version))
    arguments = {"x-single-active-consumer": True}
    async with RecordingConsumer(
        transport=transport, queue_type="quorum", queue_arguments=arguments
    ):
        pass
    assert told is any(
        "a quorum queue has no delivery limit" in each.getMessage() for each in caplog.records
    )


async def test_without_a_version_there_are_no_version_dependent_warnings(caplog):
    """Not every transport knows its broker's version."""
    async with RecordingConsumer(
        transport=ScriptedTransport(), queue_type="quorum", max_requeue_attempts=3
    ):
        pass
    assert not any("redelivered forever" in each.getMessage() for each in caplog.records)


@pytest.mark.parametrize("ending", ["stop", "run", "nothing"])
def test_a_program_that_ends_although_its_consumer_runs_is_warned(caplog, ending):
    """Because start() returns: in 0.1.0 it did so after the end."""

    async def program():
        broker = BatchBroker()
        consumer = RecordingConsumer(transport=broker.transport, num_workers=3)
        if ending == "run":
            running = asyncio.create_task(consumer.run())
            await broker.advance(1)
            assert not running.done()
            return
        await consumer.start()
        if ending == "stop":
            await consumer.stop()

    virtual_time.run(program())
    told = [each.levelname for each in caplog.records if "without stop()" in each.getMessage()]
    assert (["WARNING"] if ending == "nothing" else []) == told


@pytest.mark.parametrize("is_configured", [True, False])
async def test_a_program_that_configures_only_structlog_is_warned(rabbit, is_configured):
    """It would miss the log of the library."""
    try:
        if is_configured:
            structlog.configure(processors=[structlog.processors.JSONRenderer()])
        lines = await printed(rabbit, is_terminal=False, dead_letter_queue="dead")
    finally:
        structlog.reset_defaults()
    text = "WARNING aio_pika_batch.consumer: structlog doesn't get the library's log"
    assert is_configured is any(line.startswith(text) for line in lines)
    assert is_configured is bool(lines)

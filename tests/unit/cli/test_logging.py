"""Tests of how the command line configures logging."""

from __future__ import annotations

import io
import json
import logging
import math
import re
import sys
import warnings

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from aio_pika_batch.cli.app import Exit, run_app
from aio_pika_batch.cli.logging import CLIENTS, configure_logging
from aio_pika_batch.logs import KeywordLogger
from tests.unit.shell.test_logging import Odd


class Terminal(io.StringIO):
    """A stream that claims to be a terminal."""

    def isatty(self):
        return True


@pytest.fixture(autouse=True)
def as_before():
    """Restore the logging configuration after each test."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers[:] = []  # pytest's handlers must not be closed
    structlog.reset_defaults()
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(capture=False)
    structlog.reset_defaults()
    for name in CLIENTS:
        logging.getLogger(name).setLevel(logging.NOTSET)


@pytest.fixture
def log():
    """A logger of the library."""
    return KeywordLogger(logging.getLogger("aio_pika_batch.test"), queue="jobs")


def lines(stream):
    """Return each written line, decoded from JSON."""
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_json_has_the_event_and_each_keyword_as_a_key(log):
    """A search needs no regular expression."""
    configure_logging("info", "json", stream=(out := io.StringIO()))
    log.info("consuming", worker=1, epoch=2)
    [line] = lines(out)
    assert line.pop("timestamp").endswith("+00:00")
    assert {
        "level": "info",
        "logger": "aio_pika_batch.test",
        "event": "consuming",
        "queue": "jobs",
        "worker": 1,
        "epoch": 2,
    } == line


def test_json_has_the_traceback_on_the_same_line(log):
    """One event, one line."""
    configure_logging(format="json", stream=(out := io.StringIO()))
    log.error("a batch failed", exc_info=KeyError("x"))
    [line] = lines(out)
    assert "KeyError: 'x'" in line["exception"]


def test_json_writes_any_value(log):
    """What JSON doesn't support becomes text, and no value makes logging fail."""
    configure_logging(format="json", stream=(out := io.StringIO()))
    log.warning("odd", what={1}, worse=Odd(), text="ä %s")
    logging.getLogger("mine").warning("sent %s", "so", extra={"shelf": 3})
    first, second = lines(out)
    assert "{1}" == first["what"]
    assert "(no text: str() raised AttributeError)" == first["worse"]
    assert "ä %s" == first["text"]
    assert ("sent so", 3, "mine") == (second["event"], second["shelf"], second["logger"])


def test_the_console_format_is_a_line_of_text(log):
    """With the context behind the event, and without colours outside a terminal."""
    configure_logging("info", "console", stream=(out := io.StringIO()))
    log.info("consuming", worker=1)
    log.debug("not shown")
    assert out.getvalue().endswith(
        " INFO     aio_pika_batch.test: consuming [queue=jobs worker=1]\n"
    )
    assert 1 == len(out.getvalue().splitlines())


@pytest.mark.parametrize("with_rich", [True, False])
def test_a_terminal_gets_the_console(log, monkeypatch, with_rich):
    """With rich and without it."""
    if not with_rich:
        find = sys.modules["importlib.util"].find_spec
        monkeypatch.setattr(
            "importlib.util.find_spec", lambda name: None if name == "rich" else find(name)
        )
    configure_logging(stream=(out := Terminal()))
    log.info("on", worker=1)
    text = " ".join(re.sub(r"\x1b\[[\d;]*m", "", out.getvalue()).split())
    assert "INFO" in text
    assert "on [queue=jobs worker=1]" in text
    assert with_rich is (type(logging.getLogger().handlers[0]).__name__ == "RichHandler")


def test_auto_is_json_outside_a_terminal(log):
    """As in a container."""
    configure_logging(stream=(out := io.StringIO()))
    log.info("consuming")
    assert ["consuming"] == [line["event"] for line in lines(out)]


@pytest.mark.parametrize("form", ["console", "json"])
def test_no_password_is_written(log, form):
    """Not even one in another library's line or traceback."""
    configure_logging("debug", form, stream=(out := io.StringIO()))
    url = "amqp://me:hunter2@host:5672/vhost"
    logging.getLogger("other").warning("cannot reach %s", url)
    log.error("failed", where=url, exc_info=OSError(url))
    assert "hunter2" not in out.getvalue()
    assert "amqp://me:***@host:5672/vhost" in out.getvalue()


def test_client_libraries_are_logged_from_warning_on():
    """Whatever the level: the library logs the same events itself."""
    configure_logging("debug", "json", stream=(out := io.StringIO()))
    logging.getLogger("aiormq.connection").debug("a frame")
    logging.getLogger("aiormq.connection").warning("a warning")
    assert ["a warning"] == [line["event"] for line in lines(out)]


def test_warnings_are_logged():
    """Those of the module warnings."""
    configure_logging(format="json", stream=(out := io.StringIO()))
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(capture=False)
        logging.captureWarnings(capture=True)
        warnings.warn("deprecated", stacklevel=1)
    assert ["py.warnings"] == [line["logger"] for line in lines(out)]


def test_structlog_writes_to_the_same_handler():
    """If the user's code hasn't configured it."""
    configure_logging(format="json", stream=(out := io.StringIO()))
    mine = structlog.get_logger("mine").bind(order=1)
    mine.info("stored", name="x")
    mine.debug("not asked for")
    try:
        {}["x"]
    except KeyError:
        mine.exception("failed")
    stored, failed = lines(out)
    assert ("stored", 1, "x", "mine") == tuple(
        stored[key] for key in ("event", "order", "name_", "logger")
    )
    assert "KeyError" in failed["exception"]


def test_a_configured_structlog_is_left_alone():
    """The user has chosen its processors."""
    processors = [structlog.processors.JSONRenderer()]
    structlog.configure(processors=processors)
    configure_logging(stream=io.StringIO())
    assert processors == structlog.get_config()["processors"]


def test_structlog_is_not_needed(monkeypatch):
    """Without it, logging works all the same."""
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    configure_logging(stream=Terminal())
    assert not structlog.is_configured()


def test_structlogs_formatter_gets_the_keywords(log):
    """The library's records are events with keys for it."""
    structlog_formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[structlog.stdlib.ExtraAdder()],
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.processors.JSONRenderer(),
        ],
    )
    handler = logging.StreamHandler(out := io.StringIO())
    handler.setFormatter(structlog_formatter)
    logging.basicConfig(level="INFO", handlers=[handler], force=True)
    log.info("consuming", worker=1)
    assert [{"event": "consuming", "queue": "jobs", "worker": 1}] == lines(out)


FORGED = (
    "x\n2026-11-29 10:00:00,000 CRITICAL root: forged\r\x1b]0;owned\x07"
    "\u202e\u2028\u2029\x85\x9b\ud800"
)
"""What a message could contain to look like a line of the log, or to act on a terminal."""


def text_of(stream):
    """What was written, as bytes would be: no surrogate may be left."""
    stream.getvalue().encode()
    return stream.getvalue()


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
@pytest.mark.parametrize("chained", [False, True])
def test_content_of_messages_makes_no_lines_of_text(log, stream, chained):
    """As context, argument, text of an exception, note or extra, by any logger."""
    configure_logging(format="console", stream=(out := stream()))
    error = ValueError(FORGED)
    error.add_note(FORGED)
    if chained:
        error.__cause__ = KeyError(FORGED)
    log.error(FORGED, exc_info=error, context=FORGED)
    logging.getLogger("mine").error("sent %s", FORGED, exc_info=error, stack_info=True)
    logging.getLogger("mine").error("too few %s %s", *[FORGED])
    structlog.get_logger("its").error("sent", value=FORGED)
    shown = text_of(out)
    assert "forged" in shown
    assert not re.search(r"^\S*2026-11-29 10:00", shown, re.MULTILINE)
    assert not re.search(
        r"[\x1b\x07\r\x85\x9b\u202e\u2028\u2029]", re.sub(r"\x1b\[[\d;]*m", "", shown)
    )


@given(
    st.dictionaries(
        st.sampled_from(["timestamp", "level", "logger", "event", "exception", "stack", "x", "y"]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
            lambda inner: (
                st.lists(inner)
                | st.dictionaries(st.text() | st.integers() | st.tuples(st.integers()), inner)
            ),
            max_leaves=5,
        ),
    ),
    st.text(st.characters(codec=None)),
)
def test_json_is_one_valid_object_in_a_line_whatever_the_context(context, text):
    """And no key of ours is overwritten."""
    configure_logging(format="json", stream=(out := io.StringIO()))
    logging.getLogger("mine").warning("%s", text, extra=context)
    context.pop("event", None)
    KeywordLogger(logging.getLogger("ours")).warning("event", **{**context, "more": text})
    written = text_of(out)
    assert 2 == len(written.splitlines())
    mine, ours = (json.loads(line, parse_constant=pytest.fail) for line in written.splitlines())
    for line, name in ((mine, "mine"), (ours, "ours")):
        assert (line["logger"], line["level"]) == (name, "warning")
        assert line["timestamp"].endswith("+00:00")
        assert "exception" not in line
    assert "event" == ours["event"]
    assert text == mine["event"]


def test_json_survives_values_that_it_lacks(log):
    """A list that contains itself, one that is very deep, and numbers that JSON doesn't have."""
    endless, deep = [], []
    endless.append(endless)
    for _ in range(10_000):
        deep = [deep]
    configure_logging(format="json", stream=(out := io.StringIO()))
    log.warning("odd", endless=endless, deep=deep, no=math.nan, most=math.inf, least=-math.inf)
    [line] = lines(out)
    assert ("nan", "inf", "-inf") == (line["no"], line["most"], line["least"])
    assert "odd" == line["event"]


@pytest.mark.parametrize(
    ("option", "valid"), [("--log-level=loud", '"debug"'), ("--log-format=xml", '"json"')]
)
def test_an_unknown_level_or_format_is_refused(option, valid, capsys):
    """The error lists the valid ones."""
    assert Exit.USAGE == run_app(["run", "shop:Importer", option])
    assert valid in capsys.readouterr().err

"""Tests of the output and exit codes of `check`, `topology` and `dlq`.

The commands run in this process on a broker in memory, which outlives their event loops. The
integration tests run them as processes.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from datetime import UTC, datetime, timedelta
from types import ModuleType

import pytest

from aio_pika_batch import BatchConsumer, BatchConsumerSettings, MessageResult
from aio_pika_batch.adapters.memory import ConnectFault, EventKind
from aio_pika_batch.cli.app import run_app
from aio_pika_batch.cli.printing import parse_duration
from aio_pika_batch.errors import TopologyError
from tests.unit.shell.helpers import QueueBroker

DLQ = "orders.dlq"


class Orders(BatchConsumer):
    """Acknowledges everything."""

    async def process_messages(self, messages):
        for _ in messages:
            yield MessageResult.ACK


@pytest.fixture
def rabbit():
    """An empty broker."""
    return QueueBroker("4.0")


@pytest.fixture
def cli(rabbit, monkeypatch, capsys):
    """A function that runs a command and returns exit code, output and errors."""
    monkeypatch.setenv("COLUMNS", "120")

    def run(*words, broker=rabbit, **given):
        given = {"queue_name": "orders", "dead_letter_queue": DLQ, "url": "memory://"} | given
        module = ModuleType("bookshop")
        module.orders = Orders(
            BatchConsumerSettings(_env_file=None, **given), transport=broker.transport
        )
        monkeypatch.setitem(sys.modules, "bookshop", module)
        code = run_app(list(words))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def dead_letter(rabbit, *bodies, reason="rejected", key="orders", age=0, **headers):
    """Publish dead letters."""
    rabbit.publish(
        *bodies,
        routing_key=DLQ,
        headers={
            "x-dead-letter-reason": reason,
            "x-original-exchange": "",
            "x-original-routing-key": key,
            "x-original-queue": "orders",
            "x-dead-lettered-at": datetime.now(UTC) - timedelta(seconds=age),
            "x-retry-count": 3,
            **headers,
        },
    )


@pytest.fixture
def letters(rabbit):
    """A broker with three dead letters."""
    rabbit.declare("orders")
    rabbit.declare(DLQ)
    dead_letter(rabbit, b'{"order": 17}', age=7200, tenant="acme")
    dead_letter(
        rabbit, b"\xff\x00", reason="exhausted", age=60, **{"x-exception-type": "ValueError"}
    )
    dead_letter(rabbit, b"two", reason="exhausted", **{"x-dead-letter-detail": "not [bold]now\x1b"})
    return rabbit


# --- check -----------------------------------------------------------------------


def test_check_shows_where_each_value_comes_from(cli, rabbit, monkeypatch):
    """Default, environment or code; and what is missing on the broker."""
    monkeypatch.setenv("AIO_PIKA_BATCH_BATCH_SIZE", "7")
    code, out, _ = cli("check", "bookshop:orders")
    assert 0 == code
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.strip()}
    assert ["7", "environment"] == rows["batch_size"]
    assert ["orders", "code"] == rows["queue_name"]
    assert ["1", "default"] == rows["num_workers"]
    assert "queue orders does not exist yet" in out
    assert [] == rabbit.broker.queues


def test_check_as_json(cli, rabbit):
    """The settings and the findings."""
    rabbit.declare("orders", x_max_length=7)
    code, out, _ = cli("check", "bookshop:orders", "--format", "json")
    assert 1 == code
    result = json.loads(out)
    assert {"value": "memory://", "from": "code"} == result["settings"]["url"]
    [wrong] = [each["text"] for each in result["findings"] if each["level"] == "error"]
    assert "x-max-length" in wrong


def test_check_offline_does_not_connect(cli, rabbit):
    """With --strict, warnings fail the check."""
    rabbit.broker.faults.connect_fault = ConnectFault.UNREACHABLE
    assert 0 == cli("check", "bookshop:orders", "--offline")[0]
    code, out, _ = cli("check", "bookshop:orders", "--offline", "--strict", prefetch_count=1)
    assert 1 == code
    assert "prefetch_count=1 is below batch_size=10" in out
    assert 3 == cli("check", "bookshop:orders")[0]


def test_check_reports_missing_entities_as_errors_with_declare_false(cli, rabbit):
    """The consumer won't declare them."""
    code, out, _ = cli("check", "bookshop:orders", declare=False)
    assert (1, 3) == (code, out.count("error: "))


def test_check_without_findings(cli, rabbit):
    """It says so, and exits with 0."""
    code, out, _ = cli("check", "bookshop:orders", "--offline", queue_type="classic")
    assert (0, True) == (code, "No problems found." in out)


def check(cli, **given):
    """The findings of `check`, as (level, text)."""
    _, out, err = cli("check", "bookshop:orders", "--format", "json", **given)
    assert "" == err
    return [(each["level"], each["text"]) for each in json.loads(out)["findings"]]


@pytest.mark.parametrize("words", [[], ["--offline"]])
def test_check_finds_dead_letters_that_come_back(cli, rabbit, words):
    """The start would be refused."""
    code, out, _ = cli("check", "bookshop:orders", *words, dead_letter_queue="orders")
    assert (1, True) == (code, "error: dead letters of queue 'orders' would come back" in out)


def test_check_finds_a_dead_letter_exchange_that_cannot_work(cli, rabbit):
    """By the type that it has on the broker."""
    rabbit.declare("theirs")
    rabbit.bind("theirs", "shared", kind="fanout")
    [error, *_] = check(cli, dead_letter_exchange="shared")
    assert "error" == error[0]
    assert "exchange 'shared' is a fanout exchange" in error[1]
    assert ["theirs"] == rabbit.broker.queues


def test_check_finds_what_an_existing_queue_lacks(cli, rabbit):
    """With the policy to add."""
    rabbit.declare("orders")
    found = [text for level, text in check(cli) if level == "warning"]
    [line] = [text for text in found if "exists without x-dead-letter-exchange" in text]
    assert "rabbitmqctl set_policy --apply-to queues orders-dead-letters '^orders$'" in line
    assert not [line for _, line in check(cli, broker_dead_letters=False) if "without" in line]


@pytest.mark.parametrize(
    ("queue", "arguments", "given", "words"),
    [
        (
            DLQ,
            {"x_queue_type": "quorum"},
            {},
            "dead-letter queue 'orders.dlq' has a delivery limit of 20",
        ),
        (
            DLQ,
            {"x_queue_type": "quorum", "x_delivery_limit": 3, "x_max_length": 7},
            {},
            "dead-letter queue 'orders.dlq' has a delivery limit of 3",
        ),
        (DLQ, {"x_message_ttl": 1000}, {}, "dead-letter queue 'orders.dlq' has x-message-ttl=1000"),
        (
            DLQ,
            {"x_dead_letter_exchange": "", "x_dead_letter_routing_key": "orders"},
            {},
            "dead-letter queue 'orders.dlq' dead-letters to queue 'orders': a loop",
        ),
        (
            "orders",
            {"x_max_length": 7, "x_single_active_consumer": True},
            {"declare": False, "dead_letter_queue": None},
            "queue 'orders' has x-max-length=7: the broker drops messages",
        ),
        (
            "orders",
            {"x_dead_letter_exchange": ""},
            {"declare": False, "dead_letter_queue": None},
            "queue 'orders' dead-letters to itself, a loop",
        ),
    ],
)
def test_check_finds_queues_that_lose_messages(cli, rabbit, queue, arguments, given, words):
    """By the arguments that they have on the broker, whatever the settings say."""
    rabbit.declare(queue, **arguments)
    assert 1 == len([text for level, text in check(cli, **given) if words in text])


def test_check_finds_nothing_about_queues_that_the_consumer_has_declared(cli, rabbit):
    """They lack nothing, and lose nothing."""
    cli("topology", "bookshop:orders", "--apply", queue_type="quorum")
    quorum = {"queue_type": "quorum", "queue_arguments": None}
    assert [] == check(cli, **quorum)


@pytest.mark.parametrize(
    ("ahead", "words"),
    [
        (0, None),
        (7, "s ahead of this computer's: retries over AMQP 1.0 come back earlier by that"),
        (-7, "s behind this computer's: retries over AMQP 1.0 come back later by that"),
    ],
)
def test_check_compares_the_clocks_that_delays_depend_on(cli, ahead, words):
    """Only where the broker's clock decides, and it leaves no queue behind."""
    rabbit = QueueBroker("4.3")
    rabbit.broker.advance(time.time() + ahead)

    def check(**given):
        given = {"queue_name": "orders", "dead_letter_queue": DLQ, "queue_type": "quorum"} | given
        return cli("check", "bookshop:orders", broker=rabbit, **given)[1].replace("\n", " ")

    assert (words is not None) == ("the broker's clock is" in check(wire="amqp10"))
    assert words is None or words in check(wire="amqp10")
    assert "clock" not in check()
    assert [] == rabbit.broker.queues


def test_check_compares_no_clocks_without_the_right_to_declare(cli, monkeypatch):
    """It isn't worth an error."""
    rabbit = QueueBroker("4.3")
    rabbit.broker.advance(time.time() + 3600)

    def session(_):
        raise TopologyError("403")

    monkeypatch.setattr(rabbit.transport, "session", session)
    code, out, _ = cli(
        "check", "bookshop:orders", broker=rabbit, wire="amqp10", queue_type="quorum"
    )
    assert (0, False) == (code, "clock" in out)


def test_check_finds_a_missing_permission(cli, rabbit):
    """Here the exchange is internal."""
    with rabbit.broker.operation() as vhost:
        vhost.declare_exchange(
            "dlx", "direct", durable=True, auto_delete=False, internal=True, arguments={}
        )
    found = check(cli, dead_letter_exchange="dlx")
    assert ["publishing to exchange 'dlx' at memory"] == [
        text.partition(":")[0] for level, text in found if level == "error"
    ]


# --- topology --------------------------------------------------------------------


def test_topology_shows_and_applies(cli, rabbit):
    """It connects only with --dry-run or --apply."""
    code, out, _ = cli("topology", "bookshop:orders", queue_type="quorum", requeue_delay=1)
    assert 0 == code
    assert "orders.retry.1000" in out
    assert "no delivery limit" in out
    assert "x-dead-letter-exchange=orders.dlx" in "".join(out.split())
    assert [] == rabbit.broker.queues
    code, out, _ = cli("topology", "bookshop:orders", "--dry-run")
    assert (0, 3) == (code, out.count("missing"))
    code, out, _ = cli("topology", "bookshop:orders", "--apply", declare=False)
    assert (0, 3) == (code, out.count("exists"))
    assert {"orders", DLQ} == set(rabbit.broker.queues)
    code, out, _ = cli(
        "topology", "bookshop:orders", "--dry-run", queue_arguments={"x-max-length": 1}
    )
    assert (1, 1) == (code, out.count("differs"))
    assert "inequivalent arg 'x-max-length'" in out


def test_topology_as_json(cli, rabbit):
    """With the state of each entity if there is --dry-run."""
    code, out, _ = cli("topology", "bookshop:orders", "--format", "json", queue_exclusive=True)
    assert (0, "state" in out) == (code, False)
    code, out, _ = cli(
        "topology", "bookshop:orders", "--format", "json", "--dry-run", queue_exclusive=True
    )
    states = {each.get("name"): each["state"] for each in json.loads(out)}
    assert {"orders.dlx": "missing", DLQ: "missing", "orders": "cannot be seen"} == {
        name: state for name, state in states.items() if name
    }


@pytest.mark.parametrize(
    ("words", "expected"),
    [(["--rabbitmq", "3.10"], {}), (["--rabbitmq", "4.1"], {"x-delivery-limit": -1}), ([], None)],
)
def test_definitions_depend_on_the_version(cli, rabbit, words, expected):
    """The given one, or that of the consumer's broker, 4.0 here."""
    expected = {"x-delivery-limit": -1} if expected is None else expected
    code, out, _ = cli(
        "topology", "bookshop:orders", "--format", "definitions", *words, queue_type="quorum"
    )
    assert 0 == code
    [dlq, _] = json.loads(out)["queues"]
    assert {"x-queue-type": "quorum", **expected} == dlq["arguments"]
    assert "/" == dlq["vhost"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--apply", "--dry-run"], "contradict"),
        (["--format", "definitions", "--apply"], "cannot be combined"),
        (["--format", "definitions", "--rabbitmq", "new"], "'new' is not a version"),
    ],
)
def test_topology_refuses_invalid_options(cli, words, expected):
    """With exit code 2."""
    code, out, err = cli("topology", "bookshop:orders", *words)
    assert (2, "") == (code, out)
    assert expected in err


# --- dlq -------------------------------------------------------------------------


def test_list_counts_reasons_for_each_consumer(cli, letters):
    """As a table and as JSON."""
    code, out, _ = cli("dlq", "list", "bookshop:orders", "bookshop:orders")
    assert (0, 2) == (code, out.count(DLQ))
    assert "2 exhausted, 1 rejected" in out
    assert "2 h ago" in out
    code, out, _ = cli("dlq", "list", "bookshop:orders", "--look-at", "1", "--format", "json")
    [row] = json.loads(out)
    assert (3, 1, {"rejected": 1}) == (row["letters"], row["looked_at"], row["reasons"])


def test_show_prints_headers_and_bodies(cli, letters):
    """Binary as hex, JSON indented, and no control characters."""
    code, out, _ = cli("dlq", "show", "bookshop:orders")
    assert 0 == code
    assert '      "order": 17' in out
    assert "header tenant: acme" in out
    assert "ff 00" in out
    assert "ValueError" in out
    assert "because: not [bold]now\\x1b" in out
    assert "3 shown, 3 looked at, 3 in orders.dlq" in out
    code, out, _ = cli(
        "dlq", "show", "bookshop:orders", "--reason", "exhausted", "--limit", "1", "--format=json"
    )
    [letter] = json.loads(out)
    assert (2, "ff00", 2) == (letter["letter"], letter["body"], letter["bytes"])


def test_replay_reports_how_many_were_replayed(cli, letters):
    """First a dry run, then with a filter, then the rest."""
    code, out, _ = cli("dlq", "replay", "bookshop:orders", "--dry-run")
    assert (0, True) == (code, "3 of 3 dead letters would be replayed" in out)
    code, out, _ = cli(
        "dlq", "replay", "bookshop:orders", "--older-than", "1h", "--header", "tenant=acme"
    )
    assert (0, True) == (code, "1 of 3 dead letters replayed" in out)
    code, out, _ = cli("dlq", "replay", "bookshop:orders", "--to-queue", "--newer-than", "1h")
    assert (0, True) == (code, "2 of 2 dead letters replayed" in out)
    assert 3 == len(letters.broker.ready("orders"))


def test_replay_reports_what_cannot_be_replayed(cli, letters):
    """With exit code 1."""
    dead_letter(letters, b"3", key="nowhere")
    code, out, err = cli("dlq", "replay", "bookshop:orders")
    assert (1, True) == (code, "3 of 4 dead letters replayed" in out)
    assert "1 stay in orders.dlq: returned: no queue is bound" in err


def test_replay_reports_its_progress_when_the_connection_is_lost(cli, rabbit):
    """No dead letter is lost."""
    rabbit.declare("orders")
    rabbit.declare(DLQ)
    dead_letter(rabbit, *[b"%d" % number for number in range(250)])
    acked = 0
    note = rabbit.broker.journal.on_event

    def count(event):
        nonlocal acked
        note(event)
        acked += event.kind is EventKind.ACKED
        if acked == 150:
            asyncio.get_running_loop().call_soon(rabbit.cut)

    rabbit.broker.journal.on_event = count
    code, out, err = cli("dlq", "replay", "bookshop:orders")
    assert (1, True) == (code, "200 of 250 dead letters replayed" in out)
    assert "ended early: the connection for publishing was lost" in err
    assert 250 <= len(rabbit.broker.ready("orders")) + len(rabbit.broker.ready(DLQ))


def test_a_queue_can_be_named_instead_of_a_consumer(cli):
    """If it doesn't exist, the error has the broker's words, and no advice for a consumer."""
    code, _, err = cli("dlq", "list", "--queue", "nowhere", "--url", "memory://")
    assert (2, True) == (code, "no queue 'nowhere'" in err)
    assert "correct its name" in " ".join(err.split())
    assert "declare=" not in err


def test_purge_only_counts_without_yes(cli, letters):
    """With exit code 2 and a hint."""
    code, out, err = cli("dlq", "purge", "bookshop:orders", "--reason", "exhausted")
    assert (2, True) == (code, "2 of 3 dead letters would be deleted" in out)
    assert "--yes" in err
    code, out, _ = cli("dlq", "purge", "bookshop:orders", "--reason", "exhausted", "--yes")
    assert (0, True) == (code, "2 of 3 dead letters deleted" in out)
    assert 1 == len(letters.broker.ready(DLQ))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["list"], "name a consumer"),
        (["list", "bookshop:orders", "--look-at", "0"], "--look-at: must be at least 1"),
        (["show", "bookshop:orders", "--header", "acme"], "write name=value"),
        (["replay", "bookshop:orders", "--limit", "0"], "--limit: must be at least 1"),
        (["replay", "bookshop:orders", "--older-than", "soon"], "older-than"),
        (["replay", "bookshop:nothing"], "there is no 'nothing'"),
    ],
)
def test_invalid_options_are_refused_on_one_line(cli, words, expected):
    """With exit code 2, before the broker is asked."""
    code, out, err = cli("dlq", *words)
    assert (2, "") == (code, out)
    assert expected in err
    assert "Traceback" not in err


def test_a_consumer_without_dead_letter_queue_needs_the_option_queue(cli, letters):
    """Its settings don't name one."""
    code, _, err = cli("dlq", "list", "bookshop:orders", dead_letter_queue=None)
    assert (2, True) == (code, "name the queue with --queue" in err)
    words = ("dlq", "list", "bookshop:orders", "--queue", DLQ, "--delivery-limit", "-1")
    assert 0 == cli(*words, dead_letter_queue=None)[0]


@pytest.mark.parametrize(
    "words", ["check", "topology", "dlq list", "dlq show", "dlq replay", "dlq purge"]
)
def test_the_help_of_each_command_has_an_example(capsys, words):
    """It can be pasted."""
    assert 0 == run_app([*words.split(), "--help"])
    assert f"Example: aio-pika-batch {words} " in " ".join(capsys.readouterr().out.split())


# --- dlq: large queues, JSON and odd words -----------------------------------------


@pytest.mark.parametrize("words", [("replay", "--dry-run"), ("purge",), ("replay",)])
def test_dead_letters_are_all_seen_however_many_stay(cli, rabbit, words):
    """Those that don't match are held by the broker, and only their tags here."""
    rabbit.declare(DLQ)
    dead_letter(rabbit, *(b"%d" % number for number in range(3500)))
    dead_letter(rabbit, b"last", reason="exhausted")
    code, out, _ = cli(
        "dlq", *words, "bookshop:orders", "--reason", "exhausted", "--format", "json"
    )
    report = json.loads(out)
    assert (3501, 3501, 1) == (
        report["ready"],
        report["seen"],
        report["done"] + sum(report["failed"].values()),
    )
    assert {"rejected": 3500, "exhausted": 1} == report["reasons"]
    assert report["ended"] is None
    assert 3501 == len(rabbit.broker.ready(DLQ))
    assert 0 == code or words != ("replay", "--dry-run")


def test_show_finds_the_only_one_that_matches(cli, rabbit):
    """A filter looks at all dead letters."""
    rabbit.declare(DLQ)
    dead_letter(rabbit, *(b"%d" % number for number in range(2500)))
    dead_letter(rabbit, b"last", reason="exhausted")
    code, out, _ = cli("dlq", "show", "bookshop:orders", "--reason", "exhausted")
    assert 0 == code
    assert "dead letter 2501: exhausted" in out
    assert "1 shown, 2501 looked at, 2501 in orders.dlq" in out


def test_a_limit_of_held_ones_says_at_least_and_how_to_see_more(cli, rabbit):
    """The number would be wrong otherwise."""
    rabbit.declare(DLQ)
    dead_letter(rabbit, *(b"%d" % number for number in range(30)))
    code, out, err = cli("dlq", "replay", "bookshop:orders", "--dry-run", "--scan", "10")
    assert 1 == code
    assert "at least 10 of 30 dead letters would be replayed" in out
    assert "raise scan (--scan)" in err


@pytest.mark.parametrize("words", [("replay",), ("purge", "--yes"), ("show",)])
def test_a_reason_that_no_dead_letter_has_lists_those_that_exist(cli, letters, words):
    """It may be misspelt."""
    _, out, err = cli("dlq", *words, "bookshop:orders", "--reason", "exausted")
    assert "no dead letter has the reason exausted; found: exhausted (2), rejected (1)" in err
    assert 3 == len(letters.broker.ready(DLQ))
    assert "exhausted (2)" not in out


def test_bodies_in_json_are_text_where_they_are_text(cli, letters):
    """The others are hex, and marked."""
    _, out, _ = cli("dlq", "show", "bookshop:orders", "--format", "json")
    shown = [(each["body"], each["body_is_hex"]) for each in json.loads(out)]
    assert [('{"order": 17}', False), ("ff00", True), ("two", False)] == shown


@pytest.mark.parametrize(
    "headers",
    [
        {"x": float("nan")},
        {"x": float("inf")},
        {"x": b"\xff"},
        {"x": {"[/b]": [1, None]}},
        {"x-death": "odd"},
        {"x-dead-lettered-at": "yesterday"},
        {"x-dead-letter-reason": b"\xff[/x]"},
    ],
    ids=str,
)
@pytest.mark.parametrize("command", ["list", "show", "replay", "purge"])
@pytest.mark.parametrize("format_", ["text", "json"])
def test_odd_headers_end_no_command(cli, rabbit, headers, command, format_):
    """Whatever a client has put into them."""
    if command == "list" and format_ == "text":
        format_ = "table"
    rabbit.declare(DLQ)
    dead_letter(rabbit, b"\xed\xa0\x80", **headers)
    code, out, err = cli("dlq", command, "bookshop:orders", "--format", format_)
    assert code in {0, 1, 2}
    assert "Traceback" not in err
    if format_ == "json":
        json.loads(out, parse_constant=pytest.fail)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("90s", timedelta(seconds=90)),
        ("15m", timedelta(minutes=15)),
        ("2h", timedelta(hours=2)),
        ("3d", timedelta(days=3)),
        ("3weeks", timedelta(weeks=3)),
        ("1.5 hours", timedelta(minutes=90)),
        ("1d12h", timedelta(hours=36)),
        ("10 Min", timedelta(minutes=10)),
        ("2 days 3 hrs", timedelta(hours=51)),
    ],
)
def test_durations_are_read(text, expected):
    """In the words that people use."""
    assert expected == parse_duration(text)


@pytest.mark.parametrize("text", ["", "3", "soon", "3 fortnights", "-1h", "1h ago", "9" * 30 + "w"])
def test_an_invalid_duration_is_refused(cli, letters, text):
    """The error says how one is written."""
    code, _, err = cli("dlq", "show", "bookshop:orders", f"--older-than={text}")
    assert 2 == code
    assert "90s, 15m, 2h, 3d" in err or "longer than" in err


@pytest.mark.parametrize(
    ("words", "meaning"),
    [
        (["run"], "1 crash or incomplete drain"),
        (["check"], "1 problems found"),
        (["health"], "1 unhealthy"),
        (["topology"], "1 something differs"),
        (["dlq", "list"], "1 not all could be read"),
        (["dlq", "purge"], "1 some stay that match"),
    ],
)
def test_each_help_explains_its_own_exit_codes(capsys, words, meaning):
    """A failed check isn't a crash."""
    assert 0 == run_app([*words, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert meaning in text
    assert 1 == text.count("Exit codes:")

"""What do `check`, `topology` and `dlq` say, and with which code do they end?

They run in this process, on a broker in memory that outlives their event loops; as processes they
are run by the integration tests.
"""

from __future__ import annotations

import asyncio
import json
import sys
from datetime import UTC, datetime, timedelta
from types import ModuleType

import pytest

from aio_pika_batch import BatchConsumer, BatchConsumerSettings, MessageResult
from aio_pika_batch.adapters.memory import ConnectFault, EventKind
from aio_pika_batch.cli.app import run_app
from tests.unit.shell.helpers import QueueBroker

DLQ = "orders.dlq"


class Orders(BatchConsumer):
    """Content with everything."""

    async def process_messages(self, messages):
        for _ in messages:
            yield MessageResult.ACK


@pytest.fixture
def rabbit():
    """A broker with nothing on it."""
    return QueueBroker("4.0")


@pytest.fixture
def cli(rabbit, monkeypatch, capsys):
    """Runs a command on a consumer with these settings; returns code, output and complaints."""
    monkeypatch.setenv("COLUMNS", "120")

    def run(*words, **given):
        given = {"queue_name": "orders", "dead_letter_queue": DLQ, "url": "memory://"} | given
        module = ModuleType("bookshop")
        module.orders = Orders(
            BatchConsumerSettings(_env_file=None, **given), transport=rabbit.transport
        )
        monkeypatch.setitem(sys.modules, "bookshop", module)
        code = run_app(list(words))
        told = capsys.readouterr()
        return code, told.out, told.err

    return run


def bury(rabbit, *bodies, reason="rejected", key="orders", age=0, **headers):
    """Put letters into the dead-letter queue."""
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
    """Three of them."""
    rabbit.declare("orders")
    rabbit.declare(DLQ)
    bury(rabbit, b'{"order": 17}', age=7200, tenant="acme")
    bury(rabbit, b"\xff\x00", reason="exhausted", age=60, **{"x-exception-type": "ValueError"})
    bury(rabbit, b"two", reason="exhausted", **{"x-dead-letter-detail": "not [bold]now\x1b"})
    return rabbit


# --- check -----------------------------------------------------------------------


def test_check_shows_where_each_value_comes_from(cli, rabbit, monkeypatch):
    """Default, environment or code; and the broker is asked."""
    monkeypatch.setenv("AIO_PIKA_BATCH_BATCH_SIZE", "7")
    code, out, _ = cli("check", "bookshop:orders")
    assert 0 == code
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.strip()}
    assert ["7", "environment"] == rows["batch_size"]
    assert ["orders", "code"] == rows["queue_name"]
    assert ["1", "default"] == rows["num_workers"]
    assert "queue orders is not there yet" in out
    assert [] == rabbit.broker.queues


def test_check_tells_programs(cli, rabbit):
    """The same as JSON, without a password."""
    rabbit.declare("orders", x_max_length=7)
    code, out, _ = cli("check", "bookshop:orders", "--format", "json")
    assert 1 == code
    told = json.loads(out)
    assert {"value": "memory://", "from": "code"} == told["settings"]["url"]
    [wrong] = [each["text"] for each in told["findings"] if each["level"] == "error"]
    assert "x-max-length" in wrong


def test_check_offline_asks_nobody(cli, rabbit):
    """And warnings count if they shall."""
    rabbit.broker.faults.connect_fault = ConnectFault.UNREACHABLE
    assert 0 == cli("check", "bookshop:orders", "--offline")[0]
    code, out, _ = cli("check", "bookshop:orders", "--offline", "--strict", prefetch_count=1)
    assert 1 == code
    assert "prefetch_count=1 is below batch_size=10" in out
    assert 3 == cli("check", "bookshop:orders")[0]


def test_check_of_a_consumer_that_declares_nothing(cli, rabbit):
    """Then what is missing is wrong."""
    code, out, _ = cli("check", "bookshop:orders", declare=False)
    assert (1, 3) == (code, out.count("error: "))


def test_check_has_nothing_to_say(cli, rabbit):
    """Where all is well."""
    code, out, _ = cli("check", "bookshop:orders", "--offline", queue_type="classic")
    assert (0, True) == (code, "Nothing found." in out)


# --- topology --------------------------------------------------------------------


def test_topology_shows_and_applies(cli, rabbit):
    """Nothing is asked of a broker unless it shall."""
    code, out, _ = cli("topology", "bookshop:orders", queue_type="quorum", requeue_delay=1)
    assert 0 == code
    assert "orders.retry.1000" in out
    assert "no delivery limit" in out
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


def test_topology_for_programs(cli, rabbit):
    """As JSON, with its state if it was looked for."""
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
def test_definitions_for_a_version(cli, rabbit, words, expected):
    """Given, or that of the consumer's own broker (which is a 4.0 here)."""
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
        (["--format", "definitions", "--apply"], "use it alone"),
        (["--format", "definitions", "--rabbitmq", "new"], "'new' is no version"),
    ],
)
def test_topology_refuses_nonsense(cli, words, expected):
    """In one line."""
    code, out, err = cli("topology", "bookshop:orders", *words)
    assert (2, "") == (code, out)
    assert expected in err


# --- dlq -------------------------------------------------------------------------


def test_list_counts_reasons(cli, letters):
    """Of several consumers, too, and by a queue's name."""
    code, out, _ = cli("dlq", "list", "bookshop:orders", "bookshop:orders")
    assert (0, 2) == (code, out.count(DLQ))
    assert "2 exhausted, 1 rejected" in out
    assert "2 h ago" in out
    code, out, _ = cli("dlq", "list", "bookshop:orders", "--look-at", "1", "--format", "json")
    [told] = json.loads(out)
    assert (3, 1, {"rejected": 1}) == (told["letters"], told["looked_at"], told["reasons"])


def test_show_shows_headers_and_bodies(cli, letters):
    """Binary as hex, JSON laid out, and nothing that a terminal would obey."""
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
    [told] = json.loads(out)
    assert (2, "ff00", 2) == (told["letter"], told["body"], told["bytes"])


def test_replay_tells_what_it_has_done(cli, letters):
    """First dry, then by a filter, then all that is left."""
    code, out, _ = cli("dlq", "replay", "bookshop:orders", "--dry-run")
    assert (0, True) == (code, "3 of 3 letters would be replayed" in out)
    code, out, _ = cli(
        "dlq", "replay", "bookshop:orders", "--older-than", "1h", "--header", "tenant=acme"
    )
    assert (0, True) == (code, "1 of 3 letters replayed" in out)
    code, out, _ = cli("dlq", "replay", "bookshop:orders", "--to-queue", "--newer-than", "1h")
    assert (0, True) == (code, "2 of 2 letters replayed" in out)
    assert 3 == len(letters.broker.ready("orders"))


def test_replay_says_what_has_no_way_back(cli, letters):
    """With a code that a script can see."""
    bury(letters, b"3", key="nowhere")
    code, out, err = cli("dlq", "replay", "bookshop:orders")
    assert (1, True) == (code, "3 of 4 letters replayed" in out)
    assert "1 stay in orders.dlq: returned: no queue is bound" in err


def test_replay_says_how_far_it_got_when_the_connection_is_lost(cli, rabbit):
    """What was done is done, and nothing is lost."""
    rabbit.declare("orders")
    rabbit.declare(DLQ)
    bury(rabbit, *[b"%d" % number for number in range(250)])
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
    assert (1, True) == (code, "200 of 250 letters replayed" in out)
    assert "ended early: the connection for publishing was lost" in err
    assert 250 <= len(rabbit.broker.ready("orders")) + len(rabbit.broker.ready(DLQ))


def test_a_queue_can_be_named_without_a_consumer(cli):
    """And where it is not there, the broker's words say so."""
    code, _, err = cli("dlq", "list", "--queue", "nowhere", "--url", "memory://")
    assert (2, True) == (code, "no queue 'nowhere'" in err)


def test_purge_wants_a_yes(cli, letters):
    """Without it the count is told."""
    code, out, err = cli("dlq", "purge", "bookshop:orders", "--reason", "exhausted")
    assert (2, True) == (code, "2 of 3 letters would be deleted" in out)
    assert "--yes" in err
    code, out, _ = cli("dlq", "purge", "bookshop:orders", "--reason", "exhausted", "--yes")
    assert (0, True) == (code, "2 of 3 letters deleted" in out)
    assert 1 == len(letters.broker.ready(DLQ))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["list"], "name a consumer"),
        (["list", "bookshop:orders", "--look-at", "0"], "--look-at: must be 1 to 65535"),
        (["show", "bookshop:orders", "--header", "acme"], "write name=value"),
        (["replay", "bookshop:orders", "--limit", "0"], "--limit: must be at least 1"),
        (["replay", "bookshop:orders", "--older-than", "soon"], "older-than"),
        (["replay", "bookshop:nothing"], "no 'nothing' there"),
    ],
)
def test_nonsense_is_refused_in_one_line(cli, words, expected):
    """With code 2, and before anybody is asked."""
    code, out, err = cli("dlq", *words)
    assert (2, "") == (code, out)
    assert expected in err
    assert "Traceback" not in err


def test_a_consumer_without_a_dead_letter_queue_needs_one_named(cli, letters):
    """Its settings do not say where its letters lie."""
    code, _, err = cli("dlq", "list", "bookshop:orders", dead_letter_queue=None)
    assert (2, True) == (code, "name the queue by --queue" in err)
    words = ("dlq", "list", "bookshop:orders", "--queue", DLQ, "--delivery-limit", "-1")
    assert 0 == cli(*words, dead_letter_queue=None)[0]


@pytest.mark.parametrize(
    "words", ["check", "topology", "dlq list", "dlq show", "dlq replay", "dlq purge"]
)
def test_help_has_an_example(capsys, words):
    """Of every command."""
    assert 0 == run_app([*words.split(), "--help"])
    assert f"Example: aio-pika-batch {words} " in " ".join(capsys.readouterr().out.split())

"""Tests of the command line as its user sees it, from its help to its exit codes."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.helpers import PATIENCE, App, command_line, holds, shop, until
from tests.integration.test_cli_supervisor import BATCHES, address, is_ready, orders, put

CONSUMER = """
import os
from aio_pika_batch import BatchConsumer, BatchConsumerSettings, MessageResult

print("VERSION 1", flush=True)

class Importer(BatchConsumer):
    async def process_messages(self, messages):
        for message in messages:
            yield MessageResult.ACK

class Failing(Importer):
    async def on_start(self):
        raise RuntimeError("no database")

importer = Importer(BatchConsumerSettings(queue_name="orders", url="memory://"))
"""


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with a module."""
    (tmp_path / "stall.py").write_text(CONSUMER)
    return tmp_path


def cli(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command that exits by itself."""
    return subprocess.run(
        [sys.executable, "-m", "aio_pika_batch", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE,
        check=False,
    )


COMMANDS = "run", "relay", "health", "check", "topology", "demo", "dlq"
DLQ_COMMANDS = "list", "show", "replay", "purge"


@pytest.mark.long
@pytest.mark.parametrize(
    "command", [(), *((each,) for each in COMMANDS), *(("dlq", each) for each in DLQ_COMMANDS)]
)
def test_every_command_has_help_with_an_example(tmp_path, command) -> None:
    """On standard output, without colours in a pipe."""
    done = cli(tmp_path, *command, "--help")
    assert 0 == done.returncode
    assert "Usage: aio-pika-batch" in done.stdout
    assert "\x1b" not in done.stdout
    assert "Exit codes:" in done.stdout
    if command:
        assert f"Example: aio-pika-batch {command[0]} " in " ".join(done.stdout.split())


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("run",), "TARGET"),
        (("run", "no_such:thing"), "there is no module 'no_such'"),
        (("run", "stall:Importr"), "did you mean 'Importer'?"),
        (("run", "stall:importer", "--processes", "0"), "--processes"),
        (("run", "stall:importer", "-n", "1", "--hung-after", "0"), "--hung-after"),
        (("run", "stall:importer", "-n", "1", "--hung-after", "1.9"), "--hung-after"),
        (("run", "stall:importer", "-n", "1", "--crash-limit", "0"), "--crash-limit"),
        (("run", "stall:importer", "-n", "1", "--app-dir", "nowhere"), "nowhere"),
        (("run", "stall:importer", "--loop", "trio"), "--loop"),
        (("run", "stall:importer", "--log-level", "loud"), "--log-level"),
        (("run", "stall:importer", "--drain-timeout", "-1"), "shutdown_timeout"),
        (("run", "stall:importer", "--health-port", "99999"), "99999"),
        (("health", "--url", "ftp://127.0.0.1"), "must start with http://"),
    ],
)
def test_wrong_input_exits_with_2_and_no_traceback(folder, arguments, expected) -> None:
    """One line on standard error says what is wrong."""
    done = cli(folder, *arguments)
    assert 2 == done.returncode, done.stderr
    assert expected in done.stderr
    assert "Traceback" not in done.stderr


async def test_consumers_run_until_sigterm_and_probes_are_answered(
    channel, amqp_url, name, tmp_path
) -> None:
    """Several consumers in one process, and a probe by `health`."""
    arguments = (*shop("shop:make"), "--health-port", "0", "--workers", "2")
    async with command_line(tmp_path, *arguments, queue=name, url=amqp_url, **BATCHES) as program:
        url = await address(program)
        await is_ready(url)
        await put(channel, name, orders(50))
        await program.noted("done", 50)
        done = cli(tmp_path, "health", "--url", f"{url}/status")
        assert 0 == done.returncode
        status = json.loads(done.stdout)
        assert [2, 2] == [len(each["workers"]) for each in status["consumers"]]
        program.send(signal.SIGTERM)
        assert 0 == await program.ended(), program.printed
    assert 2 == len(program.of("on_stop"))
    await holds(amqp_url, name, 0)
    done = cli(tmp_path, "health", "--url", f"{url}/livez")
    assert 3 == done.returncode
    assert "no answer" in done.stderr


@pytest.mark.long
async def test_a_stuck_worker_fails_the_probe(channel, amqp_url, name, tmp_path) -> None:
    """With exit code 1 and the reason."""
    async with command_line(
        tmp_path,
        *shop("--health-port", "0"),
        queue=name,
        url=amqp_url,
        PACE="600",
        AIO_PIKA_BATCH_STUCK_AFTER="0.1",
    ) as program:
        url = await address(program)
        await is_ready(url)
        assert 0 == cli(tmp_path, "health", "--url", f"{url}/livez").returncode
        await put(channel, name, orders(1))
        await program.noted("begin")
        done = cli(tmp_path, "health", "--url", f"{url}/livez")
        assert 1 == done.returncode
        assert "longer than stuck_after" in done.stdout


@pytest.mark.parametrize("supervised", [(), ("-n", "1")])
async def test_an_unreachable_broker_fails_readiness_only(tmp_path, supervised) -> None:
    """The program waits for it until a signal, and the probe says why."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"amqp://127.0.0.1:{unused.getsockname()[1]}/"
        arguments = shop("--health-port", "0", *supervised)
        async with command_line(tmp_path, *arguments, url=url) as program:
            where = await address(program)
            await until(lambda: "not consuming" in program.printed)
            assert 0 == cli(tmp_path, "health", "--url", f"{where}/livez").returncode

            def probe() -> str:
                done = cli(tmp_path, "health", "--url", f"{where}/readyz")
                assert 1 == done.returncode
                return done.stdout

            await until(lambda: "worker 0 is waiting: BrokerUnavailable" in probe(), what=probe)
            program.send(signal.SIGTERM)
            assert 0 == await program.ended(), program.printed


@pytest.mark.parametrize("supervised", [(), ("-n", "2")])
async def test_a_wrong_password_exits_with_3(amqp_url, name, tmp_path, supervised) -> None:
    """With the reason, without a traceback, and without the password."""
    wrong = amqp_url.replace("guest:guest", "guest:wr0ng") if "guest:guest" in amqp_url else ""
    if not wrong:
        scheme, _, rest = amqp_url.partition("://")
        wrong = f"{scheme}://stranger:wr0ng@{rest.rpartition('@')[2]}"
    async with command_line(tmp_path, *shop(*supervised), queue=name, url=wrong) as program:
        assert 3 == await program.ended(), program.printed
    assert "AccessRefused" in program.printed
    assert "wr0ng" not in program.printed
    assert "Traceback" not in program.printed


async def test_a_consumer_that_fails_drains_the_others(folder) -> None:
    """With its traceback and exit code 1."""
    async with command_line(folder, "run", "stall:importer", "stall:Failing") as program:
        assert 1 == await program.ended(), program.printed
    assert "RuntimeError: no database" in program.printed
    assert '"stopped"' in program.printed


async def test_a_port_in_use_exits_with_2(folder) -> None:
    """The error names the port."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = cli(folder, "run", "stall:importer", "--health-port", str(port))
    assert 2 == done.returncode
    assert f"cannot listen on 127.0.0.1:{port}" in done.stderr


@pytest.mark.long
async def test_reload_restarts_after_a_change(folder) -> None:
    """Also after a change that doesn't run."""
    async with command_line(folder, "run", "stall:importer", "--reload") as program:
        await wait_for_output(program, "VERSION 1", '"consuming"')
        (folder / "stall.py").write_text("oops oops")
        await wait_for_output(program, "SyntaxError")
        (folder / "stall.py").write_text(CONSUMER.replace("VERSION 1", "VERSION 2"))
        await wait_for_output(program, "VERSION 2")
        await until(lambda: program.printed.count('"consuming"') == 2, what=lambda: program.printed)
        program.send(signal.SIGINT)
        assert 0 == await program.ended(), program.printed


async def wait_for_output(program: App, *texts: str) -> None:
    """Wait until the program has printed all of these."""
    for text in texts:
        await until(lambda text=text: text in program.printed, what=lambda: program.printed)


@pytest.mark.parametrize("loop", ["auto", "asyncio", "uvloop"])
async def test_consumers_run_on_either_event_loop(folder, loop) -> None:
    """By default on uvloop, if it is installed."""
    async with command_line(folder, "run", "stall:importer", "--loop", loop) as program:
        await wait_for_output(program, '"consuming"')
        program.send(signal.SIGTERM)
        assert 0 == await program.ended(), program.printed

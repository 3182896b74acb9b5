"""Tests of the demo as a program: in a pipe, in a terminal, and on a real RabbitMQ."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
from typing import TYPE_CHECKING

import pytest

from tests.integration.helpers import PATIENCE

if TYPE_CHECKING:
    from aio_pika_batch.testing.rabbitmq.node import RabbitMQ

DEMO = [sys.executable, "-m", "aio_pika_batch", "demo"]


def run(*arguments: str, seconds: int = 1) -> subprocess.CompletedProcess[str]:
    """Run the demo in a pipe."""
    command = [*DEMO, "--seconds", str(seconds), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=2 * PATIENCE, check=False
    )


def in_terminal(columns: int, *arguments: str) -> tuple[int, str]:
    """Run the demo in a terminal of this width; return its exit code and its output."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    env = {**os.environ, "TERM": "xterm-256color"}
    env.pop("COLUMNS", None)
    command = [*DEMO, "--seconds", "1", *arguments]
    with subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=env) as running:
        os.close(slave)
        written = b""
        while True:
            try:
                chunk = os.read(master, 65536)
            except OSError:  # how Linux reports the end of a terminal
                break
            if not chunk:
                break
            written += chunk
    os.close(master)
    return running.returncode, written.decode()


def test_the_demo_prints_lines_without_colours_in_a_pipe() -> None:
    """A line per second, then the final check."""
    done = run(seconds=3)

    assert (0, "") == (done.returncode, done.stderr)
    assert "\x1b" not in done.stdout
    # On a busy machine a line may be late, and say so.
    assert re.search(r"^ +\d+ s +[\d,]+ published", done.stdout, re.MULTILINE)
    assert re.search(r"^  lost +0  = +0  orders$", done.stdout, re.MULTILINE)
    assert done.stdout.endswith("All orders are accounted for.\n")


@pytest.mark.long
def test_the_demo_loses_nothing_when_connections_are_cut() -> None:
    """Some orders may be delivered again."""
    done = run("--chaos", seconds=4)

    assert 0 == done.returncode, done.stdout
    assert re.search(r"lost connections [1-9]", done.stdout)
    assert re.search(r"^  lost +0  = +0  orders$", done.stdout, re.MULTILINE)


@pytest.mark.parametrize("columns", [pytest.param(80, marks=pytest.mark.long), 120])
def test_the_demo_draws_a_dashboard_as_wide_as_the_terminal(tmp_path, columns: int) -> None:
    """It stays at the end. The saved picture loads no font from the web."""
    picture = tmp_path / "demo.svg"
    code, written = in_terminal(columns, "--save-svg", str(picture))

    assert 0 == code
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written)
    lines = re.split(r"[\r\n]+", plain)
    assert columns == max(map(len, lines))
    assert any("Invoices" in line for line in lines)
    assert "All orders are accounted for." in plain
    drawn = picture.read_text()
    assert "Invoices" in drawn
    assert "url(http" not in drawn
    assert "@font-face" not in drawn


@pytest.mark.long
@pytest.mark.needs_node
def test_the_demo_deletes_what_it_declared_on_a_real_broker(
    rabbitmq: RabbitMQ, amqp_url: str
) -> None:
    """Queues and exchanges."""
    done = run("--url", amqp_url)

    assert (0, "") == (done.returncode, done.stderr)
    assert done.stdout.endswith("All orders are accounted for.\n")
    for what in ("queues", "exchanges"):
        assert "aio-pika-batch.demo" not in rabbitmq.rabbitmqctl("--quiet", f"list_{what}", "name")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rate", "0"], "--rate: must be greater than 0"),
        (["--chaos", "--url", "amqp://localhost"], "--chaos: works on memory:// only"),
        (["--url", "gopher://x"], "gopher:// is not one of"),
    ],
)
def test_invalid_options_of_the_demo_are_reported_on_one_line(
    arguments: list[str], words: str
) -> None:
    """Exit code 2, and no traceback."""
    done = run(*arguments)

    assert 2 == done.returncode
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_an_unreachable_broker_is_reported_at_once_with_the_reason() -> None:
    """Exit code 3."""
    done = run("--url", "amqp://guest:secret@127.0.0.1:9/")

    assert 3 == done.returncode
    assert done.stdout.startswith("Connecting to amqp://guest:***@127.0.0.1:9/")
    assert "refused" in done.stderr.lower()
    assert 1 == len(done.stderr.splitlines())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_demo_with_its_summary(number: signal.Signals) -> None:
    """What was published is handled before."""
    with subprocess.Popen(
        [*DEMO, "--seconds", "600"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as running:
        assert running.stdout is not None
        running.stdout.readline()
        running.send_signal(number)
        output, errors = running.communicate(timeout=PATIENCE)

    assert (0, "") == (running.returncode, errors)
    assert output.endswith("All orders are accounted for.\n")

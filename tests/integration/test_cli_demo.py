"""Does the demo run as a program: in a pipe, in a terminal, on a real RabbitMQ; and end well?"""

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

if TYPE_CHECKING:
    from aio_pika_batch.testing.rabbitmq.node import RabbitMQ

DEMO = [sys.executable, "-m", "aio_pika_batch", "demo"]


def run(*arguments: str, seconds: int = 1) -> subprocess.CompletedProcess[str]:
    """Run it in a pipe."""
    command = [*DEMO, "--seconds", str(seconds), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)


def in_terminal(columns: int, *arguments: str) -> tuple[int, str]:
    """Run it in a terminal of so many columns; its exit code, and all that it has written."""
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
            except OSError:  # Linux tells the end of a terminal in this way
                break
            if not chunk:
                break
            written += chunk
    os.close(master)
    return running.returncode, written.decode()


def test_in_a_pipe_it_prints_lines_without_colours() -> None:
    """A line a second, then the books."""
    done = run()

    assert (0, "") == (done.returncode, done.stderr)
    assert "\x1b" not in done.stdout
    assert re.search(r"^ +1 s +[\d,]+ in", done.stdout, re.MULTILINE)
    assert re.search(r"^  lost +0  = +0  of them$", done.stdout, re.MULTILINE)
    assert done.stdout.endswith("It adds up.\n")


def test_connections_that_are_cut_lose_nothing() -> None:
    """Some are delivered again."""
    done = run("--chaos", seconds=4)

    assert 0 == done.returncode, done.stdout
    assert re.search(r"lost connections [1-9]", done.stdout)
    assert re.search(r"^  lost +0  = +0  of them$", done.stdout, re.MULTILINE)


@pytest.mark.parametrize("columns", [80, 120])
def test_in_a_terminal_it_draws_within_its_width(tmp_path, columns: int) -> None:
    """A dashboard, which stays when it is over; its picture asks nobody for a font."""
    picture = tmp_path / "demo.svg"
    code, written = in_terminal(columns, "--save-svg", str(picture))

    assert 0 == code
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written)
    lines = re.split(r"[\r\n]+", plain)
    assert columns == max(map(len, lines))
    assert any("Invoices" in line for line in lines)
    assert "It adds up." in plain
    drawn = picture.read_text()
    assert "Invoices" in drawn
    assert "url(http" not in drawn
    assert "@font-face" not in drawn


@pytest.mark.needs_node
def test_on_a_real_broker_it_leaves_nothing_behind(rabbitmq: RabbitMQ, amqp_url: str) -> None:
    """Neither a queue nor an exchange."""
    done = run("--url", amqp_url)

    assert (0, "") == (done.returncode, done.stderr)
    assert done.stdout.endswith("It adds up.\n")
    for what in ("queues", "exchanges"):
        assert "aio-pika-batch.demo" not in rabbitmq.rabbitmqctl("--quiet", f"list_{what}", "name")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rate", "0"], "--rate: must be more than 0"),
        (["--chaos", "--url", "amqp://localhost"], "--chaos: only a broker in memory"),
        (["--url", "gopher://x"], "gopher:// is not one of"),
    ],
)
def test_wrong_input_is_told_in_a_line(arguments: list[str], words: str) -> None:
    """Exit code 2, and no traceback."""
    done = run(*arguments)

    assert 2 == done.returncode
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_a_broker_that_is_not_there_is_told_in_a_line() -> None:
    """Exit code 3."""
    done = run("--url", "amqp://127.0.0.1:9/")

    assert 3 == done.returncode
    assert "Traceback" not in done.stderr


def test_ctrl_c_ends_it() -> None:
    """Without a traceback."""
    with subprocess.Popen(
        [*DEMO, "--seconds", "60"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as running:
        assert running.stdout is not None
        running.stdout.readline()
        running.send_signal(signal.SIGINT)
        _, errors = running.communicate(timeout=60)

    assert 130 == running.returncode
    assert "Traceback" not in errors

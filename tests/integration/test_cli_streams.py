"""The command line with closed streams, a full disk, and names that a terminal could misread."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.integration.helpers import PATIENCE, shop

ENVIRONMENT = os.environ | {
    "AIO_PIKA_BATCH_URL": "memory://",
    "AIO_PIKA_BATCH_QUEUE_NAME": "orders[eu]",
    "AIO_PIKA_BATCH_DEAD_LETTER_QUEUE": "dead[/x]:smile:\x1b",
    "COLUMNS": "200",
}


def environment(folder: Path) -> dict[str, str]:
    """Return the variables of a program with odd names."""
    own = ENVIRONMENT | {"EVENT_LOG": str(folder / "events.jsonl")}
    # What coverage prints at the end of a program is not the program's.
    return {name: value for name, value in own.items() if not name.startswith("COVERAGE_")}


@pytest.mark.parametrize("more", [(), ("-n", "1")], ids=["alone", "supervised"])
@pytest.mark.parametrize(
    "redirect",
    [
        ">&- 2>&- <&-",
        "2>/dev/full",
        *(pytest.param(each, marks=pytest.mark.long) for each in (">&-", "2>&-", "<&-")),
    ],
)
def test_a_consumer_starts_and_ends_with_closed_streams(
    tmp_path: Path, redirect: str, more: tuple[str, ...]
) -> None:
    """With exit code 0, and no traceback where there is somewhere to write one."""
    output = tmp_path / "output"
    command = [sys.executable, "-m", "aio_pika_batch", *shop(*more)]
    with output.open("wb") as out:
        program = subprocess.Popen(
            ["sh", "-c", f'exec "$@" {redirect}', "sh", *command],
            env=environment(tmp_path),
            cwd=tmp_path,
            stdout=out,
            stderr=out,
        )
    try:
        events = tmp_path / "events.jsonl"
        deadline = time.monotonic() + PATIENCE
        while not (events.exists() and "started" in events.read_text()):
            assert time.monotonic() < deadline, output.read_text()
            assert program.poll() is None, output.read_text()
            time.sleep(0.05)
        program.send_signal(signal.SIGTERM)
        assert 0 == program.wait(PATIENCE), output.read_text()
    finally:
        program.kill()
        program.wait()
    assert "Traceback" not in output.read_text()


@pytest.mark.parametrize(
    "words", [("check", "--offline"), ("check", "--offline", "--format", "json"), ("topology",)]
)
def test_a_full_disk_is_one_line(tmp_path: Path, words: tuple[str, ...]) -> None:
    """With exit code 1."""
    command, *options = words
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "aio_pika_batch", command, *shop()[1:], *options],
            env=environment(tmp_path),
            cwd=tmp_path,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert (1, 1) == (done.returncode, len(done.stderr.splitlines())), done.stderr
    assert "the output can't be written: No space left on device" in done.stderr


@pytest.mark.parametrize("encoding", [pytest.param("utf-8", marks=pytest.mark.long), "ascii"])
@pytest.mark.parametrize(
    "words", [("check", "--offline"), ("topology",), ("dlq", "list"), ("dlq", "show")]
)
def test_names_are_printed_whole(tmp_path: Path, encoding: str, words: tuple[str, ...]) -> None:
    """Brackets aren't markup, colons aren't emoji, and control characters are written out."""
    name = "dead[/x]:smile:"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "aio_pika_batch"),
            *([*words, *shop()[1:]] if words[0] == "dlq" else [words[0], *shop()[1:], *words[1:]]),
        ],
        env=environment(tmp_path)
        | {"AIO_PIKA_BATCH_DEAD_LETTER_QUEUE": f"{name}é", "PYTHONIOENCODING": encoding},
        cwd=tmp_path,
        capture_output=True,
        encoding=encoding,
        check=False,
    )
    assert "Traceback" not in done.stderr
    assert name in done.stdout + done.stderr

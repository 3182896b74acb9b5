"""The examples run on the broker in memory, account for all messages, and end by themselves.

Each as a process of its own, as a reader would start it. aio-pika is made impossible to import
there: nothing on `memory://` needs it.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"

WITHOUT_AIO_PIKA = """
import runpy, sys
sys.modules["aio_pika"] = sys.modules["aiormq"] = None
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""

# From within, since an example may be over by the time that a busy machine sends it a signal.
INTERRUPTED = """
import builtins, signal
def print_and_interrupt(*arguments, **more):
    builtins.print = print_only
    print_only(*arguments, **more)
    signal.raise_signal(signal.SIGINT)
print_only, builtins.print = print, print_and_interrupt
"""


def output(name: str, *arguments: str, how: str = WITHOUT_AIO_PIKA) -> str:
    """What an example prints; it must say nothing on stderr and end well."""
    main = str(EXAMPLES / name / "main.py")
    done = subprocess.run(
        [sys.executable, "-c", how, main, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (0, "") == (done.returncode, done.stderr)
    return done.stdout


def test_simple_prints_a_receipt_for_each_order() -> None:
    """Eight orders, and their sum."""
    said = output("simple")

    assert list(range(1, 9)) == sorted(int(each) for each in re.findall(r"order (\d+):", said))
    assert said.endswith("8 orders, 43.60 EUR\n")


def test_batch_accounts_for_every_picture() -> None:
    """Each picture becomes a thumbnail or a dead letter with a reason; retries are counted."""
    said = output("batch")

    assert 4 == said.count("dead letter: rejected after 0 retries: no JSON")
    assert 1 == said.count("dead letter: exhausted after 3 retries: out of colours")
    assert 46 == sum(int(each) for each in re.findall(r"batch of +(\d+)", said))
    assert said.endswith("40 pictures = 35 thumbnails + 5 dead letters + 0 left; 6 requeues\n")


@pytest.mark.parametrize("way", [(), ("--modern",)], ids=["classic", "modern"])
def test_fan_in_writes_every_event_once(way: tuple[str, ...]) -> None:
    """Three sources, forty events each, and the writer's batches hold all of them."""
    said = output("fan_in", *way)

    assert ["40", "40", "40"] == re.findall(r": (\d+) written", said)
    assert 120 == sum(int(each) for each in re.findall(r"wrote (\d+)", said))


@pytest.mark.parametrize("name", ["simple", "batch", "fan_in"])
def test_an_interrupted_example_stops_cleanly(name: str) -> None:
    """Ctrl-C at its first line drains: no traceback, exit code 0."""
    assert output(name, how=INTERRUPTED + WITHOUT_AIO_PIKA)


@pytest.mark.parametrize(
    "folder",
    [each.parent for each in sorted(EXAMPLES.glob("*/main.py"))],
    ids=lambda folder: folder.name,
)
def test_every_example_says_what_it_is(folder: Path) -> None:
    """And how to start it."""
    assert f"python examples/{folder.name}/main.py" in (folder / "README.md").read_text()

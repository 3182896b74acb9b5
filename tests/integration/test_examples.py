"""The examples run on a real RabbitMQ, account for all messages, and end by themselves."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.integration.helpers import PATIENCE
from tests.unit.test_examples import INTERRUPTED

if TYPE_CHECKING:
    from aio_pika_batch.testing.rabbitmq.node import RabbitMQ

EXAMPLES = Path(__file__).parents[2] / "examples"

AS_IT_IS = """
import runpy, sys
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def output(name: str, *arguments: str, how: str = AS_IT_IS) -> str:
    """What an example prints; it must say nothing on stderr and end well."""
    done = subprocess.run(
        [sys.executable, "-c", how, str(EXAMPLES / name / "main.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE,
        check=False,
    )
    assert (0, "") == (done.returncode, done.stderr)
    return done.stdout


def test_simple_prints_a_receipt_for_each_order(amqp_url: str) -> None:
    """Eight orders, and their sum."""
    said = output("simple", "--url", amqp_url)

    assert list(range(1, 9)) == sorted(int(each) for each in re.findall(r"order (\d+):", said))
    assert said.endswith("8 orders, 43.60 EUR\n")


def test_batch_accounts_for_every_picture(amqp_url: str) -> None:
    """Each picture becomes a thumbnail or a dead letter with a reason; retries are counted."""
    said = output("batch", "--url", amqp_url)

    assert 4 == said.count("dead letter: rejected after 0 retries: no JSON")
    assert 1 == said.count("dead letter: exhausted after 3 retries: out of colours")
    assert said.endswith("40 pictures = 35 thumbnails + 5 dead letters + 0 left; 6 requeues\n")


@pytest.mark.parametrize("way", [(), ("--modern",)], ids=["classic", "modern"])
def test_fan_in_writes_every_event_once(amqp_url: str, way: tuple[str, ...]) -> None:
    """Three sources, forty events each, and the writer's batches hold all of them."""
    said = output("fan_in", "--url", amqp_url, *way)

    assert ["40", "40", "40"] == re.findall(r": (\d+) written", said)
    assert 120 == sum(int(each) for each in re.findall(r"wrote (\d+)", said))


@pytest.mark.parametrize("name", ["simple", "batch", "fan_in"])
def test_an_interrupted_example_stops_cleanly(amqp_url: str, name: str) -> None:
    """Ctrl-C at its first line drains: no traceback, exit code 0."""
    assert output(name, "--url", amqp_url, how=INTERRUPTED + AS_IT_IS)


@pytest.mark.long
@pytest.mark.needs_node
def test_nothing_is_left_behind(rabbitmq: RabbitMQ, amqp_url: str) -> None:
    """Neither a queue nor an exchange: the next run, or another one beside it, finds none."""
    for name in ("simple", "batch", "fan_in"):
        output(name, "--url", amqp_url)

    for what in ("queues", "exchanges"):
        assert "example." not in rabbitmq.rabbitmqctl("--quiet", f"list_{what}", "name")

"""The pytest plugin: its fixtures, and what it costs when they are not used."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from aio_pika_batch._lazy import lazy_exports
from aio_pika_batch.testing.plugin import batch_broker, batch_broker_version

ROOT = Path(__file__).parents[3]
MODULE = "aio_pika_batch.testing.plugin"

__all__ = ["batch_broker", "batch_broker_version"]

pytest_plugins = "pytester"

STORY = """
import pytest

from aio_pika_batch import BatchConsumer, BatchConsumerSettings, MessageResult

SETTINGS = BatchConsumerSettings(queue_name="orders", url="memory://")


class Importer(BatchConsumer):
    async def process_messages(self, messages):
        for message in messages:
            yield MessageResult.ACK


def test_orders(batch_broker):
    async def scenario():
        async with Importer(SETTINGS, transport=batch_broker.transport):
            batch_broker.publish(b"1", routing_key="orders")
            await batch_broker.settled()
        assert [] == batch_broker.drain("orders")

    batch_broker.run(scenario())


@pytest.mark.parametrize("batch_broker_version", ["3.10"])
def test_older(batch_broker):
    assert "3.10" == batch_broker.broker.version
"""


def test_batch_broker_needs_no_other_plugin(tmp_path):
    """Not even one for asyncio."""
    (tmp_path / "test_story.py").write_text(STORY)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", MODULE]
    ran = subprocess.run(
        [*command, "-W", "error", str(tmp_path)],
        env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "2 passed" in ran.stdout, ran.stdout + ran.stderr


async def test_each_test_has_its_own_broker(batch_broker):
    """With the newest version that it can imitate."""
    assert ("4.3", []) == (batch_broker.broker.version, batch_broker.broker.queues)


NEEDY = """
def test_needs_a_broker(batch_rabbitmq):
    pass
"""


@pytest.mark.parametrize(
    ("optional", "outcome"), [("", {"errors": 1}), ("1", {"skipped": 1})], ids=["fails", "skipped"]
)
def test_without_rabbitmq_a_test_fails_unless_it_is_optional(
    pytester, monkeypatch, optional, outcome
):
    """Skipped or failed, it says what is missing and what to do."""
    monkeypatch.setenv("AIO_PIKA_BATCH_TEST_URL", "amqp://localhost:1/")
    monkeypatch.setenv("AIO_PIKA_BATCH_TEST_OPTIONAL", optional)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    pytester.makepyfile(NEEDY)

    ran = pytester.runpytest_subprocess("-p", MODULE, "-p", "no:cacheprovider", "-rs")

    ran.assert_outcomes(**outcome)
    ran.stdout.fnmatch_lines(["*AIO_PIKA_BATCH_TEST_URL is set, but no broker answers*"])


def test_it_is_found_by_its_entry_point():
    """With the name that disables it: `-p no:aio_pika_batch`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {"aio_pika_batch": MODULE} == project["entry-points"]["pytest11"]


def test_it_imports_almost_nothing_before_a_fixture_is_used():
    """Every run of every project loads it, perhaps before coverage starts."""
    story = (
        "import sys, pytest\n"
        "before = set(sys.modules)\n"
        f"import {MODULE}\n"
        "print(*sorted(set(sys.modules) - before))\n"
    )
    done = subprocess.run([sys.executable, "-c", story], check=True, capture_output=True, text=True)
    ours = {"aio_pika_batch", "aio_pika_batch._lazy", "aio_pika_batch.testing", MODULE}
    assert ours == set(done.stdout.split())


@pytest.mark.parametrize("package", ["aio_pika_batch", "aio_pika_batch.testing"])
def test_lazy_packages_have_exactly_what_they_list(package):
    """Another name raises AttributeError, as usual."""
    story = (
        f"import {package} as door\n"
        f"from {package} import *\n"
        "assert set(door.__all__) <= set(dir(door)) & set(globals())\n"
        "assert all(getattr(door, name) is globals()[name] for name in door.__all__)\n"
        "try:\n"
        "    door.Nothing\n"
        "except AttributeError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", story], check=True, capture_output=True, text=True)
    assert f"module {package!r} has no attribute 'Nothing'\n" == done.stdout


def test_a_name_that_no_module_has_raises_attribute_error():
    """Whether it is listed or not."""
    find, _ = lazy_exports("aio_pika_batch", {"Something": "errors"})
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        find("Nothing")

"""Which way may things look, and how large may they grow?

The import contracts in ``pyproject.toml`` read the source. These tests hold what only running it,
or reading the tests, can show.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import aio_pika_batch

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "src").rglob("*.py"))
UNIT_TESTS = sorted((ROOT / "tests" / "unit").rglob("*.py"))

AMQP_CLIENTS = {"aio_pika", "aiormq", "pamqp"}
LONGEST_FILE = 400
LONGER_FOR_A_REASON = {
    "consumer.py": "what a class that users subclass can do is in the file that they open",
    "core/message.py": "all that a handler can ask of a message is in one file",
    "core/settlement_plan.py": "what becomes of each result is decided in one place",
    "runtime/consume_loop.py": "one session, from the first delivery to the last settlement",
    "settings/consumer_settings.py": "all settings in the order of the docs, one after another",
}
TAKE_REAL_TIME = {"time.sleep", "asyncio.run", "asyncio.new_event_loop"}


def packages_imported_by(statement: str) -> set[str]:
    """Run *statement* in a fresh interpreter, and return the top-level packages it brought in."""
    story = (
        "import sys\n"
        "before = set(sys.modules)\n"
        f"{statement}\n"
        "print(*{name.partition('.')[0] for name in set(sys.modules) - before})\n"
    )
    done = subprocess.run([sys.executable, "-c", story], check=True, capture_output=True, text=True)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "module",
    [
        "aio_pika_batch",
        "aio_pika_batch.adapters.memory",
        "aio_pika_batch.consumer",
        "aio_pika_batch.testing",
    ],
)
def test_no_amqp_client_is_imported_before_it_is_wanted(module: str) -> None:
    """The front door is quick to open, and a consumer on ``memory://`` needs no AMQP client."""
    imported = packages_imported_by(f"import {module}")
    assert "aio_pika_batch" in imported
    assert set() == imported & AMQP_CLIENTS, (
        "import it where it is used: in adapters/aio_pika, which is found by the URL's scheme"
    )


def test_the_core_does_no_io_by_running() -> None:
    """The core alone, without the front door above it, brings in no event loop and no logging."""
    imported = packages_imported_by(
        "import importlib, pkgutil, types\n"
        "house = types.ModuleType('aio_pika_batch')\n"
        f"house.__path__ = [{str(Path(aio_pika_batch.__file__).parent)!r}]\n"
        "sys.modules['aio_pika_batch'] = house\n"
        "core = importlib.import_module('aio_pika_batch.core')\n"
        "for module in pkgutil.iter_modules(core.__path__, 'aio_pika_batch.core.'):\n"
        "    importlib.import_module(module.name)\n"
    )
    forbidden = {"asyncio", "logging", "random", "socket", "pydantic", "pydantic_settings"}
    assert set() == imported & (forbidden | AMQP_CLIENTS), (
        "the core decides from what it is given; let the shell hand it in"
    )


def test_every_public_name_resolves_and_is_listed() -> None:
    """What ``__all__`` promises can be had, also where it is imported on first use."""
    assert aio_pika_batch.__all__
    for name in aio_pika_batch.__all__:
        assert getattr(aio_pika_batch, name) is not None
    assert set(aio_pika_batch.__all__) <= set(dir(aio_pika_batch))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_is_too_long_to_be_read_at_one_sitting(path: Path) -> None:
    """A longer one has its reason."""
    length = len(path.read_text().splitlines())
    if str(path.relative_to(ROOT / "src" / "aio_pika_batch")) in LONGER_FOR_A_REASON:
        return
    assert length <= LONGEST_FILE, f"{path.relative_to(ROOT)} has {length} lines: split it"


@pytest.mark.parametrize("path", UNIT_TESTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_unit_test_takes_real_time(path: Path) -> None:
    """Unit tests run in virtual time, where ``asyncio.sleep`` costs nothing; these calls would."""
    used = {
        ast.unparse(node.func)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
    }
    assert set() == used & TAKE_REAL_TIME, (
        "make the test asynchronous, or call aio_pika_batch.testing.virtual_time.run"
    )

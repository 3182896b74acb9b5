"""The rules of the layout: what may be imported, how large things may grow, how they are named.

The import contracts in ``pyproject.toml`` check the direction of imports.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tokenize
import tomllib
from collections import Counter
from functools import cache
from pathlib import Path

import grimp
import pytest

import aio_pika_batch

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "src").rglob("*.py"))
UNIT_TESTS = sorted((ROOT / "tests" / "unit").rglob("*.py"))
OTHERS = [
    path
    for folder in ("tests", "benchmarks", "examples", "docs")
    for path in sorted((ROOT / folder).rglob("*.py"))
]
"""All Python files outside the package."""

AMQP_CLIENTS = {"aio_pika", "aiormq", "pamqp"}
PACKAGE = ROOT / "src" / "aio_pika_batch"
FOLDERS = sorted({path.parent for path in SOURCES} - {PACKAGE.parent})

LONGEST_FILE = 400
SHORTEST_FILE = 80
MOST_FILES_IN_THE_ROOT = 16
MOST_LAYERS = 10
LONGEST_CHAIN = 10
LEAST_COMMENTS = 0.025
LONGER_FOR_A_REASON = {
    "adapters/amqp10/codec.py": "every type of AMQP 1.0 is read and written by one table",
    "adapters/aio_pika/properties.py": "a property list is read, written and changed by one layout",
    "cli/check.py": "what a consumer needs, and how its broker differs, for both commands",
    "cli/process_manager.py": "one state machine decides from the start of a process to its end",
    "consumer.py": "what a class that users subclass can do is in the file that they open",
    "core/batch_run.py": "the results of one batch, from what is yielded to what is decided",
    "core/config_checks.py": "every warning about settings, whatever it is about",
    "core/message.py": "all that a handler can see of a message is in one file",
    "core/settlement_plan.py": "what happens to each result is decided in one place",
    "core/topology.py": "what is declared, in which order and as what, is in one place",
    "adapters/memory/queue.py": "all places in which a message of one queue can be",
    "adapters/memory/session.py": "both connections of a client, to consume and to publish",
    "testing/stories/player.py": "plays a story, and records it at every method of the port",
    "adapters/aio_pika/session.py": "one session, and how its settlements are written and proven",
    "adapters/aio_pika/publisher.py": "both ways to publish, and how each ends",
    "inbox.py": "claims, and the transaction that they belong to",
    "dead_letters.py": "looking at dead letters, replaying and deleting them, by one law",
    "observers/otel.py": "what each event becomes: spans, and metrics beside them",
    "runtime/publishing.py": "all that is published for a consumer, and by which connection",
    "runtime/settler.py": "all that happens to a session's results",
    "runtime/handler.py": "a handler while it runs: its slot, what it yields, what it may ask",
    "runtime/consume_loop.py": "one session, from the first delivery to the last settlement",
    "transport.py": "the port: everything that a transport implements or may offer",
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


@cache
def tree(path: Path) -> ast.Module:
    """Return the syntax tree of a file, which several rules look at."""
    return ast.parse(path.read_text())


@cache
def imports() -> grimp.ImportGraph:
    """Return what imports what."""
    return grimp.build_graph("aio_pika_batch", cache_dir=None)


def chain(module: str, inside: str, path: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Return the longest chain of imports from a module to others in the same folder."""
    assert module not in path, f"a cycle: {' -> '.join((*path, module))}"
    chains = [
        chain(each, inside, (*path, module))
        for each in imports().find_modules_directly_imported_by(module)
        if each.startswith(f"{inside}.") and each != module
    ]
    return (module, *max(chains, key=len, default=()))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: str(path.relative_to(ROOT)))
def test_chains_of_imports_in_a_folder_are_short_and_without_cycles(folder: Path) -> None:
    """So that a reader finds the start of a thread, and its end."""
    name = ".".join(folder.relative_to(PACKAGE.parent).parts)
    if folder == PACKAGE:
        return  # the contract of layers holds for it
    modules = [each for each in imports().modules if each.startswith(f"{name}.")]
    longest = max((chain(each, name) for each in modules), key=len, default=())
    assert len(longest) <= LONGEST_CHAIN, " -> ".join(longest)


def test_the_root_of_the_package_has_few_files() -> None:
    """A new file has a folder, unless users import it."""
    assert len(list(PACKAGE.glob("*.py"))) <= MOST_FILES_IN_THE_ROOT


def test_the_package_has_few_layers() -> None:
    """The contract holds the direction of imports, whatever number of layers it is given."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    [layers] = [
        each["layers"]
        for each in contracts["contracts"]
        if each.get("containers") == ["aio_pika_batch"]
    ]
    assert len(layers) <= MOST_LAYERS


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_small_module_has_several_users(path: Path) -> None:
    """One that only one other imports belongs in that one."""
    module = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    if path.stem.startswith("__"):
        return
    users = imports().find_modules_that_directly_import(module)
    is_small = len(path.read_text().splitlines()) < SHORTEST_FILE
    assert not (is_small and len(users) == 1), f"fold it into {', '.join(users)}"


@pytest.mark.parametrize("path", [*SOURCES, *OTHERS], ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_states_what_it_does(path: Path) -> None:
    """Its docstring is a statement, not a question."""
    docstring = ast.get_docstring(tree(path))
    assert docstring
    assert "?" not in docstring.partition("\n\n")[0]


def test_no_two_public_classes_have_the_same_name() -> None:
    """A name in a traceback or an import says which one it is."""
    names = Counter(
        node.name
        for path in SOURCES
        for node in ast.walk(tree(path))
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    assert [] == [name for name, count in names.items() if count > 1]


def test_decisions_are_beside_the_lines_that_they_explain() -> None:
    """In comments; switched-off rules don't count."""
    lines = comments = 0
    for path in SOURCES:
        lines += len(path.read_text().splitlines())
        with path.open("rb") as source:
            comments += sum(
                token.type == tokenize.COMMENT
                and not re.match(r"#\s*(noqa|type:|pragma)", token.string)
                for token in tokenize.tokenize(source.readline)
            )
    assert comments / lines >= LEAST_COMMENTS


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
    used = {ast.unparse(node.func) for node in ast.walk(tree(path)) if isinstance(node, ast.Call)}
    assert set() == used & TAKE_REAL_TIME, (
        "make the test asynchronous, or call aio_pika_batch.testing.virtual_time.run"
    )

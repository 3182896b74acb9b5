"""docs/errors.md lists everything that can go wrong, with its cause and what to do.

The texts are read from the code, so a new exception or a new line of the log must be added there.
"""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from aio_pika_batch import errors
from aio_pika_batch.cli.process_manager import ProcessEvent
from aio_pika_batch.testing import virtual_time
from aio_pika_batch.testing.contract.checks import ClauseBroken
from aio_pika_batch.testing.rabbitmq.find import NoBrokerError
from aio_pika_batch.testing.stories.story import StoryBroken

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "src" / "aio_pika_batch").rglob("*.py"))
PAGE = (ROOT / "docs" / "errors.md").read_text()
WORDS = PAGE.replace("`", "")

LOUD = {"warning", "error", "exception"}
ELSEWHERE = {"line", "entry.event.value"}
"""Lines that are made somewhere else: advice, and the supervisor's events; see below."""


def exceptions() -> Iterator[type[BaseException]]:
    """Whatever users may have to catch, or see a test fail by."""
    for module in (errors, virtual_time):
        for _, value in inspect.getmembers(module, inspect.isclass):
            if issubclass(value, BaseException) and value.__module__ == module.__name__:
                yield value
    yield from (ClauseBroken, NoBrokerError, StoryBroken)


@pytest.mark.parametrize("error", list(exceptions()), ids=lambda each: each.__name__)
def test_each_exception_is_explained(error):
    """Under a heading, so that a search and a link find it."""
    headings = re.findall(r"^### (.*)$", PAGE, re.MULTILINE)
    is_base = error is virtual_time.VirtualTimeError
    assert is_base or error.__name__ in {each for line in headings for each in line.split(", ")}
    assert error.__name__ in PAGE


def pieces(node: ast.expr) -> list[str] | None:
    """Return the constant parts of a text, up to the advice in it; None if it isn't a text."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        text = re.sub(r"%[sdr]", "\0", node.value)
    elif isinstance(node, ast.JoinedStr):
        text = "".join(
            str(part.value) if isinstance(part, ast.Constant) else "\0" for part in node.values
        )
    else:
        return None
    head = re.split(r"(?<=...)[:;] ", text)[0]
    return [piece.strip() for piece in head.split("\0") if piece.strip()]


def is_loud(node: ast.AST, telling: set[str]) -> bool:
    """Whether this is a method that logs at WARNING or above."""
    match node:
        case ast.Attribute(value=ast.Name(id=name) | ast.Attribute(attr=name), attr=method):
            return name.endswith("log") and method in LOUD
        case ast.IfExp(body=one, orelse=other):
            return is_loud(one, telling) or is_loud(other, telling)
        case ast.Name(id=name):
            return name in telling
    return False


def logged() -> Iterator[tuple[str, ast.expr]]:
    """Place and text of each loud line."""
    for file in SOURCES:
        tree = ast.parse(file.read_text())
        telling: set[str] = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign) and is_loud(node.value, set()):
                telling |= {each.id for each in node.targets if isinstance(each, ast.Name)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and is_loud(node.func, telling):
                yield f"{file.stem}:{node.lineno}", node.args[0]
            if isinstance(node, ast.Dict):  # what asyncio's exception handler is given
                for key, value in zip(node.keys, node.values, strict=True):
                    if isinstance(key, ast.Constant) and key.value == "message":
                        yield f"{file.stem}:{node.lineno}", value


LOGGED = list(logged())


def test_what_is_logged_is_found():
    """There is more than one way to say it."""
    said = {ast.unparse(each) for _, each in LOGGED}
    by_each_way = {
        "'a batch failed'",
        '"a delay queue can\'t be declared for now: its retries are held"',  # through a name
        "'a listener on an AMQP connection failed'",  # by asyncio
        "'the certificate of %s is not verified, because url says no_verify_ssl=1:",
    }
    assert [] == [line for line in by_each_way if not any(each.startswith(line) for each in said)]


@pytest.mark.parametrize(("place", "said"), LOGGED, ids=[place for place, _ in LOGGED])
def test_each_line_of_the_log_is_explained(place, said):
    """At WARNING and above; by all of its words that are always the same."""
    found = pieces(said)
    if found is None:
        assert ast.unparse(said) in ELSEWHERE, f"{place}: this text isn't constant"
    else:
        assert [] == [piece for piece in found if piece not in WORDS], place


def test_each_event_of_the_supervisor_is_explained():
    """Those that are logged at ERROR."""
    from aio_pika_batch.cli.supervisor import GOOD_NEWS

    bad = [each.value for each in ProcessEvent if each not in GOOD_NEWS]
    assert [] == [each for each in bad if f"| {each} |" not in PAGE]


def is_part(text: ast.JoinedStr) -> bool:
    """Whether it is only a name and a value, which become a part of another text."""
    return len("".join(pieces(text) or ())) == 1


def warnings_of_checks() -> Iterator[ast.expr]:
    """What `core.config_checks` says, wherever it makes it up."""
    tree = ast.parse((ROOT / "src" / "aio_pika_batch" / "core" / "config_checks.py").read_text())
    for node in ast.walk(tree):
        match node:
            case ast.Yield(value=ast.Constant() | ast.JoinedStr() as text):
                yield text
            case ast.Call(func=ast.Attribute(ast.Name("hints"), "append"), args=[text]):
                yield text
            case ast.Assign(targets=[ast.Name("_DROPS_AT_ONCE")], value=text):
                yield text
            case ast.Return(value=ast.List([ast.JoinedStr() as text])):
                yield text
            case ast.Return(value=ast.ListComp(elt=ast.JoinedStr() as text)) if not is_part(text):
                yield text
            case ast.FunctionDef(name="_endless"):
                returned = [each for each in ast.walk(node) if isinstance(each, ast.Return)]
                for each in (text for some in returned for text in ast.walk(some)):
                    if isinstance(each, ast.JoinedStr) or (
                        isinstance(each, ast.Constant) and isinstance(each.value, str)
                    ):
                        yield each


@pytest.mark.parametrize(
    "said", list(warnings_of_checks()), ids=lambda each: ast.unparse(each)[2:40]
)
def test_each_advice_is_explained(said):
    """By all of its words that are always the same."""
    assert [] == [piece for piece in pieces(said) or () if piece not in WORDS]

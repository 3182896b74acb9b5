"""Every public name is in the reference, with a description."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[2] / "docs" / "reference.md").read_text()
DOORS = ["aio_pika_batch", "aio_pika_batch.testing", "aio_pika_batch.testing.contract"]
PUBLIC = [(door, name) for door in DOORS for name in importlib.import_module(door).__all__]


_ALONE = re.compile(
    r"^\.\. (?:auto(?:class|function)|py:data):: (?:[a-z_.]+\.)?(\w+)$", re.MULTILINE
)
_TOGETHER = re.compile(r"^\.\. automodule:: (\S+)\n   :members:(.*)$", re.MULTILINE)


def shown() -> set[str]:
    """Every name whose docstring the page shows."""
    names = set(_ALONE.findall(PAGE))
    for module, members in _TOGETHER.findall(PAGE):
        room = importlib.import_module(module)
        names.update(
            members.replace(",", " ").split()
            or (name for name, value in vars(room).items() if _is_of(value, module))
        )
    return names


def _is_of(value: object, module: str) -> bool:
    return getattr(value, "__module__", None) == module


@pytest.mark.parametrize(("door", "name"), PUBLIC)
def test_each_public_name_is_shown(door: str, name: str) -> None:
    """Clauses are listed by the contract itself."""
    assert name in shown() | {"CLAUSES"}


@pytest.mark.parametrize(("door", "name"), PUBLIC)
def test_each_public_name_says_what_it_is(door: str, name: str) -> None:
    """A docstring of its own, and one for each of its public methods."""
    value = getattr(importlib.import_module(door), name)
    if not (inspect.isclass(value) or inspect.isfunction(value)):
        return
    undocumented = [
        member
        for member, method in vars(value).items()
        if inspect.isfunction(method) and not member.startswith("_") and not inspect.getdoc(method)
    ]
    assert inspect.getdoc(value)
    assert [] == undocumented

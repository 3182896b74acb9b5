"""docs/architecture.md describes the modules that exist."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "aio_pika_batch"
PAGE = (ROOT / "docs" / "architecture.md").read_text()


@pytest.fixture
def layers(monkeypatch):
    """The script that draws the picture."""
    spec = importlib.util.spec_from_file_location("layers", ROOT / "docs" / "layers.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "layers", module)  # where a dataclass looks its module up
    spec.loader.exec_module(module)
    return module


def test_the_picture_is_up_to_date(layers):
    """If this fails: `python docs/layers.py`."""
    assert layers.PICTURE.read_text() == layers.draw()


def test_an_arrow_is_drawn_where_no_other_way_says_so(layers):
    """What a longer way of arrows says needs no arrow of its own."""
    imports = {"a": {"b", "c", "d"}, "b": {"c"}, "c": set(), "d": set()}
    assert [("a", "b"), ("a", "d"), ("b", "c")] == layers.reduced(imports)


def test_the_picture_is_shown():
    """On the page about it."""
    assert "](layers.svg)" in PAGE


def modules():
    """What stands at the top, and in the core, where every module is a decision of its own."""
    for folder in (SOURCE, SOURCE / "core"):
        for each in sorted(folder.iterdir()):
            if each.suffix == ".py" and not each.stem.startswith("__"):
                yield each.stem
            elif (each / "__init__.py").is_file():
                yield each.name


@pytest.mark.parametrize("module", list(modules()))
def test_every_module_is_named(module):
    """In the table of what is where; packages of adapters, tests and commands as a whole."""
    table = "\n".join(re.findall(r"^\| .*", PAGE.partition("\n## One message")[0], re.MULTILINE))
    assert re.search(rf"(?<![\w.]){module}(?!\w)", table)

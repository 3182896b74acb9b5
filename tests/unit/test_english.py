"""Documentation, docstrings, log lines, errors and tests avoid the habits of translated English."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = [
    ROOT / "noxfile.py",
    *sorted((ROOT / "src" / "aio_pika_batch").rglob("*.py")),
    *sorted((ROOT / "examples").rglob("*.py")),
    *sorted((ROOT / "benchmarks").rglob("*.py")),
    *sorted((ROOT / "deploy").rglob("*.py")),
    *sorted((ROOT / "docs").rglob("*.py")),
    *sorted(each for each in (ROOT / "tests").rglob("*.py") if each != Path(__file__)),
]
CONFIGURATION = [
    ROOT / "pyproject.toml",
    ROOT / ".ci" / "run",
    *sorted((ROOT / ".github").rglob("*.yml")),
    *sorted(
        each
        for each in (ROOT / "deploy").rglob("*")
        if each.suffix in {".yaml", ".conf", ".json"} or each.name == "Dockerfile"
    ),
]
"""Files whose comments, descriptions and alerts are read, too."""

PAGES = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "SECURITY.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "docs" / "howto").glob("*.md")),
    *sorted((ROOT / "docs" / "examples").glob("*.md")),
    *sorted((ROOT / "examples").rglob("README.md")),
]

HABITS = {
    "must, should or will": r"\bshall\b",
    "anyone who, or name who it is": r"\bwho(ever|soever)\b",
    "isn't": r"(?<!there )\b(is|are|was|were) no (?!longer\b|more\b|fewer\b|other\b)",
    "messages that don't …": r"\bwhat (is|are) (no|not)\b",
    "says, reports, is notified": r"\b(is|are|was|were|be|been) told\b|\btells? of\b",
    "received": r"\bheard\b",
    "unsettled, or being handled": r"\bin hand\b|\bin the hands\b",
    "expected, or wanted": r"\b(is|are|was|were) meant\b",
    "checked against": r"\bheld to (the|it|its|what|this)\b",
    "correct it": r"\bmend(s|ed|ing)?\b",
    "what to do, fix": r"\bcures?\b",
    "until": r"\bso long as\b",
    "this many, or the number": r"\bso many\b(?! that)",
    "a free slot": r"\bhands? (is|are) free\b|\bfree hand\b",
    "the name of who it is": r"\b(no|some|every|any)body\b",
    "again, or from 0": r"\banew\b",
    "is": r"\bstands? (on|in the|beside|there)\b",
    "what happened to": r"\b(became|becomes|become) of\b",
    "returned, reported": r"\bsaid\b",
    "the field's word": r"\b(waiting room|settle desk|roster|innocents?|culprits?|deput(y|ies))\b",
    "no aphorisms": r"three in the morning|well\?$",
}
"""Each habit, named by what to write instead."""

PUBLIC = {"in_hand"}
"""Names that users know."""

FIGURES = r"(?s)<!-- (\w+): begin -->.*?<!-- \1: end -->"
"""What programs write into a page."""

LONGEST = 45
"""Words in a sentence; about twenty is the aim."""


def prose(page: Path) -> Iterator[tuple[int, str, bool]]:
    """Line and text of each paragraph, list item and table cell, and whether it is a cell."""
    text = page.read_text()
    for left_out in (FIGURES, r"(?ms)^```.*?^```$", r"(?s)<!--.*?-->"):
        text = re.sub(left_out, lambda found: "\n" * found[0].count("\n"), text)
    text = re.sub(r"`[^`]*`", "code", text)
    text = re.sub(r"\]\([^)]*\)", "]", text)
    line = 1
    for block in re.split(r"(\n(?:\s*\n|(?=[-|#>] )|(?=\d+\. )|(?=  - )))", text):
        if block.strip():
            is_row = block.strip().startswith("|")
            for cell in block.strip().strip("|").split(" | ") if is_row else [block]:
                yield line, " ".join(cell.split()), is_row
        line += block.count("\n")


def texts(source: Path) -> Iterator[tuple[int, str, bool]]:
    """Line and text of each name, docstring, comment, log line, error and help text of a module."""
    content = source.read_text()
    for node in ast.walk(ast.parse(content)):
        if (
            isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            and node.name not in PUBLIC
        ):
            yield node.lineno, node.name.replace("_", " "), False
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            yield node.lineno, " ".join(re.sub(r"`[^`]*`", "code", node.value).split()), False
        if isinstance(node, ast.JoinedStr):
            parts = [p.value if isinstance(p, ast.Constant) else "code" for p in node.values]
            yield node.lineno, " ".join("".join(map(str, parts)).split()), False
    for number, line in enumerate(content.splitlines(), 1):
        comment = re.search(r"(?:^|\s)# (?!noqa|type:|pragma)(.*)", line)
        if comment:
            yield number, comment[1], False


PLACES = [
    *((page, line, text) for page in PAGES for line, text, _ in prose(page)),
    *((source, line, text) for source in SOURCES for line, text, _ in texts(source)),
    *(
        (file, number, line)
        for file in CONFIGURATION
        for number, line in enumerate(file.read_text().splitlines(), 1)
    ),
]
"""File, line and text of everything that is read."""


@pytest.mark.parametrize(("instead", "habit"), HABITS.items(), ids=HABITS)
def test_habits_of_translated_english_are_gone(instead: str, habit: str) -> None:
    """In every page, name, docstring, comment, log line and error; the id says what to write."""
    pattern = re.compile(habit, re.IGNORECASE)
    found = [
        f"{path.relative_to(ROOT)}:{line}: {text[max(0, m.start() - 40) : m.end() + 40]}"
        for path, line, text in PLACES
        for m in pattern.finditer(text)
    ]
    assert not found, "\n".join([f"write instead: {instead}", *found])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_sentences_can_be_read_once(page: Path) -> None:
    """None is longer than `LONGEST` words or has more than one semicolon."""
    found = [
        f"{page.name}:{line}: {sentence}"
        for line, text, is_cell in prose(page)
        for sentence in re.split(r"(?<=[.!?:])\s", text)
        if len(sentence.split()) > LONGEST or (sentence.count(";") > 1 and not is_cell)
    ]
    assert not found, "\n".join(found)


def test_a_habit_that_is_put_back_is_found(tmp_path: Path) -> None:
    """In prose, in a table, in a docstring, in a comment, in a log line and in a name."""
    page, source = tmp_path / "page.md", tmp_path / "source.py"
    page.write_text(
        "A body that\nis no JSON.\n\n| a | what is no answer |\n\n```\nis no code\n```\n"
    )
    source.write_text(
        'def f():\n    """Is no JSON."""\n    log(f"{f} is no JSON")\n    # is no JSON\n'
        "def test_it_is_no_json(): ...\n"
    )
    habit = re.compile(HABITS["isn't"], re.IGNORECASE)
    assert [1, 4] == [line for line, text, _ in prose(page) if habit.search(text)]
    assert {2, 3, 4, 5} == {line for line, text, _ in texts(source) if habit.search(text)}

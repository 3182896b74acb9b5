"""The tests of docs/testing.md and the README run with each test runner that they name."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "testing.md").read_text()


def block(comment):
    """Return the block of Python after a comment."""
    [found] = re.findall(
        rf"^<!-- test: {comment} -->\n```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL
    )
    return found


def ran(folder, *arguments):
    """Run Python with these arguments; return what it printed."""
    # Measuring coverage would take as long again, and these tests are about pages.
    untraced = {name: value for name, value in os.environ.items() if "COVERAGE" not in name}
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=folder,
        env=untraced,
        capture_output=True,
        text=True,
        check=False,
    )
    assert 0 == done.returncode, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def importer():
    """The first tests of the page."""
    return block("name importer")


def test_pytest_asyncio(tmp_path, importer):
    """With the mode that the page shows."""
    [configuration] = re.findall(r"^```\n(\[tool.pytest.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    (tmp_path / "pyproject.toml").write_text(configuration)
    (tmp_path / "test_orders.py").write_text(importer)
    plugins = ("-p", "no:cacheprovider", "-p", "no:anyio")
    assert "2 passed" in ran(tmp_path, "pytest", "-q", *plugins)


def test_the_readme_with_pytest_asyncio(tmp_path):
    """With no configuration but what the README says."""
    readme = (ROOT / "README.md").read_text()
    consumer, test = re.findall(r"^```python\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL)
    [mode] = re.findall(r'`(asyncio_mode = "\w+")`', readme)
    (tmp_path / "pyproject.toml").write_text(f"[tool.pytest.ini_options]\n{mode}\n")
    (tmp_path / "test_orders.py").write_text(consumer + test)
    plugins = ("-p", "no:cacheprovider", "-p", "no:anyio")
    assert "1 passed" in ran(tmp_path, "pytest", "-q", *plugins)


def test_anyio(tmp_path, importer):
    """By the lines that the page adds."""
    source = importer + block("continues importer; file test_with_anyio.py")
    (tmp_path / "test_orders.py").write_text(source)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    plugins = ("-p", "no:cacheprovider", "-p", "no:asyncio")
    assert "2 passed" in ran(tmp_path, "pytest", "-q", *plugins)


def test_unittest(tmp_path, importer):
    """It runs what is in the class."""
    source = importer + block("continues importer; file test_with_unittest.py")
    (tmp_path / "test_orders.py").write_text(source)
    assert "Ran 1 test" in ran(tmp_path, "unittest")

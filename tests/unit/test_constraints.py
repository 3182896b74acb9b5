"""The files in `constraints` name a version for everything that sessions install.

`nox -s lock` writes them.
"""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT, GROUPS = PYPROJECT["project"], PYPROJECT["dependency-groups"]
USED = [
    *PYPROJECT["build-system"]["requires"],
    *PROJECT["dependencies"],
    *(each for extra in PROJECT["optional-dependencies"].values() for each in extra),
    *GROUPS["test"],
    *GROUPS["brokers"],
]
PINNED = [
    *USED,
    *(each for name in ("proton", "lint", "docs", "dev", "release") for each in GROUPS[name]),
]


def versions(file: str) -> dict[str, list[Version]]:
    """The versions of each package; there are several where they depend on the environment."""
    found: dict[str, list[Version]] = {}
    for line in (ROOT / "constraints" / file).read_text().splitlines():
        requirement = Requirement(line)
        [pin] = requirement.specifier
        assert "==" == pin.operator
        found.setdefault(canonicalize_name(requirement.name), []).append(Version(pin.version))
    return found


@pytest.mark.parametrize("wanted", sorted(set(PINNED)))
def test_every_requirement_is_pinned(wanted: str) -> None:
    """To a version that it allows."""
    requirement = Requirement(wanted)
    pins = versions("pinned.txt")[canonicalize_name(requirement.name)]
    assert all(requirement.specifier.contains(each) for each in pins)


@pytest.mark.parametrize("wanted", sorted(set(USED)))
def test_the_lowest_version_is_the_lower_bound(wanted: str) -> None:
    """So each bound is a version that exists, and that the session `lowest` has run on."""
    requirement = Requirement(wanted)
    pins = versions("lowest.txt")[canonicalize_name(requirement.name)]
    bounds = [Version(each.version) for each in requirement.specifier if ">=" == each.operator]
    assert bounds[:1] == [min(pins)] or not bounds


@pytest.mark.parametrize("file", ["pinned.txt", "lowest.txt"])
def test_a_constraint_names_no_place(file: str) -> None:
    """The machine's own configuration of pip decides where packages come from."""
    assert "/" not in (ROOT / "constraints" / file).read_text()

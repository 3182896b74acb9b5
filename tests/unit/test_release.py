"""Tests of what is published: distributions, their metadata, and the workflows that build them."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email import message_from_bytes
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))

VERSION = "1.2.3"
EPOCH = "1700000000"
REPOSITORY = PROJECT["urls"]["Repository"]
FILES, PICTURES = (
    f"{REPOSITORY}/blob/v{VERSION}/",
    f"{REPOSITORY.replace('github.com', 'raw.githubusercontent.com')}/v{VERSION}/",
)


# --- distributions ----------------------------------------------------------------------


def build(folder: Path, *, mode: int, modified: int, **environment: str) -> dict[str, bytes]:
    """Build both distributions from a copy of the checkout; return their contents by name."""
    checkout = folder / "checkout"
    checkout.mkdir(parents=True)
    included = PYPROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    for name in (*(each.lstrip("/") for each in included), "pyproject.toml", ".gitignore"):
        here = ROOT / name
        if here.is_dir():
            shutil.copytree(here, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(here, checkout / name)
    for each in checkout.rglob("*"):
        if each.is_file():
            each.chmod(mode)
            os.utime(each, (modified, modified))
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "--directory", "made"],
        cwd=checkout,
        env={
            **os.environ,
            "SETUPTOOLS_SCM_PRETEND_VERSION": VERSION,
            "SOURCE_DATE_EPOCH": EPOCH,
            **environment,
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert 0 == done.returncode, done.stdout + done.stderr
    return {each.name: each.read_bytes() for each in sorted((checkout / "made").iterdir())}


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> dict[str, bytes]:
    """Both distributions."""
    return build(tmp_path_factory.mktemp("first"), mode=0o644, modified=1_600_000_000)


def test_two_builds_are_equal_byte_for_byte(built, tmp_path):
    """On another machine, on another day, for another user."""
    again = build(
        tmp_path / "elsewhere",
        mode=0o600,
        modified=1_750_000_000,
        PYTHONHASHSEED="7",
        TZ="Asia/Kathmandu",
        LC_ALL="C",
    )

    assert [f"aio_pika_batch-{VERSION}-py3-none-any.whl", f"aio_pika_batch-{VERSION}.tar.gz"] == [
        *built
    ]
    assert built == again


def metadata(built: dict[str, bytes], folder: Path):
    """The metadata of the wheel."""
    [name] = (each for each in built if each.endswith(".whl"))
    file = folder / name
    file.write_bytes(built[name])
    with zipfile.ZipFile(file) as wheel:
        return message_from_bytes(wheel.read(f"aio_pika_batch-{VERSION}.dist-info/METADATA"))


def test_links_of_the_readme_work_on_the_package_index(built, tmp_path):
    """Each leads to a file of the repository at the tag of the release, and pictures are raw."""
    text = metadata(built, tmp_path).get_payload(decode=True).decode()
    links = re.findall(r"(!?)\[[^\]]*\]\(([^)\s]+)\)", text)

    assert len(links) == len(
        re.findall(r"\[[^\]]*\]\([^)\s]+\)", (ROOT / "README.md").read_text("utf-8"))
    )
    for is_picture, url in links:
        if not url.startswith((FILES, PICTURES)):
            assert re.match(r"https?://|#", url), url
            continue
        assert url.startswith(PICTURES if is_picture else FILES)
        path = url.removeprefix(PICTURES).removeprefix(FILES).partition("#")[0]
        assert (ROOT / path).exists(), url


def test_the_project_says_where_it_is_found(built, tmp_path):
    """The package index shows these links beside the README."""
    urls = dict(each.split(", ") for each in metadata(built, tmp_path).get_all("Project-URL"))

    assert PROJECT["urls"] == urls
    assert {"Changelog", "Documentation", "Issues", "Repository"} == set(urls)
    assert all(each.startswith(REPOSITORY) for each in urls.values())
    for url in urls.values():
        path = url.removeprefix(REPOSITORY).removeprefix("/blob/main/")
        assert path in {"", "/issues"} or (ROOT / path).is_file(), url


# --- what is imported -------------------------------------------------------------------


def imported(folder: Path) -> dict[str, str]:
    """Return the packages that the modules of a folder import, each with one of the modules."""
    found: dict[str, str] = {}
    for file in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            match node:
                case ast.Import():
                    names = [each.name for each in node.names]
                case ast.ImportFrom(level=0):
                    names = [str(node.module)]
                case _:
                    continue
            for name in names:
                found.setdefault(name.partition(".")[0], str(file.relative_to(ROOT)))
    own = {"aio_pika_batch", *sys.stdlib_module_names}
    return {name: file for name, file in found.items() if name not in own}


def test_every_package_that_the_library_imports_is_declared():
    """As a dependency, or by an extra: what comes with another package may leave with it."""
    extras = [each for extra in PROJECT["optional-dependencies"].values() for each in extra]
    declared = {
        canonicalize_name(Requirement(each).name) for each in [*PROJECT["dependencies"], *extras]
    }
    distributions = packages_distributions()
    undeclared = {
        name: file
        for name, file in imported(ROOT / "src").items()
        if not declared & {canonicalize_name(each) for each in distributions.get(name, [name])}
    }

    assert {} == undeclared


# --- workflows --------------------------------------------------------------------------


def steps(workflow: Path) -> list[dict]:
    """All steps of all jobs."""
    jobs = yaml.safe_load(workflow.read_text())["jobs"]
    return [step for job in jobs.values() for step in job["steps"]]


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda each: each.stem)
def test_actions_are_pinned_by_their_commit(workflow):
    """A tag can be moved; a comment beside the commit names the version."""
    lines = [line.strip() for line in workflow.read_text().splitlines() if "uses:" in line]
    pinned = r"- uses: [\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+"

    assert lines
    assert [] == [line for line in lines if not re.fullmatch(pinned, line)]


def test_an_action_has_one_version_everywhere():
    """So that an update of one workflow does not forget the other."""
    uses = {
        tuple(line.split("uses: ")[1].split("@"))
        for workflow in WORKFLOWS
        for line in workflow.read_text().splitlines()
        if "uses:" in line
    }

    assert len(uses) == len({name for name, _ in uses})


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda each: each.stem)
def test_a_checkout_keeps_no_credentials(workflow):
    """Nor does a workflow have more rights than it needs."""
    checkouts = [
        step for step in steps(workflow) if step.get("uses", "").startswith("actions/checkout@")
    ]

    assert checkouts
    assert all(step["with"]["persist-credentials"] is False for step in checkouts)
    assert {"contents": "read"} == yaml.safe_load(workflow.read_text())["permissions"]

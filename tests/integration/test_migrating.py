"""Each row of docs/migrating.md about 0.1.0, tried with this version and with the published 0.1.0.

0.1.0 runs in an environment of its own: `AIO_PIKA_BATCH_TEST_OLD` names its Python. Without it, the
environment is made if a Python of 3.12 or newer and the package index can be reached.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.helpers import PATIENCE

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "migrating.md").read_text()
PROGRAM = Path(__file__).with_name("apps") / "migrating.py"

# The beginning of each row, what its case prints with 0.1.0 and now, and with a remedy of the row.
ROWS = (
    ("`start()` returns after", "start_returns", False, True),
    ("`async with` begins before", "a_block", False, True),
    ("settings read `QUEUE_NAME`", "variables", "old", "new"),
    ("invalid settings", "a_missing_setting", "ValidationError", "ConfigurationError"),
    ("each worker makes", "instances", 3, 1),
    ("all workers share one connection", "connections", 1, 3),
    (
        "messages are aio-pika's",
        "a_message",
        ["ack", "nack", "reject", "process", "channel", "body_size"],
        [],
    ),
    ("the log is structlog's", "the_log", ["structlog", True], ["aio_pika_batch", False]),
    (
        "modules are",
        "modules",
        ["batch_consumer", "consumer", "result", "retry", "settings", "worker"],
        ["consumer", "settings"],
    ),
    ("dead letters have", "a_dead_letter", ["x-death"], ["x-dead-letter-reason"]),
    ("a retry follows at once", "a_retry", [False, None], [True, "guest"]),
    ("a retry loses its `user_id`", "a_retry", [False, None], [True, "guest"]),
    ("`prefetch_count` is 10", "full_batches", 10, 30),
    ("without a dead-letter exchange", "no_attempts_left", 0, 1),
    ("a message without a result", "a_missing_result", 1, 2),
    ("a superfluous result", "a_result_too_many", False, True),
    ("`on_stop` runs twice", "hooks", 2, 1),
    ("`stop()` cancels the handler", "a_batch_at_the_stop", 3, 0),
    ("if the broker refuses", "a_refusal", None, "TopologyError"),
    ("`is_healthy` stays true", "health", True, False),
    ("queues have the arguments", "joins", True, True),  # see the last test
)
REMEDIES = (
    ("variables", {"env_prefix": ""}, "old"),
    ("a_retry", {"requeue_delay": 0}, [False, "guest"]),
    ("full_batches", {"prefetch_count": 10}, 10),
    ("no_attempts_left", {"without_dead_letter": "reject"}, 0),
)


def make_old(folder: Path) -> str | None:
    """Install 0.1.0 into a new environment; return its Python, or None if that isn't possible."""
    pythons = [sys.executable]
    if sys.version_info < (3, 12):
        newer = [f"python3.{minor}" for minor in (12, 13, 14)]
        pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
        pythons = [*filter(shutil.which, newer), *map(str, pyenv.glob("3.1[2-9]*/bin/python"))]
    for python in pythons:
        made = subprocess.run([python, "-m", "venv", folder], capture_output=True, check=False)
        if made.returncode:
            continue  # for example a shim of pyenv's
        old = str(folder / "bin" / "python")
        command = [old, "-m", "pip", "install", "-q", "aio-pika-batch==0.1.0"]
        if not subprocess.run(command, capture_output=True, check=False).returncode:
            return old
    return None


@pytest.fixture(scope="session")
def old(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The Python that has 0.1.0."""
    found = os.environ.get("AIO_PIKA_BATCH_TEST_OLD") or make_old(tmp_path_factory.mktemp("old"))
    if found is None:
        pytest.skip("0.1.0 can't be installed: it needs Python 3.12 and the package index")
    return found


def run(python: str, url: str, name: str, case: str, **given: object) -> object:
    """Run a case; return what it prints."""
    command = [python, "-W", "ignore", str(PROGRAM), url, name, case, json.dumps(given)]
    kept = {key: value for key, value in os.environ.items() if not key.startswith("AIO_PIKA_")}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=2 * PATIENCE, env=kept, check=False
    )
    assert 0 == done.returncode, done.stdout + done.stderr
    found: object = json.loads(done.stdout.splitlines()[-1])
    return found


def test_each_row_has_a_case() -> None:
    """In the same order."""
    section = PAGE.partition("## From aio-pika-batch 0.1.0")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (.*?) \|", section, re.MULTILINE)[2:]
    assert len(ROWS) == len(rows)
    for row, (begin, *_) in zip(rows, ROWS, strict=True):
        assert row.startswith(begin)


CASES = list({case: (before, now) for _, case, before, now in ROWS}.items())


@pytest.mark.long
@pytest.mark.parametrize(("case", "expected"), CASES, ids=[case for case, _ in CASES])
def test_now(amqp_url: str, name: str, case: str, expected: tuple[object, object]) -> None:
    """The second column."""
    assert expected[1] == run(sys.executable, amqp_url, name, case)


@pytest.mark.long
@pytest.mark.parametrize(("case", "expected"), CASES, ids=[case for case, _ in CASES])
def test_before(
    amqp_url: str, name: str, old: str, case: str, expected: tuple[object, object]
) -> None:
    """The first column."""
    assert expected[0] == run(old, amqp_url, name, case)


@pytest.mark.long
@pytest.mark.parametrize(("case", "given", "expected"), REMEDIES)
def test_what_to_do(
    amqp_url: str, name: str, case: str, given: dict[str, object], expected: object
) -> None:
    """Where the third column names a setting, it is as before."""
    assert expected == run(sys.executable, amqp_url, name, case, **given)


@pytest.mark.long
@pytest.mark.parametrize("is_apart", [False, True])
def test_a_queue_that_both_consume(amqp_url: str, name: str, old: str, is_apart: bool) -> None:
    """0.1.0 can't declare a new queue that this version made with dead-letter arguments."""
    given: dict[str, object] = {"dead_letter_queue": f"{name}.dead"}
    if is_apart:
        given["broker_dead_letters"] = False
    assert run(sys.executable, amqp_url, name, "joins", **given)
    assert is_apart is run(old, amqp_url, name, "joins")


@pytest.mark.long
def test_a_queue_of_the_old_version_is_used(amqp_url: str, name: str, old: str) -> None:
    """With dead-letter settings, too."""
    assert run(old, amqp_url, name, "joins")
    assert run(sys.executable, amqp_url, name, "joins", dead_letter_queue=f"{name}.dead")

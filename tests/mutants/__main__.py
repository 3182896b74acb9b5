"""Runs the tests against each mutant: ``python -m tests.mutants [WORD …]``, or `nox -s mutants`.

A mutant that no test kills is a failure, and so is one whose quote is out of date. With words, only
mutants whose file or trap contains one of them run. Mutants without a broker come first, and two
run at a time.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from tests.mutants.mutant import Mutant
from tests.mutants.table import TABLE
from tests.support.find import choose

_ROOT = Path(__file__).parents[2]
_SOURCE = _ROOT / "src"
_OPTIONS = ("-p", "no:cacheprovider", "--hypothesis-profile=mutants")
_AT_ONCE = 2
_FAILED = 1  # pytest's exit code for "some tests failed"


def main(words: Sequence[str]) -> int:
    """Run the selected mutants; return how many survived."""
    wanted = [
        each
        for each in TABLE
        if not words or any(word in f"{each.file} {each.trap}" for word in words)
    ]
    survivors = 0
    with ExitStack() as stack:
        environment = dict(os.environ)
        if any(each.needs_broker for each in wanted):
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            broker = stack.enter_context(choose().start(folder))
            environment["AIO_PIKA_BATCH_TEST_URL"] = broker.url
        wanted.sort(key=lambda mutant: mutant.needs_broker)
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            verdicts = pool.map(partial(_try, environment=environment), wanted)
            for mutant, verdict in zip(wanted, verdicts, strict=True):
                survivors += verdict != "killed"
                print(f"{verdict:12} {mutant.file}: {mutant.trap}", flush=True)
    print(f"\n{len(wanted) - survivors} killed, {survivors} not")
    return survivors


def _try(mutant: Mutant, environment: Mapping[str, str]) -> str:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "src"
        shutil.copytree(_SOURCE, source, ignore=shutil.ignore_patterns("__pycache__"))
        file = source / "aio_pika_batch" / mutant.file
        text = file.read_text()
        if text.count(mutant.was) != 1:
            return "OUT OF DATE"
        file.write_text(text.replace(mutant.was, mutant.becomes))
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-x", *_OPTIONS, *mutant.tests],
            cwd=_ROOT,
            env={**environment, "PYTHONPATH": str(source)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
    if done.returncode == _FAILED:
        return "killed"
    return "SURVIVED" if done.returncode == 0 else f"BROKEN ({done.returncode}):\n{done.stdout}"


if __name__ == "__main__":
    sys.exit(min(1, main(sys.argv[1:])))

"""Runs the suite and writes its figures: ``python -m tests.faults [ARGUMENT …]``, or `nox -s
faults`.

Arguments go to pytest: a run of some tests replaces their figures and keeps the others. The page is
written whatever the result is, since an older figure must not hide a loss. With ``--page`` alone no
test runs, and the page is written from the stored figures.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.faults.figures import FILE, ROOT, VARIABLE, load
from tests.faults.report import write


def main(arguments: Sequence[str]) -> int:
    """Return pytest's exit code."""
    if list(arguments) == ["--page"]:
        write(load(FILE))
        return 0
    chosen = any(Path(each.partition("::")[0]).exists() for each in arguments)
    what = arguments if chosen else [str(Path(__file__).parent), *arguments]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *what],
        cwd=ROOT,
        env={**os.environ, VARIABLE: str(FILE)},
        check=False,
    )
    write(load(FILE))
    return done.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Run the suite and tell its figures: ``python -m tests.faults [ARGUMENT …]``, or `nox -s faults`.

Arguments go to pytest: a few tests replace the figures of these, and leave the others. The page is
written whatever the tests said: one that found a loss must not be hidden by an older figure. With
``--page`` alone nothing is run, and the page is written from what is kept.
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
    """Return what pytest returned."""
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

"""Runs the benchmarks: ``python benchmarks/run.py [--quick] [--only SECTION|CASE …] [--rounds N]``.

Starts a broker of its own, makes environments for the competitors, measures them in turn, and
writes ``docs/performance.md`` with its charts. A run of only some cases writes below
``.cache/bench/report`` instead. Measurements are saved at once, so that a run that was interrupted
can be shown too: ``--show FILE [FILE …]``.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # not this folder: packages are imported as anywhere else

from benchmarks import environments  # noqa: E402  -- after the path is right


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="few messages, one round: does it run?"
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="sections or cases")
    parser.add_argument("--rounds", type=int, help="instead of 5, 3 or 1, as plan.py has it")
    parser.add_argument("--messages", type=int, help="maximum number of messages in a measurement")
    parser.add_argument("--python", help="what the competitors run on; 3.12 suits all")
    parser.add_argument("--anew", action="store_true", help="make all environments again")
    parser.add_argument(
        "--show",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="only write what FILE has, and later runs of some of its sections",
    )
    parser.add_argument("--to", type=Path, metavar="FOLDER", help="where to write it")
    parser.add_argument("--list", action="store_true", help="only tell what there is")
    return parser.parse_args()


def move_in(interpreter: str, *, anew: bool) -> None:
    """Continue in the main environment, which has all that this program needs."""
    if Path(sys.prefix).resolve() == (environments.FOLDER / environments.MAIN).resolve():
        return
    environments.make(environments.MAIN, interpreter, anew=anew)
    environments.take_ourselves()
    home = str(environments.python(environments.MAIN))
    os.execv(home, [home, str(Path(__file__).resolve()), *sys.argv[1:], "--python", interpreter])  # noqa: S606  -- ourselves


def main() -> None:
    """Measure, or show what was measured."""
    asked = arguments()
    interpreter = asked.python or environments.best_interpreter()
    move_in(interpreter, anew=asked.anew)

    from benchmarks import report, series

    if asked.show:
        kept = series.load(*asked.show)
        report.write(kept, asked.to or environments.FOLDER / "report")
        return
    wanted = series.choose(asked.only, quick=asked.quick, most=asked.messages)
    if asked.list:
        for section, cases in wanted.items():
            print(section, *(case.key for case in cases), sep="\n  ")
        return
    file = environments.FOLDER / f"run-{time.strftime('%Y%m%d-%H%M%S')}.jsonl"
    rounds = asked.rounds or (1 if asked.quick else None)
    kept = series.run(wanted, rounds, interpreter, file, anew=asked.anew)
    is_whole = not (asked.quick or asked.only or asked.messages)
    folder = asked.to or (ROOT / "docs" if is_whole else environments.FOLDER / "report")
    report.write(kept, folder)
    print(f"\nkept in {file.relative_to(ROOT)}; written to {folder}", file=sys.stderr)


if __name__ == "__main__":
    main()

"""Compare this revision with another one: ``python -m benchmarks.guard REVISION``.

Both run in turn on one broker, pair after pair, with the order reversed in each second pair. A case
fails if the lower 95 % bound of its ratio of CPU per message is above 1.02: then it has certainly
become more expensive. `nox -s guard -- REVISION` runs it; use it before each release.
"""

from __future__ import annotations

import argparse
import math
import statistics
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks import broker, environments
from benchmarks.figures import cpu
from benchmarks.fill import Filler, connected
from benchmarks.measure import Case, Failed, measure
from benchmarks.plan_ours import MEDIUM, SLOW, ours

LIMIT = 1.02
"""A ratio whose lower bound is above this is a failure."""

STUDENT = {5: 2.776, 7: 2.447, 9: 2.306, 15: 2.145, 21: 2.086}
"""Student's t for a two-sided interval of 95 %, by the number of pairs."""

YIELD, HALVES = {"settle": "yield"}, {"isolate_failures": True}
ORDERED = {"ordered_by_key": True}

CASES = [
    ours("guard.default", "defaults", messages=MEDIUM, options={"defaults": True}),
    ours("guard.ack", "all acked", messages=MEDIUM),
    ours("guard.single", "`Consumer`", messages=SLOW, module="ours_single"),
    ours("guard.requeue", "all REQUEUE", "requeue", SLOW),
    ours("guard.dead", "10 % NACK, dead-lettered", "reject", SLOW, options={"dead": True}),
    ours("guard.yield", 'settle="yield"', messages=MEDIUM, options=YIELD),
    ours("guard.isolate", "isolate_failures", messages=MEDIUM, options=HALVES),
    ours("guard.keys", "batch_key", "keys", MEDIUM),
    ours("guard.ordered", "ordered_by_key", "keys", MEDIUM, options=ORDERED),
    ours("guard.publish", "`publish_many`", "many", MEDIUM, module="ours_publish", fill=False),
]


@dataclass(frozen=True, slots=True)
class Comparison:
    """The ratio of CPU per message, new to old, and its interval of 95 %."""

    ratio: float
    low: float
    high: float

    @property
    def is_worse(self) -> bool:
        """Whether the new revision is certainly more expensive."""
        return self.low > LIMIT


def compare(old: Sequence[float], new: Sequence[float]) -> Comparison:
    """Compare pairs of measurements; the number of pairs is one of `STUDENT`."""
    logs = [math.log(after / before) for before, after in zip(old, new, strict=True)]
    mean = statistics.mean(logs)
    spread = STUDENT[len(logs)] * statistics.stdev(logs) / math.sqrt(len(logs))
    return Comparison(math.exp(mean), math.exp(mean - spread), math.exp(mean + spread))


def check_out(revision: str) -> Path:
    """Put the sources of a revision below ``.cache/bench``, and return their folder."""
    folder = environments.FOLDER / "guard" / revision.replace("/", "-")
    folder.mkdir(parents=True, exist_ok=True)
    archive = folder / "src.tar"
    command = ["git", "archive", "--output", str(archive), revision, "src"]
    subprocess.run(command, cwd=environments.ROOT, check=True)  # noqa: S603  -- our own arguments
    with tarfile.open(archive) as files:
        files.extractall(folder, filter="data")
    return folder / "src"


def measure_pairs(
    case: Case, sources: tuple[Path, Path], pairs: int, filler: Filler, url: str
) -> Comparison:
    """Measure both revisions in turn."""
    seen: dict[Path, list[float]] = {source: [] for source in sources}
    for number in range(pairs):
        for source in sources if number % 2 == 0 else sources[::-1]:
            seen[source].append(cpu(measure(replace(case, source=source), filler, url, {})))
    return compare(seen[sources[0]], seen[sources[1]])


def main() -> int:
    """Compare the revisions; return how many cases have become more expensive."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("revision", help="what to compare with, such as the tag of a release")
    parser.add_argument("--pairs", type=int, choices=sorted(STUDENT), default=9)
    parser.add_argument("--only", nargs="+", default=[], metavar="CASE")
    parser.add_argument("--messages", type=int, help="maximum number of messages in a measurement")
    asked = parser.parse_args()
    environments.make(environments.MAIN, environments.best_interpreter())
    sources = check_out(asked.revision), environments.ROOT / "src"
    worse = 0
    with broker.running() as running, connected(running.url) as filler:
        for case in CASES:
            if asked.only and not any(word in case.key for word in asked.only):
                continue
            smaller = case.smaller(asked.messages) if asked.messages else case
            try:
                found = measure_pairs(smaller, sources, asked.pairs, filler, running.url)
            except Failed as failure:
                # An older revision may not have what the case needs.
                print(f"{case.key:16} not measured: {failure}", flush=True)
                continue
            worse += found.is_worse
            verdict = "WORSE" if found.is_worse else "ok"
            interval = f"[{found.low:.3f}, {found.high:.3f}]"
            print(f"{case.key:16} {found.ratio:.3f} {interval} {verdict}", flush=True)
    return worse


if __name__ == "__main__":
    sys.exit(main())

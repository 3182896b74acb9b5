"""Runs all sections: each has several rounds, and a round measures each case once.

Each measurement is saved at once as a line of JSON. The first line describes the machine.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from aio_pika_batch import BatchConsumerSettings
from benchmarks import broker, environments, machine, plan
from benchmarks.figures import cpu, rate
from benchmarks.fill import connected
from benchmarks.measure import Case, Failed, measure
from benchmarks.protocol import Reading

QUICK = 3000
Sections = Mapping[str, Sequence[Case]]


@dataclass(kw_only=True)
class Kept:
    """What was measured.

    Attributes:
        readings: By case and round.
        errors: By case, what went wrong, each once.
    """

    machine: dict[str, str]
    readings: dict[str, dict[int, Reading]] = field(default_factory=dict)
    errors: dict[str, list[str]] = field(default_factory=dict)

    def take(self, line: Mapping[str, object]) -> None:
        """Add a line of the file."""
        key, number = str(line["case"]), int(str(line["round"]))
        if (error := line.get("error")) is not None:
            told = self.errors.setdefault(key, [])
            if error not in told:
                told.append(str(error))
            return
        reading = line["reading"]
        if isinstance(reading, Mapping):
            self.readings.setdefault(key, {})[number] = Reading(**reading)


def all_sections() -> Sections:
    """Return the whole plan, as far as this revision of the library supports it."""
    return plan.sections(has_wire="wire" in BatchConsumerSettings.model_fields)


def choose(names: Sequence[str], *, quick: bool, most: int | None) -> Sections:
    """Return the sections and cases of these names, or all of them."""
    wanted: dict[str, Sequence[Case]] = {}
    known = set()
    for section, cases in all_sections().items():
        known |= {section, *(case.key for case in cases)}
        chosen = [case for case in cases if not names or {section, case.key} & set(names)]
        if chosen:
            wanted[section] = [_cut(case, most or (QUICK if quick else None)) for case in chosen]
    if unknown := set(names) - known:
        sys.exit(f"no section or case is named {', '.join(sorted(unknown))}: see --list")
    return wanted


def _cut(case: Case, most: int | None) -> Case:
    return case if most is None else case.smaller(most)


def run(wanted: Sections, rounds: int | None, interpreter: str, file: Path, *, anew: bool) -> Kept:
    """Measure everything."""
    load = machine.load()
    missing = _environments(wanted, interpreter, anew=anew)
    file.parent.mkdir(parents=True, exist_ok=True)
    with broker.running() as node, file.open("w") as lines:
        kept = Kept(machine=machine.describe(node.version, load))
        print(json.dumps({"machine": kept.machine}), file=lines, flush=True)
        for number, case in _in_turn(wanted, rounds):
            line: dict[str, object] = {"case": case.key, "round": number}
            try:
                with connected(node.url) as filler:
                    reading = measure(case, filler, node.url, missing)
            except (Failed, OSError, RuntimeError) as error:
                line["error"] = str(error)
                told = f"FAILED: {error}"
            else:
                line["reading"] = asdict(reading)
                told = _told(reading)
            print(f"{number} {case.key:24} {told}", file=sys.stderr, flush=True)
            print(json.dumps(line), file=lines, flush=True)
            kept.take(line)
    return kept


def _told(reading: Reading) -> str:
    peak = reading.peak_rss / 2**20
    return f"{cpu(reading):8.1f} µs {rate(reading):9,.0f}/s {peak:5.0f} MiB"


def load(file: Path, *later: Path) -> Kept:
    """Return what a run has saved, also one that was interrupted.

    Args:
        later: Later runs of some sections, which replace the earlier ones.
    """
    first, *rest = [json.loads(line) for line in file.read_text().splitlines()]
    kept = Kept(machine=first["machine"])
    for line in rest:
        kept.take(line)
    if later:
        _replace_sections(kept, load(*later))
    return kept


def _replace_sections(kept: Kept, anew: Kept) -> None:
    """Replace whole sections, because ratios need one run."""
    measured = anew.readings.keys() | anew.errors.keys()
    sections = {
        section: {case.key for case in cases}
        for section, cases in all_sections().items()
        if measured & {case.key for case in cases}
    }
    for key in set().union(*sections.values()):
        kept.readings.pop(key, None)
        kept.errors.pop(key, None)
    kept.readings |= anew.readings
    kept.errors |= anew.errors
    for name, value in anew.machine.items():
        if (before := kept.machine.get(name)) != value:
            kept.machine[name] = f"{before}; {', '.join(sections)}: {value}"


def _in_turn(wanted: Sections, rounds: int | None) -> Iterator[tuple[int, Case]]:
    """Yield the cases of each section, round after round; every second round backwards."""
    for section, cases in wanted.items():
        for number in range(1, (rounds or plan.ROUNDS[section]) + 1):
            for case in cases if number % 2 else reversed(cases):
                yield number, case


def _environments(wanted: Sections, interpreter: str, *, anew: bool) -> dict[str, str]:
    """Make the environments; return which could not be made, and why."""
    missing: dict[str, str] = {}
    needed = {case.environment for cases in wanted.values() for case in cases}
    for name in sorted(needed - {environments.MAIN}):
        try:
            environments.make(name, interpreter, anew=anew)
        except environments.EnvironmentFailed as error:
            missing[name] = f"could not be installed: {error}"
    return missing

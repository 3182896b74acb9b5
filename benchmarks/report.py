"""Writes the figures as Markdown between two marks of ``performance.md``, and as charts.

Text outside the marks is written by hand, and is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path

from benchmarks import chart, figures
from benchmarks.environments import ROOT
from benchmarks.figures import Goal, Rounds, Spread
from benchmarks.measure import Case
from benchmarks.series import Kept, all_sections

FILE = "performance.md"
LARGE = 16 * 1024
"""Bytes from which on it is the body that costs, and not the message."""
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"
HEADINGS = {
    "consume": "Consuming",
    "publish": "Publishing, confirmed",
    "requeue": "Requeueing, end to end",
    "amqp10": "Over AMQP 1.0",
    "variants": "This library beside itself",
    "growth": "As things grow",
    "memory": "Memory",
}
AGAINST = {"consume": "ours.ack", "publish": "ours.publish", "requeue": "ours.requeue"}
"""What ratios are of, in the sections that compare with others; each has its chart."""
GROWTH_CHARTS = {
    "growth": "As batch, prefetch and backlog grow: µs of CPU per message",
    "bodies": "As bodies grow: µs of CPU per KiB",
}


def write(kept: Kept, folder: Path) -> None:
    """Write the page and its charts into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / FILE
    source = page if page.exists() else ROOT / "docs" / FILE
    text = source.read_text() if source.exists() else f"{BEGIN}\n{END}\n"
    page.write_text(between_marks(text, render(kept)))
    sections = all_sections()
    charts = {
        section: (
            f"{HEADINGS[section]}: µs of CPU per message, less is better",
            sorted(_bars(kept, sections[section]), key=lambda bar: bar.value),
        )
        for section in AGAINST
    }
    bodies = [case for case in sections["growth"] if case.key.startswith("body-")]
    others = [case for case in sections["growth"] if case not in bodies]
    charts["growth"] = GROWTH_CHARTS["growth"], _bars(kept, others)
    large = [case for case in bodies if case.body >= LARGE]
    charts["bodies"] = GROWTH_CHARTS["bodies"], _bars(kept, large, per_kib=True)
    for name, (title, bars) in charts.items():
        if bars:
            (folder / f"performance-{name}.svg").write_text(chart.bars(title, bars))


def between_marks(text: str, new: str) -> str:
    """Replace what stands between the marks."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"the page has no place for the figures: {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{new.strip()}\n\n{END}{after}"


def render(kept: Kept) -> str:
    """Return all that was measured as Markdown."""
    parts = [machine_table(kept.machine, versions(kept))]
    goals = figures.the_bar(kept.readings)
    if any(goal.seen for goal in goals):
        parts += ["### The bar", goal_table(goals)]
    for section, cases in all_sections().items():
        if not any(case.key in kept.readings or case.key in kept.errors for case in cases):
            continue
        parts.append(f"### {HEADINGS[section]}")
        if section in AGAINST:
            parts.append(f"![{HEADINGS[section]}: CPU per message](performance-{section}.svg)")
        if section == "growth":
            charts = GROWTH_CHARTS.items()
            parts += [f"![{title}](performance-{name}.svg)" for name, title in charts]
        parts.append(table(kept, cases, AGAINST.get(section)))
    if failed := failures(kept):
        parts += ["### What failed", failed]
    return "\n\n".join(parts)


def versions(kept: Kept) -> dict[str, set[str]]:
    """Return the versions of what was measured."""
    found: dict[str, set[str]] = {}
    for rounds in kept.readings.values():
        for reading in rounds.values():
            for package, version in reading.versions.items():
                found.setdefault(package, set()).add(version)
    return found


def machine_table(machine: Mapping[str, str], packages: Mapping[str, set[str]]) -> str:
    """Return a table of the machine and the software."""
    used = ", ".join(f"{name} {' and '.join(sorted(packages[name]))}" for name in sorted(packages))
    return rows(["", ""], [*machine.items(), ("packages", used)])


def goal_table(goals: Sequence[Goal]) -> str:
    """Return a table of the goals, and whether they are reached."""
    verdicts = {True: "reached", False: "**missed**", None: "not measured"}
    return rows(
        ["goal", "wanted", "seen", ""],
        [
            (
                goal.text,
                f"{'≤' if goal.is_ceiling else '≥'} {form(goal)(goal.limit)}{goal.unit}",
                "–" if goal.seen is None else f"{told(goal.seen, form(goal))}{goal.unit}",
                verdicts[goal.is_reached],
            )
            for goal in goals
        ],
    )


def form(goal: Goal) -> Callable[[float | Fraction], str]:
    """Return how its numbers are written: as a fraction if the goal is one."""
    return part if isinstance(goal.limit, Fraction) else number


def table(kept: Kept, cases: Sequence[Case], against: str | None) -> str:
    """Return a row for each case that was tried."""
    base: Rounds = kept.readings.get(against or "", {})
    lines = []
    for case in cases:
        rounds = kept.readings.get(case.key, {})
        if not rounds:
            if case.key in kept.errors:
                lines.append((shown(case), "failed", "", "", "", *([""] if against else [])))
            continue
        measured = max(reading.messages for reading in rounds.values())
        cells = [
            shown(case),
            told(figures.cpu_of(rounds)),
            told(figures.rate_of(rounds), whole),
            told(figures.peak_of(rounds), whole, is_brief=True),
            f"{measured:,} × {len(rounds)}",
        ]
        if against:
            cells.append(told(figures.cpu_ratio(rounds, base), is_brief=True))
        lines.append(tuple(cells))
    heads = ["", "µs CPU per message", "messages/s", "peak MiB", "messages × rounds"]
    return rows([*heads, *(["× CPU of ours"] if against else [])], lines)


def failures(kept: Kept) -> str:
    """Return the errors, in their own words."""
    return "\n".join(f"- {key}: {'; '.join(errors)}" for key, errors in kept.errors.items())


def shown(case: Case) -> str:
    """Return a name, in bold if it is this library."""
    return f"**{case.name}**" if case.is_ours else case.name


def told(
    seen: Spread | None, form: Callable[[float], str] | None = None, *, is_brief: bool = False
) -> str:
    """Return a median, with its minimum and maximum in brackets."""
    if seen is None:
        return "–"
    write_number = form or number
    middle = write_number(seen.median)
    if is_brief or seen.low == seen.high:
        return middle
    return f"{middle} ({write_number(seen.low)}–{write_number(seen.high)})"


def number(value: float | Fraction) -> str:
    """Return a number with three significant digits."""
    if abs(value) >= 100:  # noqa: PLR2004
        return f"{value:,.0f}"
    if abs(value) >= 10:  # noqa: PLR2004
        return f"{value:.1f}"
    return f"{value:.2f}" if abs(value) >= 1 else f"{value:.3f}"


def part(value: float | Fraction) -> str:
    """Return a ratio as a fraction."""
    return f"1/{1 / float(value):.3g}"


def whole(value: float) -> str:
    """Return a count."""
    return f"{value:,.0f}"


def rows(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a table whose first column is aligned to the left, and the others to the right."""
    form = ["---", *["---:"] * (len(heads) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (heads, form, *lines))


def _bars(kept: Kept, cases: Sequence[Case], *, per_kib: bool = False) -> list[chart.Bar]:
    bars = []
    for case in cases:
        if seen := figures.cpu_of(kept.readings.get(case.key, {})):
            name = case.name.replace("`", "")
            unit = case.body / 1024 if per_kib else 1
            values = (seen.median / unit, seen.low / unit, seen.high / unit)
            bars.append(chart.Bar(name, *values, case.is_ours))
    return bars

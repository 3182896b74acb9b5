"""The benchmarks report what was measured. Statistics and report are pure functions."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from benchmarks import chart, figures, guard, report, series
from benchmarks.figures import Goal, Spread
from benchmarks.measure import Case
from benchmarks.protocol import Job, Meter, Reading


def reading(cpu: float, *, messages: int = 1000, seconds: float = 1.0) -> Reading:
    """One that took *cpu* µs for each message."""
    return Reading(
        messages=messages, cpu=cpu * messages / 1e6, seconds=seconds, rss=2**20, peak_rss=2**21
    )


def rounds(*cpu: float) -> dict[int, Reading]:
    """Return a round for each of these CPU times in µs."""
    return {number: reading(each) for number, each in enumerate(cpu, start=1)}


def kept(**readings: dict[int, Reading]) -> series.Kept:
    """What a run of these has kept."""
    return series.Kept(machine={"processor": "an abacus"}, readings=readings)


CASE = Case(key="it", name="It", module="it", task="ack", messages=1000)


class TestFigures:
    """What many readings say."""

    def test_a_median_tells_between_what_it_lies(self) -> None:
        """One slow round does not move it."""
        assert Spread(4, 3, 90) == figures.spread([90, 3, 4])
        assert figures.spread([]) is None

    def test_cpu_is_microseconds_for_a_message(self) -> None:
        """And a rate is messages for a second."""
        assert pytest.approx(4.5) == figures.cpu(reading(4.5))
        assert 2000 == figures.rate(reading(1, messages=1000, seconds=0.5))

    def test_a_ratio_is_taken_within_each_round(self) -> None:
        """A round in which the machine was busy slows both, and their ratio stays."""
        seen = figures.cpu_ratio(rounds(4, 40, 5), rounds(100, 1000, 125))
        assert seen is not None
        assert pytest.approx((0.04, 0.04, 0.04)) == (seen.median, seen.low, seen.high)

    def test_a_round_that_one_of_them_failed_does_not_count(self) -> None:
        """What is left has been measured by both."""
        theirs = rounds(10, 10)
        del theirs[1]
        assert Spread(2, 2, 2) == figures.cpu_ratio(rounds(5, 20), theirs)
        assert figures.cpu_ratio(rounds(5), {}) is None

    @pytest.mark.parametrize(("ours", "reached"), [(6.0, True), (10.0, False), (None, None)])
    def test_a_goal_is_reached_or_missed_or_unknown(
        self, ours: float | None, reached: bool | None
    ) -> None:
        """A goal that wasn't measured isn't reported as reached."""
        measured = {"aio-pika.each": rounds(130)}
        if ours is not None:
            measured["ours.ack"] = rounds(ours)
        assert reached is figures.the_bar(measured)[0].is_reached

    def test_some_goals_are_a_floor(self) -> None:
        """Of messages a second, more is better."""
        goal = Goal("speed", 0.9, Spread(0.95, 0.8, 1.0), is_ceiling=False)
        assert goal.is_reached is True
        assert replace(goal, seen=Spread(0.85, 0.8, 1.0)).is_reached is False

    def test_every_goal_is_about_something_that_is_measured(self) -> None:
        """A goal with a misspelt case would never be reached, and never missed."""
        everything = {
            case.key: rounds(1.0) for cases in series.all_sections().values() for case in cases
        }
        assert [] == [goal.text for goal in figures.the_bar(everything) if goal.seen is None]


class TestReport:
    """The report that a run writes."""

    def test_only_what_stands_between_the_marks_is_replaced(self) -> None:
        """Prose is written by hand."""
        page = f"Before.\n{report.BEGIN}\nold\n{report.END}\nAfter.\n"
        new = report.between_marks(page, "new\n")
        assert f"Before.\n{report.BEGIN}\n\nnew\n\n{report.END}\nAfter.\n" == new
        assert new == report.between_marks(new, "new")

    def test_a_page_without_a_place_for_figures_is_refused(self) -> None:
        """Rather than written over."""
        with pytest.raises(ValueError, match="no place"):
            report.between_marks("Prose.", "new")

    def test_a_line_tells_the_median_and_between_what_it_lies(self) -> None:
        """And how much it was measured."""
        shown = report.table(kept(it=rounds(4, 5, 16)), [CASE], None)
        assert "| It | 5.00 (4.00–16.0) | 1,000 | 2 | 1,000 × 3 |" in shown.splitlines()

    def test_failures_are_reported_with_their_reason(self) -> None:
        """A competitor is never dropped silently."""
        run = kept()
        for number in (1, 2):
            run.take({"case": "ours.ack", "round": number, "error": "it fell over"})
        shown = report.render(run)
        assert "| **aio-pika-batch: all acked** | failed |" in shown
        assert shown.endswith("### What failed\n\n- ours.ack: it fell over")

    def test_missed_goals_are_reported(self) -> None:
        """In bold, and in parts of what others need."""
        shown = report.goal_table(figures.the_bar({"ours.ack": rounds(13), "pika": rounds(26)}))
        assert "| ≤ 1/3 | 1/2 | **missed** |" in shown
        assert "| ≤ 1/20 | – | not measured |" in shown

    @pytest.mark.parametrize(
        ("value", "shown"), [(0.0333, "0.033"), (4.567, "4.57"), (45.67, "45.7"), (1234.5, "1,234")]
    )
    def test_three_digits_are_shown(self, value: float, shown: str) -> None:
        """More would be noise."""
        assert shown == report.number(value)

    def test_a_page_and_its_charts_are_written(self, tmp_path: Path) -> None:
        """Into a folder that need not exist."""
        report.write(kept(pika=rounds(20)), tmp_path / "new")
        assert "pika SelectConnection" in (tmp_path / "new" / report.FILE).read_text()
        assert {"performance.md", "performance-consume.svg"} == {
            path.name for path in (tmp_path / "new").iterdir()
        }

    def test_the_page_in_the_documentation_has_a_place_for_figures(self) -> None:
        """Where a whole run writes them."""
        page = Path(__file__).parents[2] / "docs" / report.FILE
        assert report.between_marks(page.read_text(), "figures")


class TestSeries:
    """What runs have kept."""

    def test_a_later_run_replaces_whole_sections(self, tmp_path: Path) -> None:
        """All ratios of a section are of one run, which is named."""
        first, later = tmp_path / "first.jsonl", tmp_path / "later.jsonl"
        for file, revision, cases in [
            (first, "a", {"ours.ack": 5.0, "pika": 20.0, "ours.publish": 8.0}),
            (later, "b", {"ours.ack": 3.0}),
        ]:
            lines: list[object] = [{"machine": {"revision": revision, "memory": "4 GiB"}}]
            lines += [
                {"case": key, "round": 1, "reading": asdict(reading(cpu))}
                for key, cpu in cases.items()
            ]
            file.write_text("".join(f"{json.dumps(line)}\n" for line in lines))

        found = series.load(first, later)

        assert {"ours.ack", "ours.publish"} == found.readings.keys()
        assert pytest.approx(3.0) == figures.cpu(found.readings["ours.ack"][1])
        assert {"revision": "a; consume: b", "memory": "4 GiB"} == found.machine


class TestChart:
    """What is seen at a glance."""

    def test_it_is_whole_and_says_in_words_what_it_shows(self) -> None:
        """For who cannot see it, too."""
        drawn = chart.bars("A <title>", [chart.Bar("ours & theirs", 4.5, 4, 5, is_ours=True)])
        root = ET.fromstring(drawn)  # noqa: S314  -- our own
        said = [each.text for each in root if each.tag.endswith(("title", "desc"))]
        assert ["A <title>", "ours & theirs: 4.5"] == said

    @pytest.mark.parametrize(
        ("most", "scale"), [(422, (100, 500)), (11.9, (2, 12)), (0.7, (0.2, 0.8))]
    )
    def test_its_scale_is_round_and_begins_at_nought(
        self, most: float, scale: tuple[float, float]
    ) -> None:
        """And ends where the longest bar has room."""
        assert pytest.approx(scale) == chart.scale(most)


class TestMeter:
    """When the clocks are read."""

    def test_the_warm_up_is_not_measured(self) -> None:
        """The clocks are read after it, and again after the measured messages."""
        meter = Meter(Job(url="", queue="", task="", messages=300, warmup=150))
        assert [False, False, False, False, True] == [meter.count(100) for _ in range(5)]
        assert meter.reading is not None
        assert 300 == meter.reading.messages

    def test_what_comes_later_changes_nothing(self) -> None:
        """A client may hand over more than was asked for before it stops."""
        meter = Meter(Job(url="", queue="", task="", messages=1, warmup=1))
        meter.count(1)
        meter.count(1)
        first = meter.reading
        assert meter.count(1) is True
        assert first is meter.reading


class TestGuard:
    """A case has become more expensive if the whole interval says so."""

    def test_a_certain_difference_is_a_failure(self) -> None:
        """Also if the machine becomes slower meanwhile."""
        old = [10.0, 11, 12, 13, 14, 15, 16, 17, 18]
        found = guard.compare(old, [1.05 * each for each in old])
        assert pytest.approx((1.05, 1.05, 1.05)) == (found.ratio, found.low, found.high)
        assert found.is_worse
        assert not guard.compare(old, [1.01 * each for each in old]).is_worse

    def test_noise_is_not_a_failure(self) -> None:
        """Its interval reaches below the limit."""
        found = guard.compare([10.0] * 9, [9, 12, 10, 11, 13, 9, 10, 12, 11])
        assert found.ratio > guard.LIMIT
        assert not found.is_worse

    def test_each_case_has_a_name_of_its_own(self) -> None:
        """And fewer messages if that is asked for."""
        assert len(guard.CASES) == len({case.key for case in guard.CASES})
        assert {100} == {case.smaller(100).messages for case in guard.CASES}

"""The soak's own logic: which curves are flat, what is counted, and what the page shows."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.curves import Curve, curves
from tests.faults.figures import Machine
from tests.soak import page
from tests.soak.tally import Tally
from tests.soak.trend import MOST_POINTS, Measure, slope, trend_of

MEMORY = Measure("memory", "MiB", 2.0)


class TestTrend:
    """The line through the second half."""

    @given(st.floats(-10, 10), st.floats(-100, 100), st.integers(5, 60), st.data())
    def test_outliers_do_not_move_the_line(self, rise, start, count, data) -> None:
        """Up to one in five points."""
        wrong = data.draw(st.sets(st.integers(0, count - 1), max_size=count // 5))
        points = [
            (float(at), start + rise * at + (1e6 if at in wrong else 0.0)) for at in range(count)
        ]
        assert pytest.approx(rise, abs=1e-6) == slope(points)

    def test_a_constant_is_flat(self) -> None:
        """It does not rise."""
        trend = trend_of(MEMORY, [(float(at), 50.0) for at in range(100)])
        assert (True, 0.0, 50.0) == (trend.is_flat, trend.rise, trend.middle)

    def test_growth_in_the_first_half_does_not_count(self) -> None:
        """It is the warm-up."""
        trend = trend_of(MEMORY, [(float(at), min(float(at), 50.0)) for at in range(101)])
        assert trend.is_flat
        assert 0.0 == trend.rise

    def test_growing_more_than_allowed_is_not_flat(self) -> None:
        """The rise is over the length of the second half."""
        trend = trend_of(MEMORY, [(float(at), 0.05 * at) for at in range(101)])
        assert pytest.approx(2.5) == trend.rise
        assert not trend.is_flat

    def test_shrinking_is_flat(self) -> None:
        """Only growth is a problem."""
        assert trend_of(MEMORY, [(float(at), -1.0 * at) for at in range(100)]).is_flat

    def test_peaks_are_reported_and_do_not_count(self) -> None:
        """A queue that grows during each fault, and is emptied afterwards, is flat."""
        trend = trend_of(MEMORY, [(float(at), 900.0 if at % 5 == 0 else 0.0) for at in range(100)])
        assert (True, 900.0) == (trend.is_flat, trend.greatest)

    def test_many_points_are_thinned_evenly(self) -> None:
        """An hour's samples make half a million pairs, not millions."""
        points = [(float(at), 3.0 * at) for at in range(10 * MOST_POINTS)]
        assert pytest.approx(3.0) == slope(points)

    def test_too_few_points_are_refused(self) -> None:
        """A line needs two points."""
        for points in ([], [(0.0, 1.0)]):
            with pytest.raises(ValueError, match="not enough samples of memory"):
                trend_of(MEMORY, points)


class TestTally:
    """The consumer's record."""

    def test_results_are_counted_as_they_come(self, tmp_path: Path) -> None:
        """An incomplete line is read later."""
        record = tmp_path / "record"
        tally = Tally(record)
        tally.read()
        assert 0 == tally.total
        record.write_text("1 0 A\n2 0 R\n2 1")
        tally.read()
        assert ({1}, 2) == (tally.done, tally.total)
        record.write_text("1 0 A\n2 0 R\n2 1 A\n")
        tally.read()
        assert ({1, 2}, 3, 0) == (tally.done, tally.total, tally.repeated)

    def test_a_requested_retry_is_not_a_repetition(self, tmp_path: Path) -> None:
        """REQUEUE_IMMEDIATE causes the same attempt again; nothing else does."""
        record = tmp_path / "record"
        record.write_text("1 0 I\n1 0 A\n2 0 A\n2 0 A\n3 0 N\n3 0 N\n3 0 N\n")
        tally = Tally(record)
        tally.read()
        assert 3 == tally.repeated


def soak(**changed: object) -> page.Soak:
    """Return a short soak without problems."""
    seen: dict[str, object] = {
        "minutes": 1.0,
        "broker": "4.3.6",
        "machine": Machine(revision="abc", processors=2, python="3.12.1"),
        "messages": 24_000,
        "handled": 24_000,
        "duplicated": 12,
        "lost": 0,
        "left": 0,
        "exit_code": 0,
        "faults": [(3.0, "cut"), (9.0, "cut"), (12.0, "broker paused")],
        "curves": {name: [(float(at), 5.0) for at in range(60)] for name in page.MEASURES},
    }
    return page.Soak(**{**seen, **changed})  # type: ignore[arg-type]


class TestPage:
    """The page and the plot."""

    def test_the_section_and_the_plot_are_written(self, tmp_path: Path) -> None:
        """Between the marks and beside the page; everything else stays."""
        file = tmp_path / "reliability.md"
        file.write_text(f"before\n{page.BEGIN}\nold\n{page.END}\nafter\n")
        page.write(soak(), tmp_path)
        told = file.read_text()
        assert told.startswith("before\n")
        assert told.endswith("\nafter\n")
        assert "old" not in told
        for part in ("24,000 messages", "**0 lost**", "broker paused (1), cut (2)", "4.3.6"):
            assert part in told
        ET.fromstring((tmp_path / page.PLOT).read_text())  # noqa: S314  -- our own

    @pytest.mark.parametrize("wrong", ["lost", "left", "exit_code"])
    def test_a_soak_with_a_problem_is_not_well(self, wrong: str) -> None:
        """Any problem."""
        assert soak().is_well
        assert not soak(**{wrong: 1}).is_well

    def test_growth_is_reported(self) -> None:
        """In the table and by the trend."""
        still = {name: [(float(at), 5.0) for at in range(60)] for name in page.MEASURES}
        grown = soak(curves={**still, "tasks": [(float(at), float(at)) for at in range(60)]})
        assert not grown.is_well
        assert "| asyncio tasks | 44.5 | 59.0 | +29.00 | 2 | **no** |" in page.render(grown)


def test_curves_show_peaks() -> None:
    """Of more points than can be seen, the highest are drawn; names are escaped."""
    points = [(float(at), 100.0 if at == 777 else 1.0) for at in range(5000)]
    drawn = curves("a & b", [Curve("x < y", points)], [10.0, 20.0])
    ET.fromstring(drawn)  # noqa: S314  -- our own
    assert 2 == drawn.count('class="mark"')
    assert "x &lt; y: at most 100" in drawn
    [places] = [each for each in drawn.splitlines() if each.startswith("<polyline")]
    heights = [
        float(place.split(",")[1]) for place in places.split('points="')[1].split('"')[0].split()
    ]
    assert 2 == len(set(heights))

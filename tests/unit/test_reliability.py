"""The figures of the fault tests: counting, storing and the page. They need no broker."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from aio_pika_batch import Message, MessageResult
from aio_pika_batch.testing import make_message
from tests.faults import figures, report
from tests.faults.figures import Figures, Machine
from tests.faults.trial import KINDS, HandlingRecord

SEEN = Figures(
    fault="broker killed",
    did="SIGKILL to the node.",
    wire="fast",
    broker="3.10.8",
    messages=1200,
    handled=1200,
    duplicated=7,
    lost=0,
    recovery=1.25,
)
MACHINE = Machine(revision="abc1234", processors=2, python="3.12.1")


def kept(*seen: Figures) -> figures.Kept:
    """Return what a run with these figures has stored."""
    return {each.key: (each, MACHINE) for each in seen}


def numbered(number: int, retry_count: int = 0) -> Message:
    """Return one of the load's messages."""
    headers: Mapping[str, int] = {"x-retry-count": retry_count}
    return make_message(b"", message_id=str(number), headers=headers)


class TestRecord:
    """Requested retries are not duplicates."""

    @pytest.mark.parametrize(
        ("kind", "attempts"),
        [("good", [0]), ("flaky", [0, 1, 2]), ("impatient", [0, 0]), ("doomed", [0, 1, 2, 3])],
    )
    def test_a_requested_retry_is_not_a_duplicate(self, kind: str, attempts: list[int]) -> None:
        """But each further one is."""
        record = HandlingRecord()
        number = KINDS.index(kind)
        for attempt in attempts:
            record.answer(numbered(number, attempt))
        assert 0 == record.repeated
        record.answer(numbered(number, attempts[-1]))
        assert 1 == record.repeated

    def test_only_an_ack_makes_a_message_done(self) -> None:
        """A NACKed message is finished when it is dead-lettered."""
        record = HandlingRecord()
        answers = [record.answer(numbered(KINDS.index(kind))) for kind in ("good", "bad", "doomed")]
        assert [MessageResult.ACK, MessageResult.NACK, MessageResult.REQUEUE] == answers
        assert {KINDS.index("good")} == record.done


class TestStored:
    """The file with a line for each fault."""

    def test_new_figures_replace_those_of_the_same_fault_only(self, tmp_path: Path) -> None:
        """Another wire, broker or fault has its own line."""
        file = tmp_path / "figures.jsonl"
        others = [
            replace(SEEN, wire="plain"),
            replace(SEEN, broker="4.0.5"),
            replace(SEEN, fault="broker paused"),
        ]
        figures.keep(file, [SEEN, *others], MACHINE)
        newer = replace(SEEN, duplicated=3)
        later = replace(MACHINE, revision="def5678")
        figures.keep(file, [newer], later)
        expected = kept(newer, *others) | {newer.key: (newer, later)}
        assert expected == figures.load(file)

    def test_brokers_are_sorted_by_version(self, tmp_path: Path) -> None:
        """3.8 comes before 3.10."""
        file = tmp_path / "figures.jsonl"
        for version in ("4.0.5", "3.10.8", "3.8.9"):
            figures.keep(file, [replace(SEEN, broker=version)], MACHINE)
        brokers = [each.broker for each, _ in figures.load(file).values()]
        assert ["3.8.9", "3.10.8", "4.0.5"] == brokers

    def test_without_a_file_there_are_no_figures(self, tmp_path: Path) -> None:
        """`load` returns an empty dictionary."""
        assert {} == figures.load(tmp_path / "none.jsonl")


class TestReport:
    """The page."""

    def test_each_broker_has_a_column_and_each_fault_a_row(self) -> None:
        """A cell has the sums of both wires, and the longest recovery."""
        plain = replace(SEEN, wire="plain", recovery=3.5, duplicated=1)
        newer = replace(SEEN, broker="4.0.5", lost=2, recovery=None)
        elsewhere = replace(newer, fault="broker paused", did="SIGSTOP to the node.")
        shown = report.render(kept(SEEN, plain, newer, elsewhere)).splitlines()
        assert shown[0].startswith("Measured on revision abc1234, 2 processors, Python 3.12.1 (")
        both, one = "**0 lost**; 8 of 2,400 repeated; 3.5 s", "**2 lost**; 7 of 1,200 repeated"
        assert [
            "| fault | RabbitMQ 3.10.8 | RabbitMQ 4.0.5 |",
            "| --- | --- | --- |",
            f"| broker killed | {both} | {one} |",
            f"| broker paused | – | {one} |",
        ] == shown[2:6]

    def test_each_fault_has_a_sentence_with_its_remarks(self) -> None:
        """Queue types share a row, and faults with the same sentence share it."""
        some = [
            replace(SEEN, fault="client killed in a handler, classic", remark="In vain."),
            replace(SEEN, fault="client killed in a handler, quorum", remark="In vain."),
            replace(SEEN, fault="client killed at the end"),
            replace(SEEN, fault="paused", did="SIGSTOP to the node."),
        ]
        shown = report.render(kept(*some)).splitlines()
        assert ["client killed at the end", "client killed in a handler", "paused"] == [
            line.split(" | ")[0].removeprefix("| ") for line in shown if "lost**" in line
        ]
        assert [
            "- **client killed …**: SIGKILL to the node. In vain.",
            "- **paused**: SIGSTOP to the node.",
        ] == shown[-2:]

    def test_only_the_text_between_the_marks_is_replaced(self) -> None:
        """The rest is written by hand."""
        page = f"Before.\n{report.BEGIN}\nold\n{report.END}\nAfter.\n"
        new = report.between_marks(page, "new\n")
        assert f"Before.\n{report.BEGIN}\n\nnew\n\n{report.END}\nAfter.\n" == new
        with pytest.raises(ValueError, match="no place"):
            report.between_marks("Prose.", "new")

    def test_the_page_is_up_to_date(self) -> None:
        """If this fails: `python -m tests.faults --page`."""
        page = report.PAGE.read_text()
        assert report.between_marks(page, report.render(figures.load(figures.FILE))) == page

    def test_no_stored_figure_has_a_loss(self) -> None:
        """A loss is a bug to fix, not a figure to publish."""
        assert [] == [each for each, _ in figures.load(figures.FILE).values() if each.lost]

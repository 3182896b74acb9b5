"""Counts the results in the consumer's record, which is read while it is written."""

from __future__ import annotations

from collections import Counter
from pathlib import Path


class Tally:
    """Counts results.

    Attributes:
        done: What was acknowledged.
    """

    def __init__(self, record: Path) -> None:
        self.done: set[int] = set()
        self._record = record
        self._read = 0
        self._answers: Counter[tuple[int, int]] = Counter()
        self._asked: Counter[tuple[int, int]] = Counter()

    @property
    def repeated(self) -> int:
        """How often a message was handled although nothing required it."""
        return sum(
            max(0, count - 1 - self._asked[attempt]) for attempt, count in self._answers.items()
        )

    @property
    def total(self) -> int:
        """The number of results."""
        return self._answers.total()

    def read(self) -> None:
        """Read new lines, up to the last complete one."""
        if not self._record.exists():
            return
        with self._record.open("rb") as record:
            record.seek(self._read)
            new, _, _ = record.read().rpartition(b"\n")
        if not new:
            return
        self._read += len(new) + 1
        for line in new.decode().split("\n"):
            number, retries, letter = line.split()
            attempt = int(number), int(retries)
            self._answers[attempt] += 1
            if letter == "I":
                self._asked[attempt] += 1
            elif letter == "A":
                self.done.add(attempt[0])

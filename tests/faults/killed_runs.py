"""What a killed consumer had done, and what it had not settled, from its event log."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

APPLIED = 0.5
"""Seconds after which a settlement that was sent counts, also on a quorum queue."""


@dataclass(frozen=True)
class ProcessRun:
    """What one process has done.

    Attributes:
        done: How often the handler ACKed each message.
        unsettled: How many deliveries of each message were unsettled at its end.
    """

    done: Counter[int]
    unsettled: Counter[int]


def read_run(entries: Iterable[Mapping[str, Any]], died: float) -> ProcessRun:
    """Read the event log of a process that was killed at *died*."""
    done: Counter[int] = Counter()
    unsettled: dict[tuple[int, int], int] = {}
    for entry in entries:
        match entry["what"], entry["of"]:
            case "done", number:
                done[number] += 1
            case "delivered", [session, delivered]:
                unsettled |= {(session, tag): number for tag, number in delivered}
            case "settled", [session, at, tags] if at < died - APPLIED:
                for tag in tags:
                    del unsettled[session, tag]
    return ProcessRun(done, Counter(unsettled.values()))

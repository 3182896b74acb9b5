"""What has a consumer done that was killed, and what did it have in hand? Its diary tells."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

APPLIED = 0.5
"""Seconds after which a settlement that was sent counts, also on a quorum queue."""


@dataclass(frozen=True)
class Life:
    """What one process has done, from its diary.

    Attributes:
        done: How often each message was acknowledged by the handler.
        in_hand: How many deliveries of each message were unsettled at its end.
    """

    done: Counter[int]
    in_hand: Counter[int]


def life(entries: Iterable[Mapping[str, Any]], died: float) -> Life:
    """Read a diary, of a process that is gone since *died*."""
    done: Counter[int] = Counter()
    in_hand: dict[tuple[int, int], int] = {}
    for entry in entries:
        match entry["what"], entry["of"]:
            case "done", number:
                done[number] += 1
            case "delivered", [session, delivered]:
                in_hand |= {(session, tag): number for tag, number in delivered}
            case "settled", [session, at, tags] if at < died - APPLIED:
                for tag in tags:
                    del in_hand[session, tag]
    return Life(done, Counter(in_hand.values()))

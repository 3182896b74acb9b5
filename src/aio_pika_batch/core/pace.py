"""How soon must be settled what was just yielded?

Within an interval, whatever else is going on. Settlements of one moment cost less together, so what
is yielded is collected first; then its copies, if there are any, and those of other batches have a
moment each for their confirmations, so that one frame may settle the lot.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True, slots=True)
class Pace:
    """How an interval is divided.

    Attributes:
        collect: Seconds from the first yield until what has been yielded goes on its way.
        patience: Seconds that a settlement then waits for confirmations, at most, and as many are
            kept in reserve.
    """

    collect: float
    patience: float

    @classmethod
    def within(cls, interval: float, *, longest: float) -> Self:
        """Divide an interval.

        Args:
            longest: Seconds for confirmations that are enough, however long the interval.
        """
        patience = min(longest, interval / 4)
        return cls(interval - 2 * patience, patience)

"""Who is to blame for a run that failed?

A handler that writes all its messages in one go fails as a whole, whoever is to blame. What it left
undecided is run again in halves, and so is each half that fails, until a culprit stands alone.

Laws:

- Only a message that failed in a run of its own is condemned for its own sake.
- k culprits among n messages are found in 1 + 2k⌈log₂ n⌉ runs at most.
- After the last culprit that may be looked for, nothing is run any more: what is still undecided is
  condemned for the failure that it was part of.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from aio_pika_batch.core.message import Message


@dataclass(frozen=True, slots=True)
class Part:
    """Messages that were in one run, and what that run failed of."""

    messages: Sequence[Message]
    error: BaseException


class Isolation:
    """What is to be run again, in the order of the batch.

    Args:
        limit: How many culprits are looked for. With 0 nothing is divided: who was in a run that
            failed is condemned.
    """

    __slots__ = ("_left", "_parts")

    def __init__(self, limit: int) -> None:
        self._left = limit
        self._parts: list[Part] = []

    def __len__(self) -> int:
        """How many runs are due."""
        return len(self._parts)

    def again(self, part: Part) -> None:
        """Run these again next, undivided."""
        if part.messages:
            self._parts.append(part)

    def failed(self, run: Sequence[Message], rest: Part) -> list[Part]:
        """Decide what a failure means.

        Args:
            run: The messages of the run that failed.
            rest: Those that it left undecided.

        Returns:
            Who is condemned; everybody else of `rest` is run again.
        """
        if not self._left:
            return [rest]
        if len(run) > 1:
            # One that is left over of many has not failed alone yet; the others were in the same
            # transaction, say.
            middle = (len(rest.messages) + 1) // 2
            self.again(Part(rest.messages[middle:], rest.error))
            self.again(Part(rest.messages[:middle], rest.error))
            return []
        self._left -= 1
        return [rest] if self._left else [rest, *self.stop()]

    def next_run(self) -> Sequence[Message]:
        """Take the next part; empty if none is due."""
        return self._parts.pop().messages if self._parts else ()

    def stop(self) -> list[Part]:
        """Run nothing more; returns what was due."""
        parts, self._parts = self._parts[::-1], []
        return parts

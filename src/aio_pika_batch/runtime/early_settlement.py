"""What is settled while its handler still runs?

What was yielded, soon after, where a yield says that the effect is durable (`settle="yield"`). All
handlers of a session share one clock, so that what several of them have yielded goes out together.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from aio_pika_batch.core.batch_run import BatchDecisions
from aio_pika_batch.runtime.handler import HandlerRun


class EarlySettlement:
    """Collects what handlers have yielded, and passes it on in time.

    Args:
        collect: Seconds from the first yield until what has been yielded is passed on.
        settle: Takes what was decided; how many messages of which handling that is; and when the
            oldest of them may have arrived, in loop time.
    """

    def __init__(
        self,
        collect: float,
        settle: Callable[[BatchDecisions, dict[HandlerRun, int], float], None],
    ) -> None:
        self._collect = collect
        self._settle = settle
        self._loop = asyncio.get_running_loop()
        self._waiting: list[HandlerRun] = []
        self._timer: asyncio.TimerHandle | None = None
        self._is_over = False

    def note(self, handling: HandlerRun) -> None:
        """Remember that a handling has something; it says so once until that is taken."""
        if self._is_over:
            return
        self._waiting.append(handling)
        if self._timer is None:
            self._timer = self._loop.call_later(self._collect, self._pass_on)

    def _pass_on(self) -> None:
        self._timer = None
        together, counts = BatchDecisions(), {}
        waiting, self._waiting = self._waiting, []
        for handling in waiting:
            taken = handling.take()
            if taken:
                counts[handling] = len(taken)
                together.add(taken)
        if together:
            # In the order of delivery, in which one frame may do for all.
            together.acked.sort()
            since = min(handling.batch.since for handling in counts)
            self._settle(together, counts, since)

    def stop(self) -> None:
        """Pass nothing on any more: what is left is settled with its batch, if at all."""
        self._is_over = True
        self._waiting.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

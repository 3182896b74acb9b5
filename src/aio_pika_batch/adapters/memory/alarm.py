"""How does a broker without a clock come to live in an event loop?

It asks the loop for the time, and keeps one timer there, for the next thing that happens by itself.
The loop is not held: a broker must not keep a loop alive whose turn is over.
"""

from __future__ import annotations

import asyncio
import weakref
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aio_pika_batch.adapters.memory.broker import Broker


class LoopAlarm:
    """An alarm clock in an event loop.

    The broker's time goes on where it stood: a broker may live through several loops, whose clocks
    need not agree.
    """

    def __init__(self, broker: Broker, loop: asyncio.AbstractEventLoop) -> None:
        self._broker = broker
        self._loop = weakref.ref(loop)
        self._offset = max(0.0, broker.now - loop.time())
        self._last = broker.now
        self._when: float | None = None
        # The loop holds its timers; held here as well, one would hold the loop.
        self._timer: weakref.ref[asyncio.TimerHandle] | None = None

    def in_loop(self, loop: asyncio.AbstractEventLoop) -> bool:
        """Whether it is in this loop."""
        return self._loop() is loop

    def time(self) -> float:
        """The present time; that of the loop's end, once it is gone."""
        loop = self._loop()
        if loop is not None:
            self._last = loop.time() + self._offset
        return self._last

    def ring_at(self, when: float | None) -> None:
        """Set the timer anew, if need be."""
        if when == self._when:
            return
        self._when = when
        timer = None if self._timer is None else self._timer()
        if timer is not None:
            timer.cancel()
        loop = self._loop()
        if when is not None and loop is not None and not loop.is_closed():
            self._timer = weakref.ref(loop.call_at(when - self._offset, self._ring, when))

    def _ring(self, when: float) -> None:
        self._when = None
        # A loop may call a little early, by the resolution of its clock.
        self._broker.advance(max(when, self.time()))


def attach(broker: Broker) -> None:
    """Let a broker live in the running loop."""
    loop = asyncio.get_running_loop()
    if not (isinstance(broker.alarm, LoopAlarm) and broker.alarm.in_loop(loop)):
        if broker.alarm is not None:
            broker.alarm.ring_at(None)
        broker.alarm = LoopAlarm(broker, loop)

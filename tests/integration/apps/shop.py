"""The consumer of ``work.py`` with a factory, for `aio-pika-batch run`.

Its settings come from the environment, and so do ``EVENT_LOG`` and ``PACE``. Two more kinds of
message crash or hang the process only when they are first delivered: ``lethal-once`` and
``hangs-once``.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import AsyncIterator, Sequence

from event_log import EventLog
from work import Worker

from aio_pika_batch import BatchConsumerSettings, Message, MessageResult


class Importer(Worker):
    """Records its process id, too."""

    async def on_start(self) -> None:
        if os.environ.get("MISHAP") == "crash":
            os._exit(7)
        self._events.note("started", os.getpid())
        if os.environ.get("MISHAP") == "forks":
            if not (forked := os.fork()):
                signal.pause()
            self._events.note("forked", forked)

    def process_messages(self, messages: Sequence[Message]) -> AsyncIterator[MessageResult]:
        kinds = {each.json()["kind"] for each in messages if not each.redelivered}
        if "lethal-once" in kinds:
            os.kill(os.getpid(), signal.SIGKILL)
        if "hangs-once" in kinds:
            self._events.note("hangs", os.getpid())
            time.sleep(3600)  # not a coroutine's: the event loop stands still
        return super().process_messages(messages)


def make() -> Importer:
    """The factory ``shop:make``."""
    return Importer(
        BatchConsumerSettings(),
        EventLog(os.environ["EVENT_LOG"]),
        float(os.environ.get("PACE", "0")),
    )

"""A consumer process that does what its messages say, and records what it has done.

A message is ``{"id": 7, "kind": "good"}``; kinds are ``good``, ``bad`` (NACK), ``flaky`` (REQUEUE
twice, then ACK), ``doomed`` (always REQUEUE) and ``lethal`` (kills the process). Effects are
recorded before their results are yielded, as any real effect happens before its message is acked.

Usage: ``python work.py '{"url": …, "queue": …, "event_log": …, further options}'``
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from typing import Any

from event_log import EventLog

from aio_pika_batch import BatchConsumer, BatchConsumerSettings, Message, MessageResult


class Worker(BatchConsumer):
    """Records ``begin`` and ``end`` of each batch, and the effect of each message in between.

    ``pace`` is how long a batch takes, in seconds.
    """

    def __init__(self, settings: BatchConsumerSettings, events: EventLog, pace: float) -> None:
        super().__init__(settings)
        self._events = events
        self._pace = pace

    async def on_stop(self) -> None:
        self._events.note("on_stop", self.settings.queue_name)

    async def process_messages(self, messages: Sequence[Message]) -> AsyncIterator[MessageResult]:
        contents = [message.json() for message in messages]
        self._events.note("begin", [content["id"] for content in contents])
        await asyncio.sleep(self._pace)
        for message, content in zip(messages, contents, strict=True):
            result = _result(content["kind"], message.retry_count)
            if result is MessageResult.ACK:
                self._events.note("done", content["id"])
            yield result
        self._events.note("end", [content["id"] for content in contents])


def _result(kind: str, retries: int) -> MessageResult:
    match kind:
        case "bad":
            return MessageResult.NACK
        case "doomed":
            return MessageResult.REQUEUE
        case "flaky" if retries < 2:
            return MessageResult.REQUEUE
        case "lethal":
            os.kill(os.getpid(), signal.SIGKILL)
            raise AssertionError
        case _:
            return MessageResult.ACK


async def main(options: dict[str, Any]) -> None:
    """Run one consumer for each named queue."""
    events = EventLog(options.pop("event_log"))
    queues = options.pop("queue").split(",")
    pace = options.pop("pace", 0.0)
    consumers = [
        Worker(BatchConsumerSettings(queue_name=queue, **options), events, pace) for queue in queues
    ]
    running = [asyncio.ensure_future(consumer.run()) for consumer in consumers]
    while not all(consumer.is_healthy for consumer in consumers):
        await asyncio.wait(running, timeout=0.01, return_when=asyncio.FIRST_COMPLETED)
        if any(task.done() for task in running):
            break
    else:
        events.note("consuming")
    await asyncio.gather(*running)
    events.note("stopped")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, stream=sys.stdout)
    asyncio.run(main(json.loads(sys.argv[1])))

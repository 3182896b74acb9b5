"""A consumer process that is killed at a chosen point, and records what it did until then.

A message is ``{"id": 7, "kind": "good"}``; kinds are ``good``, ``bad`` (NACK), ``flaky`` (REQUEUE
twice, then ACK), ``doomed`` (always REQUEUE) and ``again`` (REQUEUE_IMMEDIATE when it is first
delivered). An ACK is recorded before it is yielded, as any real effect happens before its message
is acked.

Usage: ``python -m tests.faults.killed_consumer '{"url": …, "queue_name": …, "event_log": …,
"point": …, "countdown": …, "drain_after": …, further settings}'``
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

from aio_pika_batch import BatchConsumer, BatchConsumerSettings, Message, MessageResult
from aio_pika_batch.adapters.rabbitmq import open_transport
from aio_pika_batch.transport import Endpoint
from tests.faults.kill_points import KillableTransport, KillPoint, KillSwitch
from tests.integration.apps.event_log import EventLog


class KilledConsumer(BatchConsumer):
    """Does what its messages say.

    Args:
        drain_after: Stop after starting to handle this many messages; None: do not stop.
    """

    def __init__(
        self, settings: BatchConsumerSettings, switch: KillSwitch, *, drain_after: int | None
    ) -> None:
        endpoint = Endpoint(url=settings.url, wire=settings.wire)
        super().__init__(settings, transport=KillableTransport(open_transport(endpoint), switch))
        self._switch = switch
        self._drain_after = drain_after
        self._begun = 0

    async def on_start(self) -> None:
        self._switch.events.note("started")

    async def process_messages(self, messages: Sequence[Message]) -> AsyncIterator[MessageResult]:
        for message in messages:
            await asyncio.sleep(0)
            self._begun += 1
            if self._begun == self._drain_after:
                self._switch.is_draining = True
                os.kill(os.getpid(), signal.SIGTERM)
            content = message.json()
            result = _result(content["kind"], message)
            if result is MessageResult.ACK:
                self._switch.events.note("done", content["id"])
            self._switch.reach(KillPoint.HANDLING)
            yield result


def _result(kind: str, message: Message) -> MessageResult:
    match kind:
        case "bad":
            return MessageResult.NACK
        case "doomed":
            return MessageResult.REQUEUE
        case "flaky" if message.retry_count < 2:
            return MessageResult.REQUEUE
        case "again" if not message.redelivered:
            return MessageResult.REQUEUE_IMMEDIATE
        case _:
            return MessageResult.ACK


async def main(options: dict[str, Any]) -> None:
    """Run until a signal stops or kills it."""
    point = options.pop("point", None)
    switch = KillSwitch(
        EventLog(options.pop("event_log")),
        point=None if point is None else KillPoint(point),
        countdown=options.pop("countdown", 1),
    )
    drain_after = options.pop("drain_after", None)
    await KilledConsumer(BatchConsumerSettings(**options), switch, drain_after=drain_after).run()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, stream=sys.stdout)
    asyncio.run(main(json.loads(sys.argv[1])))

"""A consumer as a process that dies at a chosen moment, and notes what it did until then.

A message is ``{"id": 7, "kind": "good"}``; kinds are ``good``, ``bad`` (NACK), ``flaky`` (REQUEUE
twice, then ACK), ``doomed`` (always REQUEUE) and ``again`` (REQUEUE_IMMEDIATE when it comes for the
first time). What ends as ACK is noted before it is yielded, as any real effect happens before its
message is acked.

Usage: ``python -m tests.faults.mortal '{"url": …, "queue_name": …, "diary": …, "moment": …,
"countdown": …, "drain_after": …, further settings}'``
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
from aio_pika_batch.adapters.aio_pika.transport import AioPikaTransport
from aio_pika_batch.transport import Endpoint
from tests.faults.moments import Fate, Moment, MortalTransport
from tests.integration.apps.diary import Diary


class Mortal(BatchConsumer):
    """Does what its messages say.

    Args:
        drain_after: It is told to stop when it has begun with so many messages; None: it is not.
    """

    def __init__(
        self, settings: BatchConsumerSettings, fate: Fate, *, drain_after: int | None
    ) -> None:
        endpoint = Endpoint(url=settings.url, wire=settings.wire)
        super().__init__(settings, transport=MortalTransport(AioPikaTransport(endpoint), fate))
        self._fate = fate
        self._drain_after = drain_after
        self._begun = 0

    async def on_start(self) -> None:
        self._fate.diary.note("started")

    async def process_messages(self, messages: Sequence[Message]) -> AsyncIterator[MessageResult]:
        for message in messages:
            await asyncio.sleep(0)
            self._begun += 1
            if self._begun == self._drain_after:
                self._fate.is_draining = True
                os.kill(os.getpid(), signal.SIGTERM)
            content = message.json()
            result = _result(content["kind"], message)
            if result is MessageResult.ACK:
                self._fate.diary.note("done", content["id"])
            self._fate.reach(Moment.HANDLING)
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
    """Run until told to stop, or dead."""
    moment = options.pop("moment", None)
    fate = Fate(
        Diary(options.pop("diary")),
        moment=None if moment is None else Moment(moment),
        countdown=options.pop("countdown", 1),
    )
    drain_after = options.pop("drain_after", None)
    await Mortal(BatchConsumerSettings(**options), fate, drain_after=drain_after).run()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, stream=sys.stdout)
    asyncio.run(main(json.loads(sys.argv[1])))

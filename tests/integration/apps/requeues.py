"""A consumer that gives every message back, for as long as it lives.

Usage: ``python -m tests.integration.apps.requeues '{"dead": false, settings}'``. Each message is
retried after 50 to 600 ms, or dead-lettered.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
from collections.abc import AsyncIterator, Sequence
from typing import Any

from aio_pika_batch import BatchConsumer, BatchConsumerSettings, Message, MessageResult, Requeue


class Requeues(BatchConsumer):
    """Gives messages back."""

    def __init__(self, settings: BatchConsumerSettings, *, dead: bool) -> None:
        super().__init__(settings)
        self._dead = dead

    async def process_messages(self, messages: Sequence[Message]) -> AsyncIterator[Any]:
        if self._dead:
            await asyncio.sleep(0.03)  # so that there is something left for each kill
        for _ in messages:
            if self._dead:
                yield MessageResult.NACK
            else:
                yield Requeue(delay=random.uniform(0.05, 0.6), reason="again")


def main(options: dict[str, Any]) -> None:
    """Run until a signal comes."""
    dead = options.pop("dead")
    asyncio.run(Requeues(BatchConsumerSettings(**options), dead=dead).run())


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))

"""The consumer of a night: it records what it handles, and reports hostile messages as they are.

`NIGHT_RECORD` is the file: a line for each message that is acknowledged, with the time, the process
and the number of the message.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress

from aio_pika_batch import BatchConsumer, Message, MessageResult, Nack

_log = logging.getLogger("night")


class Importer(BatchConsumer):
    """Acknowledges orders, refuses hostile ones, and fails for impossible ones."""

    async def on_start(self) -> None:
        """Open the record."""
        self._record = os.open(os.environ["NIGHT_RECORD"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    async def process_messages(
        self, messages: Sequence[Message]
    ) -> AsyncIterator[MessageResult | Nack]:
        """Handle a batch."""
        with suppress(OSError):  # the reader may be gone
            print(f"{len(messages)} orders")
        for message in messages:
            if message.type == "impossible":
                raise ValueError(message.text())
        results: list[MessageResult | Nack] = []
        for message in messages:
            if message.type == "good":
                results.append(MessageResult.ACK)
            else:
                text = f"{message.text()}\ud800"
                _log.warning("refused: %s", text)
                results.append(Nack(reason=text))
        good = [message.message_id for message in messages if message.type == "good"]
        seen = "".join(f"{time.time():.3f} {os.getpid()} {number}\n" for number in good)
        os.write(self._record, seen.encode())
        for result in results:
            yield result

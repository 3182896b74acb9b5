"""The consumer of a soak, in its own process: it keeps nothing in memory, and reports its size.

Everything about messages is written to a file at once, so that only the library could grow.

Usage: ``python -m tests.soak.soak_consumer '{"record": …, "samples": …, settings …}'``. The record
has a line for each result, ``<number> <retry count> <letter>``; the samples are lines of JSON.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import resource
import sys
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from aio_pika_batch import BatchConsumer, BatchConsumerSettings, Message, MessageResult
from tests.faults.trial import KINDS

SAMPLE_EVERY = 1.0
"""Seconds."""

LETTERS = {
    MessageResult.ACK: "A",
    MessageResult.NACK: "N",
    MessageResult.REQUEUE: "R",
    MessageResult.REQUEUE_IMMEDIATE: "I",
}


class SoakConsumer(BatchConsumer):
    """Yields results that depend on the number of a message."""

    def __init__(self, settings: BatchConsumerSettings, record: Path) -> None:
        super().__init__(settings)
        self._record = os.open(record, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    async def process_messages(self, messages: Sequence[Message]) -> AsyncIterator[MessageResult]:
        answers = [_answer(message) for message in messages]
        lines = (
            f"{message.message_id} {message.retry_count} {LETTERS[answer]}\n"
            for message, answer in zip(messages, answers, strict=True)
        )
        os.write(self._record, "".join(lines).encode())
        await asyncio.sleep(0.01)
        for answer in answers:
            yield answer


def _answer(message: Message) -> MessageResult:
    match KINDS[int(message.message_id or "") % len(KINDS)]:
        case "bad":
            return MessageResult.NACK
        case "doomed":
            return MessageResult.REQUEUE
        case "flaky" if message.retry_count < 2:
            return MessageResult.REQUEUE
        case "impatient" if not message.redelivered:
            return MessageResult.REQUEUE_IMMEDIATE
        case _:
            return MessageResult.ACK


def resident_memory() -> float:
    """Return the resident memory of this process in MiB; Linux counts pages."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def open_files() -> int:
    """Return the number of open file descriptors of this process."""
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


async def write_samples(file: Path, consumer: BatchConsumer) -> None:
    """Write a sample every second, forever."""
    with file.open("a", buffering=1) as samples:
        while True:
            sample = {
                "at": time.time(),
                "memory": resident_memory(),
                "tasks": len(asyncio.all_tasks()),
                "files": open_files(),
                "is_healthy": consumer.is_healthy,
            }
            samples.write(json.dumps(sample) + "\n")
            await asyncio.sleep(SAMPLE_EVERY)


async def main(options: dict[str, Any]) -> None:
    """Run until a signal stops it."""
    record, samples = Path(options.pop("record")), Path(options.pop("samples"))
    consumer = SoakConsumer(BatchConsumerSettings(**options), record)
    telling = asyncio.create_task(write_samples(samples, consumer))
    await consumer.run()
    telling.cancel()


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, stream=sys.stdout)
    asyncio.run(main(json.loads(sys.argv[1])))

"""Claims overlapping, shuffled batches of ids, as one of several processes.

Usage: ``python -m tests.support.claimer DSN TABLE BATCHES SEED``. It prints one JSON line: the ids
that were fresh, and how many deadlocks there were.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys

import asyncpg

from aio_pika_batch.inbox import Inbox
from aio_pika_batch.testing import make_message

SIZE = 20
WINDOW = 60
STEP = 4
"""Each batch is drawn from a window of ids that moves on, the same in each process."""
SESSIONS = 4


async def main(dsn: str, table: str, batches: int, seed: int) -> None:
    """Claim in several sessions at once."""
    inbox = Inbox("claimer", table=table)
    fresh: list[str] = []
    deadlocks = 0

    async def claim(session: int) -> None:
        nonlocal deadlocks
        drawn = random.Random(seed * SESSIONS + session)
        connection = await asyncpg.connect(dsn)
        for at in range(batches // SESSIONS):
            window = range(at * STEP, at * STEP + WINDOW)
            ids = drawn.sample(window, SIZE)
            messages = [make_message(b"", message_id=str(each)) for each in ids]
            transaction = connection.transaction()
            await transaction.start()
            try:
                claimed = await inbox.claim(connection, messages)
            except asyncpg.DeadlockDetectedError:
                deadlocks += 1
                await transaction.rollback()
                continue
            if drawn.random() < 0.05:
                await transaction.rollback()
                continue
            await transaction.commit()
            fresh.extend(each.message_id or "" for each in claimed)
        await connection.close()

    await asyncio.gather(*(claim(session) for session in range(SESSIONS)))
    print(json.dumps({"fresh": fresh, "deadlocks": deadlocks}))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))

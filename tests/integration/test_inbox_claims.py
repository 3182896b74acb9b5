"""Overlapping claims of two processes on PostgreSQL.

`AIO_PIKA_BATCH_TEST_CLAIMS` is the number of batches; ``nox -s exactly_once`` makes it 100,000.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path

from aio_pika_batch.inbox import Inbox

ROOT = Path(__file__).parents[2]
BATCHES = int(os.environ.get("AIO_PIKA_BATCH_TEST_CLAIMS", "2000"))


async def claim(dsn: str, seed: int) -> dict[str, object]:
    """Run one process; returns what it prints."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.support.claimer",
        dsn,
        "claims",
        str(BATCHES // 2),
        str(seed),
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
    )
    out, _ = await process.communicate()
    assert 0 == process.returncode
    found: dict[str, object] = json.loads(out)
    return found


async def test_claims_of_two_processes_never_deadlock(schema) -> None:
    """Although their batches overlap, and are in no order. Each id is fresh once."""
    connection, dsn = schema
    await Inbox("claimer", table="claims").create(connection)
    first, second = await asyncio.gather(claim(dsn, 1), claim(dsn, 2))
    assert (0, 0) == (first["deadlocks"], second["deadlocks"])
    fresh = [*first["fresh"], *second["fresh"]]
    assert len(set(fresh)) == len(fresh)
    assert len(fresh) == await connection.fetchval("SELECT count(*) FROM claims")
    assert len(fresh) > BATCHES // 8 * 4 * 0.9

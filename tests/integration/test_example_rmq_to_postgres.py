"""The example rmq_to_postgres, on a real RabbitMQ and a real PostgreSQL."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from tests.integration.helpers import PATIENCE, QUEUE_TYPES, holds, take_all

MAIN = Path(__file__).parents[2] / "examples" / "rmq_to_postgres" / "main.py"


@QUEUE_TYPES
async def test_three_bad_rows_among_a_thousand_cost_three_rows(
    amqp_url, channel, name, schema, queue_type
) -> None:
    """997 are written and 3 are dead letters with the database's error, in O(k log n) INSERTs."""
    database, dsn = schema
    own = {
        "URL": amqp_url,
        "DSN": dsn,
        "QUEUE_NAME": name,
        "QUEUE_TYPE": queue_type,
        "DEAD_LETTER_QUEUE": f"{name}.dead",
    }
    done = subprocess.run(  # noqa: ASYNC221  -- nothing else is to be done meanwhile
        [sys.executable, str(MAIN), "--samples"],
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE,
        check=False,
        env={**os.environ, **{f"RMQ_TO_POSTGRES_{key}": value for key, value in own.items()}},
    )
    assert 0 == done.returncode, done.stderr

    bad = {123, 456, 789}
    numbers = {row["number"] for row in await database.fetch("SELECT number FROM orders")}
    assert {*range(1000)} - bad == numbers

    dead = await take_all(channel, f"{name}.dead", 3)
    assert bad == {json.loads(letter.body)["number"] for letter in dead}
    assert 3 == len(dead)
    why = {letter.headers["x-exception-type"].rpartition(".")[2] for letter in dead}
    assert {"CheckViolationError", "InvalidTextRepresentationError", "NotNullViolationError"} == why
    await holds(amqp_url, name, 0)

    found = re.search(r"997 rows, 3 dead letters, (\d+) INSERTs\n$", done.stdout)
    assert found, done.stdout
    # The queue may have been handed out in two batches; both are halved.
    assert 1 + 2 * 9 <= int(found[1]) <= 2 + 2 * 3 * 10

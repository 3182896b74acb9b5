"""Whatever handlers do, an effect exists once if its message was ACKed, and otherwise not.

Here on real databases; `tests/unit/inbox/test_laws.py` plays many more in virtual time.
"""

from __future__ import annotations

import asyncio
import os
import uuid
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings

from tests.support.databases import database
from tests.support.inbox_stories import Plan, plans, play

if TYPE_CHECKING:
    from pathlib import Path

COUNT = int(os.environ.get("AIO_PIKA_BATCH_TEST_REAL_STORIES", "40")) // 2

HOUR = 5.0
"""Seconds: a handler's time is up after a quarter of one, or less."""


def run(plan: Plan, driver: str, url: str) -> None:
    """On a table of its own."""

    async def main() -> None:
        async with database(driver, url) as found:
            await play(plan, found, table=f"inbox_{uuid.uuid4().hex[:12]}", hour=HOUR)

    asyncio.run(main())


@pytest.mark.long
@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
@settings(max_examples=COUNT, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(plans())
def test_an_effect_is_there_once_on_postgresql(postgres_url: str, driver: str, plan: Plan) -> None:
    """By the inbox's own transaction, with every `settle`."""
    run(plan, driver, postgres_url)


@pytest.mark.long
@settings(max_examples=COUNT, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(plans(bare=True))
def test_a_bare_claim_keeps_the_law_on_postgresql(postgres_url: str, plan: Plan) -> None:
    """As long as the handler does not fail after its commit."""
    run(plan, "asyncpg", postgres_url)


@pytest.mark.long
@settings(max_examples=COUNT, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(plans())
def test_an_effect_is_there_once_on_sqlite(tmp_path: Path, plan: Plan) -> None:
    """On the real aiosqlite."""
    run(plan, "aiosqlite", str(tmp_path / f"{uuid.uuid4().hex}.sqlite"))

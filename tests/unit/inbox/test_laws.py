"""Whatever handlers do, an effect exists once if its message was ACKed, and otherwise not."""

from __future__ import annotations

import tempfile
from pathlib import Path

from hypothesis import given, settings

from aio_pika_batch.testing import virtual_time
from tests.stories import STORIES
from tests.support.databases import TestDatabase
from tests.support.inbox_stories import Plan, plans, play
from tests.unit.inbox.sqlite import Connection


def run(plan: Plan) -> None:
    """On a database of its own, in virtual time."""
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, "test.sqlite"))
        database = TestDatabase("aiosqlite", path, lambda: Connection(path))
        virtual_time.run(play(plan, database, table="inbox"))


@settings(max_examples=STORIES)
@given(plans())
def test_an_effect_is_there_once_if_its_message_was_acked(plan: Plan) -> None:
    """By the inbox's own transaction, with every `settle`."""
    run(plan)


@settings(max_examples=STORIES)
@given(plans(bare=True))
def test_a_bare_claim_keeps_the_same_law(plan: Plan) -> None:
    """As long as the handler does not fail after its commit."""
    run(plan)

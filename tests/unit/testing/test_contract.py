"""The broker in memory keeps the contract, and whoever breaks it is found out."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest

from aio_pika_batch.testing.contract import Clause, TransportContract
from tests.unit.testing.harness import ALL, opened

QUORUM = replace(ALL, counts_deliveries=True, exclusive_consumers=False)

KINDS = {
    ("3.10", "classic"): ALL,
    ("4.0", "classic"): ALL,
    ("4.3", "classic"): ALL,
    # Without a delivery limit, what is given back goes to the end of the queue.
    ("3.10", "quorum"): replace(QUORUM, keeps_place=False),
    ("4.0", "quorum"): QUORUM,
    ("4.3", "quorum"): replace(QUORUM, spares_returns=True),
}

EVERY_CLAUSE = [
    pytest.param(version, kind, clause, id=f"{version} {kind}: {clause}")
    for (version, kind), features in KINDS.items()
    for clause in TransportContract(opened, features).applicable
]


@pytest.mark.parametrize(("version", "kind", "clause"), EVERY_CLAUSE)
async def test_the_broker_in_memory_keeps(version: str, kind: str, clause: Clause):
    """Each clause, as each release that it imitates, with each kind of queue."""
    features = KINDS[version, kind]
    await TransportContract(partial(opened, version, kind), features).check(clause)

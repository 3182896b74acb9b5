"""How is a topology written so that RabbitMQ can import it?"""

from __future__ import annotations

import pytest

from aio_pika_batch.core.topology import (
    Topology,
    TopologyOptions,
    build_topology,
    depends_on_version,
    to_definitions,
)

WANTED = TopologyOptions(
    queue_name="orders",
    queue_type="quorum",
    exchange_name="shop",
    exchange_type="topic",
    routing_keys=("order.*",),
    dead_letter_queue="orders.dlq",
)


def test_everything_that_a_consumer_needs_is_there():
    """In the words of RabbitMQ's definitions."""
    made = to_definitions(build_topology(WANTED), "/shop", (4, 0))
    assert ["orders.dlx", "shop"] == [each["name"] for each in made["exchanges"]]
    assert {
        "name": "shop",
        "vhost": "/shop",
        "type": "topic",
        "durable": True,
        "auto_delete": False,
        "internal": False,
        "arguments": {},
    } == made["exchanges"][1]
    assert {
        "name": "orders",
        "vhost": "/shop",
        "durable": True,
        "auto_delete": False,
        "arguments": {"x-queue-type": "quorum"},
    } == made["queues"][1]
    assert {
        "source": "shop",
        "vhost": "/shop",
        "destination": "orders",
        "destination_type": "queue",
        "routing_key": "order.*",
        "arguments": {},
    } == made["bindings"][1]


@pytest.mark.parametrize(("version", "expected"), [((4, 0), True), ((3, 13), False), (None, False)])
def test_a_limit_is_lifted_in_the_words_of_the_version(version, expected):
    """Before 4.0 a negative limit would be exceeded at once."""
    assert depends_on_version(build_topology(WANTED))
    made = to_definitions(build_topology(WANTED), "/", version)
    assert expected is ("x-delivery-limit" in made["queues"][0]["arguments"])


def test_nobody_imports_what_is_somebody_elses():
    """What must exist already, and what goes with its connection."""
    mine = build_topology(
        TopologyOptions(queue_name="mine", queue_exclusive=True, dead_letter_exchange="theirs")
    )
    assert not depends_on_version(mine)
    assert {"exchanges": [], "queues": [], "bindings": []} == to_definitions(mine, "/", None)
    assert {"exchanges": [], "queues": [], "bindings": []} == to_definitions(Topology(), "/", None)

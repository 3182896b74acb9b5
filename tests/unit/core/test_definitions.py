"""A topology as definitions that RabbitMQ can import."""

from __future__ import annotations

from dataclasses import replace

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


def test_the_definitions_have_the_whole_topology():
    """In the format of RabbitMQ's definitions."""
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
        "arguments": {
            "x-queue-type": "quorum",
            "x-dead-letter-exchange": "orders.dlx",
            "x-dead-letter-strategy": "at-least-once",
            "x-overflow": "reject-publish",
        },
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
def test_the_delivery_limit_depends_on_the_version(version, expected):
    """Before 4.0 the first redelivery would exceed a negative limit."""
    assert depends_on_version(build_topology(WANTED))
    made = to_definitions(build_topology(WANTED), "/", version)
    assert expected is ("x-delivery-limit" in made["queues"][0]["arguments"])


def test_a_queue_of_an_unknown_type_has_only_arguments_that_every_queue_can_have():
    """A virtual host decides about its type, and a classic queue refuses a delivery limit."""
    settings = replace(WANTED, queue_type=None)

    made = to_definitions(build_topology(settings), "/", (4, 0))

    assert not depends_on_version(build_topology(settings))
    assert {"orders.dlq": {}, "orders": {"x-dead-letter-exchange": "orders.dlx"}} == {
        each["name"]: each["arguments"] for each in made["queues"]
    }


def test_existing_and_exclusive_entities_are_left_out():
    """The definitions contain only what the import must create."""
    mine = build_topology(
        TopologyOptions(queue_name="mine", queue_exclusive=True, dead_letter_exchange="theirs")
    )
    assert not depends_on_version(mine)
    assert {"exchanges": [], "queues": [], "bindings": []} == to_definitions(mine, "/", None)
    assert {"exchanges": [], "queues": [], "bindings": []} == to_definitions(Topology(), "/", None)

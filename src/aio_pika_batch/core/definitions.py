"""How is a topology written so that RabbitMQ can import it?

As `rabbitmqctl import_definitions` and the management's *Import definitions* read it. What must be
there already, and what lives and dies with one connection, is nobody's to import.
"""

from __future__ import annotations

from typing import Any

from aio_pika_batch.core.topology import Topology, Version, split_exclusive


def definitions(topology: Topology, vhost: str, version: Version | None) -> dict[str, Any]:
    """A topology as definitions.

    Args:
        vhost: The virtual host that it is for.
        version: Of the RabbitMQ that shall import it: a delivery limit is lifted in its own words.
    """
    shared, _ = split_exclusive(topology)
    return {
        "exchanges": [
            {
                "name": exchange.name,
                "vhost": vhost,
                "type": exchange.type,
                "durable": exchange.durable,
                "auto_delete": exchange.auto_delete,
                "internal": False,
                "arguments": dict(exchange.arguments),
            }
            for exchange in shared.exchanges
            if exchange.name and not exchange.check_only
        ],
        "queues": [
            {
                "name": queue.name,
                "vhost": vhost,
                "durable": queue.durable,
                "auto_delete": queue.auto_delete,
                "arguments": dict(queue.arguments_on(version)),
            }
            for queue in shared.queues
            if not queue.check_only
        ],
        "bindings": [
            {
                "source": binding.exchange,
                "vhost": vhost,
                "destination": binding.queue,
                "destination_type": "queue",
                "routing_key": binding.routing_key,
                "arguments": dict(binding.arguments),
            }
            for binding in shared.bindings
            if binding.exchange
        ],
    }


def depends_on_version(topology: Topology) -> bool:
    """Whether it has to be known which RabbitMQ shall import it."""
    return any(queue.no_delivery_limit for queue in topology.queues)

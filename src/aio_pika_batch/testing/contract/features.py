"""What can one broker do that another cannot?

What every transport owes is not listed here. The rest is claimed feature by feature: what is
claimed is checked, and what is not claimed is reported as not applicable.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Features:
    """What a transport claims, and what its harness can do to it.

    Attributes:
        keeps_order: Messages are handed out in the order in which they were put into the queue.
        keeps_place: What is given back is handed out again before what was never handed out.
        prefetches: Messages leave their queue before anybody asks for them, as many as may.
        marks_redelivered: A message that was handed out before says so.
        counts_deliveries: A message that was requeued says how often, in `delivery_count`.
        spares_returns: A message that was returned is not counted as delivered.
        dead_letters: What is rejected goes to the queue `Harness.dead_letters`.
        returns_unroutable: A mandatory publication that no queue takes is `RETURNED`.
        refuses_when_full: What the queue `Harness.full` has no room for is `REFUSED`.
        has_exchanges: A publication to an exchange that is not there is `REFUSED`.
        carries_properties: All properties of a message arrive, and absent ones stay absent.
        checks_users: A connection has a user, and a copy does not carry another's name.
        declares: Queues can be declared, and `check_only` finds them missing.
        compares: Declaring what exists otherwise is a `TopologyError`.
        exclusive_consumers: A queue can be consumed by one session alone.
        exclusive_queues: A queue can live and die with the session that declares it.
        pumps: Its sessions can pump.
        has_native: Its sessions have objects of the broker's own library.
        tells_version: It knows the version of RabbitMQ that it has reached.
        counts_ready: It knows how many messages are ready in a queue.
        can_cut: The harness can cut the transport's connections.
        can_hush: The harness can keep the broker's answers from the transport.
        can_end_subscriptions: The harness can let the broker end a consumer and keep its
            connection.
        can_lock_out: The harness can make the broker unreachable.
    """

    keeps_order: bool = False
    keeps_place: bool = False
    prefetches: bool = False
    marks_redelivered: bool = False
    counts_deliveries: bool = False
    spares_returns: bool = False
    dead_letters: bool = False
    returns_unroutable: bool = False
    refuses_when_full: bool = False
    has_exchanges: bool = False
    carries_properties: bool = False
    checks_users: bool = False
    declares: bool = False
    compares: bool = False
    exclusive_consumers: bool = False
    exclusive_queues: bool = False
    pumps: bool = False
    has_native: bool = False
    tells_version: bool = False
    counts_ready: bool = False
    can_cut: bool = False
    can_hush: bool = False
    can_end_subscriptions: bool = False
    can_lock_out: bool = False

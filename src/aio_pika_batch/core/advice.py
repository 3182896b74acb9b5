"""What works, and is still not what anybody would want?

One line for each finding: what it is, what it leads to, and what to do.
"""

from __future__ import annotations

from aio_pika_batch.core.topology import (
    DEAD_LETTER_EXCHANGE,
    Wanted,
    dead_letter_target,
    effective_queue_type,
)


def advice(wanted: Wanted, *, prefetch: int, batch_size: int) -> list[str]:
    """Look for what will surprise somebody later.

    Args:
        prefetch: The prefetch count that is used; 0 means no limit.
    """
    found = []
    if 0 < prefetch < batch_size:
        found.append(
            f"prefetch_count={prefetch} is below batch_size={batch_size}: batches are cut at"
            f" {prefetch} messages; raise prefetch_count, or leave it unset"
        )
    if dead_letter_target(wanted) is None:
        found.append(
            "no dead-letter exchange is known: unless a policy sets one, the broker discards what"
            " is NACKed or exhausted; set dead_letter_exchange, or dead_letter_queue to have both"
            " declared"
        )
    if (
        effective_queue_type(wanted) == "quorum"
        and DEAD_LETTER_EXCHANGE not in wanted.queue_arguments
    ):
        found.append(
            "a quorum queue drops messages that were delivered too often (RabbitMQ 4: 20 times"
            f" unless x-delivery-limit says otherwise): set {DEAD_LETTER_EXCHANGE} in"
            " queue_arguments, or by a policy, to keep them"
        )
    return found

"""What can a broker be told about what it delivered?"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Disposition(Enum):
    """What a broker can be told about one delivery."""

    ACK = "ack"
    """`basic.ack`: done, forget it."""
    REJECT = "reject"
    """`basic.reject(requeue=False)`: dead-letter it as the queue says, else discard it."""
    REQUEUE = "requeue"
    """`basic.reject(requeue=True)`: it failed; deliver it again, and count this one."""
    RETURN = "return"
    """`basic.nack(requeue=True)`: it was not started; newer brokers do not count this one."""


@dataclass(frozen=True, slots=True)
class Settlement:
    """One disposition for some deliveries of one session.

    Grouped, because a batch has hundreds of messages and hardly ever more than two dispositions.
    """

    disposition: Disposition
    tags: tuple[int, ...]

"""What can be configured about batches, beyond what holds for every consumer?"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from aio_pika_batch.fields import Count, Seconds
from aio_pika_batch.settings import ConsumerSettings


class BatchConsumerSettings(ConsumerSettings):
    """Settings of a :class:`~aio_pika_batch.BatchConsumer`."""

    batch_size: Count = Field(default=10, description="Most messages in a batch.")
    batch_timeout: Seconds = Field(
        default=5.0, description="How long a batch's first message waits for the batch to fill."
    )
    batch_max_bytes: Count | None = Field(
        default=None,
        description="Most bytes of bodies in a batch; a message that is larger goes alone. None: no"
        " limit.",
    )
    settle: Literal["batch", "yield", "atomic"] = Field(
        default="batch",
        description="When results are settled. `batch`: all together, when the handler has ended;"
        " `yield`: while it runs, each within `settle_interval`; `atomic`: as `batch`, and a"
        " failure voids the batch's ACKs.",
    )
    settle_interval: Seconds = Field(
        default=0.1, description='With `settle="yield"`: how soon a yield is settled.'
    )
    isolate_failures: bool = Field(
        default=False,
        description="After an exception, run what was left undecided again in halves until the"
        " culprits stand alone; only they get the failure's result.",
    )
    isolate_limit: Count = Field(
        default=10, description="How many culprits are looked for in a batch, at most."
    )

    @property
    def messages_per_batch(self) -> int:
        """How many messages a handler gets at most."""
        return self.batch_size

    @property
    def seconds_per_batch(self) -> float:
        """How long a handler's messages are collected at most."""
        return self.batch_timeout

    @property
    def bytes_per_batch(self) -> int | None:
        """How many bytes a handler's messages have at most, unless it is one."""
        return self.batch_max_bytes

    @property
    def seconds_until_settled(self) -> float | None:
        """How soon a yield is settled at the latest; None: when its batch has been handled."""
        return self.settle_interval if self.settle == "yield" else None

    @property
    def is_atomic(self) -> bool:
        """Whether a failure voids the ACKs of its batch."""
        return self.settle == "atomic"

    @property
    def culprits_per_batch(self) -> int:
        """How many culprits are looked for in a batch that failed."""
        return self.isolate_limit if self.isolate_failures else 0

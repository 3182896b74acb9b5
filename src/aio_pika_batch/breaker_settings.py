"""When does a worker pause, and for how long? The settings that say so.

They stand apart from the others because :mod:`aio_pika_batch.settings` is long enough.
"""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator
from pydantic_settings import BaseSettings

from aio_pika_batch.core.circuit_breaker import BreakerPolicy
from aio_pika_batch.core.retry import Backoff
from aio_pika_batch.fields import Count, Seconds


class BreakerSettings(BaseSettings):
    """A part of all consumers' settings."""

    breaker_threshold: Annotated[float, Field(gt=0, le=1)] | None = Field(
        default=None,
        description="A worker pauses when this share of its messages has failed; none: never.",
    )
    breaker_window: Seconds = Field(
        default=30.0, description="For how long a message counts for `breaker_threshold`."
    )
    breaker_min_samples: Count = Field(
        default=20, description="With fewer messages in `breaker_window` nobody pauses."
    )
    breaker_pause: Seconds = Field(
        default=30.0,
        description="First pause; then one message at a time is tried until one succeeds. Doubled"
        " each time that one fails instead.",
    )
    breaker_pause_max: Seconds = Field(default=300.0, description="Longest pause of all.")

    @property
    def breaker(self) -> BreakerPolicy | None:
        """When a worker's breaker opens; None if it has none."""
        if self.breaker_threshold is None:
            return None
        return BreakerPolicy(
            self.breaker_threshold,
            self.breaker_window,
            self.breaker_min_samples,
            Backoff(self.breaker_pause, self.breaker_pause_max),
        )

    @model_validator(mode="after")
    def _grows(self) -> Self:
        if self.breaker_pause > self.breaker_pause_max:
            msg = "breaker_pause must not exceed breaker_pause_max"
            raise ValueError(msg)
        return self

"""What does a process that runs consumers have to know?

Plain values, which go to a child process as JSON.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal, Self, TypeAlias

from aio_pika_batch.cli.targets import AnyConsumer, Loading, load

LogFormat: TypeAlias = Literal["auto", "console", "json"]
LogLevel: TypeAlias = Literal["debug", "info", "warning", "error", "critical"]
LoopName: TypeAlias = Literal["auto", "uvloop", "asyncio"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What one process runs, and how.

    Attributes:
        targets: Consumers, each as `module:attribute`.
        workers: Instead of `num_workers`; None: as the settings say.
        drain_timeout: Instead of `shutdown_timeout`, in seconds.
        has_metrics: Whether what consumers do is counted for Prometheus.
    """

    targets: tuple[str, ...]
    loading: Loading = field(default_factory=Loading)
    workers: int | None = None
    drain_timeout: float | None = None
    log_level: LogLevel = "info"
    log_format: LogFormat = "auto"
    loop: LoopName = "auto"
    has_metrics: bool = False

    def load(self) -> list[AnyConsumer]:
        """Load all consumers.

        Raises:
            ConfigurationError: One of them cannot be had.
        """
        given = {"num_workers": self.workers, "shutdown_timeout": self.drain_timeout}
        consumers = [load(target, self.loading, **given) for target in self.targets]
        if self.has_metrics:
            from aio_pika_batch.observers.prometheus import PrometheusObserver

            for consumer in consumers:
                consumer.observe(PrometheusObserver())
        return consumers

    def to_json(self) -> str:
        """Write it on one line."""
        return json.dumps(asdict(self), default=str)

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Read what `to_json` wrote."""
        values = json.loads(text)
        loading = Loading(**values.pop("loading"))
        env_file = None if loading.env_file is None else Path(loading.env_file)
        loading = replace(loading, app_dir=Path(loading.app_dir), env_file=env_file)
        return cls(targets=tuple(values.pop("targets")), loading=loading, **values)

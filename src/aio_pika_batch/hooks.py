"""What is a session's hook given?"""

from __future__ import annotations

from dataclasses import dataclass

from aio_pika_batch.errors import ConfigurationError
from aio_pika_batch.transport import Native, NativeSession, Session


@dataclass(frozen=True, slots=True)
class WorkerSession:
    """One session of one worker, as `on_session` gets it.

    Attributes:
        worker: The worker's index, from 0.
        epoch: Counts the worker's sessions, from 1.
    """

    worker: int
    epoch: int
    queue_name: str
    _session: Session

    async def native(self) -> Native:
        """The broker library's own channel and queue, apart from the consuming channel.

        Raises:
            ConfigurationError: This transport has none.
        """
        if not isinstance(self._session, NativeSession):
            msg = f"{type(self._session).__name__} has no channel of its broker library to hand out"
            raise ConfigurationError(msg)
        return await self._session.native()

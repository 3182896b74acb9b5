"""When does a consumer start, when is it well, and how does it stop?

Lifecycle, hooks, health and publishing, shared by both kinds of consumer; the work is done by the
crew's workers.
"""

from __future__ import annotations

import asyncio
import copy
import functools
import logging
from collections.abc import Hashable, Sequence
from types import TracebackType
from typing import Any, ClassVar, Generic, Self, TypeVar

from aio_pika_batch.core.config_checks import ConsumerProfile, broker_warnings_for, warnings_for
from aio_pika_batch.core.message import Headers, Message
from aio_pika_batch.core.publication import Outcome, Publication
from aio_pika_batch.core.results import ExceptionResults
from aio_pika_batch.errors import ConfigurationError, PublishError, SessionClosed, StartInterrupted
from aio_pika_batch.hooks import WorkerSession
from aio_pika_batch.logs import KeywordLogger
from aio_pika_batch.observer import Observer
from aio_pika_batch.runtime.batching import check_batch_key
from aio_pika_batch.runtime.consume_loop import ConsumeLoop
from aio_pika_batch.runtime.handler import Process
from aio_pika_batch.runtime.lifecycle import Lifecycle
from aio_pika_batch.runtime.publishing import describe_outcome
from aio_pika_batch.runtime.signals import process_signals
from aio_pika_batch.runtime.worker_pool import WorkerInstance, WorkerPool
from aio_pika_batch.settings import ConsumerSettings
from aio_pika_batch.status import ConsumerStatus
from aio_pika_batch.transport import (
    Endpoint,
    Session,
    Transport,
    VersionedTransport,
    open_transport,
)

SettingsT = TypeVar("SettingsT", bound=ConsumerSettings)


class BaseConsumer(Generic[SettingsT]):
    """Lifecycle, hooks and health, shared by both kinds of consumer.

    Args:
        settings: None takes them from the environment.
        transport: None takes the one that serves the URL's scheme.
        observers: Told what happens.

    Raises:
        ConfigurationError: The settings, or the class, cannot work.
    """

    settings_class: ClassVar[type[ConsumerSettings]] = ConsumerSettings
    """What `settings=None` makes."""

    exception_results: ClassVar[ExceptionResults] = {}
    """What becomes of undecided messages when an exception of such a class (or of a subclass of it;
    the most specific one counts) leaves the handler. What is not listed gets
    `unhandled_exception_action`."""

    settings: SettingsT

    def __init__(
        self,
        settings: SettingsT | None = None,
        *,
        transport: Transport | None = None,
        observers: Sequence[Observer] = (),
    ) -> None:
        self._check_class()
        self.settings = settings if settings is not None else self._settings_from_environment()
        check_batch_key(
            type(self).__name__,
            type(self).batch_key,
            overridden=self._overrides("batch_key"),
            ordered=self.settings.ordered_by_key,
        )
        self._transport = transport if transport is not None else open_transport(self._endpoint())
        self._observers = tuple(observers)
        self._name = type(self).__name__
        self._log = KeywordLogger(
            logging.getLogger("aio_pika_batch.consumer"),
            consumer=self._name,
            queue=self.settings.queue_name,
        )
        self._life = Lifecycle(self._log)
        self._current: ConsumeLoop | None = None

    def configure(self, **given: Any) -> None:  # noqa: ANN401  -- each setting has its own type
        """Replace some settings before the start, as a command line does.

        A transport that was handed in stays, unless another URL is given.

        Raises:
            ConfigurationError: A value makes no sense, or it is running already.
        """
        if not given:
            return
        if self.is_running:
            msg = f"{self._name} is running: settings can be replaced before its start only"
            raise ConfigurationError(msg)
        self.settings = self.settings.replaced(**given)
        if "url" in given:
            self._transport = open_transport(self._endpoint())

    def observe(self, observer: Observer) -> None:
        """Add an observer before the start, unless there is one of its class."""
        if not any(isinstance(each, type(observer)) for each in self._observers):
            self._observers = (*self._observers, observer)

    # -- what you override ------------------------------------------------------------------------

    async def on_start(self) -> None:
        """Called once before the first worker consumes, whatever `num_workers` is."""

    async def on_stop(self) -> None:
        """Called once after the last worker has stopped, if `on_start` had finished."""

    async def on_session(self, session: WorkerSession) -> None:
        """Called for each session of each worker, before its first message.

        Each worker has an instance of its own then (worker 0 this one, the others a `copy.copy`
        made after `on_start`), so that what a session stores on `self` stays with its worker.
        """

    def batch_key(self, message: Message) -> Hashable | None:  # noqa: ARG002  -- for those who override it
        """The key of a message: a batch holds messages of one key only.

        With `ordered_by_key`, batches of one key are handled one after another, in their order.
        None is no key: such messages share batches, and have no order to keep. If it raises, this
        message alone is treated as if its handler had raised.

        It is asked once for each message, when it arrives, on the event loop: it must be quick.
        """
        return None

    async def _run_internal(
        self,
        channel: Any,  # noqa: ANN401  -- the broker library's own
        queue: Any,  # noqa: ANN401
        settings: ConsumerSettings,
        stop_event: asyncio.Event,
        log: KeywordLogger,
    ) -> None:
        """Called for each session of each worker; `super()` consumes until the session ends.

        `channel` and `queue` are for declarations and publishes; messages are consumed on another
        channel. New code overrides `on_session` instead.
        """
        del channel, queue, settings, stop_event, log
        if self._current is None:
            msg = "_run_internal is called by the library, once for each session"
            raise SessionClosed(msg)
        await self._current.consume()

    def _process(self) -> Process:
        raise NotImplementedError

    def _check_class(self) -> None:
        raise NotImplementedError

    # -- lifecycle --------------------------------------------------------------------------------

    async def run(self) -> None:
        """Start, wait, and drain at SIGINT, SIGTERM or `stop`.

        Raises:
            TransportError: The broker says no, for good.
            DrainIncomplete: The drain was abandoned at a second signal, or `shutdown_timeout` cut
                handlers off.
        """
        life = self._life
        with process_signals.listen(life.request_stop, life.abandon):
            try:
                await self.start()
            except StartInterrupted:
                return
            try:
                if life.crew is not None:
                    await life.crew.watch()
            finally:
                life.request_stop()
                incomplete = await life.drained()
        if incomplete is not None:
            raise incomplete

    async def start(self) -> None:
        """Start; returns once every worker consumes. A broker that is not there yet is waited for.

        Raises:
            TransportError: The broker says no, for good: password, virtual host, queue, exchange.
            StartInterrupted: `stop` was called meanwhile.
            ConfigurationError: It is running already.
        """
        if self._life.crew is not None:
            msg = f"{self._name} is running already: stop it before you start it again"
            raise ConfigurationError(msg)
        wanted, habits = self.settings.wanted, self._habits()
        for line in warnings_for(wanted, habits):
            self._log.warning(line)
        await self._life.begin(
            WorkerPool(self._name, self.settings, self._transport, self._observers, self._log),
            on_start=self.on_start,
            on_stop=self.on_stop,
            seats=self._seats,
            timeout=self.settings.shutdown_timeout,
        )
        reached = isinstance(self._transport, VersionedTransport) and self._transport.broker_version
        for line in broker_warnings_for(wanted, habits, reached or None):
            self._log.warning(line)

    async def stop(self) -> None:
        """Drain and stop; idempotent, from any task, also during `start`.

        Called by a handler or a hook, or in a task that one of them has started, it returns at
        once, since the drain waits for them.
        """
        await self._life.stop()

    def request_stop(self) -> None:
        """Begin to drain, without waiting for it."""
        self._life.request_stop()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.stop()

    # -- health -----------------------------------------------------------------------------------

    @property
    def is_running(self) -> bool:
        """Whether it has been started and has not stopped."""
        return self._life.crew is not None

    @property
    def is_healthy(self) -> bool:
        """Whether every worker consumes, and none holds a message for longer than `stuck_after`."""
        crew = self._life.crew
        return crew is not None and crew.is_healthy()

    def status(self) -> ConsumerStatus:
        """A snapshot of everything."""
        crew = self._life.crew
        return ConsumerStatus(
            consumer=self._name,
            queue=self.settings.queue_name,
            is_running=self.is_running,
            is_healthy=self.is_healthy,
            workers=crew.statuses if crew else (),
            is_stuck=crew is not None and crew.is_stuck(),
        )

    # -- publishing -------------------------------------------------------------------------------

    async def publish(
        self,
        body: bytes,
        *,
        exchange: str = "",
        routing_key: str = "",
        headers: Headers | None = None,
        mandatory: bool = True,
        **properties: Any,  # noqa: ANN401  -- those of Publication, each with its own type
    ) -> None:
        """Publish a message and wait for its confirmation.

        Args:
            mandatory: Whether it is an error if no queue takes it.
            **properties: Further ones of :class:`~aio_pika_batch.Publication`, such as
                `message_id`.

        Raises:
            PublishError: It was returned, refused, or nothing was heard of it in `publish_timeout`.
            SessionClosed: The consumer is not running.
        """
        publication = Publication(
            body,
            exchange=exchange,
            routing_key=routing_key,
            headers=headers,
            mandatory=mandatory,
            **properties,
        )
        [outcome] = await self.publish_many([publication])
        if outcome is not Outcome.CONFIRMED:
            raise PublishError(
                describe_outcome(outcome, publication, self.settings.publish_timeout)
            )

    async def publish_many(self, publications: Sequence[Publication]) -> Sequence[Outcome]:
        """Publish many messages at once and wait for all confirmations.

        Returns:
            An outcome for each, in order.

        Raises:
            SessionClosed: The consumer is not running.
        """
        crew = self._life.crew
        if crew is None:
            msg = "publishing needs a running consumer: between start and stop, hooks included"
            raise SessionClosed(msg)
        return await crew.post.publish(publications)

    # -- inside -----------------------------------------------------------------------------------

    def _settings_from_environment(self) -> SettingsT:
        settings: Any = self.settings_class()
        made: SettingsT = settings
        return made

    def _habits(self) -> ConsumerProfile:
        settings = self.settings
        return ConsumerProfile(
            prefetch=settings.effective_prefetch,
            batch_size=settings.messages_per_batch,
            batch_timeout=settings.seconds_per_batch,
            concurrency=settings.concurrency,
            process_timeout=settings.process_timeout,
            max_requeue_attempts=settings.max_requeue_attempts,
            failure_results={
                settings.unhandled_exception_action,
                *self.exception_results.values(),
            },
            consumer_arguments=settings.consumer_arguments or {},
            retry_seconds=settings.delay_steps.total_seconds(settings.max_requeue_attempts),
            ordered=settings.ordered_by_key,
        )

    def _endpoint(self) -> Endpoint:
        settings = self.settings
        password = settings.ssl_key_password
        return Endpoint(
            url=settings.url,
            connect_timeout=settings.connect_timeout,
            heartbeat=settings.heartbeat,
            publish_timeout=settings.publish_timeout,
            connection_name=settings.connection_name
            or f"{type(self).__name__} ({settings.queue_name})",
            ssl_cafile=settings.ssl_cafile,
            ssl_certfile=settings.ssl_certfile,
            ssl_keyfile=settings.ssl_keyfile,
            ssl_key_password=None if password is None else password.get_secret_value(),
            wire=settings.wire,
        )

    def _seats(self) -> list[WorkerInstance]:
        count = self.settings.num_workers
        if self._overrides("on_session") or self._overrides("_run_internal"):
            instances = [self, *(copy.copy(self) for _ in range(count - 1))]
        else:
            instances = [self] * count
        return [instance._seat(index) for index, instance in enumerate(instances)]  # noqa: SLF001  -- our own

    def _seat(self, index: int) -> WorkerInstance:
        attend = functools.partial(self._attend, index)
        batch_key = self.batch_key if self._overrides("batch_key") else None
        return WorkerInstance(self._process(), batch_key, attend, self.exception_results)

    def _overrides(self, name: str) -> bool:
        return getattr(type(self), name) is not getattr(BaseConsumer, name)

    async def _attend(
        self, index: int, epoch: ConsumeLoop, session: Session, number: int, log: KeywordLogger
    ) -> None:
        """Run this instance's hooks around the consumption of one session."""
        worker_session = WorkerSession(index, number, self.settings.queue_name, session)
        if self._overrides("on_session"):
            await self.on_session(worker_session)
        if not self._overrides("_run_internal"):
            await epoch.consume()
            return
        native = await worker_session.native()
        self._current = epoch
        try:
            await self._run_internal(
                channel=native.channel,
                queue=native.queue,
                settings=self.settings,
                stop_event=epoch.stop.event,
                log=log,
            )
        finally:
            self._current = None

"""The classes to subclass: BatchConsumer, and Consumer for one message at a time."""

from __future__ import annotations

import asyncio
import copy
import functools
import inspect
import logging
from collections.abc import AsyncIterator, Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, is_dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Self, TypeAlias, cast, get_args

from typing_extensions import TypeVar

from aio_pika_batch.core.config_checks import (
    broker_warnings_for,
    costliest_setting,
    hints_for,
    warnings_for,
)
from aio_pika_batch.core.message import Message
from aio_pika_batch.core.results import (
    ExceptionResults,
    MessageResult,
    Nack,
    Requeue,
    Result,
    describe,
)
from aio_pika_batch.core.topology_options import refuse_loops
from aio_pika_batch.errors import (
    ConfigurationError,
    SessionClosed,
    StartInterrupted,
)
from aio_pika_batch.logs import KeywordLogger, missing_configuration
from aio_pika_batch.masking import mask_url
from aio_pika_batch.observer import Observer
from aio_pika_batch.publisher import PublishMethods
from aio_pika_batch.runtime.consume_loop import ConsumeLoop, WorkerInstance
from aio_pika_batch.runtime.handler import HandlerMistake, InvalidResult, Process, ResultsAtOnce
from aio_pika_batch.runtime.lifecycle import Lifecycle
from aio_pika_batch.runtime.publishing import SharedPublisher
from aio_pika_batch.runtime.shutdown import process_signals
from aio_pika_batch.runtime.worker_config import WorkerConfig
from aio_pika_batch.runtime.worker_pool import WorkerPool
from aio_pika_batch.settings import BatchConsumerSettings, ConsumerSettings, plain_url
from aio_pika_batch.settings.derived import consumer_profile, endpoint, topology_options
from aio_pika_batch.status import ConsumerStatus
from aio_pika_batch.transport import (
    FallingBackTransport,
    Native,
    NativeSession,
    Session,
    Transport,
    VersionedTransport,
    open_transport,
    server_of,
)

_PATIENCE = 2.0
"""Seconds that `async with` waits for a broker that doesn't answer: an application with a consumer
must come up without its broker. A broker that refuses the connection isn't waited for at all."""

# Covariant, so that a `BatchConsumer[MySettings]` is a `BatchConsumer`.
SettingsT_co = TypeVar(
    "SettingsT_co", bound=ConsumerSettings, default=ConsumerSettings, covariant=True
)
BatchSettingsT_co = TypeVar(
    "BatchSettingsT_co", bound=BatchConsumerSettings, default=BatchConsumerSettings, covariant=True
)

Yield: TypeAlias = Result | tuple[Message, Result]
"""The values that `process_messages` can yield."""

if TYPE_CHECKING:
    # Subclasses of Any, so that a handler can annotate its parameter as it likes: `list[Message]`,
    # `Sequence[Message]`, or aio-pika's class, as code for 0.1.0 does. Without an annotation, type
    # checkers still know the messages.
    class _Messages(Any):  # type: ignore[misc]
        def __iter__(self) -> Iterator[Message]: ...

    class _Message(Message, Any): ...  # type: ignore[misc]

else:
    _Messages, _Message = list[Message], Message


@dataclass(frozen=True, slots=True)
class WorkerSession:
    """One session of one worker, as `on_session` gets it.

    Attributes:
        worker: The worker's index, from 0.
        epoch: The number of the worker's session, from 1.
        queue_name: The queue that is consumed.
    """

    worker: int
    epoch: int
    queue_name: str
    _session: Session

    async def native(self) -> Native:
        """Return the broker library's own channel and queue, apart from the consuming channel.

        Raises:
            ConfigurationError: This transport has none.
        """
        if not isinstance(self._session, NativeSession):
            msg = f"{type(self._session).__name__} has no channel of its broker library to hand out"
            raise ConfigurationError(msg)
        return await self._session.native()


class BaseConsumer(PublishMethods, Generic[SettingsT_co]):
    """Lifecycle, hooks, health and publishing of both kinds of consumer.

    Args:
        settings: None reads them from the environment.
        transport: None uses the one that serves the URL's scheme.
        observers: Notified of everything that happens.

    Raises:
        ConfigurationError: The settings or the class can't work.
    """

    settings_class: ClassVar[type[ConsumerSettings]] = ConsumerSettings
    """The class of the settings. `BatchConsumer[MySettings]` sets it, too."""

    exception_results: ClassVar[ExceptionResults] = {}
    """Results of undecided messages by the class of the exception that left the handler.

    Subclasses of a listed class match; the most specific class counts. Exceptions that aren't
    listed get `unhandled_exception_action`.
    """

    settings: SettingsT_co

    _made_lifecycle: Lifecycle | None = None
    _is_single: ClassVar[bool] = False
    _has_queue: ClassVar[bool] = True
    """False if messages come from somewhere else, so that advice about queues doesn't apply."""

    def __init_subclass__(cls, **kwargs: Any) -> None:  # noqa: ANN401  -- as other classes have it
        super().__init_subclass__(**kwargs)
        if "settings_class" not in vars(cls):
            for base in vars(cls).get("__orig_bases__", ()):
                for each in get_args(base):
                    if isinstance(each, type) and issubclass(each, ConsumerSettings):
                        cls.settings_class = each

    def __init__(
        self,
        settings: SettingsT_co | None = None,
        *,
        transport: Transport | None = None,
        observers: Sequence[Observer] = (),
    ) -> None:
        self._name = type(self).__name__
        # First: a class that can't work should fail where it is made, not at its first message.
        self._check_class()
        self._check_hooks()
        self._check_exception_results()
        self.settings = (
            cast("SettingsT_co", self.settings_class()) if settings is None else settings
        )
        self._check_settings()
        self._check_batch_key()
        self._transport = transport if transport is not None else self._open_transport()
        self._observers = tuple(observers)
        self._log = KeywordLogger(
            logging.getLogger("aio_pika_batch.consumer"),
            consumer=self._name,
            queue=self.settings.queue_name,
        )
        self._made_lifecycle = Lifecycle(self._log)
        self._current: ConsumeLoop | None = None

    def configure(self, **given: Any) -> None:  # noqa: ANN401  -- each setting has its own type
        """Replace some settings before the start, as the command line does.

        A transport that was passed to the constructor is kept, unless another URL is given.

        Raises:
            ConfigurationError: A value is invalid, or the consumer is running.
        """
        if not given:
            return
        if self.is_running:
            msg = f"{self._name} is running: settings can be replaced before its start only"
            raise ConfigurationError(msg)
        self.settings = self.settings.replaced(**given)
        if "url" in given:
            self._transport = self._open_transport()

    def observe(self, observer: Observer) -> None:
        """Add an observer before the start, unless there is one of its class."""
        self._lifecycle  # noqa: B018  -- raises an error if there are no observers yet
        if not any(isinstance(each, type(observer)) for each in self._observers):
            self._observers = (*self._observers, observer)

    # -- what you override ------------------------------------------------------------------------

    async def on_start(self) -> None:
        """Called once before the first worker consumes, whatever `num_workers` is."""

    async def on_stop(self) -> None:
        """Called once after the last worker has stopped, if `on_start` had finished."""

    async def on_session(self, session: WorkerSession) -> None:
        """Called for each session of each worker, before its first message.

        Each worker then has its own instance, so that what a session stores on `self` stays with
        its worker: worker 0 has this one, the others a `copy.copy` of it made after `on_start`.
        """

    def batch_key(self, message: Message) -> Hashable | None:  # noqa: ARG002  -- for overrides
        """Return the key of a message: a batch contains messages of one key only.

        With `ordered_by_key`, batches of one key are handled one after another, in their order.
        None means no key: such messages share batches and have no order. If it raises, only this
        message is treated as if its handler had raised.

        It is called once for each message when it arrives, on the event loop, so it must be quick.
        """
        return None

    async def _run_internal(
        self,
        channel: Any,  # noqa: ANN401  -- the broker library's own
        queue: Any,  # noqa: ANN401  -- the same
        settings: Any,  # noqa: ANN401  -- an override may name its own class
        stop_event: asyncio.Event,
        log: Any,  # noqa: ANN401  -- a KeywordLogger; code for 0.1.0 annotates structlog's
    ) -> None:
        """Called for each session of each worker; `super()` consumes until the session ends.

        `channel` and `queue` are for declarations and publishes; messages are consumed on another
        channel. New code overrides `on_session` instead.
        """
        del channel, queue, settings, stop_event, log
        if self._current is None:
            raise SessionClosed("_run_internal is called by the library, once for each session")
        await self._current.consume()

    def _process(self) -> Process:
        raise NotImplementedError

    def _check_class(self) -> None:
        raise NotImplementedError

    # -- lifecycle --------------------------------------------------------------------------------

    async def run(self, *, signals: bool = True) -> None:
        """Start, consume, and drain at SIGINT, SIGTERM or `stop`.

        Args:
            signals: Whether to drain at SIGINT and SIGTERM. After the drain, handlers that the
                program has set before are called. With False, the program calls `stop`.

        Raises:
            TransportError: The broker refuses for good.
            ConfigurationError: The handler can't work: it returns a list, or never a result.
            DrainIncomplete: A second signal abandoned the drain, or `shutdown_timeout` cut handlers
                off.
        """
        lifecycle = self._lifecycle
        listening = process_signals.listen(lifecycle.request_stop, lifecycle.abandon)
        with listening if signals else nullcontext():
            try:
                await self.start()
            # A signal during the start is a stop like any other.
            except StartInterrupted:
                return
            try:
                if lifecycle.pool is not None:
                    await lifecycle.pool.watch()
            finally:
                # Also if a worker has failed: the others finish what they have.
                lifecycle.request_stop()
                failure = await lifecycle.drained()
        if failure is not None:
            raise failure

    async def start(self, *, wait: bool = True) -> None:
        """Start, and return once every worker consumes. An absent broker is waited for.

        Args:
            wait: False returns after `on_start`, and connects in the background. Then a refusal of
                the broker is logged and retried, not raised.

        Raises:
            TransportError: The broker refuses for good: password, virtual host, queue, exchange.
            StartInterrupted: `stop` was called meanwhile.
            ConfigurationError: The consumer is already running, or its dead letters would come back
                to its own queue.
        """
        await self._start(None if wait else 0.0)

    async def _start(self, patience: float | None) -> None:
        if self._lifecycle.pool is not None:
            msg = f"{self._name} is running already: stop it before you start it again"
            raise ConfigurationError(msg)
        settings = self.settings
        options = topology_options(settings)
        refuse_loops(options)
        profile = consumer_profile(settings, self.exception_results.values())
        for line in missing_configuration():
            self._log.warning(line)
        if self._has_queue:
            for line in warnings_for(options, profile):
                self._log.warning(line)
            for line in hints_for(options, profile):
                self._log.info(line)
        await self._lifecycle.begin(
            WorkerPool(
                self._name,
                self._config(),
                self._transport,
                self._observers,
                self._log,
                server=server_of(plain_url(settings)),
                on_running=self._announce,
            ),
            on_start=self.on_start,
            on_stop=self.on_stop,
            instances=self._instances,
            timeout=settings.shutdown_timeout,
            patience=patience,
        )
        if not self._has_queue or (patience is not None and not self.is_healthy):
            return
        # Only now: the version is known once the topology has been declared.
        version = isinstance(self._transport, VersionedTransport) and self._transport.broker_version
        for line in broker_warnings_for(options, profile, version or None):
            self._log.warning(line)

    def _announce(self) -> None:
        settings = self.settings
        batches: dict[str, object] = {}
        if isinstance(settings, BatchConsumerSettings):
            batches["batch_size"] = settings.batch_size
            batches["batch_timeout"] = f"{settings.batch_timeout:g} s"
        self._log.announce(
            "the consumer is running",
            broker=mask_url(plain_url(settings)),
            **batches,
            workers=settings.num_workers,
            concurrency=settings.concurrency,
            prefetch=settings.effective_prefetch,
        )

    async def stop(self) -> None:
        """Drain and stop. It is idempotent, and may be called from any task, also during `start`.

        It may also be called in another thread, with an event loop of its own.

        In a handler or a hook, or in a task that one of them has started, it returns at once,
        because the drain waits for them.
        """
        await self._lifecycle.stop()

    def request_stop(self) -> None:
        """Begin to drain, without waiting for it. It may be called from any thread."""
        self._lifecycle.request_stop()

    async def __aenter__(self) -> Self:
        """Start. If the broker is away, connecting goes on in the background."""
        await self._start(_PATIENCE)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    # -- health -----------------------------------------------------------------------------------

    @property
    def is_running(self) -> bool:
        """Whether it has been started and has not stopped."""
        return self._lifecycle.pool is not None

    @property
    def is_healthy(self) -> bool:
        """Whether every worker consumes, and none holds a message for longer than `stuck_after`."""
        pool = self._lifecycle.pool
        return pool is not None and pool.is_healthy()

    def status(self) -> ConsumerStatus:
        """Return a snapshot of the consumer and its workers."""
        pool = self._lifecycle.pool
        transport: object = self._transport
        return ConsumerStatus(
            consumer=self._name,
            queue=self.settings.queue_name,
            is_running=self.is_running,
            is_healthy=self.is_healthy,
            workers=pool.statuses if pool else (),
            is_stuck=pool is not None and pool.is_stuck(),
            fallbacks=transport.fallbacks if isinstance(transport, FallingBackTransport) else 0,
            costliest_setting=self._costliest_setting,
        )

    # -- inside -----------------------------------------------------------------------------------

    def _publisher(self) -> tuple[SharedPublisher, float]:
        pool = self._lifecycle.pool
        if pool is None:
            msg = "publishing needs a running consumer: between start and stop, hooks included"
            raise SessionClosed(msg)
        return pool.publisher, self.settings.publish_timeout

    @property
    def _lifecycle(self) -> Lifecycle:
        if self._made_lifecycle is None:
            cls: type = type(self)
            msg = (
                f"{cls.__name__}.__init__ has not called super().__init__(settings)"
                f"{': a dataclass never does' if is_dataclass(cls) else ''}"
            )
            raise ConfigurationError(msg)
        return self._made_lifecycle

    def _check_hooks(self) -> None:
        for hook in ("on_start", "on_stop", "on_session"):
            method = inspect.unwrap(getattr(type(self), hook))
            if inspect.isfunction(method) and not inspect.iscoroutinefunction(method):
                msg = f"{self._name}.{hook} is not a coroutine: write `async def {hook}`"
                raise ConfigurationError(msg)

    def _check_exception_results(self) -> None:
        table: Mapping[Any, object] = self.exception_results
        for error, result in table.items():
            name = f"{self._name}.exception_results"
            if not (inspect.isclass(error) and issubclass(error, BaseException)):
                raise ConfigurationError(f"{name}: {error!r} is not a class of exceptions")
            if not isinstance(result, MessageResult | Nack | Requeue):
                raise ConfigurationError(
                    f"{name}[{error.__name__}] is {describe(result)}: use a MessageResult, Nack(…)"
                    " or Requeue(…)"
                )

    def _check_settings(self) -> None:
        settings: object = self.settings
        name, wanted = self._name, self.settings_class
        if isinstance(settings, wanted):
            return
        match settings:
            case type():
                found = f"the class {settings.__name__}"
            case Mapping():
                found = f"a {type(settings).__name__}; use {name}({wanted.__name__}(**settings))"
            case str():
                found = f"a str; use {name}({wanted.__name__}(url=…, queue_name=…))"
            case _:
                found = f"something of {type(settings)}"
        raise ConfigurationError(f"{name} needs an instance of {wanted.__name__}, not {found}")

    def _check_batch_key(self) -> None:
        if inspect.iscoroutinefunction(type(self).batch_key):
            raise ConfigurationError(
                f"{self._name}.batch_key is a coroutine: it must be a plain `def` that returns the"
                " key"
            )
        if self.settings.ordered_by_key and not self._overrides("batch_key"):
            raise ConfigurationError(
                f"ordered_by_key=True keeps the order of each key, but {self._name} has no keys:"
                " override batch_key(self, message)"
            )

    @functools.cached_property
    def _costliest_setting(self) -> str | None:
        profile = consumer_profile(self.settings, self.exception_results.values())
        return costliest_setting(profile, singly=self._is_single)

    def _config(self) -> WorkerConfig:
        return WorkerConfig.from_settings(
            self.settings, self.exception_results, singly=self._is_single
        )

    def _open_transport(self) -> Transport:
        return open_transport(endpoint(self.settings, self._name))

    def _instances(self) -> list[WorkerInstance]:
        count = self.settings.num_workers
        if self._overrides("on_session") or self._overrides("_run_internal"):
            # Session hooks store channels on `self`, which workers must not overwrite.
            consumers = [self, *(copy.copy(self) for _ in range(count - 1))]
        else:
            consumers = [self] * count
        return [each._instance(index) for index, each in enumerate(consumers)]  # noqa: SLF001  -- same class

    def _instance(self, index: int) -> WorkerInstance:
        batch_key = self.batch_key if self._overrides("batch_key") else None
        return WorkerInstance(self._process(), batch_key, functools.partial(self._attend, index))

    def _overrides(self, name: str) -> bool:
        return getattr(type(self), name) is not getattr(BaseConsumer, name)

    async def _attend(
        self, index: int, loop: ConsumeLoop, session: Session, epoch: int, log: KeywordLogger
    ) -> None:
        """Run this instance's hooks around one session."""
        worker_session = WorkerSession(index, epoch, self.settings.queue_name, session)
        if self._overrides("on_session"):
            await self.on_session(worker_session)
        if not self._overrides("_run_internal"):
            await loop.consume()
            return
        native = await worker_session.native()
        self._current = loop
        try:
            await self._run_internal(
                channel=native.channel,
                queue=native.queue,
                settings=self.settings,
                stop_event=loop.shutdown.event,
                log=log,
            )
        finally:
            self._current = None


class BatchConsumer(BaseConsumer[BatchSettingsT_co]):
    """Consumes batches: override `process_messages`.

    Example::

        class Importer(BatchConsumer):
            async def process_messages(self, messages):
                for message in messages:
                    yield MessageResult.ACK if await store(message) else MessageResult.REQUEUE


        settings = BatchConsumerSettings(queue_name="orders", dead_letter_queue="orders.dead")
        asyncio.run(Importer(settings).run())
    """

    settings_class = BatchConsumerSettings

    def process_messages(self, messages: _Messages) -> AsyncIterator[Yield]:
        """Yield a result for each message.

        The i-th result belongs to the i-th message. A handler that works out of order yields
        `(message, result)` instead. Messages that are left undecided, because it raised or ended
        early, get `unhandled_exception_action`: a missing result is never an ACK.

        Args:
            messages: Oldest first, never empty, at most `batch_size`.
        """
        raise NotImplementedError

    def _process(self) -> Process:
        return self.process_messages

    def _check_class(self) -> None:
        if type(self).process_messages is BatchConsumer.process_messages:
            is_single = hasattr(self, "process_message")
            hint = "; process_message is a Consumer's" if is_single else ""
            msg = f"{self._name} must override process_messages, an async generator{hint}"
            raise ConfigurationError(msg)
        method = self.process_messages
        if inspect.iscoroutinefunction(method) or inspect.isgeneratorfunction(method):
            wrong = "has no `yield`" if inspect.iscoroutinefunction(method) else "is not async"
            raise ConfigurationError(
                f"{self._name}.process_messages {wrong}: it must be an `async def` that yields a"
                " MessageResult for each message"
            )
        _check_signature(f"{self._name}.process_messages", method, "messages")


class Consumer(BaseConsumer[SettingsT_co]):
    """Consumes one message at a time: override `process_message`.

    `concurrency` messages are handled at the same time.
    """

    settings_class = ConsumerSettings
    _is_single = True

    async def process_message(self, message: _Message) -> Result:
        """Return the result of a message. If it raises, `unhandled_exception_action` is used."""
        raise NotImplementedError

    async def _answer(self, message: Any) -> tuple[Result]:  # noqa: ANN401  -- as `process_message`
        answer: Any = self.process_message(message)
        if not inspect.isawaitable(answer):
            msg = f"process_message returned {describe(answer)}: it must be an `async def`"
            raise HandlerMistake(msg)
        result = await answer
        if not isinstance(result, MessageResult | Nack | Requeue):
            msg = (
                f"process_message returned {describe(result)}, which is not a result: return a"
                " MessageResult, Nack(…) or Requeue(…)"
            )
            raise (HandlerMistake if result is None else InvalidResult)(msg)
        return (result,)

    def _process(self) -> Process:
        # Its batches have one message each.
        return lambda messages: ResultsAtOnce(self._answer(messages[0]))

    def _check_class(self) -> None:
        if type(self).process_message is Consumer.process_message:
            is_batch = hasattr(self, "process_messages")
            hint = "; process_messages is a BatchConsumer's" if is_batch else ""
            msg = f"{self._name} must override process_message, a coroutine{hint}"
            raise ConfigurationError(msg)
        method = self.process_message
        if inspect.isasyncgenfunction(method) or inspect.isgeneratorfunction(method):
            msg = (
                f"{self._name}.process_message has a `yield`: it must be an `async def` that"
                " returns a MessageResult"
            )
            raise ConfigurationError(msg)
        _check_signature(f"{self._name}.process_message", method, "message")


def _check_signature(name: str, method: Callable[..., object], parameter: str) -> None:
    """Raise an error if the handler can't be called with one argument."""
    try:
        signature = inspect.signature(method)
    except ValueError:  # of a callable that isn't written in Python
        return
    try:
        signature.bind(None)
    except TypeError as error:
        msg = f"{name}{signature} must take self and {parameter}: {error}"
        raise ConfigurationError(msg) from None

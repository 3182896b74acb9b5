"""Settings of a consumer: values, defaults, and the combinations that are refused.

Values come from code, then from the environment, then from `.env`. The prefix of the variables is
`AIO_PIKA_BATCH_` unless a subclass sets another one in `model_config`. Invalid values are refused
at construction, with the field's name and what is allowed. Passwords are never shown.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import (
    BaseModel,
    Field,
    GetCoreSchemaHandler,
    PrivateAttr,
    SecretStr,
    ValidationError,
    ValidatorFunctionWrapHandler,
    model_validator,
)
from pydantic_core import CoreSchema, InitErrorDetails, PydanticCustomError
from pydantic_core.core_schema import no_info_wrap_validator_function
from pydantic_settings import (
    BaseSettings,
    DotEnvSettingsSource,
    EnvSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from aio_pika_batch.core.results import MessageResult
from aio_pika_batch.core.retry import LONGEST_WAIT, check_wait_queue_names, make_delay_steps
from aio_pika_batch.core.topology_options import QUEUE_TYPE
from aio_pika_batch.errors import ConfigurationError
from aio_pika_batch.masking import mask_url
from aio_pika_batch.settings.fields import (
    PREFIX,
    Arguments,
    Count,
    ExchangeName,
    ExchangeType,
    Factor,
    FailureAction,
    Keys,
    Name,
    Pause,
    Seconds,
    ShortString,
    Url,
    explain,
    ignored_variables,
    refuse_unknown,
)

MAX_PREFETCH = 65535
"""The prefetch count is an unsigned 16-bit number (AMQP 0-9-1, basic.qos)."""

DEFAULT_PREFETCH = 10
DEFAULT_STUCK_AFTER = 15 * 60.0

Source: TypeAlias = Literal["code", "environment", "default"]
"""Where a setting's value comes from; a value from `.env` counts as the environment."""


_log = logging.getLogger("aio_pika_batch.settings")

_making: ContextVar[Literal["a part", "a copy"] | None] = ContextVar(
    "aio_pika_batch_settings", default=None
)
"""What is being made: a part of an application's own settings, or a copy of other settings."""


def plain_url(settings: ConsumerSettings) -> str:
    """Return the URL as text, also if a subclass gives it another type."""
    url: Any = settings.url
    return url.get_secret_value() if isinstance(url, SecretStr) else str(url)


def _validate_part(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:  # noqa: ANN401
    token = _making.set("a part")
    try:
        return handler(value)
    except ValidationError as error:
        causes = [each["ctx"].get("error") for each in error.errors() if "ctx" in each]
        ours = [each for each in causes if isinstance(each, ConfigurationError)]
        if not ours:
            raise
        # Pydantic would show the whole input, passwords included.
        why = PydanticCustomError("configuration", "{why}", {"why": str(ours[0])})
        details = InitErrorDetails(type=why, input="(not shown)")
        raise ValidationError.from_exception_data("settings", [details]) from None
    finally:
        _making.reset(token)


def _environment(cls: type[BaseSettings], values: Mapping[str, Any]) -> dict[str, str | None]:
    """Return all variables that settings could read, with names in capitals."""
    file = {"env_file": values["_env_file"]} if "_env_file" in values else {}
    sources = (DotEnvSettingsSource(cls, **file), EnvSettingsSource(cls))
    return {name.upper(): text for each in sources for name, text in each.env_vars.items()}


def _known_names(prefix: object) -> set[str]:
    """Return the settings of this library, and of subclasses with a prefix, if any is given.

    Several consumers may share an environment, so those of all classes count.
    """
    names: set[str] = set()
    left: list[type[BaseSettings]] = [_EssentialSettings]
    while left:
        each = left.pop()
        left += each.__subclasses__()
        is_ours = each.__module__.startswith("aio_pika_batch.")
        if is_ours or (prefix is not None and each.model_config.get("env_prefix") == prefix):
            names |= each.model_fields.keys()
    return names


# Pydantic lists the fields of base classes first, in reverse method resolution order. These two
# base classes exist so that both kinds of settings list their fields in the order of the docs:
# `url`, `queue_name`, the batch settings where there are any, and then the rest.
class _EssentialSettings(BaseSettings):
    """What every consumer needs."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_file=".env",
        # The environment also holds other programs' variables. In code, an unknown name is refused.
        extra="ignore",
        hide_input_in_errors=True,
        validate_default=True,
        # Most programs use only one of these classes, so the others needn't be built at import.
        defer_build=True,
    )

    url: Url = Field(
        default="amqp://guest:guest@localhost:5672/",
        repr=False,
        description="URL of the broker: `amqp://user:password@host1:5672,host2:5672/vhost`,"
        " `amqps://…`, `memory://name`, or another registered scheme. Several hosts are tried in"
        " random order. Several whole URLs can be given, separated by commas.",
    )
    queue_name: Name = Field(
        # Required. Written this way, type checkers accept that it comes from the environment.
        default=...,
        description="Queue to consume from.",
    )


class _BatchSettings(_EssentialSettings):
    """How messages are collected into batches, and how a batch is settled."""

    batch_size: Count = Field(default=10, description="Maximum number of messages in a batch.")
    batch_timeout: Seconds = Field(
        default=5.0,
        description="How long the first message of a batch waits for the batch to fill.",
    )
    batch_max_bytes: Count | None = Field(
        default=None,
        description="Maximum size of a batch's bodies in bytes. A larger message is handled alone."
        " None: no limit.",
    )
    settle: Literal["batch", "yield", "atomic"] = Field(
        default="batch",
        description="When results are settled. `batch`: together, when the handler has ended."
        " `yield`: while the handler runs, each within `settle_interval`. `atomic`: like `batch`,"
        " but an exception voids the batch's ACKs.",
    )
    settle_interval: Seconds = Field(
        default=0.1, description='How soon a yielded result is settled with `settle="yield"`.'
    )
    isolate_failures: bool = Field(
        default=False,
        description="After an exception, run the undecided messages again in halves until the"
        " messages that cause it are found. Only they get the failure's result.",
    )
    isolate_limit: Count = Field(
        default=10,
        description="Maximum number of failing messages that `isolate_failures` looks for in a"
        " batch.",
    )


class ConsumerSettings(_EssentialSettings):
    """Settings of a :class:`~aio_pika_batch.Consumer`, and the base of those for batches.

    Times are in seconds.

    Raises:
        ConfigurationError: A value is invalid, or a name is unknown.
    """

    # -- workers ----------------------------------------------------------------------------------

    num_workers: Count = Field(
        default=1,
        description="Number of independent consumers on the queue, each with its own connection.",
    )
    concurrency: Count = Field(
        default=1, description="Number of handlers that run at the same time, per worker."
    )
    ordered_by_key: bool = Field(
        default=False,
        description="Batches of one `batch_key` never overlap and keep their order. Messages that"
        " fail are retried in place. Requires `num_workers=1`.",
    )
    prefetch_count: int = Field(
        default=DEFAULT_PREFETCH,
        ge=0,
        le=MAX_PREFETCH,
        description="Maximum number of unsettled messages per worker; 0: no limit. If it isn't set,"
        " it begins with `max(10, batch_size × (concurrency + 1))` (see `effective_prefetch`) and"
        " adapts to what is acked.",
    )

    # -- results and retries ----------------------------------------------------------------------

    unhandled_exception_action: FailureAction = Field(
        default=MessageResult.REQUEUE,
        description="Result of messages that the handler left undecided because it raised, ended"
        " early or exceeded `process_timeout`. ACK is not allowed.",
    )
    process_timeout: Seconds | None = Field(
        default=None, description="Time limit of the handler for one batch. None: no limit."
    )
    max_requeue_attempts: int = Field(
        default=3,
        ge=0,
        description="Number of retries by REQUEUE before a message is dead-lettered.",
    )
    requeue_delay: Pause | None = Field(
        default=None,
        description="Delay of the first retry. None: the consumer holds a failed message for"
        " 1, 2, 4, … s, at most 30 s, before it is retried. 0: retries follow at once. More:"
        " messages wait in queues that are declared for this, `<queue_name>.retry.<milliseconds>`.",
    )
    requeue_backoff: Factor = Field(
        default=2.0,
        description="Factor by which each delay is longer than the one before; 1: constant.",
    )
    requeue_delay_max: Seconds = Field(
        default=300.0,
        le=LONGEST_WAIT,
        description="Longest delay, also for `Requeue(delay=…)`.",
    )
    requeue_hold: Seconds = Field(
        default=30.0,
        description="How long a message is held while its retry or dead-letter copy is not"
        " confirmed.",
    )
    retry_count_header: Name = Field(
        default="x-retry-count", description="Header that counts the retries."
    )

    # -- dead letters -----------------------------------------------------------------------------

    dead_letter_queue: Name | None = Field(
        default=None,
        description="Queue for dead letters. The queue, its exchange (`<queue_name>.dlx` unless"
        " `dead_letter_exchange` is set) and their binding are declared.",
    )
    dead_letter_exchange: Name | None = Field(
        default=None,
        description="Exchange for dead letters. None: the one that `queue_arguments` names as"
        " `x-dead-letter-exchange`.",
    )
    dead_letter_exchange_type: ExchangeType | None = Field(
        default=None,
        description="Type of the dead-letter exchange. None: the type that it has; a new one is"
        " `fanout`, or `direct` if `dead_letter_exchange` names it.",
    )
    dead_letter_routing_key: ShortString | None = Field(
        default=None,
        description="Routing key of dead letters. None: each message's original one.",
    )
    broker_dead_letters: bool = Field(
        default=True,
        description="Declare the queue with arguments by which the broker dead-letters to the same"
        " place what it gives up (TTL, length limit, delivery limit). Other programs that declare"
        " the queue must use the same arguments.",
    )
    without_dead_letter: Literal["retry", "reject"] = Field(
        default="retry",
        description="What happens to a message that failed for good if no destination for dead"
        " letters is known. `retry`: it is retried with growing delays, up to `requeue_delay_max`."
        " `reject`: the broker discards it, unless a policy dead-letters it.",
    )
    dead_letter_exception_message: bool = Field(
        default=True,
        description="Dead letters carry the exception's text, up to 1 KiB.",
    )

    # -- crashes ----------------------------------------------------------------------------------

    crash_suspect_after: Count = Field(
        default=3,
        description="A message that came back so often without a result, as after a crash, is"
        ' handled alone, while its process holds no other. Needs `queue_type="quorum"`.',
    )
    crash_limit: int = Field(
        default=8,
        ge=2,
        description="A message that came back so often without a result is dead-lettered, and not"
        " handled again. Keep it below a delivery limit that a policy sets.",
    )

    # -- queue ------------------------------------------------------------------------------------

    queue_type: Literal["classic", "quorum"] | None = Field(
        default=None, description="`x-queue-type`. None: the virtual host's default."
    )
    queue_durable: bool = Field(default=True, description="The queue survives broker restarts.")
    queue_exclusive: bool = Field(
        default=False,
        description="The queue belongs to one connection and is deleted with it.",
    )
    queue_auto_delete: bool = Field(
        default=False, description="The queue is deleted when its last consumer is cancelled."
    )
    queue_arguments: Arguments = Field(
        default=None,
        description="Further queue arguments, such as a TTL or a dead-letter exchange.",
    )
    consumer_arguments: Arguments = Field(
        default=None, description="Arguments of `basic.consume`, such as `x-priority`."
    )
    declare: bool = Field(
        default=True,
        description="Declare queues, exchanges and bindings. False: only check that they exist.",
    )

    # -- exchange and bindings --------------------------------------------------------------------

    exchange_name: ExchangeName | None = Field(
        default=None, description="Exchange to declare and to bind the queue to."
    )
    exchange_type: ExchangeType = Field(
        default="direct",
        description="`direct`, `fanout`, `topic`, `headers`, or a plugin's `x-…`.",
    )
    exchange_durable: bool = Field(
        default=True, description="The exchange survives broker restarts."
    )
    exchange_auto_delete: bool = Field(
        default=False, description="The exchange is deleted with its last binding."
    )
    exchange_internal: bool = Field(
        default=False, description="Only other exchanges can publish to the exchange."
    )
    exchange_arguments: Arguments = Field(
        default=None,
        description="Arguments of the exchange, such as `alternate-exchange`, or `x-delayed-type`"
        " for the type `x-delayed-message`.",
    )
    routing_key: Keys = Field(
        default=None, description="One or several binding keys. None: the queue's name."
    )
    binding_arguments: Arguments = Field(
        default=None,
        description="Arguments of the binding, for example what a headers exchange matches.",
    )

    # -- circuit breaker --------------------------------------------------------------------------

    breaker_threshold: Annotated[float, Field(gt=0, le=1)] | None = Field(
        default=None,
        description="Share of failed messages at which a worker pauses. None: never.",
    )
    breaker_window: Seconds = Field(
        default=30.0, description="How long a message counts towards `breaker_threshold`."
    )
    breaker_min_samples: Count = Field(
        default=20,
        description="Minimum number of messages in `breaker_window` for a worker to pause.",
    )
    breaker_pause: Seconds = Field(
        default=30.0,
        description="First pause. After it, one message at a time is tried until one succeeds. Each"
        " failure doubles the pause.",
    )
    breaker_pause_max: Seconds = Field(default=300.0, description="Longest pause of the breaker.")

    # -- timeouts and health ----------------------------------------------------------------------

    shutdown_timeout: Seconds = Field(
        default=25.0,
        description="Time limit of a graceful shutdown, from the signal to the closed connection.",
    )
    stuck_after: Seconds | None = Field(
        default=None,
        description="A worker that holds a message unsettled for longer is unhealthy. None:"
        " 2 × `process_timeout`, or 15 minutes.",
    )
    connect_timeout: Seconds = Field(
        default=10.0, description="Time limit of one attempt to connect."
    )
    publish_timeout: Seconds = Field(
        default=10.0,
        description="How long a publisher waits for a confirm. For `publish_many`, each confirm"
        " starts it again.",
    )
    heartbeat: int = Field(
        default=30,
        ge=1,
        le=65535,
        description="Heartbeat interval. A peer that is silent for three intervals is considered"
        " dead.",
    )
    reconnect_delay: Seconds = Field(
        default=0.5,
        description="Upper limit of the first pause before reconnecting; doubled each time.",
    )
    reconnect_delay_max: Seconds = Field(
        default=30.0, description="Longest pause before reconnecting."
    )

    # -- connection -------------------------------------------------------------------------------

    connection_name: str | None = Field(
        default=None,
        max_length=255,
        description="Name of the connections in the broker's management interface.",
    )
    ssl_cafile: str | None = Field(
        default=None,
        description="CA certificates (PEM) used to verify the broker; defaults to the system's.",
    )
    ssl_certfile: str | None = Field(default=None, description="Client certificate (PEM).")
    ssl_keyfile: str | None = Field(
        default=None,
        description="Private key of the client certificate (PEM). None: it is in the same file.",
    )
    ssl_key_password: SecretStr | None = Field(
        default=None, description="Password of an encrypted private key. It is never shown."
    )
    wire: Literal["auto", "fast", "plain", "amqp10"] = Field(
        default="auto",
        description="`fast` reads and writes AMQP frames directly. `plain` goes through aio-pika."
        " `auto` is `fast`. `amqp10` consumes quorum queues of RabbitMQ 4 over AMQP"
        " 1.0, where retries and dead letters need no copies.",
    )

    _in_code: frozenset[str] = PrivateAttr(default=frozenset())

    _ignored_variables: tuple[str, ...] = PrivateAttr(default=())

    def __init__(self, **values: Any) -> None:  # noqa: ANN401  -- as BaseSettings has it
        cls = type(self)
        refuse_unknown(cls, values)
        variables = _environment(cls, values)
        prefix = str(cls.model_config.get("env_prefix", ""))
        known = _known_names(prefix)
        ignored = ignored_variables(prefix, known, variables, given=values.keys())
        try:
            super().__init__(**values)
        except ValidationError as error:
            given = values.keys() if _making.get() == "a part" else ()
            text = explain(cls, error, _known_names(None), given=given, variables=variables)
            raise ConfigurationError("\n  ".join([text, *ignored])) from None
        except SettingsError as error:
            # It names the setting. The JSON error behind it could show a part of the value.
            raise ConfigurationError(f"{cls.__name__}: {error}: it isn't valid JSON") from None
        self._in_code = frozenset(values)
        self._ignored_variables = tuple(ignored)
        for line in ignored if _making.get() != "a copy" else ():
            _log.warning(line)

    @classmethod
    def __get_pydantic_core_schema__(
        cls, source: type[BaseModel], handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        """Report errors as a part of an application's settings, without showing its values."""
        return no_info_wrap_validator_function(_validate_part, handler(source))

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        """Show URLs without their passwords, also in fields of subclasses."""
        yield "url", mask_url(plain_url(self))
        for name, value in super().__repr_args__():
            if name != "url":
                yield name, mask_url(str(value)) if "://" in str(value) else value

    def replaced(self, **given: Any) -> Self:  # noqa: ANN401  -- each setting has its own type
        """Return the same settings with some values replaced.

        Raises:
            ConfigurationError: A value is invalid, or a name is unknown.
        """
        chosen = {name: getattr(self, name) for name in self.model_fields_set}
        token = _making.set("a copy")
        try:
            made = type(self)(**{**chosen, **given})
        finally:
            _making.reset(token)
        made._in_code = self._in_code | given.keys()  # noqa: SLF001  -- same class
        return made

    @property
    def ignored_variables(self) -> Sequence[str]:
        """A line for each environment variable that looks like a setting, but isn't read."""
        return self._ignored_variables

    @property
    def provenance(self) -> Mapping[str, Source]:
        """Where each value comes from."""
        return {
            name: "code"
            if name in self._in_code
            else "environment"
            if name in self.model_fields_set
            else "default"
            for name in type(self).model_fields
        }

    @property
    def effective_prefetch(self) -> int:
        """The prefetch count that is used, see `prefetch_count`."""
        return self._prefetch_for(batch_size=1)

    def _prefetch_for(self, *, batch_size: int) -> int:
        if "prefetch_count" in self.model_fields_set:
            return self.prefetch_count
        # A full batch can be collected while the others are handled.
        computed = batch_size * (self.concurrency + 1)
        return min(MAX_PREFETCH, max(DEFAULT_PREFETCH, computed))

    @property
    def effective_stuck_after(self) -> float:
        """The seconds that are used, see `stuck_after`."""
        if self.stuck_after is not None:
            return self.stuck_after
        return DEFAULT_STUCK_AFTER if self.process_timeout is None else 2 * self.process_timeout

    @model_validator(mode="after")
    def _check_queue(self) -> Self:
        stated = (self.queue_arguments or {}).get(QUEUE_TYPE)
        if self.queue_type is not None and stated not in (None, self.queue_type):
            raise ValueError(
                f"queue_type={self.queue_type!r} contradicts"
                f" {QUEUE_TYPE}={stated!r} in queue_arguments"
            )
        if "x-stream-offset" in (self.consumer_arguments or {}):
            raise ValueError(
                "x-stream-offset in consumer_arguments: a stream cannot be consumed from, because"
                " its messages cannot be rejected or requeued one by one; use another queue"
            )
        if self.queue_exclusive and self.num_workers > 1:
            raise ValueError(
                f"num_workers={self.num_workers} cannot share an exclusive queue, which belongs to"
                " one connection; use num_workers=1, or concurrency"
            )
        if self.queue_exclusive and not self.declare:
            raise ValueError(
                "declare=False cannot find an exclusive queue: it is deleted with the connection"
                " that declared it"
            )
        if self.breaker_threshold is not None and (self.queue_exclusive or self.queue_auto_delete):
            which = "queue_exclusive" if self.queue_exclusive else "queue_auto_delete"
            raise ValueError(
                f"breaker_threshold cannot be used with {which}: a paused worker doesn't consume,"
                " and the broker then deletes the queue with all its messages"
            )
        if self.requeue_delay:
            steps = make_delay_steps(
                self.requeue_delay, self.requeue_backoff, self.requeue_delay_max
            )
            check_wait_queue_names(self.queue_name, steps)
        return self

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        if self.ordered_by_key and self.num_workers > 1:
            raise ValueError(
                f"num_workers={self.num_workers} cannot keep the order of ordered_by_key, because"
                " each worker gets messages of every key; use num_workers=1, and concurrency"
            )
        if self.crash_limit <= self.crash_suspect_after:
            msg = (
                f"crash_limit={self.crash_limit} must be above"
                f" crash_suspect_after={self.crash_suspect_after}"
            )
            raise ValueError(msg)
        for first, longest in (
            ("reconnect_delay", "reconnect_delay_max"),
            ("breaker_pause", "breaker_pause_max"),
        ):
            if getattr(self, first) > getattr(self, longest):
                raise ValueError(f"{first} must not exceed {longest}")
        # A variable that is set to nothing. Other types of exchanges don't look at the key.
        is_matched = self.exchange_name and self.exchange_type in {"direct", "topic"}
        if self.routing_key == "" and is_matched:
            raise ValueError(
                "routing_key is empty: leave it out to bind with the queue's name, or write"
                ' [""] to bind with an empty key'
            )
        for name in ("ssl_keyfile", "ssl_key_password"):
            if getattr(self, name) is not None and self.ssl_certfile is None:
                msg = f"{name} without ssl_certfile: name the certificate that it belongs to"
                raise ValueError(msg)
        return self


class BatchConsumerSettings(ConsumerSettings, _BatchSettings):
    """Settings of a :class:`~aio_pika_batch.BatchConsumer`."""

    @property
    def effective_prefetch(self) -> int:
        """The prefetch count that is used, see `prefetch_count`."""
        return self._prefetch_for(batch_size=self.batch_size)


class OutboxRelaySettings(BatchConsumerSettings):
    """Settings of an :class:`~aio_pika_batch.outbox.OutboxRelay`.

    Those of a consumer that are about the broker's URL, workers, timeouts, reconnecting and TLS
    apply. Those about queues, retries and dead letters don't.
    """

    queue_name: Name = Field(default="outbox", description="Names the outbox in logs and metrics.")
    batch_size: Count = Field(default=1000, description="Maximum number of rows in a batch.")
    batch_timeout: Seconds = Field(
        default=0.001, description="Rows are taken in batches, so there is nothing to wait for."
    )
    poll_interval: Seconds = Field(
        default=0.2, description="Time between two looks at an empty outbox."
    )

    @property
    def effective_prefetch(self) -> int:
        """The number of rows that are taken at once."""
        return self.batch_size

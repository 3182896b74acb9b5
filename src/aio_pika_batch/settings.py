"""What can be configured, and what makes no sense.

Values come from code, then the environment, then `.env`; the prefix is `AIO_PIKA_BATCH_` unless a
subclass sets another by `model_config`. Nonsense is refused at construction, with the field's name
and what is allowed. No password is ever shown.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, Self, TypeAlias

from pydantic import Field, PrivateAttr, SecretStr, ValidationError, model_validator
from pydantic_settings import SettingsConfigDict

from aio_pika_batch.breaker_settings import BreakerSettings
from aio_pika_batch.core.message import FieldValue
from aio_pika_batch.core.results import MessageResult
from aio_pika_batch.core.retry import (
    LONGEST_WAIT,
    DelaySteps,
    check_wait_queue_names,
    make_delay_steps,
)
from aio_pika_batch.core.topology import QUEUE_TYPE, TopologyOptions
from aio_pika_batch.errors import ConfigurationError
from aio_pika_batch.fields import (
    Arguments,
    Count,
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
    refuse_unknown,
)
from aio_pika_batch.masking import mask_url

MAX_PREFETCH = 65535
"""The prefetch count is an unsigned 16-bit number (AMQP 0-9-1, basic.qos)."""

Source: TypeAlias = Literal["code", "environment", "default"]

DEFAULT_PREFETCH = 10
DEFAULT_STUCK_AFTER = 15 * 60.0


class ConsumerSettings(BreakerSettings):
    """Settings of a :class:`~aio_pika_batch.Consumer`, and the base of those for batches.

    Times are in seconds.

    Raises:
        ConfigurationError: A value makes no sense, or a name is unknown.
    """

    model_config = SettingsConfigDict(
        env_prefix="AIO_PIKA_BATCH_",
        env_file=".env",
        # Other programs' variables stand in the same environment; in code, a wrong name is refused.
        extra="ignore",
        hide_input_in_errors=True,
        validate_default=True,
    )

    url: Url = Field(
        default="amqp://guest:guest@localhost:5672/",
        repr=False,
        description="Broker: `amqp://user:password@host1:5672,host2:5672/vhost` (several hosts are"
        " tried in random order; several whole URLs may be given, comma-separated), `amqps://…`,"
        " `memory://name`, or another registered scheme.",
    )
    queue_name: Name = Field(
        # Required; said this way, type checkers do not insist on having it in code.
        default=...,
        description="Queue to consume from.",
    )
    exchange_name: ShortString | None = Field(
        default=None, description="Exchange to declare and to bind the queue to."
    )
    exchange_type: ExchangeType = Field(
        default="direct",
        description="`direct`, `fanout`, `topic`, `headers`, or a plugin's `x-…`.",
    )
    routing_key: Keys = Field(
        default=None, description="One or several binding keys; none: the queue's name."
    )
    binding_arguments: Arguments = Field(
        default=None, description="Arguments of the binding, as a headers exchange matches them."
    )
    prefetch_count: int = Field(
        default=DEFAULT_PREFETCH,
        ge=0,
        le=MAX_PREFETCH,
        description="Unsettled messages per worker; 0: no limit. Left unset, what is used is"
        " `max(10, batch_size × (concurrency + 1))`, see `effective_prefetch`.",
    )
    num_workers: Count = Field(
        default=1,
        description="Independent consumers on the same queue, each with a connection of its own.",
    )
    concurrency: Count = Field(default=1, description="Handlers that run at once, per worker.")
    ordered_by_key: bool = Field(
        default=False,
        description="Batches of one `batch_key` never overlap and keep their order; what fails is"
        " tried again in place. With `num_workers=1` only.",
    )
    max_requeue_attempts: int = Field(
        default=3,
        ge=0,
        description="Retries by REQUEUE before a message is dead-lettered; spent within"
        " milliseconds on an idle queue, unless `requeue_delay` is set.",
    )
    unhandled_exception_action: FailureAction = Field(
        default=MessageResult.REQUEUE,
        description="What becomes of messages that a handler left undecided: by an exception, by"
        " ending early, by `process_timeout`. Not ACK.",
    )
    process_timeout: Seconds | None = Field(
        default=None, description="How long a handler may take for a batch; none: no limit."
    )
    retry_count_header: Name = Field(default="x-retry-count", description="Counts the retries.")
    requeue_delay: Pause = Field(
        default=0.0,
        description="Wait before the first retry; 0: none. Messages wait in queues of their own,"
        " `<queue_name>.retry.<milliseconds>`, which are declared.",
    )
    requeue_backoff: Factor = Field(
        default=2.0, description="By which each wait is longer than the one before; 1: all alike."
    )
    requeue_delay_max: Seconds = Field(
        default=300.0, le=LONGEST_WAIT, description="Longest wait, `Requeue(delay=…)` included."
    )
    unsafe_delay: bool = Field(
        default=False,
        description="Wait in classic queues, as brokers before RabbitMQ 3.10 need it: they lose"
        " what expires while the queue is full or gone.",
    )
    requeue_hold: Seconds = Field(
        default=30.0, description="How long an original is held while its copy is not confirmed."
    )
    queue_durable: bool = Field(default=True, description="The queue survives broker restarts.")
    queue_exclusive: bool = Field(
        default=False, description="The queue belongs to one connection and goes with it."
    )
    queue_auto_delete: bool = Field(
        default=False, description="The queue goes with its last consumer."
    )
    queue_type: Literal["classic", "quorum"] | None = Field(
        default=None, description="`x-queue-type`; none: the virtual host's default."
    )
    queue_arguments: Arguments = Field(
        default=None,
        description="Further arguments of the queue: TTL, dead-letter exchange, ….",
    )
    exchange_durable: bool = Field(
        default=True, description="The exchange survives broker restarts."
    )
    declare: bool = Field(
        default=True,
        description="False: declare nothing, only check that everything is there.",
    )
    dead_letter_exchange: Name | None = Field(
        default=None,
        description="Exchange for dead letters; none: what `queue_arguments` names as"
        " `x-dead-letter-exchange`.",
    )
    dead_letter_exchange_type: ExchangeType = Field(
        default="fanout", description="Its type, where it is declared."
    )
    dead_letter_routing_key: ShortString | None = Field(
        default=None,
        description="Routing key of dead letters; none: the original one.",
    )
    dead_letter_queue: Name | None = Field(
        default=None,
        description="Queue for dead letters; it, its exchange (`<queue_name>.dlx` if none is named)"
        " and their binding are declared.",
    )
    dead_letter_exception_message: bool = Field(
        default=True, description="Dead letters carry the exception's text, cut at 1 KiB."
    )
    consumer_arguments: Arguments = Field(
        default=None, description="Arguments of `basic.consume`, such as `x-priority`."
    )
    connection_name: str | None = Field(
        default=None, max_length=255, description="How the broker's management shows connections."
    )
    connect_timeout: Seconds = Field(default=10.0, description="For one attempt to connect.")
    heartbeat: int = Field(
        default=30, ge=1, le=65535, description="A peer that is silent for three of them is dead."
    )
    publish_timeout: Seconds = Field(
        default=10.0, description="How long a publisher waits for the next confirmation."
    )
    reconnect_delay: Seconds = Field(
        default=0.5, description="Longest first pause before reconnecting; doubled each time."
    )
    reconnect_delay_max: Seconds = Field(default=30.0, description="Longest pause of all.")
    shutdown_timeout: Seconds = Field(
        default=25.0, description="For the whole drain, from the signal to the closed connection."
    )
    stuck_after: Seconds | None = Field(
        default=None,
        description="A worker that holds a message unsettled for longer is unhealthy; none:"
        " 2 × `process_timeout`, or 15 min.",
    )
    ssl_cafile: str | None = Field(
        default=None,
        description="Authorities that may vouch for the broker, PEM; none: those of the system.",
    )
    ssl_certfile: str | None = Field(default=None, description="Client certificate, PEM.")
    ssl_keyfile: str | None = Field(
        default=None, description="Its key, PEM; none: it stands in the same file."
    )
    ssl_key_password: SecretStr | None = Field(
        default=None, description="For a key that is encrypted; never shown."
    )
    wire: Literal["auto", "fast", "plain"] = Field(
        default="auto", description="Past aio-pika, or by its calls; `auto`: `fast` where possible."
    )

    _in_code: frozenset[str] = PrivateAttr(default=frozenset())

    def __init__(self, **values: Any) -> None:  # noqa: ANN401  -- as BaseSettings has it
        refuse_unknown(type(self), values)
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigurationError(explain(type(self), error)) from None
        self._in_code = frozenset(values)

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        """Show the URL without its passwords."""
        yield "url", mask_url(self.url)
        yield from super().__repr_args__()

    def replaced(self, **given: Any) -> Self:  # noqa: ANN401  -- each setting has its own type
        """The same settings but for some. Raises ConfigurationError."""
        chosen = {name: getattr(self, name) for name in self.model_fields_set}
        made = type(self)(**{**chosen, **given})
        made._in_code = self._in_code | given.keys()  # noqa: SLF001  -- its own kind
        return made

    @property
    def provenance(self) -> Mapping[str, Source]:
        """Where each value comes from; what `.env` holds counts as the environment."""
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
        if "prefetch_count" in self.model_fields_set:
            return self.prefetch_count
        wanted = self.messages_per_batch * (self.concurrency + 1)
        return min(MAX_PREFETCH, max(DEFAULT_PREFETCH, wanted))

    @property
    def messages_per_batch(self) -> int:
        """How many messages a handler gets at most: one."""
        return 1

    @property
    def seconds_per_batch(self) -> float:
        """How long a handler's messages are collected at most: not at all."""
        return 0.0

    @property
    def bytes_per_batch(self) -> int | None:
        """How many bytes a handler's messages have at most: no limit."""
        return None

    @property
    def seconds_until_settled(self) -> float | None:
        """How soon a yield is settled at the latest; None: when its batch has been handled."""
        return None

    @property
    def is_atomic(self) -> bool:
        """Whether a failure voids the ACKs of its batch."""
        return False

    @property
    def culprits_per_batch(self) -> int:
        """How many culprits are looked for in a batch that failed: none."""
        return 0

    @property
    def effective_stuck_after(self) -> float:
        """The seconds that are used, see `stuck_after`."""
        if self.stuck_after is not None:
            return self.stuck_after
        return DEFAULT_STUCK_AFTER if self.process_timeout is None else 2 * self.process_timeout

    @property
    def delay_steps(self) -> DelaySteps:
        """How long retries wait, see `requeue_delay`."""
        return make_delay_steps(self.requeue_delay, self.requeue_backoff, self.requeue_delay_max)

    @property
    def wanted(self) -> TopologyOptions:
        """What these settings say about queue, exchange and dead letters."""
        keys = self.routing_key
        return TopologyOptions(
            queue_name=self.queue_name,
            queue_durable=self.queue_durable,
            queue_exclusive=self.queue_exclusive,
            queue_auto_delete=self.queue_auto_delete,
            queue_type=self.queue_type,
            queue_arguments=_given(self.queue_arguments),
            exchange_name=self.exchange_name,
            exchange_type=self.exchange_type,
            exchange_durable=self.exchange_durable,
            routing_keys=() if keys is None else (keys,) if isinstance(keys, str) else tuple(keys),
            binding_arguments=_given(self.binding_arguments),
            dead_letter_exchange=self.dead_letter_exchange,
            dead_letter_exchange_type=self.dead_letter_exchange_type,
            dead_letter_routing_key=self.dead_letter_routing_key,
            dead_letter_queue=self.dead_letter_queue,
            wait_levels=self.delay_steps.steps_for(self.max_requeue_attempts),
            unsafe_delay=self.unsafe_delay,
            declare=self.declare,
        )

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        stated = _given(self.queue_arguments).get(QUEUE_TYPE)
        if self.queue_type is not None and stated not in (None, self.queue_type):
            msg = (
                f"queue_type={self.queue_type!r} contradicts"
                f" {QUEUE_TYPE}={stated!r} in queue_arguments"
            )
            raise ValueError(msg)
        if self.queue_exclusive and self.num_workers > 1:
            msg = (
                f"num_workers={self.num_workers} cannot share an exclusive queue, which belongs to"
                " one connection; use num_workers=1, or concurrency"
            )
            raise ValueError(msg)
        if self.queue_exclusive and not self.declare:
            msg = "declare=False finds no exclusive queue: it goes with the connection that made it"
            raise ValueError(msg)
        if self.ordered_by_key and self.num_workers > 1:
            msg = (
                f"num_workers={self.num_workers} cannot keep the order of ordered_by_key, since"
                " each worker gets messages of every key; use num_workers=1, and concurrency"
            )
            raise ValueError(msg)
        if self.reconnect_delay > self.reconnect_delay_max:
            msg = "reconnect_delay must not exceed reconnect_delay_max"
            raise ValueError(msg)
        if self.requeue_delay:
            check_wait_queue_names(self.queue_name, self.delay_steps)
        if self.breaker_threshold is not None and (self.queue_exclusive or self.queue_auto_delete):
            which = "queue_exclusive" if self.queue_exclusive else "queue_auto_delete"
            msg = (
                f"breaker_threshold does not go with {which}: in a pause nobody consumes, and the"
                " broker deletes the queue with all that is in it"
            )
            raise ValueError(msg)
        for name in ("ssl_keyfile", "ssl_key_password"):
            if getattr(self, name) is not None and self.ssl_certfile is None:
                msg = f"{name} without ssl_certfile: name the certificate that it belongs to"
                raise ValueError(msg)
        return self


def _given(arguments: Mapping[str, FieldValue] | None) -> Mapping[str, FieldValue]:
    return {} if arguments is None else arguments

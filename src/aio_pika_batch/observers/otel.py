"""Reports what consumers do as spans and metrics of OpenTelemetry.

Each run of a handler is a span with a link to the origin of each of its messages. A batch has many
origins, so none of them is its parent. The span is current while the handler runs, so that the
handler's own spans become its children. Settlements are child spans too. Names and attributes
follow the semantic conventions for messaging, 1.44.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar, Token
from functools import cached_property
from importlib.metadata import version
from typing import overload

from aio_pika_batch.core.message import FieldValue, Headers, Message
from aio_pika_batch.errors import MessageDecodeError
from aio_pika_batch.masking import mask_error, mask_traceback
from aio_pika_batch.observer import (
    BatchCut,
    BatchHandled,
    Discarded,
    DuplicatesDropped,
    Load,
    Lost,
    Observer,
    Origin,
    Received,
    Settled,
    SettleFailed,
    Step,
    WorkerStarted,
    WorkerStopped,
)

try:
    from opentelemetry import context as otel_context
    from opentelemetry import metrics, propagate, trace
    from opentelemetry.context import Context
    from opentelemetry.trace import (
        Link,
        Span,
        SpanContext,
        SpanKind,
        Status,
        StatusCode,
        TraceFlags,
        TraceState,
    )
except ModuleNotFoundError as error:
    raise ImportError(
        "OpenTelemetryObserver needs opentelemetry-api: pip install 'aio-pika-batch[otel]'"
    ) from error

TRACEPARENT = "traceparent"
TRACESTATE = "tracestate"

_ENTRY = re.compile(
    rb"\x0btraceparentS\0\0\0\x37"
    rb"00-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})",
    re.DOTALL,
)
"""A `traceparent` in an encoded table of headers: its name and 55 bytes of text."""

# An object for each value of the flags: creating them was part of the cost of each link.
_FLAGS = tuple(map(TraceFlags, range(256)))

LINKS = "OTEL_SPAN_LINK_COUNT_LIMIT"
DEFAULT_LINKS = 128
"""Links that the SDK keeps for a span, unless the variable `LINKS` is set."""

BOUNDARIES = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)
"""Buckets that the conventions recommend for durations of messaging, in seconds."""

SCOPE = "aio_pika_batch"
SCHEMA = "https://opentelemetry.io/schemas/1.44.0"
"""The version of the semantic conventions that names and attributes follow."""

_log = logging.getLogger("aio_pika_batch.observers.otel")

_TRACEPARENT = re.compile(
    r"00-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})"
    r"|(?!00|ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(?:-.*)?"
)


class OpenTelemetryObserver(Observer):
    """Reports spans and metrics: `MyConsumer(observers=[OpenTelemetryObserver()])`.

    Args:
        tracer_provider: The tracer provider; None for the global one.
        meter_provider: The meter provider; None for the global one.
        max_links: Maximum links of a span; None for the limit of the SDK.

    Raises:
        ImportError: On import, if opentelemetry-api isn't installed.
    """

    def __init__(
        self,
        *,
        tracer_provider: trace.TracerProvider | None = None,
        meter_provider: metrics.MeterProvider | None = None,
        max_links: int | None = None,
    ) -> None:
        scope = SCOPE, version("aio-pika-batch")
        self._tracer = trace.get_tracer(*scope, tracer_provider, SCHEMA)
        meter = metrics.get_meter(*scope, meter_provider, SCHEMA)
        self._process = meter.create_histogram(
            "messaging.process.duration",
            unit="s",
            description="Duration of processing operation.",
            explicit_bucket_boundaries_advisory=BOUNDARIES,
        )
        self._operation = meter.create_histogram(
            "messaging.client.operation.duration",
            unit="s",
            description="Duration of a client's messaging operation.",
            explicit_bucket_boundaries_advisory=BOUNDARIES,
        )
        self._consumed = meter.create_counter(
            "messaging.client.consumed.messages",
            unit="{message}",
            description="Number of messages that were delivered to the application.",
        )
        self._duplicates = meter.create_counter(
            "aio_pika_batch.duplicates_dropped",
            unit="{message}",
            description="Number of messages that an inbox dropped as duplicates.",
        )
        self._discarded = meter.create_counter(
            "aio_pika_batch.messages_discarded",
            unit="{message}",
            description="Number of messages rejected although no dead-letter destination is known.",
        )
        # By differences, since an observable gauge would be read by another thread.
        self._held = meter.create_up_down_counter(
            "aio_pika_batch.messages_held",
            unit="{message}",
            description="Number of messages that wait, unsettled, for a retry or a confirm.",
        )
        self._loads: dict[int, tuple[Callable[[], Load], int]] = {}
        self._max_links = _kept_links() if max_links is None else max_links
        self._has_warned_of_links = False
        self._current: ContextVar[tuple[Span, Token[Context]] | None] = ContextVar(
            "aio_pika_batch_span", default=None
        )
        self._attributes: dict[tuple[Origin, str, str], dict[str, str | int]] = {}

    def _attributes_of(self, origin: Origin, name: str, kind: str) -> dict[str, str | int]:
        key = origin, name, kind
        found = self._attributes.get(key)
        if found is None:
            found = self._attributes[key] = {
                "messaging.system": "rabbitmq",
                "messaging.operation.name": name,
                "messaging.operation.type": kind,
                "messaging.destination.name": origin.queue,
            }
            if origin.server is not None:
                found["server.address"], found["server.port"] = origin.server
        return found

    def worker_started(self, origin: Origin, event: WorkerStarted) -> None:
        """Remember how to read the worker's load, and begin its series."""
        attributes = self._attributes_of(origin, "process", "process")
        self._discarded.add(0, attributes)
        self._held.add(0, attributes)
        self._loads[id(origin)] = event.load, 0

    def worker_stopped(self, origin: Origin, event: WorkerStopped) -> None:
        """Count its held messages as gone: the broker has them again."""
        self._update_held(origin)
        del self._loads[id(origin)]

    def lost(self, origin: Origin, event: Lost) -> None:
        """Count the held messages of the session as gone."""
        self._update_held(origin)

    def discarded(self, origin: Origin, event: Discarded) -> None:
        """Count the messages."""
        attributes = self._attributes_of(origin, "process", "process")
        self._discarded.add(len(event.messages), attributes)

    def _update_held(self, origin: Origin) -> None:
        load, before = self._loads[id(origin)]
        held = load().held
        if held != before:
            self._loads[id(origin)] = load, held
            self._held.add(held - before, self._attributes_of(origin, "process", "process"))

    def received(self, origin: Origin, event: Received) -> None:
        """Count the messages."""
        self._update_held(origin)
        self._consumed.add(event.count, self._attributes_of(origin, "receive", "receive"))

    def batch_cut(self, origin: Origin, event: BatchCut) -> None:
        """Start a span and make it current in the task that the handler runs in."""
        span = self._tracer.start_span(
            f"process {origin.queue}",
            # A root span, whatever span was current when the consumer was started.
            context=Context(),
            kind=SpanKind.CONSUMER,
            links=_Links(event.messages, self._max_links, self._warn_of_links),
            attributes={
                **self._attributes_of(origin, "process", "process"),
                "messaging.batch.message_count": len(event.messages),
                "aio_pika_batch.trigger": event.trigger.value,
            },
        )
        token = otel_context.attach(trace.set_span_in_context(span))
        self._current.set((span, token))

    def _warn_of_links(self, found: int) -> None:
        if not self._has_warned_of_links:
            self._has_warned_of_links = True
            _log.warning(
                "a batch has more than %d messages with a trace; the others are not linked;"
                " %s raises the limit",
                found,
                LINKS,
            )

    def batch_handled(self, origin: Origin, event: BatchHandled) -> None:
        """End the span."""
        attributes = self._attributes_of(origin, "process", "process")
        if event.error is not None:
            attributes = {**attributes, "error.type": _class_of(event.error)}
        self._process.record(event.seconds, attributes)
        current = self._current.get()
        if current is None:
            return
        span, token = current
        otel_context.detach(token)
        # The batch is settled in this task. Its settlement becomes a child of the ended span.
        self._current.set(None)
        otel_context.attach(trace.set_span_in_context(span))
        try:
            if event.error is not None:
                _record_error(span, event.error)
        finally:
            span.end()

    def duplicates_dropped(self, origin: Origin, event: DuplicatesDropped) -> None:
        """Count the messages."""
        attributes = self._attributes_of(origin, "process", "process")
        self._duplicates.add(len(event.messages), attributes)

    def settled(self, origin: Origin, event: Settled) -> None:
        """Report a settlement as a span, with the number of messages per result."""
        counts: dict[str, int] = {}
        for (result, _), count in event.counts.items():
            name = f"aio_pika_batch.{'returned' if result is None else result.name.lower()}"
            counts[name] = counts.get(name, 0) + count
        self._settle(origin, "settle", sum(event.counts.values()), event.seconds, more=counts)
        self._update_held(origin)

    def settle_failed(self, origin: Origin, event: SettleFailed) -> None:
        """Report a failed settlement or publication as a span with an error."""
        name = "send" if event.step is Step.PUBLISH else "settle"
        what = "unconfirmed" if event.error is None else _class_of(event.error)
        self._settle(origin, name, event.count, event.seconds, error_type=what)

    def _settle(
        self,
        origin: Origin,
        name: str,
        count: int,
        seconds: float,
        *,
        error_type: str | None = None,
        more: Mapping[str, int] | None = None,
    ) -> None:
        # The event comes when it is over, so that the start is computed.
        attributes = self._attributes_of(origin, name, "send" if name == "send" else "settle")
        if error_type is not None:
            attributes = {**attributes, "error.type": error_type}
        self._operation.record(seconds, attributes)
        end = time.time_ns()
        span = self._tracer.start_span(
            f"{name} {origin.queue}",
            kind=SpanKind.CLIENT,
            start_time=end - round(seconds * 1e9),
            attributes={**attributes, "messaging.batch.message_count": count, **(more or {})},
        )
        if error_type is not None:
            span.set_status(Status(StatusCode.ERROR))
        span.end(end)


class _Links(Sequence[Link]):
    """A link for each message with a trace, created on first access.

    Links are most of what tracing costs, and only a recorded span reads them.

    Args:
        limit: Maximum number of links.
        beyond: Called with the limit if there are more.
    """

    def __init__(
        self, messages: Sequence[Message], limit: int, beyond: Callable[[int], None]
    ) -> None:
        self._messages = messages
        self._limit = limit
        self._beyond = beyond

    @cached_property
    def _links(self) -> list[Link]:
        links: list[Link] = []
        for message in self._messages:
            found = origin_of(message)
            if found is not None:
                if len(links) == self._limit:
                    self._beyond(self._limit)
                    break
                links.append(Link(found))
        return links

    def __bool__(self) -> bool:
        return True  # without creating them, since unrecorded spans are asked too

    def __len__(self) -> int:
        return len(self._links)

    def __iter__(self) -> Iterator[Link]:
        return iter(self._links)

    @overload
    def __getitem__(self, index: int) -> Link: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Link]: ...
    def __getitem__(self, index: int | slice) -> Link | Sequence[Link]:
        return self._links[index]


def origin_of(message: Message) -> SpanContext | None:
    """Return the span context in the `traceparent` of a message; None without a valid one."""
    raw = message.raw_properties
    if raw is not None:
        # Decoding all headers would be most of the cost of a link. A text entry of a table has only
        # one encoding (AMQP 0-9-1, section 4.2.5.5). Anything else of this name is decoded below.
        entry = _ENTRY.search(raw)
        if entry is None:
            if b"traceparent" not in raw:
                return None
        elif b"tracestate" not in raw:
            trace_id, span_id, flags = entry.groups()
            return SpanContext(int(trace_id, 16), int(span_id, 16), True, _FLAGS[int(flags, 16)])  # noqa: FBT003  -- by position, since this is done for every message
    try:
        headers = message.headers
    except MessageDecodeError:
        return None
    stated = headers.get(TRACEPARENT)
    if not isinstance(stated, str):
        return None
    state = headers.get(TRACESTATE)
    return _read(stated, state if isinstance(state, str) else None)


def _read(traceparent: str, tracestate: str | None) -> SpanContext | None:
    """Parse a `traceparent` (W3C Trace Context, section 3.2); None if it is invalid."""
    found = _TRACEPARENT.fullmatch(traceparent)
    if found is None:
        return None
    state = TraceState.from_header([tracestate]) if tracestate else None
    trace_id, span_id, flags = filter(None, found.groups())
    return SpanContext(
        int(trace_id, 16),
        int(span_id, 16),
        is_remote=True,
        trace_flags=TraceFlags(int(flags, 16)),
        trace_state=state,
    )


def trace_headers(headers: Headers | None = None) -> Headers:
    """Return headers with the current trace: `self.publish(body, headers=trace_headers())`.

    The global propagator adds them; by default it adds `traceparent`. An observer must not change
    what you publish, so this is for you to call.
    """
    carrier: dict[str, FieldValue] = dict(headers or {})
    propagate.inject(carrier)
    return carrier


def _kept_links() -> int:
    stated = os.environ.get(LINKS, "")
    return int(stated) if stated.isdigit() else DEFAULT_LINKS


def _record_error(span: Span, error: BaseException) -> None:
    if not span.is_recording():
        return
    text, name = mask_error(error), _class_of(error)
    span.set_attribute("error.type", name)
    span.set_status(Status(StatusCode.ERROR, text))
    # Not `record_exception`: a trace leaves the process as the log does, and the text of an
    # exception may contain a password, a whole body, or what no exporter can encode.
    attributes = {"exception.type": name, "exception.message": text}
    span.add_event("exception", {**attributes, "exception.stacktrace": mask_traceback(error)})


def _class_of(error: BaseException) -> str:
    cls = type(error)
    return (
        cls.__qualname__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__qualname__}"
    )

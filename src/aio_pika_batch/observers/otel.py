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
from binascii import unhexlify
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from importlib.metadata import version
from typing import TypeAlias, overload

from aio_pika_batch.core.batcher import Trigger
from aio_pika_batch.core.message import FieldValue, Headers, Message
from aio_pika_batch.core.results import MessageResult
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
_LENGTH = len(TRACESTATE)

# An object for each value of the flags: creating them was part of the cost of each link.
_number = int.from_bytes
_FLAGS = {b"%02x" % value: TraceFlags(value) for value in range(256)}

_ROOT = Context()
"""The context of a span without a parent."""

_RESULTS: dict[MessageResult | None, str] = {
    None: "aio_pika_batch.returned",
    **{result: f"aio_pika_batch.{result.name.lower()}" for result in MessageResult},
}
"""The attributes that count the messages of a settlement."""

COUNT = "messaging.batch.message_count"

LINKS = "OTEL_SPAN_LINK_COUNT_LIMIT"
DEFAULT_LINKS = 128
"""Links that the SDK keeps for a span, unless the variable `LINKS` is set."""

BOUNDARIES = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)
"""Buckets that the conventions recommend for durations of messaging, in seconds."""

SCOPE = "aio_pika_batch"
SCHEMA = "https://opentelemetry.io/schemas/1.44.0"
"""The version of the semantic conventions that names and attributes follow."""

_log = logging.getLogger("aio_pika_batch.observers.otel")

_Attributes: TypeAlias = dict[str, str | int]

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

        def histogram(name: str, text: str) -> metrics.Histogram:
            return meter.create_histogram(
                name, unit="s", description=text, explicit_bucket_boundaries_advisory=BOUNDARIES
            )

        def counter(name: str, text: str) -> metrics.Counter:
            return meter.create_counter(name, unit="{message}", description=text)

        self._process = histogram("messaging.process.duration", "Duration of processing operation.")
        self._operation = histogram(
            "messaging.client.operation.duration",
            "Duration of a client's messaging operation.",
        )
        self._consumed = counter(
            "messaging.client.consumed.messages",
            "Number of messages that were delivered to the application.",
        )
        self._duplicates = counter(
            "aio_pika_batch.duplicates_dropped",
            "Number of messages that an inbox dropped as duplicates.",
        )
        self._discarded = counter(
            "aio_pika_batch.messages_discarded",
            "Number of messages rejected although no dead-letter destination is known.",
        )
        # By differences, since an observable gauge would be read by another thread.
        self._held = meter.create_up_down_counter(
            "aio_pika_batch.messages_held",
            unit="{message}",
            description="Number of messages that wait, unsettled, for a retry or a confirm.",
        )
        self._workers: dict[int, _Worker] = {}
        self._max_links = _kept_links() if max_links is None else max_links
        self._has_warned_of_links = False
        self._current: ContextVar[tuple[Span, Context] | None] = ContextVar(
            "aio_pika_batch_span", default=None
        )

    def _worker(self, origin: Origin) -> _Worker:
        # By identity, because to hash an origin costs more than all else that is done here.
        found = self._workers.get(id(origin))
        if found is None:
            found = self._workers[id(origin)] = _Worker(origin)
        return found

    def worker_started(self, origin: Origin, event: WorkerStarted) -> None:
        """Remember how to read the worker's load, and begin its series."""
        worker = self._worker(origin)
        worker.load = event.load
        self._discarded.add(0, worker.process)
        self._held.add(0, worker.process)

    def worker_stopped(self, origin: Origin, event: WorkerStopped) -> None:
        """Count its held messages as gone: the broker has them again."""
        self._update_held(self._worker(origin))
        del self._workers[id(origin)]

    def lost(self, origin: Origin, event: Lost) -> None:
        """Count the held messages of the session as gone."""
        self._update_held(self._worker(origin))

    def discarded(self, origin: Origin, event: Discarded) -> None:
        """Count the messages."""
        self._discarded.add(len(event.messages), self._worker(origin).process)

    def _update_held(self, worker: _Worker) -> None:
        held = worker.load().held
        if held != worker.held:
            self._held.add(held - worker.held, worker.process)
            worker.held = held

    def received(self, origin: Origin, event: Received) -> None:
        """Count the messages."""
        worker = self._worker(origin)
        self._update_held(worker)
        self._consumed.add(event.count, worker.receive)

    def batch_cut(self, origin: Origin, event: BatchCut) -> None:
        """Start a span and make it current in the task that the handler runs in."""
        worker = self._worker(origin)
        span = self._tracer.start_span(
            worker.span_name,
            # A root span, whatever span was current when the consumer was started.
            context=_ROOT,
            kind=SpanKind.CONSUMER,
            links=_Links(event.messages, self._max_links, self._warn_of_links),
            attributes=worker.batch(len(event.messages), event.trigger),
        )
        context = trace.set_span_in_context(span)
        otel_context.attach(context)
        self._current.set((span, context))

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
        attributes = self._worker(origin).process
        if event.error is not None:
            attributes = {**attributes, "error.type": _class_of(event.error)}
        self._process.record(event.seconds, attributes)
        current = self._current.get()
        if current is None:
            return
        span, context = current
        self._current.set(None)
        # The batch is settled in this task. Its settlement becomes a child of the ended span, even
        # if the handler has left another span behind.
        if otel_context.get_current() is not context:
            otel_context.attach(context)
        try:
            if event.error is not None:
                _record_error(span, event.error)
        finally:
            span.end()

    def duplicates_dropped(self, origin: Origin, event: DuplicatesDropped) -> None:
        """Count the messages."""
        self._duplicates.add(len(event.messages), self._worker(origin).process)

    def settled(self, origin: Origin, event: Settled) -> None:
        """Report a settlement as a span, with the number of messages per result."""
        worker = self._worker(origin)
        total, counts = 0, dict[str, int]()
        for (result, _), count in event.counts.items():
            name = _RESULTS[result]
            counts[name] = counts.get(name, 0) + count
            total += count
        counts[COUNT] = total
        self._settle(worker.settle, worker.settle_name, event.seconds, counts)
        self._update_held(worker)

    def settle_failed(self, origin: Origin, event: SettleFailed) -> None:
        """Report a failed settlement or publication as a span with an error."""
        worker = self._worker(origin)
        attributes, name = worker.settle, worker.settle_name
        if event.step is Step.PUBLISH:
            attributes, name = _attributes(origin, "send"), f"send {origin.queue}"
        what = "unconfirmed" if event.error is None else _class_of(event.error)
        attributes = {**attributes, "error.type": what}
        self._settle(attributes, name, event.seconds, {COUNT: event.count}, failed=True)

    def _settle(
        self,
        attributes: _Attributes,
        name: str,
        seconds: float,
        counts: dict[str, int],
        *,
        failed: bool = False,
    ) -> None:
        # The event comes when it is over, so that the start is computed.
        self._operation.record(seconds, attributes)
        end = time.time_ns()
        span = self._tracer.start_span(
            name,
            kind=SpanKind.CLIENT,
            start_time=end - round(seconds * 1e9),
            attributes={**attributes, **counts},
        )
        if failed:
            span.set_status(Status(StatusCode.ERROR))
        span.end(end)


class _Worker:
    """The attributes of one worker, made once, and its load."""

    __slots__ = (
        "_batch",
        "_batch_key",
        "held",
        "load",
        "origin",
        "process",
        "receive",
        "settle",
        "settle_name",
        "span_name",
    )

    def __init__(self, origin: Origin) -> None:
        self.origin = origin  # so that no other object has its id
        self.load: Callable[[], Load] = _no_load
        self.held = 0
        self.process = _attributes(origin, "process")
        self.receive = _attributes(origin, "receive")
        self.settle = _attributes(origin, "settle")
        self.span_name = f"process {origin.queue}"
        self.settle_name = f"settle {origin.queue}"
        self._batch_key: tuple[int, Trigger] | None = None
        self._batch: _Attributes = {}

    def batch(self, count: int, trigger: Trigger) -> _Attributes:
        """Return the attributes of a batch; most batches are like the one before."""
        key = count, trigger
        if key != self._batch_key:
            self._batch_key = key
            more: _Attributes = {COUNT: count, "aio_pika_batch.trigger": trigger.value}
            self._batch = {**self.process, **more}
        return self._batch


def _no_load() -> Load:
    return Load(0, 0, is_consuming=False)


def _attributes(origin: Origin, operation: str) -> _Attributes:
    found: _Attributes = {
        "messaging.system": "rabbitmq",
        "messaging.operation.name": operation,
        "messaging.operation.type": operation,
        "messaging.destination.name": origin.queue,
    }
    if origin.server is not None:
        found["server.address"], found["server.port"] = origin.server
    return found


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
        self._created: list[Link] | None = None

    @property
    def _links(self) -> list[Link]:
        if self._created is None:
            self._created = self._create()
        return self._created

    def _create(self) -> list[Link]:
        links: list[Link] = []
        link: Link | None = None
        before: tuple[bytes, ...] | None = None
        for message in self._messages:
            parts = _encoded_parts(message)
            # Messages that were published together often have the same origin.
            if parts is None or parts != before:
                found = _decoded_origin(message) if parts is None else _span_context(parts)
                link, before = None if found is None else Link(found), parts
            if link is not None:
                if len(links) == self._limit:
                    self._beyond(self._limit)
                    break
                links.append(link)
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


def _encoded_parts(message: Message) -> tuple[bytes, ...] | None:
    """Return trace, span and flags of an undecoded `traceparent`; None if it must be decoded."""
    # Decoding all headers would be most of the cost of a link. A text entry of a table has only
    # one encoding (AMQP 0-9-1, section 4.2.5.5).
    raw = message.raw_properties
    entry = None if raw is None else _ENTRY.search(raw)
    # The byte before a `tracestate` is its length, and is found several times faster.
    if raw is None or entry is None or (_LENGTH in raw and b"tracestateS" in raw):
        return None
    return entry.group(1, 2, 3)


def _span_context(parts: tuple[bytes, ...]) -> SpanContext:
    trace_id, span_id, flags = parts
    trace, span = _number(unhexlify(trace_id)), _number(unhexlify(span_id))
    return SpanContext(trace, span, True, _FLAGS[flags])  # noqa: FBT003  -- by position, since this is done for every message


def _decoded_origin(message: Message) -> SpanContext | None:
    raw = message.raw_properties
    if raw is not None and b"traceparent" not in raw:
        return None
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

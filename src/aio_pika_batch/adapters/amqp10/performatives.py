"""The performatives of AMQP 1.0 as records, with the specification's fields in its order.

The types of a record's fields are the types on the wire. They are checked when a record is read,
and select the encoding when it is written.
"""

from __future__ import annotations

import types
from dataclasses import dataclass, fields
from typing import Any, Final, NamedTuple, TypeAlias, get_args, get_origin, get_type_hints

from aio_pika_batch.adapters.amqp10 import spec
from aio_pika_batch.adapters.amqp10.codec import (
    Array,
    CodecError,
    Described,
    NotText,
    Symbol,
    UByte,
    UInt,
    ULong,
    UShort,
    read,
    write,
)

Map: TypeAlias = dict[Any, Any]
Symbols: TypeAlias = Symbol | Array
"""One symbol, or an array of them."""


@dataclass(frozen=True, slots=True)
class PeerError:
    """The error for which a peer ended something."""

    condition: Symbol
    description: str | NotText | None = None
    info: Map | None = None

    def __str__(self) -> str:
        if self.description is None:
            return str(self.condition)
        text = self.description
        return (
            f"{self.condition}: {text if isinstance(text, str) else text.decode(errors='replace')}"
        )


@dataclass(frozen=True, slots=True)
class Open:
    """Opens a connection."""

    container_id: str
    hostname: str | None = None
    max_frame_size: UInt | None = None
    channel_max: UShort | None = None
    idle_time_out: UInt | None = None
    outgoing_locales: Symbols | None = None
    incoming_locales: Symbols | None = None
    offered_capabilities: Symbols | None = None
    desired_capabilities: Symbols | None = None
    properties: Map | None = None


@dataclass(frozen=True, slots=True)
class Begin:
    """Begins a session."""

    remote_channel: UShort | None
    next_outgoing_id: UInt
    incoming_window: UInt
    outgoing_window: UInt
    handle_max: UInt | None = None
    offered_capabilities: Symbols | None = None
    desired_capabilities: Symbols | None = None
    properties: Map | None = None


@dataclass(frozen=True, slots=True)
class SourceTerminus:
    """The source of a link's messages."""

    address: str | None = None
    durable: UInt | None = None
    expiry_policy: Symbol | None = None
    timeout: UInt | None = None
    dynamic: bool | None = None
    dynamic_node_properties: Map | None = None
    distribution_mode: Symbol | None = None
    filter: Map | None = None
    default_outcome: Described | None = None
    outcomes: Symbols | None = None
    capabilities: Symbols | None = None


@dataclass(frozen=True, slots=True)
class TargetTerminus:
    """The target of a link's messages."""

    address: str | None = None
    durable: UInt | None = None
    expiry_policy: Symbol | None = None
    timeout: UInt | None = None
    dynamic: bool | None = None
    dynamic_node_properties: Map | None = None
    capabilities: Symbols | None = None


@dataclass(frozen=True, slots=True)
class Attach:
    """Attaches a link to a session. `role` is true for a receiver."""

    name: str
    handle: UInt
    role: bool
    snd_settle_mode: UByte | None = None
    rcv_settle_mode: UByte | None = None
    source: SourceTerminus | None = None
    target: TargetTerminus | None = None
    unsettled: Map | None = None
    incomplete_unsettled: bool | None = None
    initial_delivery_count: UInt | None = None
    max_message_size: ULong | None = None
    offered_capabilities: Symbols | None = None
    desired_capabilities: Symbols | None = None
    properties: Map | None = None


@dataclass(frozen=True, slots=True)
class Flow:
    """Updates windows and, with a handle, a link's credit."""

    next_incoming_id: UInt | None
    incoming_window: UInt
    next_outgoing_id: UInt
    outgoing_window: UInt
    handle: UInt | None = None
    delivery_count: UInt | None = None
    link_credit: UInt | None = None
    available: UInt | None = None
    drain: bool | None = None
    echo: bool | None = None
    properties: Map | None = None


@dataclass(frozen=True, slots=True)
class Transfer:
    """Carries a message, or a part of one."""

    handle: UInt
    delivery_id: UInt | None = None
    delivery_tag: bytes | None = None
    message_format: UInt | None = None
    settled: bool | None = None
    more: bool | None = None
    rcv_settle_mode: UByte | None = None
    state: Described | None = None
    resume: bool | None = None
    aborted: bool | None = None
    batchable: bool | None = None


@dataclass(frozen=True, slots=True)
class DispositionFrame:
    """Settles deliveries. `role` is true if their receiver sends it."""

    role: bool
    first: UInt
    last: UInt | None = None
    settled: bool | None = None
    state: Described | None = None
    batchable: bool | None = None


@dataclass(frozen=True, slots=True)
class Detach:
    """Detaches a link."""

    handle: UInt
    closed: bool | None = None
    error: PeerError | None = None


@dataclass(frozen=True, slots=True)
class End:
    """Ends a session."""

    error: PeerError | None = None


@dataclass(frozen=True, slots=True)
class Close:
    """Closes a connection."""

    error: PeerError | None = None


@dataclass(frozen=True, slots=True)
class Mechanisms:
    """The ways to log in that a server offers."""

    sasl_server_mechanisms: Symbols


@dataclass(frozen=True, slots=True)
class Init:
    """Logs in."""

    mechanism: Symbol
    initial_response: bytes | None = None
    hostname: str | None = None


@dataclass(frozen=True, slots=True)
class SaslOutcome:
    """Whether that was accepted: code 0."""

    code: UByte
    additional_data: bytes | None = None


Performative: TypeAlias = (
    Open | Begin | Attach | Flow | Transfer | DispositionFrame | Detach | End | Close
)
SaslPerformative: TypeAlias = Mechanisms | Init | SaslOutcome
Record: TypeAlias = Performative | SaslPerformative | SourceTerminus | TargetTerminus | PeerError

_CODES: Final[dict[type[Record], int]] = {
    Open: spec.OPEN,
    Begin: spec.BEGIN,
    Attach: spec.ATTACH,
    Flow: spec.FLOW,
    Transfer: spec.TRANSFER,
    DispositionFrame: spec.DISPOSITION,
    Detach: spec.DETACH,
    End: spec.END,
    Close: spec.CLOSE,
    PeerError: spec.ERROR,
    SourceTerminus: spec.SOURCE,
    TargetTerminus: spec.TARGET,
    Mechanisms: spec.SASL_MECHANISMS,
    Init: spec.SASL_INIT,
    SaslOutcome: spec.SASL_OUTCOME,
}
_RECORDS: Final = {code: kind for kind, code in _CODES.items()}


class _Field(NamedTuple):
    name: str
    types: tuple[type, ...]
    is_optional: bool


def _schema(kind: type[Record]) -> tuple[_Field, ...]:
    hints = get_type_hints(kind)
    return tuple(_field(each.name, hints[each.name]) for each in fields(kind))


def _field(name: str, hint: Any) -> _Field:  # noqa: ANN401
    hints = get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    kinds = tuple(get_origin(each) or each for each in hints if each is not types.NoneType)
    return _Field(name, kinds, types.NoneType in hints)


_SCHEMAS: Final = {kind: _schema(kind) for kind in _CODES}


def decode(body: bytes) -> tuple[Record, int]:
    """Read the record at the beginning of a frame's body; return it and where it ends.

    Raises:
        CodecError: It isn't a record, or a field violates the specification.
    """
    value, end = read(body, 0, len(body))
    return _record(value), end


def _record(value: Any) -> Record:  # noqa: ANN401
    match value:
        case Described(ULong() as code, list() as values) if code in _RECORDS:
            kind = _RECORDS[code]
        case Described(descriptor, _):
            raise CodecError(f"a frame has an unknown performative: {descriptor!r:.80}")
        case _:
            raise CodecError("a frame must begin with a described list")
    schema = _SCHEMAS[kind]
    if len(values) > len(schema):
        raise CodecError(f"{kind.__name__.lower()} has {len(values)} fields, not {len(schema)}")
    values += [None] * (len(schema) - len(values))
    return kind(*[_checked(kind, *each) for each in zip(schema, values, strict=True)])


def _checked(kind: type[Record], field: _Field, value: Any) -> Any:  # noqa: ANN401
    if value is None:
        if field.is_optional:
            return None
        raise CodecError(f"{field.name} of {kind.__name__.lower()} is missing")
    if isinstance(value, Described) and Described not in field.types:
        value = _record(value)
    if isinstance(value, field.types):
        return value
    expected = " or ".join(each.__name__ for each in field.types)
    raise CodecError(
        f"{field.name} of {kind.__name__.lower()} is a {type(value).__name__}, not a {expected}"
    )


def encode(record: Record) -> bytes:
    """Return an encoded record, without the absent fields at its end."""
    return write(_described(record))


def _described(record: Record) -> Described:
    values = []
    for field in _SCHEMAS[type(record)]:
        value = getattr(record, field.name)
        values.append(_described(value) if type(value) in _SCHEMAS else value)
    while values and values[-1] is None:
        values.pop()
    return Described(ULong(_CODES[type(record)]), values)

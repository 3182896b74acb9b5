"""The numbers of AMQP 0-9-1: frames, methods, properties and field types.

They come from the specification, with RabbitMQ's extensions: `basic.nack`, and the field types that
RabbitMQ reads and writes. Two numbers are in `core`, which needs them as well: reply codes
(:class:`~aio_pika_batch.core.refusals.ReplyCode`) and the longest short string
(:data:`~aio_pika_batch.core.message.SHORT_STRING`).
"""

from __future__ import annotations

import struct
from typing import Final

# --- frames: type, channel, size of the payload; the payload; the end ---------------

METHOD, HEADER, BODY, HEARTBEAT = 1, 2, 3, 8
FRAME_TYPES: Final = frozenset((METHOD, HEADER, BODY, HEARTBEAT))
FRAME_END = 0xCE

FRAME_HEAD = struct.Struct(">BHI")
PAYLOAD_AT = FRAME_HEAD.size
FRAME_OVERHEAD = PAYLOAD_AT + 1

HEARTBEAT_FRAME = FRAME_HEAD.pack(HEARTBEAT, 0, 0) + bytes((FRAME_END,))
DEFAULT_FRAME_MAX = 131_072
"""RabbitMQ's default for the largest frame. It holds until the broker proposes another."""

PROTOCOL_HEADER = b"AMQP"
"""Begins the eight bytes with which a broker answers if it doesn't speak this version."""

# --- methods: class and method, which begin a method frame's payload ----------------

METHOD_ID = struct.Struct(">I")
ARGUMENTS_AT = PAYLOAD_AT + METHOD_ID.size

CONNECTION_TUNE = 10 << 16 | 30
CONNECTION_CLOSE = 10 << 16 | 50
CHANNEL_CLOSE = 20 << 16 | 40
CHANNEL_CLOSE_OK = 20 << 16 | 41
BASIC_CANCEL = 60 << 16 | 30
BASIC_PUBLISH = 60 << 16 | 40
BASIC_RETURN = 60 << 16 | 50
BASIC_DELIVER = 60 << 16 | 60
BASIC_ACK = 60 << 16 | 80
BASIC_REJECT = 60 << 16 | 90
BASIC_NACK = 60 << 16 | 120

ACK_SIZE = 13
"""Bytes in the payload of an ack, a nack or a reject: the method, the delivery tag, the flags."""

MULTIPLE = 1
REJECT_REQUEUE = 1
NACK_REQUEUE = 2  # `multiple` comes first

# --- content header: class, weight, size of the body; flags; properties -------------

CONTENT_CLASS = 60 << 16
"""The class `basic`, followed by the weight, which is always 0."""

CONTENT_HEAD = struct.Struct(">IQ")
SHORTEST_CONTENT_HEADER = CONTENT_HEAD.size + 2  # the flags
PROPERTIES_AT = PAYLOAD_AT + CONTENT_HEAD.size

FLAGS = struct.Struct(">H")
HEADERS_FLAG = 1 << 13
CORRELATION_ID_FLAG = 1 << 10
EXPIRATION_FLAG = 1 << 8
MESSAGE_ID_FLAG = 1 << 7
TIMESTAMP_FLAG = 1 << 6
USER_ID_FLAG = 1 << 4
UNDEFINED_FLAGS = 0b11  # a property that isn't defined, and "more flags follow"

SHORT, TABLE, OCTET, TIME = range(4)
"""The types of properties."""

PROPERTIES: Final = (
    (1 << 15, "content_type", SHORT),
    (1 << 14, "content_encoding", SHORT),
    (HEADERS_FLAG, "headers", TABLE),
    (1 << 12, "delivery_mode", OCTET),
    (1 << 11, "priority", OCTET),
    (CORRELATION_ID_FLAG, "correlation_id", SHORT),
    (1 << 9, "reply_to", SHORT),
    (EXPIRATION_FLAG, "expiration", SHORT),
    (MESSAGE_ID_FLAG, "message_id", SHORT),
    (TIMESTAMP_FLAG, "timestamp", TIME),
    (1 << 5, "type", SHORT),
    (USER_ID_FLAG, "user_id", SHORT),
    (1 << 3, "app_id", SHORT),
    (1 << 2, "cluster_id", SHORT),
)
"""The flag, the name and the type of each property, in their order in a property list."""

# --- tables: each value begins with its type ----------------------------------------

LENGTH = struct.Struct(">I")
SECONDS = struct.Struct(">Q")
DECIMAL_VALUE = struct.Struct(">Bi")

TEXT, BINARY, ARRAY, NESTED_TABLE = b"SxAF"
TIMESTAMP, DECIMAL, VOID = b"TDV"
BOOLEAN, INT32, INT64, DOUBLE = b"tIld"

# RabbitMQ's list, which differs from the specification's: `s` is a short integer and `x` is binary.
# `L` is read as other clients write it.
NUMBERS: Final = {
    ord(letter): struct.Struct(layout)
    for letter, layout in {
        "b": ">b",
        "B": ">B",
        "s": ">h",
        "u": ">H",
        "I": ">i",
        "i": ">I",
        "l": ">q",
        "L": ">q",
        "f": ">f",
        "d": ">d",
        "t": "?",
    }.items()
}

FIXED_SIZES: Final = {
    **{letter: layout.size for letter, layout in NUMBERS.items()},
    TIMESTAMP: SECONDS.size,
    DECIMAL: DECIMAL_VALUE.size,
    VOID: 0,
}

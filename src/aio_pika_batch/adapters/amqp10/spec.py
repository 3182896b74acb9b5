"""The numbers of AMQP 1.0 that several modules need: of frames, outcomes and sections."""

from __future__ import annotations

from typing import Final

AMQP_HEADER: Final = b"AMQP\x00\x01\x00\x00"
SASL_HEADER: Final = b"AMQP\x03\x01\x00\x00"

AMQP_FRAME: Final = 0
SASL_FRAME: Final = 1

FRAME_HEAD: Final = 8
"""Bytes before a frame's body: size, data offset, type and channel."""

SERIAL: Final = 0xFFFF_FFFF
"""Ids and counts are 32 bits wide and wrap (RFC 1982)."""

# The outcomes of a delivery: the last byte of the descriptor, as in the sections below.
ACCEPTED: Final = 0x24
REJECTED: Final = 0x25
RELEASED: Final = 0x26
MODIFIED: Final = 0x27

# The sections of a message.
HEADER: Final = 0x70
DELIVERY_ANNOTATIONS: Final = 0x71
MESSAGE_ANNOTATIONS: Final = 0x72
PROPERTIES: Final = 0x73
APPLICATION_PROPERTIES: Final = 0x74
DATA: Final = 0x75
AMQP_SEQUENCE: Final = 0x76
AMQP_VALUE: Final = 0x77
FOOTER: Final = 0x78

"""Which ports are free, and does a broker answer there yet?

Ports are picked below the range from which the kernel serves outgoing connections: a node that was
killed must find its port free when it comes back.
"""

from __future__ import annotations

import random
import re
import socket
import struct

LOCALHOST = "127.0.0.1"
_PROTOCOL_HEADER = b"AMQP\x00\x00\x09\x01"
_HEAD = struct.Struct(">BHI")
_METHOD = 1
_LARGEST = 1 << 16
# An entry of the table of server properties: a name, `S`, and a text after its four-byte length.
_VERSION = re.compile(rb"\x07versionS\x00\x00\x00(.)", re.DOTALL)


def free_port() -> int:
    """Return a TCP port of 127.0.0.1 that nobody listens on."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((LOCALHOST, port))
            except OSError:
                continue
        return port


def greeting(host: str, port: int, *, timeout: float = 2) -> str | None:
    """Say hello in AMQP, and return the version that the broker tells, or None if none answers.

    A port that only accepts connections is no broker yet: ``connection.start`` must come back.
    """
    try:
        with socket.create_connection((host, port), timeout=timeout) as conversation:
            conversation.sendall(_PROTOCOL_HEADER)
            return _version(conversation)
    except OSError:
        return None


def _version(conversation: socket.socket) -> str | None:
    # Read by hand: what a test believes of a broker must not hang on the code that it tests.
    received = b""
    while chunk := conversation.recv(4096):
        received += chunk
        if len(received) < _HEAD.size:
            continue
        kind, _, size = _HEAD.unpack_from(received)
        if kind != _METHOD or size > _LARGEST:
            break
        if len(received) > _HEAD.size + size:
            told = _VERSION.search(received)
            return told and received[told.end() : told.end() + ord(told[1])].decode()
    return None

"""Decodes bodies that their publisher has compressed or encoded, as `content_encoding` says."""

from __future__ import annotations

import codecs
import zlib
from importlib import import_module

MAX_BYTES = 64 * 1024 * 1024
"""The default limit of a decompressed body."""

_GZIP = zlib.MAX_WBITS | 16
_NOTHING_TO_DO = frozenset(("", "identity", "binary"))  # kombu calls pickled bodies "binary"


def charset_of(content_encoding: str | None) -> str | None:
    """Return the character set that `content_encoding` names, as kombu and Celery use it."""
    try:
        return codecs.lookup(content_encoding or "").name
    except (LookupError, ValueError):
        return None


def decompress(body: bytes, content_encoding: str | None, max_bytes: int) -> bytes:
    """Return a body as it was before its publisher compressed it.

    Several encodings, separated by commas, were applied in this order (RFC 9110, section 8.4).

    Raises:
        ValueError: The encoding is unknown, the body isn't encoded so, or the result is too large.
    """
    for each in reversed((content_encoding or "").split(",")):
        name = each.strip().lower()
        if name in _NOTHING_TO_DO:
            continue
        try:
            body = _decoded(body, name, max_bytes)
        except zlib.error as error:
            text = f"content_encoding {name!r}: the body is not encoded so ({error})"
            raise ValueError(text) from error
        except ValueError as error:
            raise ValueError(f"content_encoding {name!r}: {error}") from error
    return body


def _decoded(body: bytes, encoding: str, max_bytes: int) -> bytes:
    match encoding:
        case "gzip" | "x-gzip":
            return _inflate(body, _GZIP, max_bytes)
        case "deflate":
            try:
                return _inflate(body, zlib.MAX_WBITS, max_bytes)
            except zlib.error:
                # RFC 9110 means zlib's format, but many programs leave out its header.
                return _inflate(body, -zlib.MAX_WBITS, max_bytes)
        case "zstd":
            return _inflate_zstd(body, max_bytes)
        case _ if charset_of(encoding) is None:
            raise ValueError("only gzip, deflate and zstd are known: decode `body` yourself")
    return body


def _inflate(body: bytes, wbits: int, max_bytes: int) -> bytes:
    parts: list[bytes] = []
    left = max_bytes
    while body:  # gzip may have several members, one behind another
        decompressor = zlib.decompressobj(wbits)
        part = decompressor.decompress(body, left + 1)
        left -= len(part)
        if left < 0:
            raise _too_large(max_bytes)
        if not decompressor.eof:
            raise ValueError("the body is incomplete")
        parts.append(part)
        body = decompressor.unused_data
    return b"".join(parts)


def _inflate_zstd(body: bytes, max_bytes: int) -> bytes:
    try:
        zstd = import_module("compression.zstd")
    except ImportError:
        raise ValueError("it needs Python 3.14: decode `body` yourself") from None
    decompressor = zstd.ZstdDecompressor()
    try:
        found: bytes = decompressor.decompress(body, max_bytes + 1)
    except zstd.ZstdError as error:
        raise ValueError(f"the body is not encoded so ({error})") from error
    if len(found) > max_bytes:
        raise _too_large(max_bytes)
    if not decompressor.eof:
        raise ValueError("the body is incomplete")
    return found


def _too_large(max_bytes: int) -> ValueError:
    return ValueError(f"the body is larger than {max_bytes} bytes when decoded: raise `max_bytes`")

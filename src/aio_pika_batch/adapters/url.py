"""Parses a broker URL, which may name several hosts, into addresses.

`amqp://user:password@host1:5672,host2:5672/vhost` names two hosts, and so do two whole URLs that
are separated by a comma. The defaults are the usual ones: port 5672 (5671 with TLS), user and
password `guest`, virtual host `/`. Characters that have a meaning in a URL must be percent-encoded.

No error shows a password, or anything that might be a part of one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import parse_qsl, quote, unquote

from aio_pika_batch.errors import ConfigurationError
from aio_pika_batch.transport import PORTS

_LARGEST_PORT = 65_535
_LONGEST_HEARTBEAT = 65_535
_LONGEST_NAME = 255
_LONGEST_VHOST = 127

OPTIONS: Final = frozenset(
    (
        "auth",
        "cadata",
        "cafile",
        "capath",
        "certfile",
        "happy_eyeballs_delay",
        "heartbeat",
        "interleave",
        "keyfile",
        "name",
        "no_verify_ssl",
    )
)
"""The query parameters that are allowed: those that aio-pika reads."""

_ANOTHER_URL = re.compile(r",(?=\s*[A-Za-z][A-Za-z0-9+.-]*://)")


@dataclass(frozen=True, slots=True)
class Address:
    """One broker."""

    host: str
    port: int
    user: str = "guest"
    password: str = field(default="guest", repr=False)
    vhost: str = "/"
    tls: bool = False
    options: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """The address without user and password, for errors and logs."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        vhost = "/" if self.vhost == "/" else f"/{quote(self.vhost, safe='')}"
        return f"{'amqps' if self.tls else 'amqp'}://{host}:{self.port}{vhost}"


def parse_url(url: str) -> tuple[Address, ...]:
    """Parse one URL, or several that are separated by commas.

    Raises:
        ConfigurationError: The URL is invalid.
    """
    return tuple(
        address for part in _ANOTHER_URL.split(url) for address in _parse_one(part.strip())
    )


def _parse_one(url: str) -> list[Address]:
    scheme, separator, rest = url.partition("://")
    scheme = scheme.lower()
    if not separator:
        raise ConfigurationError("url: it must begin with amqp:// or amqps://")
    if scheme not in PORTS:
        raise ConfigurationError(f"url: the scheme is {scheme!r}; it must be amqp or amqps")
    match = re.fullmatch(r"([^/?#]*)(?:/([^?#]*))?(?:\?([^#]*))?(#.*)?", rest, re.DOTALL)
    authority, path, query, fragment = match.groups() if match else ("", None, None, None)
    after_authority = f"{path or ''}{query or ''}{fragment or ''}"
    if "@" in after_authority and "@" not in authority:
        raise ConfigurationError(
            "url: user or password contain a '/', '?' or '#'; write them as %2F, %3F and %23"
        )
    if fragment:
        raise ConfigurationError("url: a '#' in it must be written as %23")
    userinfo, _, hosts = authority.rpartition("@")
    user, has_password, password = userinfo.partition(":")
    common = {
        "user": _unquoted("the user", user) or "guest",
        "password": _unquoted("the password", password) if has_password else "guest",
        "vhost": _unquoted("the virtual host", path or "") or "/",
    }
    _check_vhost(common["vhost"])
    options = _options(query or "")
    return [
        Address(host, port, tls=scheme == "amqps", options=options, **common)
        for host, port in (_host_and_port(each.strip(), scheme) for each in hosts.split(","))
    ]


def _host_and_port(text: str, scheme: str) -> tuple[str, int]:
    if text.startswith("["):
        host, closed, rest = text[1:].partition("]")
        if not closed or (rest and not rest.startswith(":")):
            raise ConfigurationError(
                f"url: the IPv6 address {text!r} must end with ']' or ']:port'"
            )
        port = rest[1:]
    else:
        host, _, port = text.partition(":")
        if ":" in port:
            raise ConfigurationError(f"url: an IPv6 address needs brackets: [{text}]")
    if not host:
        raise ConfigurationError("url: a host is missing")
    if not port:
        return unquote(host), PORTS[scheme]
    if not (port.isascii() and port.isdigit() and 0 < int(port) <= _LARGEST_PORT):
        # The text isn't shown: if the '@' was forgotten, it is a password.
        raise ConfigurationError(
            f"url: what follows {host!r} and a colon is not a port; it must be 1 to 65535"
        )
    return unquote(host), int(port)


def _unquoted(what: str, text: str) -> str:
    try:
        found = unquote(text, errors="strict")
        found.encode()
    except UnicodeError as error:
        raise ConfigurationError(f"url: {what} is percent-encoded, but not as UTF-8") from error
    if "\0" in found:
        # It separates the user from the password when the client logs in.
        raise ConfigurationError(f"url: {what} contains a null character, which AMQP can't send")
    return found


def _check_vhost(vhost: str) -> None:
    """Refuse the few names of virtual hosts that the client library would change or reject."""
    if len(vhost) > _LONGEST_VHOST:
        raise ConfigurationError(
            f"url: the virtual host has {len(vhost)} characters; the client library allows"
            f" {_LONGEST_VHOST}"
        )
    if "%2F" in vhost:
        raise ConfigurationError(
            f"url: the virtual host {vhost!r} contains '%2F' literally, which the client library"
            " takes for '/'; if you meant '/', encode it once"
        )


def _options(query: str) -> dict[str, str]:
    options = dict(parse_qsl(query, keep_blank_values=True))
    unknown = sorted(options.keys() - OPTIONS)
    if unknown:
        raise ConfigurationError(
            f"url: there is no option {unknown[0]!r}; use one of {', '.join(sorted(OPTIONS))}"
        )
    if options.get("no_verify_ssl", "0") not in {"0", "1"}:
        # aiormq would take every value but 0 as a yes, even "false".
        raise ConfigurationError(
            "url: no_verify_ssl must be 0, to verify certificates, or 1, not to verify them"
        )
    # The limits are those of the settings `heartbeat` and `connection_name`.
    heartbeat = options.get("heartbeat", "30")
    is_number = heartbeat.isascii() and heartbeat.isdigit()
    if not is_number or not 1 <= int(heartbeat[:9]) <= _LONGEST_HEARTBEAT:
        raise ConfigurationError(
            f"url: heartbeat is {heartbeat!r}; it must be whole seconds, 1 to {_LONGEST_HEARTBEAT}"
        )
    if len(options.get("name", "")) > _LONGEST_NAME:
        raise ConfigurationError(f"url: name must have at most {_LONGEST_NAME} characters")
    return options

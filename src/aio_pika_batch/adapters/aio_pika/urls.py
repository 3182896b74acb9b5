"""Which brokers does a URL name?

`amqp://user:password@host1:5672,host2:5672/vhost` names two; so do two whole URLs with a comma in
between. What is left out is as elsewhere: port 5672 (5671 with TLS), user and password `guest`,
virtual host `/`. Signs that mean something in a URL are percent-encoded in its parts.

No error shows a password, nor anything that may be a piece of one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import parse_qsl, quote, unquote

from aio_pika_batch.errors import ConfigurationError

_PORTS: Final = {"amqp": 5672, "amqps": 5671}
_LARGEST_PORT = 65_535

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
"""What may stand behind the question mark: what aio-pika reads there."""

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
        """Where it is, for errors and logs."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        vhost = "/" if self.vhost == "/" else f"/{quote(self.vhost, safe='')}"
        return f"{'amqps' if self.tls else 'amqp'}://{host}:{self.port}{vhost}"


def parse(url: str) -> tuple[Address, ...]:
    """Read one URL, or several.

    Raises:
        ConfigurationError: It says what is wrong.
    """
    return tuple(
        address for part in _ANOTHER_URL.split(url) for address in _parse_one(part.strip())
    )


def _parse_one(url: str) -> list[Address]:
    scheme, separator, rest = url.partition("://")
    scheme = scheme.lower()
    if not separator:
        raise ConfigurationError("url: it must begin with amqp:// or amqps://")
    if scheme not in _PORTS:
        raise ConfigurationError(f"url: the scheme is {scheme!r}; it must be amqp or amqps")
    match = re.fullmatch(r"([^/?#]*)(?:/([^?#]*))?(?:\?([^#]*))?(#.*)?", rest, re.DOTALL)
    authority, path, query, fragment = match.groups() if match else ("", None, None, None)
    behind = f"{path or ''}{query or ''}{fragment or ''}"
    if "@" in behind and "@" not in authority:
        raise ConfigurationError(
            "url: user or password hold a '/', '?' or '#'; write them as %2F, %3F and %23"
        )
    if fragment:
        raise ConfigurationError("url: a '#' in it must be written as %23")
    userinfo, _, hosts = authority.rpartition("@")
    user, has_password, password = userinfo.partition(":")
    common = {
        "user": _decoded("the user", user) or "guest",
        "password": _decoded("the password", password) if has_password else "guest",
        "vhost": _decoded("the virtual host", path or "") or "/",
    }
    options = _options(query or "")
    return [
        Address(host, port, tls=scheme == "amqps", options=options, **common)
        for host, port in (_host_and_port(each.strip(), scheme) for each in hosts.split(","))
    ]


def _host_and_port(text: str, scheme: str) -> tuple[str, int]:
    if text.startswith("["):
        host, closed, behind = text[1:].partition("]")
        if not closed or (behind and not behind.startswith(":")):
            raise ConfigurationError(
                f"url: the IPv6 address {text!r} must end with ']' or ']:port'"
            )
        port = behind[1:]
    else:
        host, _, port = text.partition(":")
        if ":" in port:
            raise ConfigurationError(f"url: an IPv6 address stands in brackets: [{text}]")
    if not host:
        raise ConfigurationError("url: a host is missing")
    if not port:
        return unquote(host), _PORTS[scheme]
    if not (port.isascii() and port.isdigit() and 0 < int(port) <= _LARGEST_PORT):
        # Not told what stands there: where the '@' was forgotten, it is a password.
        raise ConfigurationError(f"url: what follows {host!r} and a colon is no port (1..65535)")
    return unquote(host), int(port)


def _decoded(what: str, text: str) -> str:
    try:
        return unquote(text, errors="strict")
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"url: {what} is percent-encoded, but not as UTF-8") from error


def _options(query: str) -> dict[str, str]:
    options = dict(parse_qsl(query, keep_blank_values=True))
    unknown = sorted(options.keys() - OPTIONS)
    if unknown:
        raise ConfigurationError(
            f"url: there is no option {unknown[0]!r}; known are {', '.join(sorted(OPTIONS))}"
        )
    if options.get("no_verify_ssl", "0") not in {"0", "1"}:
        # aiormq takes all but 0 for a yes, "false" too.
        raise ConfigurationError(
            "url: no_verify_ssl must be 0, to verify certificates, or 1, not to verify them"
        )
    heartbeat = options.get("heartbeat")
    if heartbeat is not None and not (heartbeat.isascii() and heartbeat.isdigit()):
        raise ConfigurationError(f"url: heartbeat is {heartbeat!r}; it must be whole seconds")
    return options

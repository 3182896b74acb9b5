"""Which transport serves a URL?

Found by the scheme: those that come along, by name only, so that nothing is imported before it is
wanted; others by the entry-point group `aio_pika_batch.transports`.
"""

from __future__ import annotations

import re
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, cast

from aio_pika_batch.errors import ConfigurationError

if TYPE_CHECKING:
    from aio_pika_batch.transport import Endpoint, Transport, TransportFactory

GROUP = "aio_pika_batch.transports"

_SCHEME = re.compile(r"\s*([a-z][a-z0-9+.-]*)://", re.IGNORECASE)
"""RFC 3986, section 3.1; anything else may be part of a password."""

_ONE_SERVER = re.compile(
    r"\w+://(?:[^/?#@]*@)?(?P<host>\[[^\]@]*\]|[^/?#@,:\[\]]*)(?::(?P<port>\d{1,5}))?(?:[/?][^,@]*)?"
)
_PORTS = {"amqp": 5672, "amqps": 5671}

_AIO_PIKA = "aio_pika_batch.adapters.aio_pika.transport:open_transport"
_BUILT_IN = {
    "amqp": _AIO_PIKA,
    "amqps": _AIO_PIKA,
    "memory": "aio_pika_batch.adapters.memory:open_transport",
}


def scheme_of(url: str) -> str:
    """The scheme of a URL, in lower case; empty if it has none, or something that can be none."""
    found = _SCHEME.match(url)
    return found[1].lower() if found else ""


def server_of(url: str) -> tuple[str, int] | None:
    """Host and port of the broker; None if the URL names none, or several."""
    found = _ONE_SERVER.fullmatch(url.strip())
    default = _PORTS.get(scheme_of(url))
    if found is None or default is None:
        return None
    host = found["host"].removeprefix("[").removesuffix("]")
    return host or "localhost", int(found["port"] or default)


def known_schemes() -> list[str]:
    """Every scheme that some transport serves, sorted."""
    return sorted({*_BUILT_IN, *entry_points(group=GROUP).names})


def open_transport(endpoint: Endpoint) -> Transport:
    """Make the transport that serves an endpoint.

    Raises:
        ConfigurationError: No transport serves its scheme, or several do, or the one that does
            cannot be imported.
    """
    scheme = scheme_of(endpoint.url)
    entry_point = _entry_point(scheme)
    try:
        factory = cast("TransportFactory", entry_point.load())
    except Exception as error:
        # Whatever a module raises while it is imported, it is of no use.
        what = f"{_named(entry_point)}, {type(error).__name__}: {error}"
        msg = (
            f"url: the transport for {scheme}:// cannot be imported ({what});"
            " install what it needs, or use another scheme"
        )
        raise ConfigurationError(msg) from error
    return factory(endpoint)


def _entry_point(scheme: str) -> EntryPoint:
    if scheme in _BUILT_IN:
        return EntryPoint(scheme, _BUILT_IN[scheme], GROUP)
    # What is found twice on the path, by a link or an editable install, is still one.
    match list(dict.fromkeys(entry_points(group=GROUP, name=scheme))):
        case [only]:
            return only
        case []:
            msg = f"url: no transport serves {scheme}://; known are {', '.join(known_schemes())}"
        case several:
            msg = (
                f"url: {scheme}:// is served by {' and by '.join(map(_named, several))};"
                " uninstall all but one, or pass the transport in"
            )
    raise ConfigurationError(msg)


def _named(entry_point: EntryPoint) -> str:
    installed = entry_point.dist
    return f"{entry_point.value} of {installed.name}" if installed else entry_point.value

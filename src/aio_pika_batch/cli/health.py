"""Is a program well? A probe for whoever can run a command but may not ask over the network."""

from __future__ import annotations

from http.client import HTTPException
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import ProxyHandler, build_opener

from aio_pika_batch.cli.exits import Exit
from aio_pika_batch.errors import BrokerUnavailable, ConfigurationError

_MOST = 64 * 1024
"""Bytes of an answer that are shown."""


def health(*, url: str = "http://127.0.0.1:8080/livez", timeout: float = 3.0) -> int:
    """Ask a running program how it is, and print what it says.

    1 says that it is not well, 3 that it did not answer in time, or that nobody listens.

    Args:
        url: What to ask, as --health-port serves it: /livez, /readyz, /status or /metrics.
        timeout: Seconds to wait.
    """
    if urlsplit(url).scheme != "http":
        raise ConfigurationError(f"--url: {url} must start with http://")
    opener = build_opener(ProxyHandler({}))  # what is on this machine is not behind a proxy
    try:
        with opener.open(url, timeout=timeout) as answer:
            print(answer.read(_MOST).decode(errors="replace"), end="")
    except HTTPError as error:
        with error:
            print(error.read(_MOST).decode(errors="replace"), end="")
        return Exit.FAILED
    except (URLError, OSError, HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise BrokerUnavailable(f"{url}: no answer: {reason}") from error
    return Exit.OK

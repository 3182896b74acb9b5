"""The command `health`: a probe that runs as a command, for where no HTTP probe is possible."""

from __future__ import annotations

from http.client import HTTPException
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import ProxyHandler, build_opener

from aio_pika_batch.cli.app import Exit
from aio_pika_batch.errors import BrokerUnavailable, ConfigurationError

_MAX_BYTES = 64 * 1024
"""Bytes of a response that are printed."""


def health(*, url: str = "http://127.0.0.1:8080/livez", timeout: float = 3.0) -> int:
    """Request a health endpoint of a running program and print the response.

    Args:
        url: Endpoint served by --health-port: /livez, /readyz, /status or /metrics.
        timeout: Seconds to wait for the response.
    """
    if urlsplit(url).scheme != "http":
        raise ConfigurationError(f"--url: {url} must start with http://")
    opener = build_opener(ProxyHandler({}))  # a proxy wouldn't reach this machine
    try:
        with opener.open(url, timeout=timeout) as answer:
            print(answer.read(_MAX_BYTES).decode(errors="replace"), end="")
    except HTTPError as error:
        with error:
            print(error.read(_MAX_BYTES).decode(errors="replace"), end="")
        return Exit.FAILED
    except (URLError, OSError, HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise BrokerUnavailable(
            f"{url}: no answer: {reason}; is the program running with --health-port?"
        ) from error
    return Exit.OK

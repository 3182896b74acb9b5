"""Which transport serves a URL, and what is said if none does?"""

from __future__ import annotations

from importlib.metadata import EntryPoint, EntryPoints

import pytest

from aio_pika_batch import ConfigurationError, registry
from aio_pika_batch.adapters.memory import MemoryTransport
from aio_pika_batch.registry import GROUP, known_schemes, open_transport, scheme_of
from aio_pika_batch.transport import Endpoint

URL = "plug://user:secret@host/"


def plugged(monkeypatch, value, name="plug"):
    """Let an installed package offer a transport."""

    def offered(*, group, **wanted):
        assert group == GROUP
        return EntryPoints([EntryPoint(name, value, GROUP)]).select(**wanted)

    monkeypatch.setattr(registry, "entry_points", offered)


def test_what_comes_along_is_known():
    """Without importing any of it."""
    assert {"amqp", "amqps", "memory"} <= set(known_schemes())
    assert sorted(known_schemes()) == known_schemes()


def test_a_scheme_is_found_by_name():
    """In whatever case."""
    assert isinstance(open_transport(Endpoint(url="memory://")), MemoryTransport)
    assert isinstance(open_transport(Endpoint(url="MEMORY://name")), MemoryTransport)


def test_an_installed_package_may_serve_another_scheme(monkeypatch):
    """By an entry point, which is given the whole endpoint."""
    plugged(monkeypatch, f"{__name__}:Plug")
    assert "plug" in known_schemes()
    assert URL == open_transport(Endpoint(url=URL)).endpoint.url


class Plug:
    """What an installed package offers."""

    def __init__(self, endpoint):
        self.endpoint = endpoint


def test_what_comes_along_cannot_be_replaced_by_accident(monkeypatch):
    """A package that names the same scheme does not take it over."""
    plugged(monkeypatch, f"{__name__}:Plug", name="memory")
    assert isinstance(open_transport(Endpoint(url="memory://")), MemoryTransport)


@pytest.mark.parametrize("url", ["plug://user:secret@host/", "nothing", "", "://"])
def test_an_unknown_scheme_is_told_with_the_known_ones(url):
    """And without the rest of the URL."""
    with pytest.raises(ConfigurationError, match="known are amqp, amqps, memory") as raised:
        open_transport(Endpoint(url=url))
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize("value", ["no_such_package:factory", f"{__name__}:no_such_name"])
def test_a_transport_that_cannot_be_imported_says_what_is_missing(monkeypatch, value):
    """And what to do about it."""
    plugged(monkeypatch, value)
    with pytest.raises(
        ConfigurationError, match=r"url: .*plug://.*no_such_(package|name).*install"
    ) as raised:
        open_transport(Endpoint(url=URL))
    assert "secret" not in str(raised.value)
    assert raised.value.__cause__ is not None


@pytest.mark.parametrize(
    ("url", "scheme"),
    [
        ("amqp://h", "amqp"),
        (" AMQPS://h", "amqps"),
        ("x-my.scheme+tls://h", "x-my.scheme+tls"),
        ("amqp:/h", ""),
        ("user:se://cret@host", ""),
        ("://h", ""),
        ("1st://h", ""),
    ],
)
def test_a_scheme_is_what_stands_before_the_slashes(url, scheme):
    """If it could be one (RFC 3986); else it may be part of a password."""
    assert scheme == scheme_of(url)

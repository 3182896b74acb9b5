"""A URL is parsed into addresses, and errors show no password."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from urllib.parse import quote

import pytest
from aiormq import Connection
from hypothesis import example, given
from hypothesis import strategies as st

from aio_pika_batch.adapters.aio_pika.connection import _url
from aio_pika_batch.adapters.url import Address, parse_url
from aio_pika_batch.errors import ConfigurationError

A = Address


@pytest.mark.parametrize(
    ("url", "addresses"),
    [
        ("amqp://h", [A("h", 5672)]),
        ("amqp://h/", [A("h", 5672)]),
        ("amqps://h", [A("h", 5671, tls=True)]),
        ("AMQP://h:1/v", [A("h", 1, vhost="v")]),
        ("amqp://u:p@h/v", [A("h", 5672, "u", "p", "v")]),
        ("amqp://u@h", [A("h", 5672, "u")]),
        ("amqp://u:@h", [A("h", 5672, "u", "")]),
        ("amqp://u%40x:p%2F%3A%23@h/a%2Fb", [A("h", 5672, "u@x", "p/:#", "a/b")]),
        ("amqp://u:p@w@h", [A("h", 5672, "u", "p@w")]),
        ("amqp://u:p,w@h", [A("h", 5672, "u", "p,w")]),
        ("amqp://h//", [A("h", 5672)]),
        ("amqp://h/%2F", [A("h", 5672)]),
        ("amqp://h/a/b", [A("h", 5672, vhost="a/b")]),
        ("amqp://[::1]:5673/v", [A("::1", 5673, vhost="v")]),
        ("amqp://[fe80::1]", [A("fe80::1", 5672)]),
        ("amqp://h?heartbeat=5&name=me", [A("h", 5672, options={"heartbeat": "5", "name": "me"})]),
        ("amqp://h/?name=a@b", [A("h", 5672, options={"name": "a@b"})][:0]),
        ("amqp://u:p@h/?name=a@b", [A("h", 5672, "u", "p", options={"name": "a@b"})]),
        ("amqp://u:p@h1,h2:1/v", [A("h1", 5672, "u", "p", "v"), A("h2", 1, "u", "p", "v")]),
        ("amqp://u:p@h1:5, [::2]:6/v", [A("h1", 5, "u", "p", "v"), A("::2", 6, "u", "p", "v")]),
        ("amqp://a/x, amqps://b/y", [A("a", 5672, vhost="x"), A("b", 5671, vhost="y", tls=True)]),
        ("amqp://a,b/x,amqp://c", [A("a", 5672, vhost="x"), A("b", 5672, vhost="x"), A("c", 5672)]),
    ],
)
def test_a_url_is_parsed_into_addresses(url: str, addresses: list[Address]) -> None:
    """The defaults are the usual ones."""
    if addresses:
        assert tuple(addresses) == parse_url(url)
    else:
        with pytest.raises(ConfigurationError):
            parse_url(url)


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("localhost", "must begin with amqp://"),
        ("", "must begin with amqp://"),
        ("http://h", "scheme is 'http'"),
        ("amqp://", "host is missing"),
        ("amqp://u:p@", "host is missing"),
        ("amqp://h1,,h2", "host is missing"),
        ("amqp://:5672", "host is missing"),
        ("amqp://h:port", "not a port"),
        ("amqp://h:0", "not a port"),
        ("amqp://h:65536", "not a port"),
        ("amqp://::1", "brackets"),
        ("amqp://[::1", "IPv6"),
        ("amqp://[::1]5", "IPv6"),
        ("amqp://h/#v", "%23"),
        ("amqp://u:secret/x@h", "%2F"),
        ("amqp://u:secret?x@h", "%2F"),
        ("amqp://u:secret#x@h", "%2F"),
        ("amqp://u:secret", "not a port"),
        ("amqp://u:%ff%fesecret@h", "password"),
        ("amqp://h/%ff", "virtual host"),
        ("amqp://h/\ud800", "not as UTF-8"),
        ("amqp://u:a%00secret@h", "null character"),
        ("amqp://h/a%252Fb", "contains '%2F' literally"),
        ("amqp://h/" + 128 * "v", "has 128 characters; the client library allows 127"),
        ("amqp://h?hartbeat=5", "no option 'hartbeat'; use one of .*heartbeat"),
        ("amqp://h?heartbeat=soon", "whole seconds"),
        ("amqp://h?heartbeat=0", "heartbeat is '0'; it must be whole seconds, 1 to 65535"),
        ("amqp://h?heartbeat=65536", "1 to 65535"),
        ("amqp://h?heartbeat=1" + "0" * 5000, "1 to 65535"),
        ("amqp://h?heartbeat=", "1 to 65535"),
        ("amqp://h?name=" + "n" * 256, "name must have at most 255"),
    ],
)
def test_an_invalid_url_is_an_error_without_the_password(url: str, why: str) -> None:
    """The text says what is wrong."""
    with pytest.raises(ConfigurationError, match=why) as caught:
        parse_url(url)
    assert "secret" not in str(caught.value)


@given(st.text(max_size=60))
def test_any_text_is_parsed_or_a_configuration_error(text: str) -> None:
    """Nothing else is raised."""
    with suppress(ConfigurationError):
        parse_url(f"amqp://{text}")


names = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=127)


@given(names.filter(bool), names, names.filter(bool).filter(lambda name: "%2F" not in name))
@example("guest", "guest", "..")
@example("guest", "guest", "./team/../b")
@example("a+b", "%2F+ /", "a+b")
def test_the_client_library_gets_each_name_as_it_is(user: str, password: str, vhost: str) -> None:
    """Also names with dots, which have a meaning in the path of a URL."""
    url = f"amqp://{quote(user, safe='')}:{quote(password, safe='')}@h/{quote(vhost, safe='')}"
    [address] = parse_url(url)
    assert (user, password, vhost) == (address.user, address.password, address.vhost)
    made = _url(address, 30)
    with asyncio.Runner() as runner:
        vhost_sent = Connection(made, loop=runner.get_loop()).vhost
    assert (user, password, vhost) == (made.user, made.password or "", vhost_sent)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("amqp://u:secret@h/v", "amqp://h:5672/v"),
        ("amqps://u:secret@[::1]", "amqps://[::1]:5671/"),
        ("amqp://u:secret@h/a%2Fb", "amqp://h:5672/a%2Fb"),
    ],
)
def test_an_address_shows_no_password(url: str, shown: str) -> None:
    """Neither as a text nor as a representation."""
    [address] = parse_url(url)

    assert shown == str(address)
    assert "secret" not in repr(address)

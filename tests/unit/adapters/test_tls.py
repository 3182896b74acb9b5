"""Errors about certificates, keys and their passwords come early, and say what is wrong."""

from __future__ import annotations

import asyncio
import base64
import logging
import ssl
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import pytest
import trustme
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)

from aio_pika_batch.adapters import tls
from aio_pika_batch.adapters.aio_pika.connection import open_connection
from aio_pika_batch.adapters.connecting import connect_to_first
from aio_pika_batch.adapters.rabbitmq import open_transport
from aio_pika_batch.adapters.url import Address
from aio_pika_batch.errors import (
    AccessRefused,
    BrokerUnavailable,
    ConfigurationError,
    TransportError,
)
from aio_pika_batch.transport import Endpoint

if TYPE_CHECKING:
    from collections.abc import Callable

PASSWORD = "s3cret"
WHERE = Address("h", 5671, tls=True)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Certificates and keys, by name."""
    folder = tmp_path_factory.mktemp("files")
    authority = trustme.CA()
    client, other = authority.issue_cert("c@h"), authority.issue_cert("d@h")
    key = load_pem_private_key(client.private_key_pem.bytes(), None)
    locked = key.private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(PASSWORD.encode())
    )
    for name, content in {
        "ca.pem": authority.cert_pem.bytes(),
        "client.pem": client.cert_chain_pems[0].bytes(),
        "client.key": client.private_key_pem.bytes(),
        "both.pem": client.private_key_and_cert_chain_pem.bytes(),
        "other.key": other.private_key_pem.bytes(),
        "locked.key": locked,
        "both-locked.pem": locked + client.cert_chain_pems[0].bytes(),
        "not.pem": b"no certificate",
    }.items():
        (folder / name).write_bytes(content)
    return lambda name: str(folder / name)


def made(url: str = "amqps://h", **options: Any) -> None:
    """Make a transport, which doesn't connect yet."""
    open_transport(Endpoint(url=url, **options))


def test_valid_tls_options_are_accepted(files: Callable[[str], str]) -> None:
    """From settings and from the URL. A key may be in the file of its certificate."""
    made()
    made(ssl_cafile=files("ca.pem"))
    made(ssl_certfile=files("client.pem"), ssl_keyfile=files("client.key"))
    made(ssl_certfile=files("both.pem"))
    made(ssl_certfile=files("both.pem"), ssl_key_password="not needed")
    made(
        ssl_certfile=files("client.pem"),
        ssl_keyfile=files("locked.key"),
        ssl_key_password=PASSWORD,
    )
    made(ssl_certfile=files("both-locked.pem"), ssl_key_password=PASSWORD)
    made(f"amqps://h?cafile={files('ca.pem')}&certfile={files('both.pem')}&no_verify_ssl=0")
    made(f"amqps://h?capath={Path(files('ca.pem')).parent}")
    pem = base64.b64encode(Path(files("ca.pem")).read_bytes()).decode()
    made(f"amqps://h?cadata={quote(pem, safe='')}")


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"ssl_cafile": "gone.pem"}, r"ssl_cafile: there is no file '.*gone\.pem'"),
        ({"ssl_certfile": "gone.pem"}, r"ssl_certfile: there is no file"),
        ({"ssl_cafile": "not.pem"}, r"ssl_cafile: '.*not\.pem' cannot be read as certificates"),
        ({"ssl_certfile": "not.pem"}, r"ssl_certfile: '.*not\.pem' and its key cannot be read"),
        ({"ssl_certfile": "client.pem"}, r"ssl_certfile: .* cannot be read as PEM"),
        (
            {"ssl_certfile": "client.pem", "ssl_keyfile": "other.key"},
            r"ssl_keyfile: the key '.*other\.key' does not belong to the certificate '.*client",
        ),
        (
            {"ssl_certfile": "client.pem", "ssl_keyfile": "locked.key"},
            r"ssl_keyfile: the key '.*' is encrypted: set ssl_key_password to its password",
        ),
        (
            {"ssl_certfile": "both-locked.pem"},
            r"ssl_certfile: the key in '.*both-locked\.pem' is encrypted",
        ),
        ({"ssl_keyfile": "client.key"}, "ssl_keyfile without a certificate"),
    ],
)
def test_an_invalid_file_is_an_error_with_the_settings_name(
    files: Callable[[str], str], given: dict[str, str], text: str
) -> None:
    """Before anything is connected."""
    with pytest.raises(ConfigurationError, match=text):
        made(**{name: files(file) for name, file in given.items()})


@pytest.mark.parametrize("wrong", ["wrong-s3cret", "", "s3cret" * 500, "s3cret\ud800"])
def test_a_wrong_key_password_is_not_shown(files: Callable[[str], str], wrong: str) -> None:
    """Not even one that cannot be a password. Nothing is asked at a terminal."""
    with pytest.raises(ConfigurationError, match="correct ssl_key_password") as caught:
        made(
            ssl_certfile=files("client.pem"),
            ssl_keyfile=files("locked.key"),
            ssl_key_password=wrong,
        )
    assert "s3cret" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("amqps://h?cafile=/no/such", "url: cafile: there is no file"),
        ("amqps://h?capath=/no/such", "url: capath: there is no directory"),
        ("amqps://h?keyfile=/no/such", "url: keyfile without a certificate"),
        ("amqps://h?cadata=!", "url: cadata must be PEM in base64"),
        ("amqps://h?cadata=bm8gY2VydGlmaWNhdGU=", "url: cadata: cannot be read as certificates"),
        ("amqps://h?no_verify_ssl=false", "no_verify_ssl must be 0, .* or 1"),
        ("amqps://h?no_verify_ssl", "no_verify_ssl must be 0"),
        ("amqp://h?no_verify_ssl=1", "no_verify_ssl in url is for TLS, and amqp://h:5672/"),
        ("amqps://h,amqp://g?cafile=x", "cafile in url is for TLS, and amqp://g:5672/"),
    ],
)
def test_an_invalid_tls_option_in_the_url_is_an_error(url: str, text: str) -> None:
    """A value that only looks like "no" must not switch verification off."""
    with pytest.raises(ConfigurationError, match=text):
        made(url)


@pytest.mark.parametrize("name", ["ssl_cafile", "ssl_certfile", "ssl_keyfile", "ssl_key_password"])
def test_tls_options_without_tls_are_refused(name: str) -> None:
    """The user has probably forgotten the s of amqps."""
    with pytest.raises(ConfigurationError, match=rf"{name} is for TLS.*write amqps://") as caught:
        made("amqp://h", **{name: "s3cret"})
    assert "s3cret" not in str(caught.value)


def test_certificate_and_name_are_verified_by_default() -> None:
    """Unless the URL says no_verify_ssl=1."""
    strict = tls.create_context(tls.tls_options(Endpoint(url=""), WHERE))
    assert (True, ssl.CERT_REQUIRED) == (strict.check_hostname, strict.verify_mode)
    assert strict.minimum_version >= ssl.TLSVersion.TLSv1_2

    careless = replace(WHERE, options={"no_verify_ssl": "1"})
    loose = tls.create_context(tls.tls_options(Endpoint(url=""), careless))
    assert (False, ssl.CERT_NONE) == (loose.check_hostname, loose.verify_mode)


def test_a_warning_is_logged_for_each_unverified_broker(caplog: pytest.LogCaptureFixture) -> None:
    """Without the password."""
    made("amqps://u:s3cret@a,b?no_verify_ssl=1")
    made("amqps://u:s3cret@c")
    reported = [each.getMessage() for each in caplog.records if logging.WARNING == each.levelno]
    assert [True, True] == ["is not verified" in each for each in reported]
    assert "amqps://a:5671/" in reported[0]
    assert "amqps://b:5671/" in reported[1]
    assert "s3cret" not in "".join(reported)


async def test_a_file_that_disappears_later_is_a_temporary_error() -> None:
    """It is probably being replaced."""
    endpoint = Endpoint(url="amqps://localhost", ssl_cafile="/no/such")
    with pytest.raises(BrokerUnavailable, match="was not tried: ssl_cafile: there is no file"):
        await open_connection(endpoint)


def test_representations_show_no_password() -> None:
    """Of endpoints and TLS options."""
    endpoint = Endpoint(url=f"amqps://u:{PASSWORD}@h", ssl_key_password=PASSWORD)
    assert PASSWORD not in repr(endpoint)
    assert PASSWORD not in repr(tls.tls_options(endpoint, WHERE))


@pytest.mark.parametrize(
    ("code", "message", "advice"),
    [
        (10, "certificate has expired", "renew it on the broker"),
        (9, "certificate is not yet valid", "clock"),
        (62, "Hostname mismatch, certificate is not valid for 'h'.", "name that is in it"),
        (64, "IP address mismatch, certificate is not valid for '::1'.", "name that is in it"),
        (18, "self-signed certificate", "set ssl_cafile"),
        (20, "unable to get local issuer certificate", "set ssl_cafile"),
        (23, "certificate revoked", "set ssl_cafile .* or renew"),
    ],
)
def test_each_flaw_of_a_certificate_has_its_advice(code: int, message: str, advice: str) -> None:
    """By OpenSSL's number for it."""
    error = ssl.SSLCertVerificationError(1, "failed")
    error.verify_code, error.verify_message = code, message
    with pytest.raises(Exception, match=rf"^amqps://h:5671/ .*{message.rstrip('.')}; .*{advice}"):
        raise tls.verification_error(error, WHERE)


@pytest.mark.parametrize(
    ("reason", "text"),
    [
        ("WRONG_VERSION_NUMBER", "does not speak TLS there"),
        ("TLSV13_ALERT_CERTIFICATE_REQUIRED", "may want a client certificate"),
        ("SSLV3_ALERT_HANDSHAKE_FAILURE", "may want a client certificate"),
        ("TLSV1_ALERT_UNKNOWN_CA", "does not accept the client certificate"),
        ("SSLV3_ALERT_CERTIFICATE_EXPIRED", "does not accept the client certificate"),
        ("TLSV1_ALERT_PROTOCOL_VERSION", "failed: TLSV1_ALERT_PROTOCOL_VERSION$"),
        ("NO_CIPHERS_AVAILABLE", "failed: NO_CIPHERS_AVAILABLE$"),
        (None, "no reason is given$"),
    ],
)
def test_each_failed_handshake_has_its_advice(reason: str | None, text: str) -> None:
    """By the alert that the broker has sent, if it has sent one."""
    error = ssl.SSLError(1, "failed")
    error.reason = reason
    with pytest.raises(Exception, match=text):
        raise tls.handshake_error(error, WHERE)


# --- an alert that was lost with its connection ----------------------------------------


class Listener:
    """A broker's side of a second connection, which ends after the handshake.

    Attributes:
        end: What ends it; None if the broker closes it without a reason.
        opened: The addresses that were connected to.
        is_open: Whether a connection is left open.
    """

    def __init__(self, end: OSError | None = None) -> None:
        self.end = end
        self.opened: list[tuple[str, int]] = []
        self.is_open = False

    @property
    def transport(self) -> Listener:
        """Itself, in the place of the writer's transport."""
        return self

    async def open(self, host: str, port: int, *, ssl: object) -> tuple[Listener, Listener]:
        """Open it, as `asyncio.open_connection` does."""
        assert ssl is not None
        self.opened.append((host, port))
        self.is_open = True
        return self, self

    async def read(self, count: int) -> bytes:
        """Wait for data: the end comes instead."""
        assert count
        await asyncio.sleep(0.5)
        if self.end is not None:
            raise self.end
        return b""

    def abort(self) -> None:
        """Drop it."""
        self.is_open = False


def alert() -> ssl.SSLError:
    """The broker wants a certificate."""
    error = ssl.SSLError(1, "oops")
    error.reason = "TLSV13_ALERT_CERTIFICATE_REQUIRED"
    return error


async def error_after(
    failure: Exception, listener: Listener, monkeypatch: pytest.MonkeyPatch, url: str = "amqps://h"
) -> TransportError:
    """What is reported when a connection fails by this, and the next one meets the listener."""

    async def connect(address: Address) -> None:
        raise BrokerUnavailable(f"{address} cannot be reached: {failure!r}") from failure

    monkeypatch.setattr(asyncio, "open_connection", listener.open)
    with pytest.raises(TransportError) as caught:
        await connect_to_first(Endpoint(url=url), connect)
    assert not listener.is_open
    return caught.value


@pytest.mark.parametrize("reset", [ConnectionResetError(104, "reset"), BrokenPipeError(32, "pipe")])
async def test_a_refused_client_gets_the_reason_although_the_alert_was_lost(
    reset: OSError, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second connection, on which nothing is sent, receives it."""
    listener = Listener(alert())
    error = await error_after(reset, listener, monkeypatch)

    assert isinstance(error, AccessRefused)
    assert "may want a client certificate: set ssl_certfile" in str(error)
    assert error.__cause__ is listener.end
    assert [("h", 5671)] == listener.opened


@pytest.mark.parametrize("end", [None, TimeoutError(), ConnectionRefusedError()])
async def test_a_reset_for_another_reason_stays_what_it_is(
    end: OSError | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The broker may be starting, or too busy: worth another attempt."""
    listener = Listener(end)
    error = await error_after(ConnectionResetError(104, "by peer"), listener, monkeypatch)

    assert isinstance(error, BrokerUnavailable)
    assert "by peer" in str(error)
    assert [("h", 5671)] == listener.opened


@pytest.mark.parametrize(
    ("url", "failure"),
    [("amqp://h", ConnectionResetError()), ("amqps://h", OSError("no route to host"))],
)
async def test_only_a_reset_tls_connection_is_opened_again(
    url: str, failure: OSError, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No alert can have been lost with the others."""
    listener = Listener(alert())
    error = await error_after(failure, listener, monkeypatch, url)

    assert isinstance(error, BrokerUnavailable)
    assert [] == listener.opened

"""Whom does a connection trust, and as whom does it show itself?

Laws:

- A broker's certificate and its name are verified, unless the URL says `no_verify_ssl=1`; then a
  warning says what that means, each time.
- Nothing that was asked for is dropped: TLS files beside `amqp://`, which would go in clear, are
  refused.
- Nobody is asked at a terminal: a key that wants a password which was not given is an error.
- Files are read anew for each connection, so that they can be replaced while a consumer runs.
"""

from __future__ import annotations

import base64
import binascii
import logging
import ssl
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from aio_pika_batch.errors import AccessRefused, ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from aio_pika_batch.adapters.aio_pika.urls import Address
    from aio_pika_batch.transport import Endpoint

_log = logging.getLogger("aio_pika_batch.tls")

_FILES: Final = ("cafile", "certfile", "keyfile")
OPTIONS: Final = frozenset((*_FILES, "capath", "cadata", "no_verify_ssl"))
"""What of a URL's options is about TLS."""

_EXPIRED, _NOT_YET = 10, 9
_NAMES = {62, 64}  # a host's name, an address
_ISSUERS = {2, 18, 19, 20, 21}
"""OpenSSL's numbers of what is wrong with a certificate (`X509_V_ERR_…`)."""

_WANTED: Final = ("CERTIFICATE_REQUIRED", "HANDSHAKE_FAILURE", "NO_CERTIFICATE")
_NOT_WANTED: Final = ("CERTIFICATE", "UNKNOWN_CA", "ACCESS_DENIED")
"""What a peer's alert about our own certificate has in its name."""


@dataclass(frozen=True, slots=True)
class Papers:
    """What is needed to talk TLS with one broker.

    Attributes:
        sources: What each file was named by, for errors.
    """

    cafile: str | None = None
    capath: str | None = None
    cadata: str | None = field(default=None, repr=False)
    certfile: str | None = None
    keyfile: str | None = None
    password: str | None = field(default=None, repr=False)
    verify: bool = True
    sources: Mapping[str, str] = field(default_factory=dict)


def check(endpoint: Endpoint, addresses: Sequence[Address]) -> None:
    """Look whether what is configured can work; warn of what nobody should want.

    Raises:
        ConfigurationError: It names the setting, or the part of the URL.
    """
    for address in addresses:
        if not address.tls:
            _refuse_clear(endpoint, address)
            continue
        papers = papers_for(endpoint, address)
        context_of(papers)
        if not papers.verify:
            _log.warning(
                "the certificate of %s is not verified, as no_verify_ssl=1 in url says: whoever"
                " stands in between can read and change all that is sent, the password included;"
                " name the authority that signed it by ssl_cafile instead",
                address,
            )


def _refuse_clear(endpoint: Endpoint, address: Address) -> None:
    named = [f"ssl_{name}" for name in _FILES if getattr(endpoint, f"ssl_{name}") is not None]
    if endpoint.ssl_key_password is not None:
        named.append("ssl_key_password")
    named += [f"{name} in url" for name in sorted(OPTIONS & address.options.keys())]
    if named:
        raise ConfigurationError(
            f"{named[0]} is for TLS, and {address} goes in clear; write amqps:// in url, or leave"
            f" {named[0]} out"
        )


def papers_for(endpoint: Endpoint, address: Address) -> Papers:
    """What settings and URL say; what stands in the URL goes first.

    Raises:
        ConfigurationError: It is not complete.
    """
    options = address.options
    found = {name: getattr(endpoint, f"ssl_{name}") for name in _FILES}
    sources = {name: f"ssl_{name}" for name in _FILES}
    for name in (*_FILES, "capath"):
        if name in options:
            found[name], sources[name] = options[name], f"url: {name}"
    if found["keyfile"] is not None and found["certfile"] is None:
        raise ConfigurationError(
            f"{sources['keyfile']} without a certificate: name the one that it belongs to"
            " by ssl_certfile"
        )
    return Papers(
        **found,
        cadata=_decoded(options.get("cadata")),
        password=endpoint.ssl_key_password,
        verify=options.get("no_verify_ssl", "0") == "0",
        sources=sources,
    )


def _decoded(text: str | None) -> str | None:
    """Certificates in a URL are PEM in base64, as aiormq has it."""
    if not text:
        return None
    try:
        return base64.b64decode(text, validate=True).decode("ascii")
    except (binascii.Error, ValueError) as error:
        raise ConfigurationError("url: cadata must be PEM in base64, percent-encoded") from error


def context_of(papers: Papers) -> ssl.SSLContext:
    """Read the files. Blocks.

    Raises:
        ConfigurationError: One is not there, or not what it should be.
    """
    for name in _FILES:
        file = getattr(papers, name)
        if file is not None and not Path(file).is_file():
            raise ConfigurationError(f"{papers.sources[name]}: there is no file {file!r}")
    if papers.capath is not None and not Path(papers.capath).is_dir():
        raise ConfigurationError(
            f"{papers.sources['capath']}: there is no directory {papers.capath!r}"
        )
    try:
        context = ssl.create_default_context(
            cafile=papers.cafile, capath=papers.capath, cadata=papers.cadata
        )
    except (OSError, ValueError) as error:
        named = papers.sources["cafile"] if papers.cafile is not None else "url: cadata"
        what = "" if papers.cafile is None else f" {papers.cafile!r}"
        raise ConfigurationError(
            f"{named}:{what} cannot be read as certificates in PEM: {_reason(error)}"
        ) from error
    if not papers.verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if papers.certfile is not None:
        _show(context, papers, papers.certfile)
    return context


def _show(context: ssl.SSLContext, papers: Papers, certfile: str) -> None:
    """Let the context show a certificate of our own."""
    was_asked = False

    def password() -> str:
        nonlocal was_asked
        was_asked = True
        if papers.password is None:
            raise ConfigurationError(f"{key} is encrypted: give its password by ssl_key_password")
        return papers.password

    key = (
        f"{papers.sources['certfile']}: the key in {certfile!r}"
        if papers.keyfile is None
        else f"{papers.sources['keyfile']}: the key {papers.keyfile!r}"
    )
    try:
        context.load_cert_chain(certfile, papers.keyfile, password)
    except ConfigurationError:
        raise
    except (OSError, ValueError) as error:
        if "MISMATCH" in _reason(error):
            why = f"{key} does not belong to the certificate {certfile!r}"
        elif was_asked:
            why = f"{key} cannot be decrypted: correct ssl_key_password"
        else:
            why = (
                f"{papers.sources['certfile']}: {certfile!r} and its key cannot be read as PEM:"
                f" {_reason(error)}"
            )
        # The password may stand in what went wrong with it.
        raise ConfigurationError(why) from (None if was_asked else error)


def _reason(error: Exception) -> str:
    reason = error.reason if isinstance(error, ssl.SSLError) else getattr(error, "strerror", None)
    return reason or type(error).__name__


def not_verified(error: ssl.SSLCertVerificationError, address: Address) -> AccessRefused:
    """The broker's certificate is not good enough: why, and what helps?"""
    code = error.verify_code
    if code == _EXPIRED:
        advice = "renew it on the broker"
    elif code == _NOT_YET:
        advice = "look whether the clock is right, here and where it was made"
    elif code in _NAMES:
        advice = "connect by a name that stands in it"
    elif code in _ISSUERS:
        advice = "set ssl_cafile to the authority that signed it"
    else:
        advice = "set ssl_cafile to the authority that signed it, or renew it on the broker"
    said = error.verify_message.rstrip(".")
    return AccessRefused(f"{address} shows a certificate that does not verify: {said}; {advice}")


def handshake_failed(error: ssl.SSLError, address: Address) -> AccessRefused:
    """The two found no common ground: why, and what helps?"""
    reason = error.reason or "no reason is given"
    if reason == "WRONG_VERSION_NUMBER":
        return AccessRefused(f"{address} does not speak TLS there; use amqp:// or another port")
    advice = ""
    if "ALERT" in reason:
        if any(word in reason for word in _WANTED):
            advice = "; the broker may want a client certificate: set ssl_certfile and ssl_keyfile"
        elif any(word in reason for word in _NOT_WANTED):
            advice = (
                "; the broker does not accept the client certificate: give one by ssl_certfile that"
                " is valid, and signed by an authority that the broker knows"
            )
    return AccessRefused(f"{address}: the TLS handshake failed: {reason}{advice}")

"""Makes the TLS context of a connection, and explains why a handshake failed.

Laws:

- The broker's certificate and its name are verified, unless the URL says `no_verify_ssl=1`. Then a
  warning is logged for each broker.
- No TLS option is ignored: TLS files beside `amqp://`, which is not encrypted, are an error.
- There is no prompt: a key whose password is missing is an error.
- Files are read again for each connection, so that you can replace them while a consumer runs.
"""

from __future__ import annotations

import base64
import binascii
import logging
import ssl
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from aio_pika_batch.adapters.url import Address, parse_url
from aio_pika_batch.errors import AccessRefused, ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from aio_pika_batch.transport import Endpoint

_log = logging.getLogger("aio_pika_batch.tls")

_FILES: Final = ("cafile", "certfile", "keyfile")
# There is no setting that switches verification off. The URL is where it will be read.
OPTIONS: Final = frozenset((*_FILES, "capath", "cadata", "no_verify_ssl"))
"""The query parameters of a URL that concern TLS."""

# OpenSSL's numbers for what is wrong with a certificate (`X509_V_ERR_…`).
_SET_CAFILE: Final = "set ssl_cafile to the authority that signed it"
_ADVICE: Final = {
    9: "check the clock, here and where it was made",  # not yet valid
    10: "renew it on the broker",  # expired
    **dict.fromkeys((62, 64), "connect by a name that is in it"),  # another host name, IP address
    **dict.fromkeys((2, 18, 19, 20, 21), _SET_CAFILE),  # issuer unknown
}

# Parts of the names of alerts that concern the client's certificate.
_CERTIFICATE_MISSING: Final = ("CERTIFICATE_REQUIRED", "HANDSHAKE_FAILURE", "NO_CERTIFICATE")
_CERTIFICATE_REJECTED: Final = ("CERTIFICATE", "UNKNOWN_CA", "ACCESS_DENIED")


@dataclass(frozen=True, slots=True)
class TlsOptions:
    """The TLS options for one broker.

    Attributes:
        sources: The setting or URL parameter that named each file, for errors.
    """

    cafile: str | None = None
    capath: str | None = None
    cadata: str | None = field(default=None, repr=False)
    certfile: str | None = None
    keyfile: str | None = None
    password: str | None = field(default=None, repr=False)
    verify: bool = True
    sources: Mapping[str, str] = field(default_factory=dict)


def check_endpoint(endpoint: Endpoint) -> None:
    """Check the URL and the TLS options, and log a warning if verification is off.

    Raises:
        ConfigurationError: One is invalid. The text names the setting, or the URL parameter.
    """
    for address in parse_url(endpoint.url):
        if not address.tls:
            _refuse_unencrypted(endpoint, address)
            continue
        options = tls_options(endpoint, address)
        create_context(options)
        if not options.verify:
            _log.warning(
                "the certificate of %s is not verified, because url says no_verify_ssl=1: anyone on"
                " the network path can read and change all data, including the password; set"
                " ssl_cafile to the authority that signed it instead",
                address,
            )


def _refuse_unencrypted(endpoint: Endpoint, address: Address) -> None:
    # Unused files would do no harm, but who sets them believes that the connection is encrypted.
    named = [f"ssl_{name}" for name in _FILES if getattr(endpoint, f"ssl_{name}") is not None]
    if endpoint.ssl_key_password is not None:
        named.append("ssl_key_password")
    named += [f"{name} in url" for name in sorted(OPTIONS & address.options.keys())]
    if named:
        raise ConfigurationError(
            f"{named[0]} is for TLS, and {address} is not encrypted; write amqps:// in url, or"
            f" remove {named[0]}"
        )


def tls_options(endpoint: Endpoint, address: Address) -> TlsOptions:
    """Combine the settings with the URL, which takes precedence.

    Raises:
        ConfigurationError: The options are incomplete.
    """
    options = address.options
    found = {name: getattr(endpoint, f"ssl_{name}") for name in _FILES}
    sources = {name: f"ssl_{name}" for name in _FILES}
    for name in (*_FILES, "capath"):
        if name in options:
            found[name], sources[name] = options[name], f"url: {name}"
    if found["keyfile"] is not None and found["certfile"] is None:
        raise ConfigurationError(
            f"{sources['keyfile']} without a certificate: set ssl_certfile to the certificate that"
            " the key belongs to"
        )
    return TlsOptions(
        **found,
        cadata=_decoded(options.get("cadata")),
        password=endpoint.ssl_key_password,
        verify=options.get("no_verify_ssl", "0") == "0",
        sources=sources,
    )


def _decoded(text: str | None) -> str | None:
    """Decode the certificates in a URL: PEM in base64, as aiormq defines it."""
    if not text:
        return None
    try:
        return base64.b64decode(text, validate=True).decode("ascii")
    except (binascii.Error, ValueError) as error:
        raise ConfigurationError("url: cadata must be PEM in base64, percent-encoded") from error


def create_context(options: TlsOptions) -> ssl.SSLContext:
    """Read the files, and make a context of them. Blocks.

    The client library's own context treats every `no_verify_ssl` but 0 as a yes, asks for a key's
    password at the terminal, and reports OpenSSL's words for a bad file.

    Raises:
        ConfigurationError: A file does not exist, or cannot be read as what it should be.
    """
    for name in _FILES:
        file = getattr(options, name)
        if file is not None and not Path(file).is_file():
            raise ConfigurationError(f"{options.sources[name]}: there is no file {file!r}")
    if options.capath is not None and not Path(options.capath).is_dir():
        raise ConfigurationError(
            f"{options.sources['capath']}: there is no directory {options.capath!r}"
        )
    try:
        context = ssl.create_default_context(
            cafile=options.cafile, capath=options.capath, cadata=options.cadata
        )
    except (OSError, ValueError) as error:
        named = options.sources["cafile"] if options.cafile is not None else "url: cadata"
        what = "" if options.cafile is None else f" {options.cafile!r}"
        raise ConfigurationError(
            f"{named}:{what} cannot be read as certificates in PEM: {_reason(error)}"
        ) from error
    if not options.verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if options.certfile is not None:
        _load_client_certificate(context, options, options.certfile)
    return context


def _load_client_certificate(context: ssl.SSLContext, options: TlsOptions, certfile: str) -> None:
    key = (
        f"{options.sources['certfile']}: the key in {certfile!r}"
        if options.keyfile is None
        else f"{options.sources['keyfile']}: the key {options.keyfile!r}"
    )
    was_asked = False

    def password() -> str:
        nonlocal was_asked
        was_asked = True
        if options.password is None:
            raise ConfigurationError(f"{key} is encrypted: set ssl_key_password to its password")
        return options.password

    try:
        context.load_cert_chain(certfile, options.keyfile, password)
    except ConfigurationError:
        raise
    except (OSError, ValueError) as error:
        if "MISMATCH" in _reason(error):
            text = f"{key} does not belong to the certificate {certfile!r}"
        elif was_asked:
            text = f"{key} cannot be decrypted: correct ssl_key_password"
        else:
            text = (
                f"{options.sources['certfile']}: {certfile!r} and its key cannot be read as PEM:"
                f" {_reason(error)}"
            )
        # The cause is hidden if its text may contain the password.
        raise ConfigurationError(text) from (None if was_asked else error)


def _reason(error: Exception) -> str:
    reason = error.reason if isinstance(error, ssl.SSLError) else getattr(error, "strerror", None)
    return reason or type(error).__name__


def verification_error(error: ssl.SSLCertVerificationError, address: Address) -> AccessRefused:
    """Make an error of a broker's certificate that does not verify, with advice."""
    advice = _ADVICE.get(error.verify_code, f"{_SET_CAFILE}, or renew it on the broker")
    reason = error.verify_message.rstrip(".")
    return AccessRefused(
        f"{address} presents a certificate that does not verify: {reason}; {advice}"
    )


def handshake_error(error: ssl.SSLError, address: Address) -> AccessRefused:
    """Make an error of a failed TLS handshake, with advice."""
    reason = error.reason or "no reason is given"
    if reason == "WRONG_VERSION_NUMBER":
        return AccessRefused(f"{address} does not speak TLS there; use amqp:// or another port")
    # An alert comes from the broker; anything else was found on this side.
    advice = ""
    if "ALERT" in reason and any(word in reason for word in _CERTIFICATE_MISSING):
        advice = "; the broker may want a client certificate: set ssl_certfile and ssl_keyfile"
    elif "ALERT" in reason and any(word in reason for word in _CERTIFICATE_REJECTED):
        advice = (
            "; the broker does not accept the client certificate: set ssl_certfile to one that is"
            " valid, and signed by an authority that the broker knows"
        )
    return AccessRefused(f"{address}: the TLS handshake failed: {reason}{advice}")

"""Removes passwords from URLs, for logs and error messages."""

from __future__ import annotations

import re

from aio_pika_batch.transport import known_schemes

_HOST = r"(?:[^:/@,\[\]]*|\[[^\]]*\])(?::\d*)?"
_WITHOUT_CREDENTIALS = re.compile(rf"[^:/]*://{_HOST}(?:,{_HOST})*(?:[/?].*)?", re.DOTALL)

_SECRET_OPTION = re.compile(
    r"([?&;][^=&;]*(?:pass|pwd|secret|token|credential|api_?key)[^=&;]*=)[^&;]*", re.IGNORECASE
)
"""Some schemes pass the password as an option, and not before the `@`."""


def mask_url(url: str) -> str:
    """Replace each password in a URL, or in several comma-separated ones, with `***`."""
    # A password that contains `,`, `@`, `/` or `:` makes the URL invalid, but it must be masked as
    # well. So everything that could be a part of a password is masked.
    schemes = "|".join(map(re.escape, known_schemes()))
    masked = []
    rest = ""
    for piece in re.split(rf",(?=\s*(?:{schemes})://)", url, flags=re.IGNORECASE):
        rest = f"{rest},{piece}" if rest else piece
        if "@" in rest or _WITHOUT_CREDENTIALS.fullmatch(rest):
            masked.append(_mask_one(rest))
            rest = ""
    if rest:
        # The end of the password is missing, so all of the rest could be a part of it.
        masked.append(_mask_one(f"{rest}@") if "://" in rest else rest)
    return ",".join(masked)


_IN_TEXT = re.compile(r"(://[^\s:/@\"']*):[^\s@\"']*@")


def mask_text(text: str) -> str:
    """Replace the password of each URL in a text, such as a log line or JSON, with `***`."""
    return _IN_TEXT.sub(r"\1:***@", text)


def _mask_one(url: str) -> str:
    scheme, found, rest = url.partition("://")
    if found and "@" in rest:
        credentials, _, address = rest.rpartition("@")
        user, secret, _ = credentials.partition(":")
        url = f"{scheme}://{user}{':***' if secret else ''}@{address}"
    return _SECRET_OPTION.sub(r"\1***", url)

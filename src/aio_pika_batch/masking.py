"""Removes passwords from URLs and from texts that contain some, in linear time.

Anyone can put a text into a log: a message's body ends up in the text of an exception. So no search
here starts again for each character, and none depends on where a password seems to end.
"""

from __future__ import annotations

import re
import traceback

from aio_pika_batch.errors import safe_str
from aio_pika_batch.logs import escape_controls, shorten
from aio_pika_batch.transport import known_schemes

_HOST = r"(?:[^:/@,\[\]]*|\[[^\]]*\])(?::\d*)?"
_WITHOUT_CREDENTIALS = re.compile(rf"[^:/]*://{_HOST}(?:,{_HOST})*(?:[/?].*)?", re.DOTALL)

_OPTION = re.compile(r"([?&;])([^?&;=]*)=[^&;]*")
_SECRET_WORDS = ("pass", "pwd", "secret", "token", "credential", "apikey", "api_key")
"""Some schemes pass the password as an option, and not before the `@`."""


def mask_url(url: str) -> str:
    """Replace each password in a URL, or in several comma-separated ones, with `***`."""
    # A password that contains `,`, `@`, `/` or `:` makes the URL invalid, but it must be masked as
    # well. So everything that could be a part of a password is masked.
    masked: list[str] = []
    rest: list[str] = []
    for piece in _pieces(url):
        rest.append(piece)
        if "@" in piece or (len(rest) == 1 and _WITHOUT_CREDENTIALS.fullmatch(piece)):
            masked.append(_mask_one(",".join(rest)))
            rest = []
    if rest:
        # The end of the password is missing, so all of the rest could be a part of it.
        left = ",".join(rest)
        masked.append(_mask_one(f"{left}@") if "://" in left else left)
    return ",".join(masked)


def _pieces(urls: str) -> list[str]:
    """Divide the text at each comma before what may be another URL."""
    if "," not in urls:
        return [urls]  # without a look at the installed packages
    schemes = "|".join(map(re.escape, known_schemes()))
    return re.split(rf",(?=\s*(?:{schemes})://)", urls, flags=re.IGNORECASE)


def _mask_one(url: str) -> str:
    return _OPTION.sub(_mask_option, _mask_credentials(url))


def _mask_option(option: re.Match[str]) -> str:
    name = option[2].lower()
    is_secret = any(word in name for word in _SECRET_WORDS)
    return f"{option[1]}{option[2]}=***" if is_secret else option[0]


def _mask_credentials(url: str) -> str:
    scheme, _, rest = url.partition("://")
    # Up to the last `@`: a password that contains one is masked whole, and perhaps a bit more.
    credentials, _, address = rest.rpartition("@")
    user, colon, _ = credentials.partition(":")
    return f"{scheme}://{user}:***@{address}" if colon else url


_WORD = re.compile(r"\S+")
_NEXT_URL = re.compile(r"(?<=[,;'\"()\[\]{}<>=|])(?=[a-z][a-z0-9+.-]{0,19}://)", re.IGNORECASE)
"""The start of a further URL in the same word; anything else may be a part of a password."""


def mask_text(text: str) -> str:
    """Replace the password of each URL in a text, such as a log line or JSON, with `***`."""
    return _WORD.sub(_mask_word, text) if "://" in text else text


def _mask_word(word: re.Match[str]) -> str:
    if "://" not in word[0]:
        return word[0]
    # Quotes don't end a URL, because a password may contain one.
    return "".join(map(_mask_credentials, _NEXT_URL.split(word[0])))


_MOST_PIECES = 100
"""Frames and texts of a traceback: a deep recursion has many, and so has a group of exceptions."""


def mask_error(error: BaseException) -> str:
    """Return the text of an exception for others than the log: cut, escaped and masked."""
    return mask_text(escape_controls(shorten(safe_str(error))))


def mask_traceback(error: BaseException) -> str:
    """Return the traceback of an exception, each text in it as :func:`mask_error` does it."""
    pieces = traceback.format_exception(error)
    if len(pieces) > _MOST_PIECES:
        half = _MOST_PIECES // 2
        left_out = len(pieces) - 2 * half
        pieces = [*pieces[:half], f"… ({left_out} parts left out)\n", *pieces[-half:]]
    # Each is a frame, or the text of an exception, whose own line breaks stay.
    lines = "".join(shorten(each.rstrip("\n")) + "\n" for each in pieces).split("\n")
    return mask_text("\n".join(map(escape_controls, lines)))

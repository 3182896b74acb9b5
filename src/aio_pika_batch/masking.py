"""How is a URL shown without its passwords?"""

from __future__ import annotations

import re


def mask_url(url: str) -> str:
    """Replace every password in a URL, or in several comma-separated ones, by `***`."""
    return ",".join(_mask_one(each) for each in re.split(r",(?=\s*[\w+.-]+://)", url))


def _mask_one(url: str) -> str:
    scheme, found, rest = url.partition("://")
    if not found or "@" not in rest:
        return url
    # Up to the last @: a password with a stray @ or / in it is no valid URL, and still a password.
    credentials, _, address = rest.rpartition("@")
    user, secret, _ = credentials.partition(":")
    return f"{scheme}://{user}{':***' if secret else ''}@{address}"

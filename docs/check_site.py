"""Checks that every link within the site works, and that pages request nothing from third parties.

``python docs/check_site.py docs/_build``; ``nox -s docs`` runs it on the site that it has built.
Links to other sites aren't followed. What a browser fetches by itself (scripts, styles, fonts,
pictures) must be part of the site, so that a page is complete without a network and no third party
learns who reads it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

_FETCHED = {
    "audio": "src",
    "embed": "src",
    "iframe": "src",
    "img": "src",
    "input": "src",
    "object": "data",
    "script": "src",
    "source": "src",
    "track": "src",
    "video": "src",
}
"""What a browser fetches as soon as it sees it, and which attribute says from where."""

_FOLLOWED_ON_CLICK = {
    "author",
    "canonical",
    "genindex",
    "index",
    "license",
    "next",
    "prev",
    "search",
}
"""Kinds of `link` that fetch nothing."""

_IN_STYLES = re.compile(r"url\(\s*['\"]?([^'\")]+)['\"]?\s*\)|@import\s+['\"]([^'\"]+)['\"]")


@dataclass(slots=True)
class Page:
    """What a page has, and what it points to."""

    anchors: set[str] = field(default_factory=set)
    links: list[str] = field(default_factory=list)
    fetched: list[str] = field(default_factory=list)


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.page = Page()
        self._is_style = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        page = self.page
        page.anchors |= {given[name] for name in ("id", "name") if name in given}
        self._is_style = tag == "style"
        page.fetched += _urls(given.get("style", ""))
        page.fetched += [each.split()[0] for each in given.get("srcset", "").split(",") if each]
        if tag == "a" and "href" in given:
            page.links.append(given["href"])
        elif tag == "link" and not set(given.get("rel", "").split()) <= _FOLLOWED_ON_CLICK:
            page.fetched.append(given["href"])
        elif given.get(_FETCHED.get(tag, "")):
            page.fetched.append(given[_FETCHED[tag]])

    def handle_data(self, data: str) -> None:
        if self._is_style:
            self.page.fetched += _urls(data)

    def handle_endtag(self, tag: str) -> None:
        del tag
        self._is_style = False


def _urls(style: str) -> list[str]:
    return [one or other for one, other in _IN_STYLES.findall(style)]


@cache
def read(file: Path) -> Page:
    """Read a page, or a style sheet."""
    if file.suffix == ".css":
        return Page(fetched=_urls(file.read_text()))
    reader = _Reader()
    reader.feed(file.read_text())
    return reader.page


def complaints(site: Path) -> Iterator[str]:
    """What is wrong with it, a line for each."""
    for file in sorted([*site.rglob("*.html"), *site.rglob("*.css")]):
        where, page = file.relative_to(site), read(file)
        for target in page.fetched:
            parts = urlsplit(target)
            if parts.scheme == "data":
                continue
            if parts.scheme or parts.netloc:
                yield f"{where}: a browser fetches {target} from elsewhere"
            elif not (file.parent / unquote(parts.path)).is_file():
                yield f"{where}: there is no {target}"
        for target in page.links:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                continue
            to = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            if not to.is_file():
                yield f"{where}: a link to {target} leads nowhere"
            elif parts.fragment and unquote(parts.fragment) not in read(to).anchors:
                yield f"{where}: {target} isn't a place on that page"


def main(folder: str) -> int:
    """Tell what is wrong; the exit code says whether anything is."""
    site = Path(folder).resolve()
    found = list(complaints(site))
    sys.stderr.writelines(f"{each}\n" for each in found)
    pages = sum(1 for _ in site.rglob("*.html"))
    sys.stdout.write(f"{pages} pages, {len(found)} complaints\n")
    return 1 if found or not pages else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

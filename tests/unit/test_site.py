"""The check of the site notices each kind of mistake."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def complaints(tmp_path):
    """Return the complaints about a page with this body, beside another one."""
    spec = importlib.util.spec_from_file_location("check_site", ROOT / "docs" / "check_site.py")
    module = importlib.util.module_from_spec(spec)
    # A dataclass looks its module up.
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "check_site", module)
        spec.loader.exec_module(module)

    def of(body, style=""):
        (tmp_path / "other.html").write_text('<h1 id="here">')
        (tmp_path / "own.css").write_text(style)
        (tmp_path / "index.html").write_text(body)
        return list(module.complaints(tmp_path))

    return of


@pytest.mark.parametrize(
    "body",
    [
        '<a href="other.html#here">',
        '<a href="https://example.com/">',
        '<a href="#top"><p id="top">',
        '<link rel="stylesheet" href="own.css?v=1">',
        '<link rel="canonical" href="https://example.com/">',
        '<img src="data:image/svg+xml;base64,PHN2Zz4=">',
    ],
)
def test_what_is_there_is_no_matter(complaints, body):
    """Nor is a link that is followed by a reader, and not by the browser."""
    assert [] == complaints(body)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ('<a href="gone.html">', "leads nowhere"),
        ('<a href="other.html#there">', "isn't a place on that page"),
        ('<a href="#there">', "isn't a place on that page"),
        ('<img src="gone.svg">', "there is no gone.svg"),
        ('<script src="https://cdn.example.com/x.js">', "from elsewhere"),
        ('<script src="//cdn.example.com/x.js">', "from elsewhere"),
        ('<link rel="stylesheet" href="https://fonts.example.com/css">', "from elsewhere"),
        ('<link rel="preconnect" href="https://fonts.example.com">', "from elsewhere"),
        ('<p style="background: url(https://example.com/x.png)">', "from elsewhere"),
        ('<style>@import "https://example.com/x.css";</style>', "from elsewhere"),
        ('<img srcset="https://example.com/x.png 2x">', "from elsewhere"),
    ],
)
def test_missing_and_remote_targets_are_reported(complaints, body, said):
    """In one line, which names the page."""
    [complaint] = complaints(body)
    assert complaint.startswith("index.html: ")
    assert said in complaint


def test_style_sheets_are_read_too(complaints):
    """Fonts are mostly named there."""
    [complaint] = complaints("", "@font-face { src: url('https://example.com/font.woff2') }")
    assert complaint.startswith("own.css: ")

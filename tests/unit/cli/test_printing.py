"""Tests of how bodies of dead letters are shown."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aio_pika_batch.cli.printing import body_lines


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"", []),
        (b"plain\ttext\r\nof two lines", ["plain    text", "of two lines"]),
        (b'{"b":1,"a":["\xc3\xa4"]}', ["{", '  "b": 1,', '  "a": [', '    "ä"', "  ]", "}"]),
        (b'{"no json', ['{"no json']),
        (b"17", ["17"]),
        (b"\xff\x00A", [f"00000000  {'ff 00 41':<47}  ..A"]),
        (b"a\0b", [f"00000000  {'61 00 62':<47}  a.b"]),
        (b"\x1b[31mred", ["\\x1b[31mred"]),
        (b'["\\u001b", "\x7f"]', ["[", '  "\\u001b",', '  "\\x7f"', "]"]),
    ],
)
def test_bodies_are_shown_as_json_text_or_hex(body, expected):
    """JSON is indented; control characters are written out."""
    assert expected == list(body_lines(body, 1000))


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"0123456789abc", ["0123456789", "… (3 more bytes)"]),
        (b"012345678\xc3\xa4", ["012345678", "… (1 more bytes)"]),
        (b'{"a":1234567}', ["{", '  "a": 1', "… (8 more characters)"]),
        (b"\xff" * 12, [f"00000000  {'ff ' * 9 + 'ff':<47}  ..........", "… (2 more bytes)"]),
    ],
)
def test_long_bodies_are_cut_at_the_limit(body, expected):
    """The last line says how much is missing."""
    assert expected == list(body_lines(body, 10))


@given(st.binary(max_size=300) | st.text(max_size=100).map(str.encode), st.integers(1, 100))
def test_no_control_character_reaches_the_terminal(body, most):
    """Whatever the body; and no line contains a line break."""
    for line in body_lines(body, most):
        assert not [each for each in line if ord(each) < 32 or 127 <= ord(each) < 160]

"""Passwords in texts are masked whole, and in linear time."""

from __future__ import annotations

import json
import string
import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from aio_pika_batch.masking import mask_text, mask_url

# A word ends at white space. Everything else may be in a password without percent-encoding.
passwords = st.text(string.ascii_letters + string.digits + "'\"@:/?%,;=&+-()[]{}é\\", min_size=1)
passwords = passwords.filter(lambda each: "://" not in each)  # that could be another URL


@given(passwords)
@example("s3c'ret")
@example('s3c"ret')
@example("s3cr@et")
@example("s3c,ret@")
@example("a://b")
def test_a_password_in_a_text_is_masked_whole(password):
    """Whatever it contains, also a quote or an `@`, in a line and in its JSON."""
    line = f"connecting to amqp://user:{password}@host:5672/v now"
    assert "connecting to amqp://user:***@host:5672/v now" == mask_text(line)
    as_json = mask_text(json.dumps({"event": line, "other": 1}))
    assert {"event": mask_text(line), "other": 1} == json.loads(as_json)


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("amqp://u:p@h1/,amqps://v:q@h2/", "amqp://u:***@h1/,amqps://v:***@h2/"),
        ("url='amqp://u:p@h',mail='a@b'", "url='amqp://u:***@b'"),
        ("{'url':'amqp://h:5672','other':'amqp://u:p@h'}", None),
        ("http://h:8080/ and mail to a@b", None),
        ("see https://example.com/a/b", None),
        ("12:30 user@host", None),
        ("amqp://u@h:5672/v", None),
    ],
)
def test_text_that_is_certainly_not_a_password_stays(text, masked):
    """White space ends a URL, and so does the next one; a quote or a comma doesn't."""
    expected = text.replace("u:p@", "u:***@") if masked is None else masked
    assert expected == mask_text(text)


HOSTILE = [
    "://a:",
    "://",
    "a://b:c@",
    ",amqp://",
    "'x://",
    "?pass",
    "&",
    "@",
    ":",
    ",",
    "x",
    "[",
    "/",
]


@pytest.mark.parametrize("mask", [mask_text, mask_url])
@pytest.mark.parametrize("piece", HOSTILE)
@pytest.mark.parametrize("end", ["", "@h", "x"])
def test_masking_takes_linear_time(mask, piece, end):
    """A quadratic search would need a minute for what is done in a few milliseconds."""
    hostile = "amqp://u" + piece * (200_000 // len(piece)) + end
    began = time.process_time()
    mask(hostile)
    assert time.process_time() - began < 5

"""What a session may attach to a message, and how modifications are joined."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from aio_pika_batch.core.settlement import (
    Modification,
    check_modified_headers,
    join_modifications,
)
from aio_pika_batch.errors import SettlementError

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def test_readable_headers_are_accepted():
    """Texts, flags, and integers that fit into 64 bits."""
    check_modified_headers({"x-a": "", "x-b": True, "x-c": -(2**63), "x-d": 2**63 - 1})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("x-a", 0.5),
        ("x-a", None),
        ("x-a", b""),
        ("x-a", NOW),
        ("x-a", []),
        ("x-a", {}),
        ("x-a", 2**63),
        ("x-a", -(2**63) - 1),
        ("a", 1),
        ("", 1),
    ],
)
def test_other_headers_are_refused(name: str, value: object):
    """RabbitMQ can't deliver a float or null over AMQP 1.0, and hides tables from 0-9-1."""
    with pytest.raises(SettlementError, match=f"header {name!r} of a modified message"):
        check_modified_headers({"x-good": 1, name: value})  # type: ignore[dict-item]


def test_modifications_that_differ_in_their_tags_only_are_joined():
    """In the order of their first ones, so that a broker gets the fewest frames."""
    first = Modification((), headers={"x-retry-count": 1})
    assert [
        Modification((1, 2, 6), headers={"x-retry-count": 1}),
        Modification((3,), dead=True),
        Modification((4,), failed=False, headers={"x-retry-count": 1}),
        Modification((5,), until=NOW, headers={"x-retry-count": 1}),
        Modification((7,), headers={"x-retry-count": 2}),
    ] == join_modifications(
        [
            (first, 1),
            (first, 2),
            (Modification((), dead=True), 3),
            (Modification((), failed=False, headers={"x-retry-count": 1}), 4),
            (Modification((), until=NOW, headers={"x-retry-count": 1}), 5),
            (Modification((), headers={"x-retry-count": 1}), 6),
            (Modification((), headers={"x-retry-count": 2}), 7),
        ]
    )

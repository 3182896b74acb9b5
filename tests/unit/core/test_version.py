"""Is a broker's version read so that it can be compared?"""

from __future__ import annotations

import pytest

from aio_pika_batch.core.topology import DEFAULT_LIMIT_SINCE, parse_version


@pytest.mark.parametrize(
    ("product", "told", "version"),
    [
        ("RabbitMQ", "3.10.8", (3, 10, 8)),
        ("RabbitMQ", "4.0.5", (4, 0, 5)),
        ("RabbitMQ", "4.0.0-rc.1", (4, 0, 0)),
        ("RabbitMQ", "4.1.0+2.gabc", (4, 1, 0)),
        ("RabbitMQ", "of no known version", None),
        ("LavinMQ", "2.1.0", None),
        ("the broker", "4.0.5", None),
    ],
)
def test_versions(product, told, version):
    """Numbers up to the first thing that is none; other products count otherwise."""
    assert version == parse_version(product, told)


def test_ten_is_more_than_nine():
    """Which texts do not know."""
    three_nine, three_ten = (parse_version("RabbitMQ", each) for each in ("3.9.13", "3.10.8"))
    assert three_nine is not None
    assert three_ten is not None
    assert three_nine < three_ten < DEFAULT_LIMIT_SINCE

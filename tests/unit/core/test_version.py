"""Versions of brokers."""

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
def test_examples_of_versions(product, told, version):
    """The numbers up to the first other character. Other products have no version."""
    assert version == parse_version(product, told)


def test_versions_are_compared_as_numbers():
    """10 is more than 9."""
    three_nine, three_ten = (parse_version("RabbitMQ", each) for each in ("3.9.13", "3.10.8"))
    assert three_nine is not None
    assert three_ten is not None
    assert three_nine < three_ten < DEFAULT_LIMIT_SINCE

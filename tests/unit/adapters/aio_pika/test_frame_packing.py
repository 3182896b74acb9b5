"""The packed bytes are what a broker reads."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pamqp import commands
from pamqp.body import ContentBody
from pamqp.frame import unmarshal
from pamqp.header import ContentHeader

from aio_pika_batch.adapters.aio_pika.frame_fastpath import (
    largest_properties,
    pack_publications,
    pack_publish,
    pack_settlements,
)
from aio_pika_batch.core.settlement import Disposition, Frame
from aio_pika_batch.errors import PublishError

TAGS = st.integers(1, 2**63 - 1)


def read(data: bytes) -> list[tuple[int, object]]:
    """All frames, as pamqp reads them, with their channels."""
    frames = []
    while data:
        used, channel, frame = unmarshal(data)
        frames.append((channel, frame))
        data = data[used:]
    return frames


def expected(frame: Frame) -> tuple[str, dict[str, object]]:
    """The method that the broker should read."""
    multiple = frame.multiple
    match frame.disposition:
        case Disposition.ACK:
            return "Basic.Ack", {"delivery_tag": frame.tag, "multiple": multiple}
        case Disposition.REJECT:
            return "Basic.Reject", {"delivery_tag": frame.tag, "requeue": False}
        case Disposition.REQUEUE:
            return "Basic.Reject", {"delivery_tag": frame.tag, "requeue": True}
        case Disposition.RETURN:
            return "Basic.Nack", {"delivery_tag": frame.tag, "multiple": multiple, "requeue": True}


@given(
    st.integers(1, 65535),
    st.lists(st.builds(Frame, st.sampled_from(Disposition), TAGS, st.booleans())),
)
def test_settlements_are_packed_in_order(channel: int, frames: list[Frame]) -> None:
    """One frame each, on the channel."""
    received = read(pack_settlements(channel, frames))

    assert [(channel, *expected(frame)) for frame in frames] == [
        (number, frame.name, dict(frame)) for number, frame in received
    ]


@given(
    st.text("abc.-", max_size=20),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=40),
    st.booleans(),
)
def test_a_publish_method_has_the_route_and_mandatory(
    exchange: str, routing_key: str, mandatory: bool
) -> None:
    """As pamqp reads it."""
    [(channel, frame)] = read(pack_publish(9, exchange, routing_key, mandatory=mandatory))

    assert 9 == channel
    expected = commands.Basic.Publish(
        exchange=exchange, routing_key=routing_key, mandatory=mandatory
    )
    assert dict(expected) == dict(frame)


@given(st.binary(max_size=300), st.integers(20, 120))
def test_content_is_split_into_frames(body: bytes, frame_max: int) -> None:
    """None is larger than frame_max."""
    packed = pack_publications(9, [((b"", ()), b"\x10\x00\x02", body)], frame_max)

    [(_, header), *bodies] = read(packed)

    assert isinstance(header, ContentHeader)
    assert (len(body), 2) == (header.body_size, header.properties.delivery_mode)
    values = [frame.value for _, frame in bodies if isinstance(frame, ContentBody)]
    assert len(bodies) == len(values)
    assert body == b"".join(values)
    assert all(0 < len(value) <= frame_max - 8 for value in values)
    assert len(values) == -(-len(body) // (frame_max - 8))


def test_names_have_at_most_255_bytes() -> None:
    """A longer name is an error that names it."""
    with pytest.raises(PublishError, match="routing_key has 256 bytes"):
        pack_publish(1, "", "k" * 256, mandatory=True)
    with pytest.raises(PublishError, match="exchange has 256 bytes"):
        pack_publish(1, "k" * 256, "", mandatory=True)


def test_properties_must_fit_into_one_frame() -> None:
    """They cannot be split."""
    assert 80 == largest_properties(100)
    end = pack_publications(1, [((b"", ()), bytes(80), b"")], 100)
    assert 100 == len(end)

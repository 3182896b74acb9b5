"""A model of a channel: what a broker does with each frame, by the specification and RabbitMQ.

It does not depend on how frames are chosen, so the ledger can be checked against it.
"""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING

from aio_pika_batch.core.settlement import Disposition, Frame

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

HAS_MULTIPLE = {Disposition.ACK, Disposition.RETURN}
"""`basic.ack` and `basic.nack`. `basic.reject` has no `multiple`."""


class ChannelClosed(Exception):
    """The broker has closed the channel because of a frame, and requeues all unsettled messages."""


class Channel:
    """The unsettled deliveries of one channel, on the broker's side."""

    def __init__(self, tags: Iterable[int] = ()) -> None:
        self.unsettled = list(tags)
        self.settled: dict[int, Disposition] = {}
        self.frames = 0

    def deliver(self, tags: Iterable[int]) -> None:
        """Send deliveries to the consumer."""
        self.unsettled.extend(tags)

    def receive(self, frames: Iterable[Frame]) -> None:
        """Receive frames, one after the other."""
        for frame in frames:
            self.frames += 1
            for tag in struck(self.unsettled, frame):
                self.unsettled.remove(tag)
                self.settled[tag] = frame.disposition


def struck(unsettled: Iterable[int], frame: Frame) -> list[int]:
    """The deliveries that a frame settles."""
    if frame.multiple and frame.disposition not in HAS_MULTIPLE:
        raise ChannelClosed(f"501 FRAME_ERROR: {frame} cannot be written")
    if frame.tag == 0:
        raise ChannelClosed(f"{frame} means every delivery, those of running handlers too")
    if frame.tag not in unsettled:
        raise ChannelClosed(f"406 PRECONDITION_FAILED - unknown delivery tag {frame.tag}")
    return [tag for tag in unsettled if tag == frame.tag or (frame.multiple and tag < frame.tag)]


def fewest_frames(unsettled: Iterable[int], wanted: Mapping[int, Disposition]) -> int:
    """Search for the fewest frames that settle exactly the wanted deliveries, by trying all."""
    start = frozenset(unsettled)
    goal = start - wanted.keys()
    seen = {start}
    front = [start]
    count = 0
    while goal not in seen:
        count += 1
        front = [
            after
            for before in front
            for after in _after_one_frame(before, wanted)
            if after not in seen and not seen.add(after)  # type: ignore[func-returns-value]
        ]
    return count


def _after_one_frame(
    unsettled: frozenset[int], wanted: Mapping[int, Disposition]
) -> Iterable[frozenset[int]]:
    for tag, disposition, multiple in product(unsettled, Disposition, (False, True)):
        try:
            gone = struck(unsettled, Frame(disposition, tag, multiple))
        except ChannelClosed:
            continue
        if all(wanted.get(each) is disposition for each in gone):
            yield unsettled - set(gone)

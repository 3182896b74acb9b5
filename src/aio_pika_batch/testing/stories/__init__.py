"""What stays true, whatever happens?

A story is drawn up front: what is published, what the handler answers to each message each time,
how long it takes, what goes wrong meanwhile, and when the consumer is stopped. It is played by a
whole consumer on a scene (the broker in memory in virtual time, or any other that can be hurt as
the story says), and judged afterwards: by the same invariants on every scene.

Hypothesis draws them: :func:`aio_pika_batch.testing.strategies.stories`.
"""

from typing import TYPE_CHECKING

from aio_pika_batch.front import lazy_exports

__all__ = [
    "INVARIANTS",
    "LATER",
    "RAISE",
    "Fault",
    "FaultKind",
    "MemoryScene",
    "Played",
    "Scene",
    "Story",
    "StoryBroken",
    "judge",
    "play",
    "play_in_memory",
]

if TYPE_CHECKING:
    from aio_pika_batch.testing.stories.in_memory import MemoryScene, play_in_memory
    from aio_pika_batch.testing.stories.invariants import INVARIANTS, StoryBroken, judge
    from aio_pika_batch.testing.stories.player import Played, Scene, play
    from aio_pika_batch.testing.stories.story import LATER, RAISE, Fault, FaultKind, Story
else:
    _ROOMS = ("story", "player", "invariants", "in_memory")
    __getattr__, __dir__ = lazy_exports(__name__, __all__, _ROOMS)

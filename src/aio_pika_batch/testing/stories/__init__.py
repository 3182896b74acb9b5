"""Randomized tests of a whole consumer: stories, and the invariants that must hold in each.

A story says in advance what is published, what the handler yields for each message each time, how
long it takes, which faults occur, and when the consumer stops. A consumer plays it on a scene: the
in-memory broker in virtual time, or any other broker on which the faults can be caused. Afterwards
the same invariants are checked on every scene.

Hypothesis draws stories: :func:`aio_pika_batch.testing.strategies.stories`.
"""

from typing import TYPE_CHECKING

from aio_pika_batch._lazy import lazy_exports

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
    from aio_pika_batch.testing.stories.player import Scene, play
    from aio_pika_batch.testing.stories.story import (
        INVARIANTS,
        LATER,
        RAISE,
        Fault,
        FaultKind,
        Played,
        Story,
        StoryBroken,
        judge,
    )
else:
    __getattr__, __dir__ = lazy_exports(
        __name__,
        {
            "Fault": "story",
            "FaultKind": "story",
            "INVARIANTS": "story",
            "LATER": "story",
            "MemoryScene": "in_memory",
            "Played": "story",
            "RAISE": "story",
            "Scene": "player",
            "Story": "story",
            "StoryBroken": "story",
            "judge": "story",
            "play": "player",
            "play_in_memory": "in_memory",
        },
    )

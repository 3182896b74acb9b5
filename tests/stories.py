"""How many stories are told? More where nobody waits for them."""

from __future__ import annotations

import os

_DEFAULT = "1000" if os.environ.get("CI") else "100"

STORIES = int(os.environ.get("AIO_PIKA_BATCH_TEST_STORIES", _DEFAULT))
"""For each test that plays them in memory, where each takes some ten milliseconds."""

REAL_STORIES = int(os.environ.get("AIO_PIKA_BATCH_TEST_REAL_STORIES", "40"))
"""On a real broker, where they take real time."""

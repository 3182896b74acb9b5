"""How many stories the tests play: more in CI."""

from __future__ import annotations

import os

_DEFAULT = "400" if os.environ.get("CI") else "100"

STORIES = int(os.environ.get("AIO_PIKA_BATCH_TEST_STORIES", _DEFAULT))
"""For each test that plays stories in memory, where each takes about ten milliseconds."""

REAL_STORIES = int(os.environ.get("AIO_PIKA_BATCH_TEST_REAL_STORIES", "40"))
"""For the tests on a real broker, where stories take real time."""

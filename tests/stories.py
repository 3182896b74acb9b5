"""How many stories the tests play."""

from __future__ import annotations

import os

from hypothesis import settings

STORIES = int(os.environ.get("AIO_PIKA_BATCH_TEST_STORIES", settings.default.max_examples))
"""For each test that plays stories in memory, where each takes about ten milliseconds."""

REAL_STORIES = int(os.environ.get("AIO_PIKA_BATCH_TEST_REAL_STORIES", "40"))
"""For the tests on a real broker, where stories take real time."""

"""A relay for `aio-pika-batch relay`: from the SQLite database that ``DATABASE`` names."""

from __future__ import annotations

import os

import aiosqlite

from aio_pika_batch.outbox import Outbox, OutboxRelay, OutboxRelaySettings

relay = OutboxRelay(
    Outbox(),
    lambda: aiosqlite.connect(os.environ["DATABASE"]),
    OutboxRelaySettings(poll_interval=0.05),
)

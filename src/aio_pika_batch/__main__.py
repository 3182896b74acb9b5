"""What `python -m aio_pika_batch` does: the same as `aio-pika-batch`."""

from __future__ import annotations

from aio_pika_batch.cli import main

if __name__ == "__main__":
    main()

"""Lets `python -m aio_pika_batch` run the command line."""

from __future__ import annotations

from aio_pika_batch.cli import main

if __name__ == "__main__":
    main()

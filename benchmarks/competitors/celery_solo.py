"""celery-batches: a hundred messages to a task, on Celery's solo pool, all in one process."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from celery import Celery
from celery_batches import Batches
from kombu import Queue

from benchmarks.protocol import CELERY_TASK, Job, Meter, answer, compete

if TYPE_CHECKING:
    from celery_batches import SimpleRequest

PACKAGES = ("celery-batches", "celery", "kombu", "amqp")


def run(job: Job, meter: Meter) -> None:
    """Consume until everything is measured; there is no way back from a worker but to leave."""
    app = Celery(broker=job.url.replace("amqp://", "pyamqp://"))
    app.conf.update(
        worker_prefetch_multiplier=job.prefetch,
        worker_concurrency=1,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        task_queues=[Queue(job.queue, no_declare=True)],
        broker_connection_retry_on_startup=False,
        task_ignore_result=True,
        worker_send_task_events=False,
    )
    size = 0

    @app.task(base=Batches, name=CELERY_TASK, flush_every=job.batch, flush_interval=5)
    def handle(requests: list[SimpleRequest]) -> None:
        nonlocal size
        size += sum(len(request.args[0]) for request in requests)
        if meter.count(len(requests)):
            answer(meter.reading, PACKAGES)
            os._exit(0)

    app.Worker(
        pool="solo",
        loglevel="ERROR",
        without_gossip=True,
        without_mingle=True,
        without_heartbeat=True,
        quiet=True,
    ).start()


if __name__ == "__main__":
    compete(run, *PACKAGES)

"""A web application with a consumer in its lifespan, as docs/howto/web-applications.md shows it.

`python web_application.py fastapi|starlette block|task PORT`; settings come from the environment.
"""

from __future__ import annotations

import asyncio
import sys
from contextlib import asynccontextmanager

import fastapi
import uvicorn
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

from aio_pika_batch import BatchConsumer, MessageResult


class Importer(BatchConsumer):
    """Prints when it handles a batch."""

    async def process_messages(self, messages):
        print("began", flush=True)  # noqa: T201
        await asyncio.sleep(0.5)
        print("handled", len(messages), flush=True)  # noqa: T201
        for _ in messages:
            yield MessageResult.ACK


importer = Importer()


@asynccontextmanager
async def block(app):
    """Start without waiting for the broker."""
    async with importer:
        yield


@asynccontextmanager
async def task(app):
    """Run beside the application."""
    running = asyncio.create_task(importer.run())
    yield
    await importer.stop()
    await running


@asynccontextmanager
async def unaware(app):
    """Cancel it at the end."""
    running = asyncio.create_task(importer.run(signals=False))
    yield
    running.cancel()


async def ready(request):
    """Say whether the consumer consumes."""
    return JSONResponse(importer.is_healthy, status_code=200 if importer.is_healthy else 503)


async def publish(request):
    """Publish an order."""
    await importer.publish(b"order", routing_key=importer.settings.queue_name)
    return JSONResponse("published")


def main() -> None:
    """Serve until a signal."""
    framework, lifespan, port = sys.argv[1:]
    routes = [Route("/readyz", ready), Route("/publish", publish)]
    if framework == "starlette":
        app = Starlette(lifespan=globals()[lifespan], routes=routes)
    else:
        app = fastapi.FastAPI(lifespan=globals()[lifespan])
        app.router.routes.extend(routes)
    uvicorn.run(app, host="127.0.0.1", port=int(port), log_level="error")


if __name__ == "__main__":
    main()

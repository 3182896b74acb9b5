"""One message at a time: orders come in, receipts are printed.

python examples/simple/main.py
python examples/simple/main.py --url amqp://guest:guest@localhost/
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import secrets

from aio_pika_batch import (
    Consumer,
    ConsumerSettings,
    Message,
    MessageResult,
    Publication,
    Result,
    WorkerSession,
)

ORDERS = [{"number": number, "cents": 100 * number + 95} for number in range(1, 9)]


class Cashier(Consumer):
    """Prints a receipt for each order; stops after the last one."""

    cents = 0
    receipts = 0

    async def process_message(self, message: Message) -> Result:
        """Handle one order. An exception here would requeue it, three times at most."""
        order = json.loads(message.body)
        await asyncio.sleep(0.05)  # stands for a database
        self.cents += order["cents"]
        self.receipts += 1
        print(f"order {order['number']}: {order['cents'] / 100:.2f} EUR")
        if self.receipts == len(ORDERS):
            self.request_stop()  # a real consumer goes on until it gets SIGTERM or Ctrl-C
        return MessageResult.ACK

    async def on_session(self, session: WorkerSession) -> None:
        """Fill the queue with samples. A real consumer leaves that to others."""
        if session.epoch == 1:
            await self.publish_many(
                [
                    Publication(json.dumps(order).encode(), routing_key=session.queue_name)
                    for order in ORDERS
                ]
            )


async def main(url: str) -> None:
    """Run the cashier until the last order, or until Ctrl-C."""
    cashier = Cashier(
        ConsumerSettings(
            url=url,
            queue_name=f"example.simple.{secrets.token_hex(4)}",
            queue_auto_delete=True,  # so that nothing is left behind on a real broker
            concurrency=4,  # orders at once
        )
    )
    await cashier.run()
    print(f"{cashier.receipts} orders, {cashier.cents / 100:.2f} EUR")


if __name__ == "__main__":
    # No dead-letter exchange is fine here, and no reason to warn: samples may be discarded.
    logging.getLogger("aio_pika_batch").setLevel(logging.ERROR)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="memory://", help="broker (default: one in memory)")
    asyncio.run(main(parser.parse_args().url))

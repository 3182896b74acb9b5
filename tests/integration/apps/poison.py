"""Shows that a decimal in a header ends each AMQP 1.0 session on its queue.

It needs pika and python-qpid-proton.
"""

# ruff: noqa: T201  -- it shows what happens

from decimal import Decimal

import pika
from proton import ProtonException
from proton.utils import BlockingConnection

channel = pika.BlockingConnection(pika.URLParameters("amqp://localhost")).channel()
channel.queue_declare("poison", durable=True, arguments={"x-queue-type": "quorum"})
for headers in ({"price": Decimal("1.25")}, *[{}] * 9):
    channel.basic_publish("", "poison", b"body", pika.BasicProperties(headers=headers))

for attempt in range(1, 23):
    connection = BlockingConnection("amqp://guest:guest@localhost")
    try:
        connection.create_receiver("/queues/poison", credit=10).receive(timeout=2)
    except ProtonException as error:
        print(attempt, str(error)[:100])

# Nothing was received, and nothing is left: the delivery limit of 20 has dropped all ten.
print("ready:", channel.queue_declare("poison", passive=True).method.message_count)

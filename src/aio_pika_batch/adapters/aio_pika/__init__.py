"""Reaches RabbitMQ through aio-pika, and reads and writes message frames without it.

aio-pika connects, logs in, and opens and closes channels. The adapter uses only its public API, and
translates every exception that aio-pika or aiormq raises.
"""

"""RabbitMQ through aio-pika, which opens and closes, and a tap of our own, which carries messages.

No private name of aio-pika or aiormq is touched, and whatever they raise is translated here, at the
edge.
"""

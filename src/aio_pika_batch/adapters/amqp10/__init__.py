"""Consumes over AMQP 1.0, which RabbitMQ speaks on the same port since 4.0."""

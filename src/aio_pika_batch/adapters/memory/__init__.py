"""A strict RabbitMQ in memory, and the port on top of it: for tests, demos and `memory://` URLs."""

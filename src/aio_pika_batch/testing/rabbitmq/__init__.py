"""Where does a test get a real RabbitMQ? For the fixture `batch_rabbitmq`, and for our own tests.

Nothing below imports the rest of the library, nor any AMQP client, but :mod:`.fixture`, which
clears away what a test has declared on a broker that is not ours.
"""

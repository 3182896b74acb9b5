"""A real RabbitMQ for tests: for the fixture `batch_rabbitmq`, and for the library's own tests.

What a test learns about a broker must not depend on the code under test. So these modules import
neither the rest of the library nor an AMQP client, except :mod:`.fixture`.
"""

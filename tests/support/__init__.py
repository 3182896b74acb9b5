"""What the tests need that is not about the library: brokers to start and to hurt, a line to cut.

Nothing here imports ``aio_pika_batch``: what it says about a broker must not depend on the code
under test.
"""

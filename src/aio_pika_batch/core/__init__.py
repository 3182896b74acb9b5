"""What is decided, and nothing of how it is carried out.

No asyncio, clock, randomness, logging or I/O below this line: time and chance come in as numbers,
decisions go out as values.
"""

"""The decisions, as functions and state machines without side effects.

No asyncio, clock, randomness, logging or I/O in this package. Times and random numbers are
arguments, and decisions are return values.
"""

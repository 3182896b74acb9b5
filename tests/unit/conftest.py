"""
What does a unit test get? Nothing that is real: no broker, no network, no time that passes.
"""

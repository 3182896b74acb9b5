"""Fault tests: a consumer under load, while faults hit the broker and the network.

There is one file for each kind of fault. The figures are in ``docs/reliability.md``. The whole
suite takes minutes, so only the tests of ``test_operator.py`` run with all others.
"""

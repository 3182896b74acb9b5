"""A soak test: a consumer goes through one fault after another, and must not grow or slow down.

``python -m tests.soak --minutes 60``, or ``nox -s soak``. The figures and the plot of the last run
are in ``docs/reliability.md``.
"""

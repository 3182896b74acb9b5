"""Does a consumer that goes through one fault after another stay as small and as quick as it was?

``python -m tests.soak --minutes 60``, or ``nox -s soak``. The figures and the plot of the last run
are in ``docs/reliability.md``.
"""

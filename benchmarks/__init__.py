"""The benchmarks: ``python benchmarks/run.py`` measures what ``plan.py`` lists."""

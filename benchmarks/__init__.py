"""How fast is it, and beside whom? ``python benchmarks/run.py`` measures, ``plan.py`` says what."""

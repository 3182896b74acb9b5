"""One file for each way to do the work; ``benchmarks/protocol.py`` says how they are run."""

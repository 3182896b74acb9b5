"""Mutants of the source, each of which a test must detect, and the program that runs them."""

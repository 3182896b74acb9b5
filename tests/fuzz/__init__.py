"""Fuzzers for everything that reads bytes from the network."""

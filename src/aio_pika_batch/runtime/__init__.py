"""Runs a consumer: lifecycle, workers, sessions, handlers and settlement."""

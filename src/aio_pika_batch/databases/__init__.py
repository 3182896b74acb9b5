"""Databases, as the inbox and the outbox use them: connections of each driver, and their SQL."""

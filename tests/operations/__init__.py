"""Whole operations that take minutes: sessions of their own run them, and no other."""

"""What can be run from a terminal."""

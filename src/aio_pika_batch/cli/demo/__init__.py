"""The command `demo`: a pipeline of consumers under load, with live statistics."""

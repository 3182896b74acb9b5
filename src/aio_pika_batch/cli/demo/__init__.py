"""The demo: a load through a pipeline of consumers, looked at while it runs."""

"""The command line: the only place that joins every package."""

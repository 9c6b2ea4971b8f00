"""The command line: one module per job, gathered by `cli.py`."""

"""Runs the command line: `python -m proxytune`."""

from proxytune.cli import main

main()

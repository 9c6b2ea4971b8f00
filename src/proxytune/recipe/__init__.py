"""The recipe directory: its keys, checked, read and written."""

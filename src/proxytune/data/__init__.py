"""Rows and prompts in files: read, checked, answered, resumed."""

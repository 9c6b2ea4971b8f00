"""Steer a large language model with a small tuned one, token by token, without touching its weights."""

"""Benchmarks run on base, expert, steered and tuned models, and their results."""

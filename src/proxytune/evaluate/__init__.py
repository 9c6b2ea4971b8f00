"""Benchmarks of base, expert, steered and tuned models, and how fast steering is."""

"""Benchmarks, one module each: prompts, settings, what counts as the answer, the rules of scoring."""

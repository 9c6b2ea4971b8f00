"""Benchmarks, one module each: prompts, settings, which part of an output is the answer, how it is scored."""

"""Models of transformers: forwards, caches, adapters, weights."""

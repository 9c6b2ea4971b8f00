"""Models, adapters and recipes as GGUF files."""

"""The paper's question on models that two processor cores can train; see `__main__.py`."""

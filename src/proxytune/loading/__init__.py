"""A recipe's models: checked together, and loaded."""

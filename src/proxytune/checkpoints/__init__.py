"""A model's files: found, read and converted, all but running it."""

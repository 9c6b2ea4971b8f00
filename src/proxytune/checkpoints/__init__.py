"""A model's files: found, read and converted. Nothing is run here."""

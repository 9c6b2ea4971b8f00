"""Text and messages as token ids, token ids as text, and vocabularies."""

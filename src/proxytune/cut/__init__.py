"""A small model cut out of a large one: first and last layers, and a bridge between them."""

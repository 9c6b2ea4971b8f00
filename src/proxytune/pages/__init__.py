"""HTML pages that need no network, and what may run in them."""

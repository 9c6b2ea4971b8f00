"""An OpenAI-compatible HTTP server on one machine; `proxytune serve` starts it."""

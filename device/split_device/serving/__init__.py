"""The HTTP server: what all dialects share, and a sub-package for each."""

"""Sessions on workers: the connection, channels, one epoch, fail-over, and the history that is replayed."""

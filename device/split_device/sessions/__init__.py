"""Sessions on workers: the connection, one epoch, what outlives it, and what is kept to replay."""

"""The queue in a Redis or Valkey server, or a cluster of them: streams, leases and rules of access."""

"""The queue in a Redis or Valkey server, or in a cluster of them: streams, leases and access rules."""

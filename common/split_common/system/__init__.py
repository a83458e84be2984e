"""Files, locks, processes, signals, servers for tests, and the console."""

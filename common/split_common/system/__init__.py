"""Files, processes, signals and the console."""

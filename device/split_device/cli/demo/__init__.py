"""`lambda-split demo`: a broker, workers and a device on this machine, in one command."""

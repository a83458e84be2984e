"""Bodies: what a worker runs for its sessions, behind one interface (`base`)."""

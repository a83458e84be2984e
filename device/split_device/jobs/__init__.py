"""Jobs: generations that are asked for now and answered later, whatever happens to the device meanwhile."""

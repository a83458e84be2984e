"""Many requests at once on one device, through head and tail as well as through the body."""

"""What travels between peers, and how it is sealed."""

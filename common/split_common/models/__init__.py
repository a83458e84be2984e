"""Checkpoints, the layers of a model, and loading and verifying one side of it."""

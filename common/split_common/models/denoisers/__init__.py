"""Denoisers of diffusion models, cut between their blocks. diffusers is imported only where a model is built."""

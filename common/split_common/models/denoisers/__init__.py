"""Denoisers of diffusion models, cut between their blocks. Only what loads weights imports diffusers."""

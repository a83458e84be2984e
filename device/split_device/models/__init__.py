"""The classes of transformers and diffusers, with the body elsewhere."""

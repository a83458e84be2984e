"""Images: their settings, and the pipeline that generates them with a split denoiser."""

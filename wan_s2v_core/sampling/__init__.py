"""From noise to latents. Knows a model only as a Denoiser."""

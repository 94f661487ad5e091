"""Self-attention: backends by name, kernels of our own, and sparse attention."""

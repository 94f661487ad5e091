"""The video VAE, fast: see `network.speed_up`."""

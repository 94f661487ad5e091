"""How much room a stage needs on the card, besides the weights of its network."""

FORWARD_BYTES_PER_TOKEN = 175_000
"""Of sampling with the 14B DiT: one forward, and what two guidance branches keep of a driving video and the past.
6.0 GB at 832x480 on an H200, 4.3 GB without either, see benchmarks/README.md."""
VAE_BYTES_PER_PIXEL = 23_000
"""Of the VAE in float32, for one latent frame at a time: 22,630 to decode and 17,190 to encode on an H200, the same at
832x480 and 1280x704 and for any number of frames, see benchmarks/README.md."""


def forward_bytes(tokens: int) -> int:
    """Peak memory of one forward of the DiT besides its weights."""
    return FORWARD_BYTES_PER_TOKEN * tokens


def vae_bytes(height_px: int, width_px: int) -> int:
    """Peak memory of encoding or decoding besides the VAE's weights and the video itself."""
    return VAE_BYTES_PER_PIXEL * height_px * width_px


VOICE_BYTES_PER_SECOND = 34_000_000
"""Of wav2vec large in float32: 23 MB in its first convolutions and 10 MB for all hidden states and a copy of them."""


def voice_bytes(seconds: float) -> int:
    """Peak memory of hearing a recording besides the audio encoder's weights."""
    return round(VOICE_BYTES_PER_SECOND * seconds)

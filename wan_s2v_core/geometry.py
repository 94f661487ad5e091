"""Video frames, latent frames, clips and tokens: integer arithmetic only, importable without torch.

Source: Wan2.2 at 42bf4cf (Apache-2.0), speech2video.py; see `ClipGeometry` for what a clip is.
"""

from dataclasses import dataclass

from .errors import ConfigError

FRAMES_PER_LATENT = 4
"""Video frames that one latent frame stands for (the first latent frame of a video stands for one)."""
PIXELS_PER_LATENT = 8
"""Pixels along a side that one latent position stands for."""
PATCH = 2
"""Latent positions along a side that one token stands for."""
FIRST_CLIP_SKIP = 3
"""Video frames that the reference cuts from the start of the first clip, decoded behind the reference picture."""
REFERENCE_TIME = 30
"""Time position of the reference picture in the rotary embedding."""
MOTION_BUCKETS = (1, 2, 16)
"""Latent frames of motion, newest first, that are packed at 1x, 2x and 4x."""
PACKED_MOTION_LATENTS = sum(MOTION_BUCKETS)


def latent_frames_of(frames: int) -> int:
    """Latent frames that hold `frames` video frames, the last one perhaps not filled."""
    return (frames + FRAMES_PER_LATENT - 1) // FRAMES_PER_LATENT


def frames_of(latent_frames: int) -> int:
    """Video frames that the VAE decodes from `latent_frames`."""
    return FRAMES_PER_LATENT * (latent_frames - 1) + 1


@dataclass(frozen=True)
class ClipGeometry:
    """How long a clip is and how much of the past it sees.

    A clip adds `clip_frames` video frames. Its DiT sees `motion_frames` frames of what came before, encoded to
    `motion_latent_frames`, and denoises `latent_frames` new ones.
    """

    clip_frames: int = 80
    motion_frames: int = 73

    def __post_init__(self):
        if self.clip_frames < FRAMES_PER_LATENT or self.clip_frames % FRAMES_PER_LATENT:
            below = max(FRAMES_PER_LATENT, self.clip_frames // FRAMES_PER_LATENT * FRAMES_PER_LATENT)
            raise ConfigError(
                f"clip_frames={self.clip_frames} does not fill whole latent frames. "
                f"Use a multiple of {FRAMES_PER_LATENT}, such as {below} or {below + FRAMES_PER_LATENT}."
            )
        if self.motion_frames < 1:
            raise ConfigError(f"motion_frames={self.motion_frames} carries no motion. Use 1 or more; the model has 73.")

    @property
    def motion_latent_frames(self) -> int:
        return latent_frames_of(self.motion_frames)

    @property
    def latent_frames(self) -> int:
        return latent_frames_of(self.clip_frames + self.motion_frames) - self.motion_latent_frames

"""Video frames, latent frames, clips and tokens: integer arithmetic only, importable without torch.

Source: Wan2.2 at 42bf4cf (Apache-2.0), speech2video.py; see `ClipGeometry` for what a clip is.
"""

import math
from dataclasses import dataclass

from .errors import ConfigError

FRAMES_PER_LATENT = 4
"""Video frames that one latent frame stands for (the first latent frame of a video stands for one)."""
LATENT_CHANNELS = 16
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


def motion_tokens(height: int, width: int, motion_latents: int, packs_motion: bool = True) -> int:
    """Tokens of the past of a clip, of latent size height x width; 0 without one."""
    if not motion_latents:
        return 0
    if not packs_motion:
        return motion_latents * (height // PATCH) * (width // PATCH)
    sides = [(latents >> level, PATCH << level) for level, latents in enumerate(MOTION_BUCKETS)]
    return sum(steps * (height // side) * (width // side) for steps, side in sides)


TILE = 128
"""Tokens of a tile, of queries and of keys, in attention that chooses or rounds tile by tile."""


def latent_frames_of(frames: int) -> int:
    """Latent frames that hold `frames` video frames, the last one perhaps not filled."""
    return (frames + FRAMES_PER_LATENT - 1) // FRAMES_PER_LATENT


def frames_of(latent_frames: int) -> int:
    """Video frames that the VAE decodes from `latent_frames`."""
    return FRAMES_PER_LATENT * (latent_frames - 1) + 1


def tiles_of(tokens: int) -> int:
    """Tiles that hold `tokens` tokens, the last one perhaps not filled."""
    return -(-tokens // TILE)


def token_slices(tokens: int, at_most: int) -> list[tuple[int, int]]:
    """Start and stop of parts of whole tiles, of at most so many tokens or one tile: as few and as equal as can be."""
    if tokens <= at_most:
        return [(0, tokens)] if tokens else []
    tiles = tiles_of(tokens)
    count = -(-tiles // max(1, at_most // TILE))
    each = TILE * -(-tiles // count)
    return [(start, min(start + each, tokens)) for start in range(0, tokens, each)]


def frame_slices(frames: int, frame_tokens: int, at_most: int) -> list[tuple[int, int]]:
    """First latent frame, and the one behind the last, of parts with at most so many tokens, or one latent frame."""
    count = -(-frames // max(1, at_most // max(1, frame_tokens)))
    each = -(-frames // max(1, count))
    return [(first, min(first + each, frames)) for first in range(0, frames, each)] if frames else []


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


SIDE_STEP_PX = 64
"""Sides of a generated video are multiples of this."""


def output_size(height_px: int, width_px: int, max_area: int) -> tuple[int, int]:
    """Height and width of the video for a picture: its aspect, at most `max_area` pixels, never scaled up further
    than to the next multiple of 64. Source: Wan2.2 speech2video.py at 42bf4cf (Apache-2.0), from its description.

    Raises:
        ConfigError: if the picture is so long that a side would vanish.
    """
    area = height_px * width_px
    smallest, largest = 0.1, 1.0
    if area > max_area:
        step = SIDE_STEP_PX - 1
        b, c = step * (height_px + width_px), step**2 - max_area
        smallest = (-b + math.sqrt(b**2 - 2 * area * c)) / (2 * area)  # 2 for 4, as in the reference
        largest = math.sqrt(max_area / area)
    for attempt in range(100):
        scale = largest - (largest - smallest) * attempt / 100
        sides = [-(-int(side * scale) // SIDE_STEP_PX) * SIDE_STEP_PX for side in (height_px, width_px)]
        if sides[0] * sides[1] <= max_area:
            break
    else:
        sides = [0, 0]
    if not all(sides):
        raise ConfigError(
            f"a picture of {width_px}x{height_px} px cannot be shown in {max_area} px with sides that are multiples of "
            f"{SIDE_STEP_PX}. Crop the picture, or choose a larger size."
        )
    return sides[0], sides[1]


SHORTEST_CLIP_FRAMES = 20
"""A clip shorter than 5 latent frames is outside what the model was trained for."""


@dataclass(frozen=True)
class ClipPlan:
    """Which video frames each clip of a video makes.

    Clip r makes the frames from `start(r)` on; negative frames lie before time 0. Of all that the clips make, the
    first `skip` frames are cut and `frames` are kept.
    """

    clip_frames: tuple[int, ...]
    frames: int
    skip: int
    lead: int
    """Frames before time 0 that the first clip makes: `skip` if picture and sound are to start together, else 0."""

    def start(self, clip: int) -> int:
        return sum(self.clip_frames[:clip]) - self.lead

    def shown(self, clip: int) -> int:
        """Frames that a clip adds to the video: without those that are cut at its start and end."""
        first, end = sum(self.clip_frames[:clip]), sum(self.clip_frames[: clip + 1])
        return min(end, self.skip + self.frames) - max(first, self.skip)

    @property
    def total(self) -> int:
        """Frames that all clips make, the skipped ones included."""
        return sum(self.clip_frames)


def plan_clips(frames: int, geometry: ClipGeometry, skip: int, lead: int) -> ClipPlan:
    """Full clips, only the last one shortened to whole latent frames, for a video of `frames` frames.

    Raises:
        ConfigError: if there is nothing to show.
    """
    if frames < 1:
        raise ConfigError(f"the recording gives {frames} video frames. At least one is needed: use a longer one.")
    full, rest = divmod(frames + skip, geometry.clip_frames)
    lengths = [geometry.clip_frames] * full
    if rest:
        whole = -(-rest // FRAMES_PER_LATENT) * FRAMES_PER_LATENT
        lengths.append(min(geometry.clip_frames, max(whole, SHORTEST_CLIP_FRAMES)))
    return ClipPlan(tuple(lengths), frames, skip, lead)

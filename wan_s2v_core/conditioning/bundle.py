"""Everything that a video is made from, put together: what flows from the encoders to the sampler."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..config import VideoConfig
from ..errors import ConfigError
from ..geometry import FIRST_CLIP_SKIP, ClipGeometry, ClipPlan, output_size, plan_clips
from ..io.audio import Recording
from ..io.maps import is_mapped
from .audio import clip_count, voice_per_frame
from .image import check_sides, fit_picture

PoseFrames = Callable[[int, int], Tensor]
"""(first frame, frames) -> T H W 3 uint8 of the driving video on our clock, fewer frames when it has ended."""


def hold_last(pose: PoseFrames) -> PoseFrames:
    """Read frames that are asked for twice in a row once."""
    held: dict[tuple[int, int], Tensor] = {}

    def read(start: int, frames: int) -> Tensor:
        if (start, frames) not in held:
            held.clear()
            held[start, frames] = pose(start, frames)
        return held[start, frames]

    return read


class Weighed:
    """A value that tells what host memory its tensors take, by the names under which ComfyUI's caches ask for it."""

    def _comfy_cache_tensors(self) -> list[Tensor]:
        """Asked for by ComfyUI 0.38 and later."""
        held = [value for value in vars(self).values() if isinstance(value, Tensor)]
        held += [value.samples for value in vars(self).values() if isinstance(value, Recording)]
        return [tensor for tensor in held if tensor.device.type == "cpu" and not is_mapped(tensor)]

    def get_ram_usage(self) -> int:
        """Bytes; asked for by ComfyUI 0.3.75."""
        return sum(tensor.nbytes for tensor in self._comfy_cache_tensors())


@dataclass(frozen=True)
class Voice(Weighed):
    """A recording and what the audio encoder heard in it."""

    recording: Recording
    features: Tensor
    """A T E at 30 Hz. That of a long recording lies in a file, see `io.scratch`: to be read in stretches."""


@dataclass(frozen=True)
class S2VConditioning(Weighed):
    """Everything that a video is made from, encoded but for the VAE's part. Tensors lie in main memory."""

    plan: ClipPlan
    geometry: ClipGeometry
    video: VideoConfig
    recording: Recording
    reference: Tensor
    """1 3 1 H W in [-1, 1]."""
    features: Tensor
    """A T E at 30 Hz, what the audio encoder heard in the recording."""
    text: Tensor
    """1 L E."""
    negative_text: Tensor
    """1 L E."""
    pose: PoseFrames | None = None

    @property
    def size_px(self) -> tuple[int, int]:
        """Height and width."""
        return tuple(self.reference.shape[-2:])

    @property
    def clips(self) -> int:
        return len(self.plan.clip_frames)

    def voice_of(self, clip: int) -> tuple[Tensor, Tensor | None]:
        """What one clip hears, 1 A E T, and what was said before it where the clip is to hear that too."""
        first = sum(self.plan.clip_frames[:clip])
        own = self.voice_between(first, first + self.plan.clip_frames[clip])
        if not self.video.hears_past or not first:
            return own, None
        return own, self.voice_between(max(0, first - self.geometry.motion_frames), first)

    def voice_between(self, first: int, end: int) -> Tensor:
        """1 A E T, one embedding for each of these frames that the clips make."""
        return voice_per_frame(self.features, self.plan.total, self.video.fps, self.plan.lead, first, end)

    def pose_of(self, clip: int) -> Tensor | None:
        """The driving video of one clip, T H W 3 uint8; it goes on from clip to clip. None without one."""
        if self.pose is None:
            return None
        start, frames = self.plan.start(clip), self.plan.clip_frames[clip]
        seen = self.pose(max(0, start), frames + min(0, start))
        if start < 0 and len(seen):  # before time 0 the first pose is held
            seen = torch.cat([seen[:1].expand(-start, -1, -1, -1), seen])
        return seen

    def with_held_pose(self) -> "S2VConditioning":
        """The same, but what was last read of the driving video is at hand: going back in a file takes long."""
        return self if self.pose is None else replace(self, pose=hold_last(self.pose))


def make_plan(seconds: float, feature_frames: int, video: VideoConfig, geometry: ClipGeometry) -> ClipPlan:
    """The clips for a recording of `seconds` whose features have `feature_frames` frames at 30 Hz."""
    skip = 0 if video.starts_from_reference else FIRST_CLIP_SKIP
    lead = skip if video.timing == "aligned" else 0
    if video.clip_plan == "audio":
        plan = plan_clips(round(video.fps * seconds), geometry, skip, lead)
    else:
        whole = clip_count(feature_frames, geometry.clip_frames, video.fps) * geometry.clip_frames
        plan = ClipPlan((geometry.clip_frames,) * (whole // geometry.clip_frames), whole - skip, skip, lead)
    lengths = plan.clip_frames[: video.clips]
    return replace(plan, clip_frames=lengths, frames=min(plan.frames, sum(lengths) - skip))


def size_of_video(picture: Tensor, video: VideoConfig) -> tuple[int, int]:
    """Height and width of the video for a picture, H W 3."""
    return video.exact_size or output_size(*picture.shape[:2], video.max_area)


def make_conditioning(
    picture: Tensor,
    voice: Voice,
    text: Tensor,
    negative_text: Tensor,
    video: VideoConfig,
    pose: PoseFrames | None = None,
) -> S2VConditioning:
    """Plan the clips and bring everything to the size and clock of the video.

    Args:
        picture: H W 3, uint8.
        text, negative_text: 1 L E, the prompt's embeddings.
    Raises:
        ConfigError: if the picture or the driving video has an unusable size, or there is nothing to show.
    """
    check_sides(*picture.shape[:2], "the picture")
    geometry = ClipGeometry(video.clip_frames, video.motion_frames)
    size = size_of_video(picture, video)
    plan = make_plan(voice.recording.seconds, voice.features.shape[1], video, geometry)
    if pose is not None and not len(pose(0, 1)):  # a bad file is told before anything is loaded
        raise ConfigError("the driving video has no frame. Use one with pictures, or leave it out.")
    return S2VConditioning(
        plan=plan,
        geometry=geometry,
        video=video,
        recording=voice.recording,
        reference=fit_picture(picture, *size, video.fit),
        features=voice.features,
        text=text,
        negative_text=negative_text,
        pose=pose,
    )

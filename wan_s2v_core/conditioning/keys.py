"""What each clip is made from, as one short key: a clip of an earlier run with the same key is the same clip."""

from typing import Any

from ..io.digest import digest_of
from .bundle import S2VConditioning

FORMAT = 2
"""To be raised when the same inputs give other clips, or clips are stored in another way."""


class ClipKeys:
    """One key per clip, each made when it is asked for.

    A key covers the key of the clip before and all that the clip itself reads: its stretch of the voice and of the
    driving video. So what comes later, such as more clips, changes no key before it.

    Args:
        facts: anything JSON that shapes the pictures besides the conditioning, such as networks and sampling.
    """

    def __init__(self, job: S2VConditioning, facts: dict[str, Any]):
        video = job.video
        general = {
            "format": FORMAT,
            "facts": facts,
            "fps": video.fps,
            "motion_frames": job.geometry.motion_frames,
            "starts_from_reference": video.starts_from_reference,
            "hears_past": video.hears_past,
        }
        self.job, self._root = job, digest_of(general, job.reference, job.text, job.negative_text)
        self._keys: list[str] = []

    def __len__(self) -> int:
        return self.job.clips

    def __getitem__(self, clip: int) -> str:
        if not 0 <= clip < len(self):
            raise IndexError(clip)
        while len(self._keys) <= clip:
            self._keys.append(self._next_key(len(self._keys)))
        return self._keys[clip]

    def size(self, clip: int) -> tuple[int, int, int]:
        """The frames that a clip adds to the video, their height and width."""
        return self.job.plan.shown(clip), *self.job.size_px

    def _next_key(self, clip: int) -> str:
        job, before = self.job, self._keys[-1] if self._keys else self._root
        lengths = {"before": before, "frames": job.plan.clip_frames[clip], "shown": job.plan.shown(clip)}
        return digest_of(lengths, job.voice_of(clip)[0], job.pose_of(clip))

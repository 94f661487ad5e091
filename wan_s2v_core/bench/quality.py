"""Quality of a finished talking video, from its pixels and its sound: no model and no download."""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..conditioning.image import fit_picture, read_picture, to_frames
from ..io.video import frames_of, read_header
from .clip_borders import ClipLengths, clip_lengths
from .head import CUT_PX, HeadTracker
from .likeness import likeness
from .lip_sync import CLEAREST_LEAST, compare, voice_envelope, voice_fault
from .lpips import SMALLEST_SIDE_PX, alexnet_lpips
from .mouth import MouthPlace, RestlessnessMap
from .opening import MouthPictures
from .pictures import blurred, grey, planes, scaled

LOOK_PX = 256
"""Longer side of the pictures in which seams and flicker are measured; smaller videos are taken as they are."""
CALM_SHARE = 0.25
"""Half of the calmer half of the picture: the median of the static part."""
LEAST_DIFFERENCE = 0.01
"""Grey levels added to both sides of the seam's ratio, so that still pictures have one."""
STRETCHES = 4
"""Parts that take the place of clips where those are not known."""
COLOUR_CELLS = 4
"""Cells along a side in which colours are compared."""


LEAST_DETAIL = 0.5
"""Grey levels of detail that every picture is given, so that flat ones are alike."""


@dataclass(frozen=True)
class QualityRequest:
    """What to measure. Without `audio` the video's own sound is used, without `reference` its first clip."""

    video: Path
    audio: Path | None = None
    against: Path | None = None
    reference: Path | None = None
    clip_frames: int | None = None
    lpips_weights: Path | None = None


@dataclass
class QualityReport:
    """Numbers by name, None where one cannot be measured, and why."""

    values: dict[str, float | None] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    def set(self, name: str, value: float | None, reason: str = "") -> None:
        self.values[name] = None if value is None else round(float(value), 6)
        if value is None:
            self.reasons[name] = reason

    def to_dict(self) -> dict[str, Any]:
        return {**self.values, "reasons": self.reasons}

    def lines(self) -> Iterator[str]:
        for name, value in self.values.items():
            yield f"{name}: {self.reasons[name] if value is None else format(value, '.6g')}"


class FirstLook:
    """All that one pass over a video gives: its length, its restless place, seams and flicker."""

    def __init__(self, fps: float):
        self.times: list[float] = []
        self.differences: list[float] = []
        self.restless = RestlessnessMap(fps)
        self.unsteady, self._past = torch.zeros(()), []

    def add(self, picture: Tensor, time: float) -> None:  # picture: 1 3 H W
        self.times.append(time)
        self.restless.add(picture)
        small = scaled(picture, min(1.0, LOOK_PX / max(picture.shape[-2:])))
        self._past = [*self._past[-2:], small]
        if len(self._past) > 1:
            self.differences.append((small - self._past[-2]).abs().mean().item())
        if len(self._past) > 2:
            before, middle, _ = self._past
            self.unsteady = self.unsteady + (before - 2 * middle + small).abs().mean(1)

    def flicker(self) -> float | None:
        """Median over the static part of the mean absolute second difference in time, of full scale."""
        steps = len(self.times) - 2
        return None if steps < 1 else self.unsteady.quantile(CALM_SHARE).item() / steps / 255

    def seam_jump(self, starts: list[int]) -> float | None:
        """Median difference of frames across borders over that inside of clips."""
        at_border = np.zeros(len(self.differences), bool)
        at_border[[start - 1 for start in starts[1:]]] = True
        differences = np.array(self.differences)
        if not at_border.any() or at_border.all():
            return None
        jump, inside = np.median(differences[at_border]), np.median(differences[~at_border])
        return float((jump + LEAST_DIFFERENCE) / (inside + LEAST_DIFFERENCE))


def measure(request: QualityRequest) -> QualityReport:
    """Measure a video.

    Raises:
        ConfigError: if a file is missing or cannot be read, or a setting makes no sense.
        CheckpointError: if the LPIPS weights are none.
    """
    header = read_header(request.video)
    lengths = clip_lengths(header.tags, request.clip_frames)
    distance = alexnet_lpips(request.lpips_weights) if request.lpips_weights else None
    look, report = FirstLook(header.fps), QualityReport()
    for picture, time in frames_of(request.video):
        look.add(planes(picture), time)
    times = np.array([*look.times, look.times[-1] + 1 / header.fps])
    starts = _starts(lengths, len(look.times))
    place = look.restless.find()
    envelope = _envelope(request, header.has_sound, times)
    opening, drift = _second_look(request, place, starts, len(look.times))

    _report_lip_sync(report, opening, envelope, float(np.median(np.diff(times))))
    report.set("identity_drift", drift)
    _report_seams(report, look, lengths)
    report.set("flicker", look.flicker(), "three frames are needed")
    if request.against:
        _report_likeness(report, request, distance)
    return report


def _starts(lengths: ClipLengths | None, frames: int) -> list[int]:
    """First frames of the clips, or of equal parts where there is none but one."""
    starts = lengths.starts(frames) if lengths else [0]
    return starts if len(starts) > 1 else sorted({part * frames // STRETCHES for part in range(STRETCHES)})


def _envelope(request: QualityRequest, has_sound: bool, times: np.ndarray) -> np.ndarray | str:
    if not request.audio and not has_sound:
        return "there is no sound: the video has none, and no --audio is given"
    envelope = voice_envelope(request.audio or request.video, times)
    return voice_fault(envelope) or envelope


def _second_look(
    request: QualityRequest, place: MouthPlace | str, starts: list[int], frames: int
) -> tuple[np.ndarray | str, float]:
    """The mouth's opening in each frame (or why there is none), and the drift of the face over the clips."""
    tracker = None if isinstance(place, str) else HeadTracker(place)
    mouths, reference = MouthPictures(frames), None
    sums: list[Tensor | float] = [0.0] * len(starts)
    for index, (picture, _) in enumerate(frames_of(request.video)):
        cut = _face(planes(picture), tracker)
        if tracker:
            mouths.add(cut)
        if request.reference and reference is None:
            reference = _reference_face(request.reference, picture, place)
        clip = bisect_right(starts, index) - 1
        sums[clip] = sums[clip] + cut
    counts = np.diff([*starts, frames]).tolist()
    faces = torch.stack([total / count for total, count in zip(sums, counts, strict=True)])
    drift = identity_drift(faces, faces[0] if reference is None else reference)
    if not tracker:
        return place, drift
    opening = mouths.opening()
    return ("the mouth does not change" if opening is None else opening), drift


def _face(picture: Tensor, tracker: HeadTracker | None) -> Tensor:
    """3 H W: the face, or the whole picture where none was found."""
    return tracker.cut(picture) if tracker else scaled(picture, CUT_PX / max(picture.shape[-2:]))[0]


def _reference_face(path: Path, frame: Tensor, place: MouthPlace | str) -> Tensor:
    """The face of a picture, fitted to the video's size as `generate` does, and laid on that of a frame."""
    picture = to_frames(fit_picture(read_picture(path), *frame.shape[:2])[0])[0]
    tracker = None if isinstance(place, str) else HeadTracker(place)
    if tracker:
        tracker.cut(planes(frame))
    return _face(planes(picture), tracker)


def identity_drift(faces: Tensor, reference: Tensor) -> float:
    """The largest distance of any of the faces, N 3 H W, from the reference, 3 H W: colours plus shape.

    Colours: mean difference of coarse cells, of full scale. Shape: 1 - correlation of the brightness without its
    coarse part. 0 for equal faces.
    """
    found = [_colour_distance(face, reference) + _shape_distance(face, reference) for face in faces]
    return max(0.0, *found)


def _colour_distance(face: Tensor, reference: Tensor) -> float:
    cells = F.adaptive_avg_pool2d(torch.stack([face, reference]), COLOUR_CELLS)
    return (cells[0] - cells[1]).abs().mean().item() / 255


def _shape_distance(face: Tensor, reference: Tensor) -> float:
    both = grey(torch.stack([face, reference]))
    fine = (blurred(both, 1.5) - blurred(both, 8.0)).flatten(1)
    fine = fine - fine.mean(1, keepdim=True)
    least = LEAST_DETAIL**2 * fine.shape[1]
    alike = (fine[0] * fine[1]).sum() + least
    return 1 - (alike / (fine.square().sum(1) + least).prod().sqrt()).item()


def _report_lip_sync(
    report: QualityReport, opening: np.ndarray | str, envelope: np.ndarray | str, frame_seconds: float
) -> None:
    reason = next((why for why in (opening, envelope) if isinstance(why, str)), "")
    sync = None if reason else compare(opening, envelope)
    report.set("lip_sync_correlation", sync and sync.correlation, reason)
    unclear = "no lag stands out: mouth and voice do not move together at any"
    is_clear = sync is not None and sync.correlation_at_lag >= CLEAREST_LEAST
    lag_ms = sync.lag_frames * frame_seconds * 1000 if is_clear else None
    report.set("lip_sync_lag_ms", lag_ms, reason or unclear)


def _report_seams(report: QualityReport, look: FirstLook, lengths: ClipLengths | None) -> None:
    jump = look.seam_jump(lengths.starts(len(look.times))) if lengths else None
    unknown = "the file does not say where its clips begin; give --clip_frames"
    report.set("seam_jump", jump, "the video has one clip, and so no border" if lengths else unknown)


def _report_likeness(report: QualityReport, request: QualityRequest, distance: Any) -> None:
    size = next(frames_of(request.video))[0].shape[:2]
    too_small = min(size) < SMALLEST_SIDE_PX
    found = likeness(request.video, request.against, None if too_small else distance)
    why = found if isinstance(found, str) else ""
    values = {} if why else found
    for name in ("psnr", "ssim"):
        report.set(name, values.get(name), why)
    missing = f"the pictures are smaller than {SMALLEST_SIDE_PX} px" if too_small and distance else ""
    report.set("lpips", values.get("lpips"), why or missing or "its weights are not given; see --lpips_weights")

"""Follows a head: the same piece of face from every frame, whatever the head does in between."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .mouth import MouthPlace
from .pictures import blurred, grey, scaled

CUT_PX = 72
"""Side of the cut."""
MOUTH_HALF_PX = 10
"""Half the mouth's width in the cut."""
MOUTH_ROW = CUT_PX // 2 + 12
"""Row of the cut in which the mouth's middle lies; eyes and nose are above it, the chin below."""
ROUNDS = 12
SMALLEST_STEP = 1e-3


class HeadTracker:
    """Cuts face and mouth out of frame after frame, moved, turned and scaled back to where they were in the first.

    Gauss-Newton on grey levels of the part above the mouth, whose lips and jaw must not count as movement of the head;
    pixels that fit badly (blinks, background) lose their weight (IRLS with Cauchy weights), and a change of brightness
    and contrast is fitted along, so that fading pictures are followed too.
    """

    def __init__(self, mouth: MouthPlace):
        self.scale = MOUTH_HALF_PX / mouth.half_px
        line = torch.arange(CUT_PX) - (CUT_PX - 1) / 2
        self.rows, self.columns = torch.meshgrid(line, line, indexing="ij")
        self.centre = tuple((place + 0.5) * self.scale - 0.5 for place in (mouth.y, mouth.x))
        self.fitted = (self.rows < MOUTH_ROW - CUT_PX / 2 - 0.6 * MOUTH_HALF_PX).flatten()
        self.motion = torch.zeros(4)
        self.template: Tensor | None = None

    def cut(self, picture: Tensor) -> Tensor:
        """1 3 H W -> 3 CUT_PX CUT_PX, 0 to 255."""
        small = scaled(picture, self.scale)
        smooth = blurred(grey(small), 1.5)
        if self.template is None:
            self._start(smooth)
        else:
            self.motion = self._fit(smooth)
        return self._sample(small, self.motion)

    def _start(self, smooth: Tensor) -> None:
        self.template = self._sample(smooth, self.motion)[0]
        down, right = torch.gradient(self.template)
        fade = self.template - self.template.mean()
        steps = (
            *(down * self.rows + right * self.columns, down * self.columns - right * self.rows),
            *(down, right, fade, torch.ones_like(fade)),
        )
        self.slopes = torch.stack(steps, -1).flatten(0, 1)[self.fitted]

    def _fit(self, smooth: Tensor) -> Tensor:
        """Scale, turn and shift that bring the picture onto the template, from those of the frame before."""
        motion, wanted = self.motion, self.template.flatten()[self.fitted]
        for _ in range(ROUNDS):
            error = self._sample(smooth, motion)[0].flatten()[self.fitted] - wanted
            spread = (error - error.median()).abs()
            weights = 1 / (1 + (spread / (3 * spread.median() + 1)) ** 2)
            weighted = self.slopes * weights[:, None]
            normal = weighted.T @ self.slopes + 1e-3 * torch.eye(6)
            step = torch.linalg.solve(normal, weighted.T @ error)[:4]
            motion = motion - step
            if step.abs().max() < SMALLEST_STEP:
                break
        lost = not torch.isfinite(motion).all() or motion[:2].abs().max() > 0.5 or motion[2:].abs().max() > 3 * CUT_PX
        return torch.zeros(4) if lost else motion

    def _sample(self, pictures: Tensor, motion: Tensor) -> Tensor:
        scale, turn, down, right = motion
        up_px = MOUTH_ROW - CUT_PX / 2
        y = (1 + scale) * self.rows + turn * self.columns + down + self.centre[0] - up_px
        x = (1 + scale) * self.columns - turn * self.rows + right + self.centre[1]
        height, width = pictures.shape[-2:]
        grid = torch.stack([(x + 0.5) * 2 / width - 1, (y + 0.5) * 2 / height - 1], -1)[None]
        return F.grid_sample(pictures, grid, padding_mode="border", align_corners=False)[0]

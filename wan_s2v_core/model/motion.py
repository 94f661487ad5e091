"""Latents to tokens: patches of video, reference and pose, and motion latents packed into few tokens."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..geometry import MOTION_BUCKETS, PACKED_MOTION_LATENTS, PATCH


class PatchProjection(nn.Conv3d):
    """Patches to tokens. B C F h w -> B L E in frame, row, column order; remainders at the edges are cut off.

    Its kernel is its stride, so this is one product over patches. It has a convolution's parameters but not its
    kernel: oneDNN's bfloat16 conv3d is wrong for some shapes on CPUs with AMX.
    """

    def __init__(self, channels: int, width: int, patch: tuple[int, int, int]):
        super().__init__(channels, width, kernel_size=patch, stride=patch)

    def forward(self, latents: Tensor) -> Tensor:
        sizes = latents.shape[2:]
        counts = [size // patch for size, patch in zip(sizes, self.kernel_size, strict=True)]
        frames, rows, columns = (n * patch for n, patch in zip(counts, self.kernel_size, strict=True))
        x = latents[:, :, :frames, :rows, :columns]
        for dim, patch in zip((4, 3, 2), reversed(self.kernel_size), strict=True):
            x = x.unflatten(dim, (-1, patch))  # B C F pf h ph w pw at the end
        patches = x.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)  # B L C*pf*ph*pw
        return F.linear(patches, self.weight.flatten(1), self.bias)


class MotionPacker(nn.Module):
    """Nineteen motion latent frames at three sizes: the newest 1 as it is, the next 2 at half, the oldest 16 at a
    quarter of the side. Source: FramePack (arXiv 2504.12626) as in Wan2.2 motioner.py at 42bf4cf (Apache-2.0).
    """

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.near, self.middle, self.far = (
            PatchProjection(channels, width, (1 << level, PATCH << level, PATCH << level)) for level in range(3)
        )

    def forward(self, motion_latents: Tensor) -> Tensor:
        """B C F h w, oldest first -> B L E, newest first. Missing old frames are zeros and still become tokens."""
        newest = motion_latents[:, :, -PACKED_MOTION_LATENTS:]
        padded = F.pad(newest, (0, 0, 0, 0, PACKED_MOTION_LATENTS - newest.shape[2], 0))
        far, middle, near = padded.split(MOTION_BUCKETS[::-1], dim=2)
        return torch.cat([self.near(near), self.middle(middle), self.far(far)], dim=1)

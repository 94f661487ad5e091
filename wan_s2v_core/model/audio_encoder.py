"""wav2vec 2.0: a waveform becomes the hidden states of all its layers."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

SPEECH_FEATURE_HZ = 50
"""Nominal feature frames per second of wav2vec 2.0."""


def normalize_waveform(waveform: Tensor) -> Tensor:
    """Zero mean, unit variance of one recording, in numpy's float32 as transformers' feature extractor does it."""
    samples = waveform.float().cpu().numpy()
    return torch.from_numpy((samples - samples.mean()) / np.sqrt(samples.var() + 1e-7))


class SpeechEncoder(nn.Module):
    """wav2vec 2.0 (transformers) in eval mode; `settings` are arguments of Wav2Vec2Config."""

    def __init__(self, settings: dict[str, Any]):
        super().__init__()
        from transformers import Wav2Vec2Config, Wav2Vec2Model  # slow to import

        # A mask embedding exists only for training-time masking, which never happens here.
        config = Wav2Vec2Config(
            **settings | {"apply_spec_augment": False, "mask_time_prob": 0.0, "mask_feature_prob": 0.0}
        )
        self.network = Wav2Vec2Model(config).eval()

    @property
    def shape(self) -> tuple[int, int]:
        """A and E of what is heard."""
        return self.network.config.num_hidden_layers + 1, self.network.config.hidden_size

    @property
    def steps(self) -> list[tuple[int, int]]:
        """Kernel and stride of each convolution over samples."""
        return list(zip(self.network.config.conv_kernel, self.network.config.conv_stride, strict=True))

    def frames_of(self, samples: int) -> int:
        """Feature frames that so many samples give."""
        for kernel, stride in self.steps:
            samples = (samples - kernel) // stride + 1
        return samples

    def samples_of(self, frames: int) -> int:
        """The fewest samples that give so many feature frames."""
        for kernel, stride in reversed(self.steps):
            frames = (frames - 1) * stride + kernel
        return frames

    def at_work(self, values: Tensor) -> Tensor:
        """The same where and as the network computes."""
        return values.to(self.network.device, self.network.dtype)

    def hidden_states(self, waveform: Tensor) -> Tensor:
        """All layers of one recording.

        Args:
            waveform: samples at 16 kHz, mono, any scale.
        Returns:
            A T E in float32, T at about 50 Hz; A is the number of layers + 1.
        """
        samples = self.at_work(normalize_waveform(waveform)[None])
        out = self.network(samples, output_hidden_states=True)
        # Since transformers 5 the last entry lacks the encoder's final norm; last_hidden_state always has it.
        return torch.cat([*out.hidden_states[:-1], out.last_hidden_state]).float()

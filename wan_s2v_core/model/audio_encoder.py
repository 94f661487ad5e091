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

    def hidden_states(self, waveform: Tensor) -> Tensor:
        """All layers of one recording.

        Args:
            waveform: samples at 16 kHz, mono, any scale.
        Returns:
            A T E in float32, T at about 50 Hz; A is the number of layers + 1.
        """
        samples = normalize_waveform(waveform)[None].to(self.network.device, self.network.dtype)
        out = self.network(samples, output_hidden_states=True)
        # Since transformers 5 the last entry lacks the encoder's final norm; last_hidden_state always has it.
        return torch.cat([*out.hidden_states[:-1], out.last_hidden_state]).float()

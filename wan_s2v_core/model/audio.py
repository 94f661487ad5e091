"""The voice inside the DiT: a causal audio encoder, and the injection of its tokens after chosen blocks."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import S2VModelConfig
from ..geometry import latent_frames_of
from ..seams import BlockContext
from .attention import CrossAttention
from .pointwise import Pointwise

AUDIO_EPS = 1e-6
"""Of every norm on the voice's way, whatever eps the config sets for the blocks."""
MODULATED_INJECTION_EPS = 1e-5
"""The reference takes this norm from diffusers' AdaLayerNorm, with its default."""


class CausalConv(nn.Conv1d):
    """A convolution over time that sees only the past. B L C -> B L/stride C, the first sample repeated to the left."""

    def __init__(self, channels: int, out_channels: int, stride: int = 1):
        super().__init__(channels, out_channels, kernel_size=3, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        padded = F.pad(x.transpose(1, 2), (self.kernel_size[0] - 1, 0), mode="replicate")
        return super().forward(padded).transpose(1, 2)


class CausalAudioEncoder(nn.Module):
    """Speech features per video frame become a few tokens and one vector per latent frame.

    A learned mixture of the layers of the speech model passes three causal convolutions, two of which halve the
    rate. The local path keeps `audio_tokens` heads apart and adds a learned token; the global path has one head.
    Runs in float32. Source: Wan2.2 auxi_blocks.py at 42bf4cf (Apache-2.0).
    """

    def __init__(self, config: S2VModelConfig):
        super().__init__()
        self.heads, self.has_vectors = config.audio_tokens, config.modulates_audio
        quarter, half = config.width // 4, config.width // 2
        self.layer_weights = nn.Parameter(torch.full((1, config.audio_layers, 1, 1), 0.01))
        self.local_in = CausalConv(config.audio_width, quarter * config.audio_tokens)
        self.middle = CausalConv(quarter, half, stride=2)
        self.last = CausalConv(half, config.width, stride=2)
        self.padding_token = nn.Parameter(torch.zeros(1, 1, 1, config.width))
        if config.modulates_audio:
            self.global_in = CausalConv(config.audio_width, quarter)
            self.global_out = nn.Linear(config.width, config.width)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor | None]:
        """Encode a whole window of audio.

        Args:
            features: B A E(audio) T, one embedding per video frame.
        Returns:
            tokens B F L(audio) E and vectors B F E (None in models without), F a quarter of T, rounded up.
        """
        weights = F.silu(self.layer_weights)
        mixed = (features * weights / weights.sum(dim=1, keepdim=True)).sum(dim=1).transpose(1, 2)  # B T E(audio)
        heads = self.local_in(mixed).unflatten(-1, (self.heads, -1))  # B T N E/4
        local = self._pool(heads.transpose(1, 2).flatten(0, 1))  # the heads share what follows
        local = local.unflatten(0, (-1, self.heads)).transpose(1, 2)  # B F N E
        tokens = torch.cat([local, self.padding_token.expand(*local.shape[:2], 1, -1)], dim=2)
        if not self.has_vectors:
            return tokens, None
        return tokens, self.global_out(self._pool(self.global_in(mixed)))

    def _pool(self, x: Tensor) -> Tensor:
        x = self._activate(x)
        return self._activate(self.last(self._activate(self.middle(x))))

    def _activate(self, x: Tensor) -> Tensor:
        return F.silu(F.layer_norm(x, x.shape[-1:], eps=AUDIO_EPS))

    def encode_clip(
        self, features: Tensor, motion_frames: int, past: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Encode one clip, B A E(audio) T -> tokens and vectors of its latent frames alone.

        The clip is led in by `motion_frames` frames whose outcome is dropped: the end of `past` where there is one,
        held copies of the first frame before that. The lead-in also sets the phase of the two halvings, so that a
        latent frame hears 5 video frames back and 3 ahead.
        """
        known = features if past is None else torch.cat([past[..., -motion_frames:], features], dim=-1)
        missing = motion_frames + features.shape[-1] - known.shape[-1]
        held = known[..., :1].expand(*known.shape[:-1], missing)
        tokens, vectors = self(torch.cat([held, known], dim=-1))
        dropped = latent_frames_of(motion_frames)
        return tokens[:, dropped:], None if vectors is None else vectors[:, dropped:]


class Voice(NamedTuple):
    """What an injector knows of the voice, for each latent frame."""

    keys_values: tuple[Tensor, Tensor]
    """Two of B F L(audio) N D."""
    shift: Tensor | None
    gain: Tensor | None
    """Both B F E in float32; None in models without."""

    def of_frames(self, first: int, stop: int) -> "Voice":
        """With keys and values of some latent frames; the modulation is looked up by `context.frame_index`."""
        k, v = self.keys_values
        return self._replace(keys_values=(k[:, first:stop], v[:, first:stop]))


RunInjector = Callable[["AudioInjector", Tensor, BlockContext], Tensor]
"""(injector, x: B L E, context) -> B L E; outside of training it may write its result over x."""


class AudioInjector(nn.Module):
    """Adds the voice to the noisy tokens: each one listens to the audio tokens of its own latent frame.

    Which frame that is comes from `context.frame_index`, so any part of a split sequence can be served alone. With all
    of them at hand, latent frames go through the attention as a batch, which takes no mask. `run` is a seam, for all of
    it in slices.
    """

    def __init__(self, config: S2VModelConfig):
        super().__init__()
        self.eps = MODULATED_INJECTION_EPS if config.modulates_audio else AUDIO_EPS
        self.attention = CrossAttention(config.width, config.heads, AUDIO_EPS)
        if config.modulates_audio:
            self.modulation = nn.Linear(config.width, 2 * config.width)
        self.pointwise = Pointwise()
        self.run: RunInjector = inject_whole

    def forward(self, x: Tensor, context: BlockContext) -> Tensor:  # B L E, float32
        return self.run(self, x, context)

    def voice(self, context: BlockContext) -> Voice:
        """What the tokens at hand listen to."""
        keys_values = self.attention.keys_values(context.audio_tokens, context.memory.own)
        return Voice(keys_values, *self.frame_modulation(context.audio_frames))

    def frame_modulation(self, audio_frames: Tensor | None) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Shift and gain of each latent frame, from its vector B F E. Two of B F E in float32, or none."""
        if audio_frames is None:
            return None, None
        shift, scale = self.modulation(F.silu(audio_frames)).float().chunk(2, dim=-1)
        return shift, 1 + scale

    def inject(self, x: Tensor, voice: Voice, own_frame: Tensor | None, context: BlockContext) -> Tensor:
        """Some of the tokens with the voice added to the noisy ones; `own_frame` as `seen` of `CrossAttention`."""
        ops = self.pointwise
        normed = ops.frame_norm(x, voice.shift, voice.gain, self.eps, context)
        return ops.add_to_noisy(x, self.attention(normed, voice.keys_values, ops, own_frame), context)


def inject_whole(injector: AudioInjector, x: Tensor, context: BlockContext) -> Tensor:
    """The plain way at `AudioInjector.run`: all tokens at once."""
    own_frame = None if context.has_all_frames else context.frame_index
    return injector.inject(x, injector.voice(context), own_frame, context)

"""The S2V diffusion transformer: embed, a stack of blocks, head.

What a clip is conditioned on does not change from step to step, so it is embedded once (`condition`) and each step
only embeds the noisy latents. Source: Wan2.2 model_s2v.py at 42bf4cf (Apache-2.0), rewritten from its description.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import UNUSED, S2VModelConfig
from ..errors import ConfigError
from ..geometry import PACKED_MOTION_LATENTS, PATCH, frame_slices, token_slices
from ..seams import BlockContext, Memory, RunStack
from .audio import AudioInjector, CausalAudioEncoder
from .block import Block
from .motion import MotionPacker, PatchProjection
from .pointwise import norm_rows
from .rope import rotary_table

NOISY, REFERENCE, MOTION = range(3)
"""Rows of the segment embedding."""


@dataclass(frozen=True)
class ClipInputs:
    """What one clip is made from, as the pipeline knows it. All latents share h and w."""

    reference_latents: Tensor
    """B C 1 h w."""
    motion_latents: Tensor | None
    """B C F h w, oldest first; None when the clip has no past. Fewer than 19 count as packed with zeros before them."""
    pose_latents: Tensor | None
    """B C F h w with the clip's latent frames; None is the same as zeros."""
    audio: Tensor
    """B A E(audio) T, one embedding per video frame of the clip; zeros are silence."""
    text: Tensor
    """B L E(text), the prompt's embeddings without padding."""
    motion_frames: int
    """Video frames of past that a clip may see: the length of the audio encoder's lead-in."""
    audio_past: Tensor | None = None
    """B A E(audio) T, what was said before the clip; None holds the clip's first frame instead, as the reference."""


@dataclass(frozen=True)
class ClipCondition:
    """Everything of a clip that is the same in every step, embedded. Made by `S2VTransformer.condition`.

    But for the pose, which is as large as the noisy tokens: it is embedded anew in each step, as they are.
    """

    inputs: ClipInputs
    """What it is made from."""
    grid: tuple[int, int, int]
    """Latent frames, token rows, token columns of the noisy latents."""
    side_tokens: Tensor
    """B L E, float32: reference and motion tokens."""
    text: Tensor
    audio_tokens: Tensor
    audio_frames: Tensor | None
    rope: Tensor
    frame_index: Tensor
    branch: str
    memory: Memory
    """What techniques remember from step to step. It belongs to these tensors and to these weights: whoever changes
    either makes a new condition."""


@lru_cache(maxsize=2048)
@torch.inference_mode(False)  # kept tables must serve training as well
def timestep_features(timestep: float, width: int) -> Tensor:
    """Cosines, then sines, of one timestep, on the CPU: tabulated in float64, since float32 angles cost 1e-5."""
    half = width // 2
    angles = timestep * 10000.0 ** (-np.arange(half, dtype=np.float64) / half)
    return torch.from_numpy(np.concatenate([np.cos(angles), np.sin(angles)])).float()


def token_grid(latents: Tensor) -> tuple[int, int, int]:
    """Frames, rows and columns of tokens that B C F h w becomes; odd rows and columns of latents are cut off."""
    frames, height, width = latents.shape[2:]
    return frames, height // PATCH, width // PATCH


class BlockStack(nn.Module):
    """The blocks in order, each followed by its audio injector if it has one."""

    def __init__(self, config: S2VModelConfig):
        super().__init__()
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.blocks))
        self.injectors = nn.ModuleList(AudioInjector(config) for _ in config.injected_blocks)
        self.injector_after = {block: index for index, block in enumerate(config.injected_blocks) if block != UNUSED}

    def forward(self, x: Tensor, context: BlockContext) -> Tensor:
        for index, block in enumerate(self.blocks):
            x = block(x, context.of_layer(f"block {index}"))
            if index in self.injector_after:
                x = self.injectors[self.injector_after[index]](x, context.of_layer(f"injector after {index}"))
        return x


def run_plainly(stack: nn.Module, tokens: Tensor, context: BlockContext) -> Tensor:
    """The plain way at `S2VTransformer.run_stack`."""
    return stack(tokens, context)


class Head(nn.Module):
    """Noisy tokens to velocity patches, in float32; `tokens_at_once` is a seam for slices, None is all of them."""

    def __init__(self, config: S2VModelConfig):
        super().__init__()
        self.eps = config.eps
        self.modulation = nn.Parameter(torch.randn(1, 2, config.width) / config.width**0.5)
        self.out = nn.Linear(config.width, PATCH * PATCH * config.latent_channels)
        self.tokens_at_once: int | None = None

    def forward(self, x: Tensor, time: Tensor) -> Tensor:  # B L E, B E -> B L 4C
        shift, scale = (self.modulation + time[:, None]).unbind(1)
        if self.tokens_at_once is None:
            return self.out(norm_rows(x, shift, scale, self.eps))
        parts = (x[:, start:stop] for start, stop in token_slices(x.shape[1], self.tokens_at_once))
        return torch.cat([self.out(norm_rows(part, shift, scale, self.eps)) for part in parts], dim=1)


class S2VTransformer(nn.Module):
    """Wan2.2 S2V: the velocity of a clip's latents, given a picture, a voice, a prompt, a pose and the past.

    `run_stack` is the seam around all blocks, for caches and for splitting the sequence; `stack` itself, and with it
    the names of weights, stays what it is. `tokens_at_once` is a seam for slices: how many noisy tokens are embedded at
    once, in whole latent frames; None is all of them.
    """

    def __init__(self, config: S2VModelConfig):
        super().__init__()
        self.config = config
        patch, width = (1, PATCH, PATCH), config.width
        self.patch_embedding = PatchProjection(config.latent_channels, width, patch)
        self.pose_embedding = PatchProjection(config.pose_channels, width, patch) if config.pose_channels else None
        self.segment_embedding = nn.Embedding(3, width)
        self.motion_packer = MotionPacker(config.latent_channels, width) if config.packs_motion else None
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_width, width), nn.GELU(approximate="tanh"), nn.Linear(width, width)
        )
        self.time_embedding = nn.Sequential(nn.Linear(config.time_width, width), nn.SiLU(), nn.Linear(width, width))
        self.time_projection = nn.Linear(width, 6 * width)
        self.audio_encoder = CausalAudioEncoder(config)
        self.stack = BlockStack(config)
        self.run_stack: RunStack = run_plainly
        self.head = Head(config)
        self.tokens_at_once: int | None = None

    FULL_PRECISION = ("segment_embedding", "time_", "audio_encoder", "head.", "modulation", "cross_norm", ".gate.")
    """Parameters that stay float32, as the reference computes them; injector modulations are products and do not."""

    @classmethod
    def keeps_full_precision(cls, name: str) -> bool:
        return ".injectors." not in name and any(part in name for part in cls.FULL_PRECISION)

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the products."""
        return self.patch_embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.patch_embedding.weight.device

    def condition(self, inputs: ClipInputs, branch: str = "cond", like: ClipCondition | None = None) -> ClipCondition:
        """Embed what stays the same over all steps of a clip.

        Args:
            like: of another guidance branch of this clip. What both are made from, which are the same tensors in
                their inputs, is then embedded and held once.
        Raises:
            ConfigError: if sizes do not fit together.
        """
        past = None if inputs.audio_past is None else inputs.audio_past.float()
        audio_tokens, audio_frames = self.audio_encoder.encode_clip(inputs.audio.float(), inputs.motion_frames, past)
        grid = (audio_tokens.shape[1], *token_grid(inputs.reference_latents)[1:])
        if inputs.pose_latents is not None and self.pose_embedding is not None:
            check_pose(inputs.pose_latents, grid)
        shares_text, shares_sides = (
            like is not None and all(getattr(inputs, name) is getattr(like.inputs, name) for name in names)
            for names in (("text",), ("reference_latents", "motion_latents"))
        )
        shares_places = shares_sides and grid == like.grid
        return ClipCondition(
            inputs=inputs,
            grid=grid,
            side_tokens=like.side_tokens if shares_sides else self._embed_sides(inputs),
            text=like.text if shares_text else self._embed_text(inputs.text),
            audio_tokens=audio_tokens.to(self.dtype),
            audio_frames=None if audio_frames is None else audio_frames.to(self.dtype),
            rope=like.rope if shares_places else self._rope(inputs, grid),
            frame_index=like.frame_index if shares_places else self._frame_index(grid),
            branch=branch,
            memory=Memory() if like is None else like.memory.of_branch(has_same_text=shares_text),
        )

    def _embed_sides(self, inputs: ClipInputs) -> Tensor:
        """Reference and motion tokens, B L E."""
        segments, dtype = self.segment_embedding.weight, self.dtype
        tokens = [self.patch_embedding(inputs.reference_latents.to(dtype)) + segments[REFERENCE]]
        if inputs.motion_latents is not None:
            embed_motion = self.motion_packer or self.patch_embedding
            tokens.append(embed_motion(inputs.motion_latents.to(dtype)) + segments[MOTION])
        return torch.cat(tokens, dim=1)

    def _rope(self, inputs: ClipInputs, grid: tuple[int, int, int]) -> Tensor:
        config, motion_latent_frames = self.config, 0
        if inputs.motion_latents is not None:
            motion_latent_frames = PACKED_MOTION_LATENTS if self.motion_packer else inputs.motion_latents.shape[2]
        table = rotary_table(config.head_width, *grid, motion_latent_frames, config.packs_motion)
        return table.to(self.device)

    def _frame_index(self, grid: tuple[int, int, int]) -> Tensor:
        return torch.arange(grid[0], device=self.device).repeat_interleave(grid[1] * grid[2])

    def _noisy_bias(self, pose_latents: Tensor | None) -> Tensor:
        """Segment and pose embedding of some latent frames, B L E or 1 1 E, which is added to the noisy tokens."""
        bias = self.segment_embedding.weight[NOISY].expand(1, 1, -1)
        if self.pose_embedding is None:
            return bias
        if pose_latents is None:  # zeros leave only the bias of the embedding
            return bias + self.pose_embedding.bias
        return bias + self.pose_embedding(pose_latents.to(self.dtype))

    def _embed_text(self, text: Tensor) -> Tensor:
        if text.shape[1] > self.config.text_tokens:
            raise ConfigError(
                f"the prompt has {text.shape[1]} tokens, the model reads {self.config.text_tokens}. Shorten it."
            )
        padded = F.pad(text, (0, 0, 0, self.config.text_tokens - text.shape[1]))
        return self.text_embedding(padded.to(self.dtype))

    def embed_time(self, timestep: float | Tensor) -> tuple[Tensor, Tensor]:
        """A timestep, or one per batch entry (B, for training) -> B E for the head, B S 6 E for the blocks."""
        moments = timestep.tolist() if isinstance(timestep, Tensor) else [timestep]
        still = [0.0 if self.config.zero_timestep else t for t in moments]  # reference and motion are not noisy
        features = torch.stack([timestep_features(float(t), self.config.time_width) for t in moments + still])
        time = self.time_embedding(features.to(self.device, non_blocking=True))  # SB E
        rows = self.time_projection(F.silu(time)).unflatten(0, (2, -1)).transpose(0, 1)  # B S 6E
        return time[: len(moments)], rows.unflatten(-1, (6, -1))

    def embed(
        self, latents: Tensor, modulation: Tensor, condition: ClipCondition, timestep: float
    ) -> tuple[Tensor, BlockContext]:
        """Noisy latents B C F h w -> tokens B L E (noisy, reference, motion) and what the blocks need to know."""
        if (tokens := token_grid(latents)) != condition.grid:
            raise ConfigError(
                f"the latents make {tokens} tokens (frames, rows, columns), audio and reference picture of the clip "
                f"{condition.grid}. Give all of them one size, and 4 video frames of audio for each latent frame."
            )
        context = BlockContext(
            rope=condition.rope,
            noisy_tokens=math.prod(condition.grid),
            frame_index=condition.frame_index,
            modulation=modulation,
            text=condition.text,
            audio_tokens=condition.audio_tokens,
            audio_frames=condition.audio_frames,
            dtype=self.dtype,
            grid=condition.grid,
            timestep=timestep,
            branch=condition.branch,
            memory=condition.memory,
        )
        return self._stream(latents, condition), context

    def _stream(self, latents: Tensor, condition: ClipCondition) -> Tensor:
        """All tokens, B L E, made in place: nothing as large is held beside them."""
        sides, pose = condition.side_tokens, condition.inputs.pose_latents
        frames, *sizes = condition.grid
        frame_tokens = math.prod(sizes)
        noisy = frames * frame_tokens
        stream = sides.new_empty(len(latents), noisy + sides.shape[1], sides.shape[2])
        stream[:, noisy:] = sides
        for first, stop in frame_slices(frames, frame_tokens, self.tokens_at_once or noisy):
            here = stream[:, first * frame_tokens : stop * frame_tokens]
            here.copy_(self.patch_embedding(latents[:, :, first:stop].to(self.dtype)))
            here += self._noisy_bias(None if pose is None else pose[:, :, first:stop])
        return stream

    def forward(self, latents: Tensor, timestep: float | Tensor, condition: ClipCondition) -> Tensor:
        """The velocity. latents: B C F h w; timestep: 0..1000, as a float in inference -> B C F h w in float32."""
        time, modulation = self.embed_time(timestep)
        tokens, context = self.embed(latents, modulation, condition, noisiest(timestep))
        tokens = self.run_stack(self.stack, tokens, context)
        patches = self.head(context.segments(tokens)[0], time)
        return unpatchify(patches, condition.grid)


def check_pose(pose_latents: Tensor, grid: tuple[int, int, int]) -> None:
    """Raises ConfigError unless there is a token of the pose for each of the clip."""
    if (tokens := token_grid(pose_latents)) != grid:
        raise ConfigError(
            f"the pose latents make {tokens} tokens (frames, rows, columns), the clip {grid}. "
            "Encode a pose video of the clip's own length and size."
        )


def noisiest(timestep: float | Tensor) -> float:
    return float(timestep.max()) if isinstance(timestep, Tensor) else float(timestep)


def unpatchify(patches: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """B L 4C, channels fastest -> B C F h w."""
    x = patches.unflatten(1, grid).unflatten(-1, (PATCH, PATCH, -1))  # B F rows columns 2 2 C
    return x.permute(0, 6, 1, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)

"""Where the benchmark meets the engine: networks, plans, and the kernels whose speed is the ceiling. Nothing else of
the benchmark knows how speed is applied.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..acceleration.attention.registry import BACKENDS, Chosen, Setting, try_backend
from ..assets import CHECKPOINT, embedded
from ..config import UNUSED, AccelerationPlan, JsonConfig, S2VModelConfig, check_choice
from ..model.audio_encoder import SpeechEncoder
from ..model.checkpoint import DIT, SPEECH_ENCODER, TEXT_ENCODER, VAE
from ..model.dit import ClipInputs, S2VTransformer
from ..model.loading import find_part, load, set_types
from ..model.text_encoder import END_OF_TEXT, TextEncoder
from ..model.vae import VideoVAE
from ..prepare import AUTO, PRECISIONS, LoadPlan, auto_precision, choose_attention, plan_loading
from .flops import ForwardShape
from .random_weights import fill_random

SEED = 7
MOTION_FRAMES = 73
"""Of past that a clip sees, as the released model has it."""
RELEASED_MODEL, DEMO_MODEL = "14B", "demo"
MODELS = (RELEASED_MODEL, DEMO_MODEL)
RELEASED: dict[str, Any] = {
    DIT: S2VModelConfig(),
    TEXT_ENCODER: {
        "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "vocab_size": 256384,
    },
    SPEECH_ENCODER: {
        "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096,
        "conv_dim": [512] * 7, "conv_bias": True, "feat_extract_norm": "layer", "do_stable_layer_norm": True,
    },
    VAE: {"width": 96},
}  # fmt: skip
"""Sizes of Wan2.2-S2V-14B and the networks that come with it."""
BUILDERS: dict[str, Callable[[Any], nn.Module]] = {
    DIT: S2VTransformer,
    TEXT_ENCODER: TextEncoder,
    SPEECH_ENCODER: SpeechEncoder,
    VAE: lambda sizes: VideoVAE(**sizes),
}


def resolve(plan: AccelerationPlan, config: S2VModelConfig, precision: str, device: torch.device) -> AccelerationPlan:
    """The plan with the attention that it leads to here, by name.

    Raises:
        BackendUnavailable, ConfigError: if it leads to none.
    """
    return replace(plan, attention=choose_attention(plan, config, PRECISIONS[precision].dtype, device).name)


def attention_bits(plan: AccelerationPlan) -> int:
    """Bits of the products of a resolved plan's attention: which ceiling it is held against."""
    return 16 if BACKENDS[plan.attention].is_exact else 8


def attention_label(plan: AccelerationPlan) -> str:
    """What reports call the attention of a resolved plan."""
    return plan.attention if plan.sparse_keep == 1 else f"{plan.attention} keep {plan.sparse_keep:g}"


def attention_kernels(bits: int, setting: Setting) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """Attention kernels of so many bits that can be used here, the best of which is the ceiling; B L N D -> B L N D."""
    tried = {name: try_backend(name, setting) for name, backend in BACKENDS.items() if backend.is_exact == (bits == 16)}
    return {
        name: (lambda q, k, v, attend=found.attend: attend(q, k, v, None))
        for name, found in tried.items()
        if isinstance(found, Chosen)
    }


# --- networks ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelSource(JsonConfig):
    """Which networks are measured: those of a checkpoint folder, or of a model by name."""

    model: str = RELEASED_MODEL
    """14B: random weights at real size; demo: the tiny checkpoint that comes with the pack."""
    checkpoint: str | None = None
    """Folder of Wan2.2-S2V-14B, or one in its layout, in place of `model`."""

    def __post_init__(self):
        check_choice("model", self.model, MODELS)

    @property
    def path(self) -> Path | None:
        """Where the weights are; None for random ones."""
        if self.checkpoint:
            return Path(self.checkpoint)
        return embedded(CHECKPOINT) if self.model == DEMO_MODEL else None

    @property
    def weights(self) -> str:
        """What reports call the weights."""
        if self.checkpoint:
            return Path(self.checkpoint).resolve().name
        return "embedded demo" if self.model == DEMO_MODEL else "random"

    @property
    def label(self) -> str:
        return self.weights if self.path else f"{self.model}, random weights"

    def config(self, kind: str) -> Any:
        """S2VModelConfig for the DiT, keyword arguments for the others."""
        return find_part(self.path, kind).config if self.path else RELEASED[kind]


def loading_of(precision: str, device: torch.device, plan: AccelerationPlan | None = None) -> LoadPlan:
    return plan_loading(precision, device, acceleration=plan or AccelerationPlan())


def precision_name(precision: str, device: torch.device) -> str:
    """What auto stands for."""
    loading_of(precision, device)  # raises where it cannot be used
    return auto_precision(device) if precision == AUTO else precision


def meta_network(kind: str, config: Any, loading: LoadPlan) -> nn.Module:
    """A network without weights, prepared as for loading."""
    with torch.device("meta"):
        network = BUILDERS[kind](config)
    loading.prepare(kind)(network)
    return network


def random_network(kind: str, config: Any, loading: LoadPlan, home: torch.device | None = None) -> nn.Module:
    """One network as loading would make it, but with random weights, which are drawn where it computes."""
    network = meta_network(kind, config, loading)
    fill_random(network, SEED, loading.dtype(kind), loading.torch_device)
    loading.finish(kind, network)
    if kind == TEXT_ENCODER:
        network.tokenizer = lambda text: [*(3 + ord(letter) % 256 for letter in text), END_OF_TEXT]
    return network.to(home or loading.torch_device)


def build_network(kind: str, source: ModelSource, loading: LoadPlan, home: torch.device | None = None) -> nn.Module:
    """One network of a source, resting on `home`."""
    if not source.path:
        return random_network(kind, source.config(kind), loading, home)
    network = load(source.path, kind, loading.dtype(kind), home or loading.torch_device, loading.prepare(kind))
    loading.finish(kind, network)
    return network


def build_dit(source: ModelSource, precision: str, device: torch.device) -> S2VTransformer:
    """The DiT of a source, on a device."""
    return build_network(DIT, source, loading_of(precision, device))


def build_short_dit(config: S2VModelConfig, precision: str, device: torch.device) -> S2VTransformer:
    """A DiT of that config with random weights, on a device."""
    return random_network(DIT, config, loading_of(precision, device))


def with_blocks(config: S2VModelConfig, blocks: int) -> S2VModelConfig:
    """The same, but at most so many blocks deep."""
    blocks = min(blocks, config.blocks)
    injected = tuple(block if block < blocks else UNUSED for block in config.injected_blocks)
    return replace(config, blocks=blocks, injected_blocks=tuple(block for block in injected if block != UNUSED))


def weight_bytes(kind: str, config: Any, loading: LoadPlan) -> int:
    """What the weights of a network take where it computes."""
    network = set_types(meta_network(kind, config, loading), loading.dtype(kind))
    return sum(tensor.nbytes for tensor in (*network.parameters(), *network.buffers()))


def make_inputs(config: S2VModelConfig, shape: ForwardShape, device: torch.device) -> tuple[ClipInputs, Tensor]:
    """Random inputs of a clip with a pose, and its noise."""
    generator = torch.Generator(device).manual_seed(SEED)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(1, *sizes, generator=generator, device=device).bfloat16().float()

    h, w = shape.latent_size
    inputs = ClipInputs(
        reference_latents=normal(config.latent_channels, 1, h, w),
        motion_latents=normal(config.latent_channels, shape.motion_latents, h, w) if shape.has_motion else None,
        pose_latents=normal(config.pose_channels, shape.latent_frames, h, w) if config.pose_channels else None,
        audio=normal(config.audio_layers, config.audio_width, shape.frames),
        text=normal(min(100, config.text_tokens), config.text_width),
        motion_frames=MOTION_FRAMES,
    )
    return inputs, normal(config.latent_channels, shape.latent_frames, h, w)

"""What is done to plain networks before they run, in the one order that composes."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

import torch
from torch import nn

from .acceleration.attention.registry import Chosen, Setting, choose
from .acceleration.convolution import flatten_convolutions
from .acceleration.experts.grouped import group_products
from .acceleration.experts.router import check_routing, describe_experts
from .acceleration.kernels.trial import kernels_work
from .acceleration.normalization import swap_channel_norms
from .acceleration.quantization import LINEARS, check_device, is_product, swap_linears, swap_text_linears
from .acceleration.vae.network import has_kernels, speed_up
from .config import AUTO, AccelerationPlan, ExpertRouting, JsonConfig, S2VModelConfig, check_choice
from .errors import BackendUnavailable
from .memory.activations import ForwardWay
from .memory.vae_room import KERNELS, LIBRARY_16, LIBRARY_32, PLAIN, VaeWay
from .model.checkpoint import DIT, LOW_NOISE_DIT, TEXT_ENCODER, VAE, kind_of
from .model.parts import Checkpoint

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Precision:
    """How weights are stored and products computed in the DiT; the text encoder has the same type without 8 bits."""

    dtype: torch.dtype
    linears: str | None = None
    """Which 8-bit layers take the place of the plain ones, one of `quantization.LINEARS`; None: none."""


PRECISIONS = {
    "bfloat16": Precision(torch.bfloat16),
    "float16": Precision(torch.float16),
    "float32": Precision(torch.float32),
    "float8-weights": Precision(torch.bfloat16, "float8-weights"),
    "float8": Precision(torch.bfloat16, "float8"),
    "int8": Precision(torch.bfloat16, "int8"),
}


TEXT_PRECISIONS = (AUTO, "float8-weights")
"""Of the text encoder; auto is the DiT's without 8 bits."""


@dataclass(frozen=True)
class LoadPlan(JsonConfig):
    """How the networks of a run are loaded: types, and what is changed before and after there are weights.

    All of it in names, so that another process can do the same from JSON. What they stand for is derived.
    """

    precision: str
    """One of PRECISIONS."""
    device: str
    """Where they compute."""
    acceleration: AccelerationPlan = field(default_factory=AccelerationPlan)
    """How they are made faster. What concerns the DiT is attached when it is used; see attach.py."""
    text_in_8_bits: bool = False
    """Whether the text encoder has float8 weights."""
    in_float16: bool = False
    """Whether what is not in 8 bits is float16, as on GPUs without bfloat16."""

    def __post_init__(self):
        check_choice("precision", self.precision, PRECISIONS)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "LoadPlan":
        acceleration = AccelerationPlan.from_dict(values.get("acceleration", {}))
        return super().from_dict({**values, "acceleration": acceleration})

    @property
    def torch_device(self) -> torch.device:
        return torch.device(self.device)

    @property
    def types(self) -> Precision:
        """What the precision stands for."""
        found = PRECISIONS[self.precision]
        return replace(found, dtype=torch.float16) if self.in_float16 else found

    @property
    def has_fast_vae(self) -> bool:
        """Whether the VAE computes in bfloat16; on CPUs other ways are faster."""
        is_wanted = self.acceleration.vae == "bfloat16"
        if self.acceleration.vae == AUTO:
            is_wanted = self.types.dtype != torch.float32 and has_bfloat16(self.torch_device)
        return is_wanted and self.torch_device.type == "cuda"

    @property
    def vae_way(self) -> VaeWay | None:
        """How the VAE computes: on cards with a network that can work in parts, elsewhere with diffusers' own."""
        if self.torch_device.type != "cuda":
            return PLAIN
        if self.has_fast_vae and has_kernels(self.torch_device):
            return KERNELS
        way = LIBRARY_16 if self.has_fast_vae else LIBRARY_32
        return replace(way, copies=bool(torch.version.hip))

    def forward_way(self, config: S2VModelConfig) -> ForwardWay:
        """How a forward of a DiT of that config computes."""
        linears, plan = self.types.linears, self.acceleration
        is_fused = plan.fused and kernels_work(self.torch_device)
        return ForwardWay(
            dtype_bytes=self.types.dtype.itemsize,
            fused=is_fused,
            rows_in_8_bits=bool(linears) and is_product(LINEARS[linears]),
            attention_bits=16 if self.attention(config).is_exact else 8,
            sparse_keep=plan.sparse_keep,
        )

    def attention(self, config: S2VModelConfig) -> Chosen:
        """The attention that a DiT of that config gets; see `choose_attention`."""
        return choose_attention(self.acceleration, config, self.types.dtype, self.torch_device)

    def dtype(self, kind: str) -> torch.dtype:
        """VAE and audio encoder stay in full precision, as in the reference."""
        return self.types.dtype if kind in (DIT, TEXT_ENCODER) else torch.float32

    def concerning(self, kind: str) -> tuple:
        """What of this plan makes another network of that kind."""
        general = self.dtype(kind), self.device
        if kind == TEXT_ENCODER:
            return *general, self.text_in_8_bits
        if kind == VAE:
            return *general, self.has_fast_vae
        if kind != DIT:
            return general
        return *general, self.types

    def prepare(self, kind: str) -> Callable[[nn.Module], None]:
        """To be called on the network of that kind before it has weights."""
        return partial(self._prepare, kind)

    def _prepare(self, kind: str, network: nn.Module) -> None:
        if kind == DIT and self.types.linears:
            swap_linears(network, self.types.linears)
        if kind == TEXT_ENCODER and self.text_in_8_bits:
            swap_text_linears(network)
        if kind == VAE and self.torch_device.type == "cpu":
            flatten_convolutions(network)
            swap_channel_norms(network)

    def finish(self, kind: str, network: nn.Module) -> None:
        """Change the network of that kind where that needs its weights."""
        if kind == DIT:
            group_products(network)
        if kind == VAE and self.torch_device.type == "cuda":
            speed_up(network, self.torch_device, torch.bfloat16 if self.has_fast_vae else torch.float32)


def choose_attention(
    plan: AccelerationPlan, config: S2VModelConfig, dtype: torch.dtype, device: torch.device
) -> Chosen:
    """The attention that a plan leads to.

    Raises:
        BackendUnavailable: if it needs one that cannot be used here.
        ConfigError: if there is none of that name.
    """
    return choose(plan.attention, Setting(device, dtype, config.head_width), takes_lists=plan.sparse_keep < 1)


def picture_facts(checkpoint: Checkpoint, loading: LoadPlan) -> dict[str, Any]:
    """All about the networks of a run that shapes its pictures, as JSON: which files they are, and how they compute."""
    parts = [name for name in (DIT, LOW_NOISE_DIT, VAE) if name in checkpoint.paths]
    config = checkpoint.config(DIT)
    return {
        "torch": torch.__version__,
        "device": loading.torch_device.type,
        "linears": loading.types.linears,
        "attention": attention_kind(loading.attention(config)),
        "sparse": sparse_facts(loading.acceleration),
        "has_fast_vae": loading.has_fast_vae,
        "dtypes": {name: str(loading.dtype(kind_of(name))) for name in parts},
        "files": {name: checkpoint.stamps(name) for name in parts},
        "dit": config.to_dict(),
    }


def attention_kind(chosen: Chosen) -> str:
    """What of a run's attention shapes its pictures: exact ones differ by rounding alone."""
    return "exact" if chosen.is_exact else chosen.name


def sparse_facts(plan: AccelerationPlan) -> dict[str, Any]:
    """What of a plan leaves something out; the rest of it changes pictures by rounding, or is told elsewhere."""
    names = ("sparse_keep", "sparse_by", "sparse_dense_steps", "sparse_dense_blocks")
    return {name: getattr(plan, name) for name in names} if plan.sparse_keep < 1 else {}


def usable_device(name: str) -> torch.device:
    """The device of that name.

    Raises:
        BackendUnavailable: if tensors cannot be placed there.
    """
    try:
        device = torch.empty(0, device=name).device
        if device.type == "meta":
            raise RuntimeError("it holds no data")
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise BackendUnavailable(f"device {name!r} cannot be used: {reason}. Use cpu, or cuda with a card.") from error
    return device


def has_bfloat16(device: torch.device) -> bool:
    """Whether a card convolves in bfloat16: Ampere and later, and AMD's."""
    if device.type != "cuda":
        return False
    return bool(torch.version.hip) or torch.cuda.get_device_capability(device) >= (8, 0)


def plan_loading(
    precision: str,
    device: str | torch.device,
    acceleration: AccelerationPlan = AccelerationPlan(),  # noqa: B008  (frozen)
    text_precision: str = AUTO,
) -> LoadPlan:
    """The plan for a precision of that name; auto is bfloat16, float16 on GPUs without it, and float32 on a CPU.

    Args:
        text_precision: of the text encoder, auto or float8-weights.
    Raises:
        ConfigError: if there is none of that name.
        BackendUnavailable: if the device cannot compute in it.
    """
    check_choice("precision", precision, (AUTO, *PRECISIONS))
    check_choice("text_precision", text_precision, TEXT_PRECISIONS)
    device = torch.device(device)
    if precision == AUTO:
        precision = auto_precision(device)
    in_float16 = False
    if linears := PRECISIONS[precision].linears:
        check_device(linears, device)
        in_float16 = auto_precision(device) == "float16"  # what the rest of the network is
    return LoadPlan(precision, str(device), acceleration, text_precision != AUTO, in_float16)


def auto_precision(device: torch.device) -> str:
    """What auto stands for on a device; where that is not the usual bfloat16 of a GPU, it is said once."""
    if device.type == "cpu":
        return "float32"
    if device.type != "cuda" or has_bfloat16(device):
        return "bfloat16"
    _say_float16(torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device))
    return "float16"


@cache
def _say_float16(name: str, capability: tuple[int, int]) -> None:
    log.warning("precision auto is float16: %s (compute capability %d.%d) has no bfloat16 units", name, *capability)


LARGE_PARAMETERS = 2e9
"""Of a DiT, from which on a forward on a CPU takes minutes."""


def warn_of_cpu(config: S2VModelConfig, device: torch.device) -> None:
    """Say that a large DiT is about to run on a CPU, why, and what to do about it."""
    parameters = dit_parameters(config)
    if device.type == "cpu" and parameters > LARGE_PARAMETERS:
        log.warning(
            "a DiT of %.0f billion parameters will run on the CPU, minutes a step: %s", parameters / 1e9, why_cpu()
        )


def dit_parameters(config: S2VModelConfig) -> int:
    """Of the blocks, which are nearly all of it."""
    attention = 4 * config.width**2
    feed_forward = 2 * config.width * config.feed_forward_width * max(1, config.num_experts)
    modulation = 2 * config.width**2 if config.modulates_audio else 0
    return config.blocks * (2 * attention + feed_forward) + len(config.injected_blocks) * (attention + modulation)


def why_cpu() -> str:
    """Why a CPU is used, and the way out."""
    if torch.cuda.is_available():
        return (
            f"{torch.cuda.get_device_name()} is there, but the CPU was asked for. Leave out --device cpu, or ComfyUI's "
            "--cpu."
        )
    if not (torch.version.cuda or torch.version.hip):
        return (
            f"torch {torch.__version__} is built for CPUs alone. With an NVIDIA or AMD GPU, install a build of torch "
            "for it."
        )
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
    return (
        f"torch is built for {build}, but finds no GPU or no driver for it. Install or update the driver: nvidia-smi "
        "or rocm-smi must list the GPU, also inside a container."
    )


def choose_routing(config: S2VModelConfig, routing: ExpertRouting) -> ExpertRouting | None:
    """The routing for a model of that config; None for a dense one, which is told if there are settings.

    Raises:
        ConfigError: if the settings do not fit the experts.
    """
    if config.num_experts:
        check_routing(config, routing)
        return routing
    if routing != ExpertRouting():
        log.warning(describe_experts(config))
    return None

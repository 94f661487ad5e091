"""The memory-bound steps between products as one kernel each, with 8-bit results where the next product takes them."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from ..model.audio import AudioInjector
from ..model.block import Block, FeedForward
from ..model.dit import S2VTransformer
from ..model.pointwise import Activations, Pointwise
from ..private_torch import has_hooks, product_with_gelu
from ..seams import BlockContext, Technique, replaced
from .kernels.trial import kernels_work

log = logging.getLogger(__name__)

STEPS_INTO_PRODUCTS = ("modulated_norm", "gated_add_norm", "add_modulated_norm", "activated", "frame_norm")
"""The steps whose result enters a product, and may be 8-bit rows."""


class FusedPointwise(Pointwise):
    """At the seam `pointwise`: each step as one pass over memory, computed in float32 from the same inputs.

    Equal to the plain steps up to rounding, of which there is less: nothing between two products is rounded on the
    way. Writes over the stream and over products, as `Pointwise` allows. With gradients on, and for tensors that are
    not on a card, the plain steps serve.

    Args:
        rows8: step -> float8_e4m3fn or int8, for those of `STEPS_INTO_PRODUCTS` whose result is to be 8-bit rows.
            Rounding to them is not exact.
        gelu_in_product: leave the tanh-GELU to cuBLAS's own product where that is possible, instead of a pass over
            its result. The result is then rounded once, not twice.
    """

    def __init__(
        self,
        rows8: Mapping[str, torch.dtype] | None = None,
        gelu_in_product: bool = False,
    ):
        self.rows8 = dict(rows8 or {})
        self.gelu_in_product = gelu_in_product

    def modulated_norm(self, x: Tensor, shift: Tensor, scale: Tensor, eps: float, context: BlockContext) -> Activations:
        if not serves(x, shift, scale):
            return super().modulated_norm(x, shift, scale, eps, context)
        from .kernels.norm import Norm, step

        made = Norm(scale, shift, eps, context.dtype, self.rows8.get("modulated_norm"), plus_one=True)
        return step(x, context.noisy_tokens, norm=made)

    def gated_add(self, x: Tensor, y: Tensor, gate: Tensor, context: BlockContext) -> Tensor:
        if not serves(x, y, gate):
            return super().gated_add(x, y, gate, context)
        from .kernels.norm import step

        step(x, context.noisy_tokens, y, gate)
        return x

    def gated_add_norm(
        self, x: Tensor, y: Tensor, gate: Tensor, norm: nn.LayerNorm, context: BlockContext
    ) -> tuple[Tensor, Activations]:
        if not (serves(x, y, gate) and type(norm) is nn.LayerNorm and norm.bias is not None):
            return super().gated_add_norm(x, y, gate, norm, context)
        from .kernels.norm import Norm, step

        gain, shift = (row.expand(1, 2, -1) for row in (norm.weight, norm.bias))
        made = Norm(gain, shift, norm.eps, context.dtype, self.rows8.get("gated_add_norm"))
        return x, step(x, context.noisy_tokens, y, gate, made)

    def add_modulated_norm(
        self, x: Tensor, y: Tensor, shift: Tensor, scale: Tensor, eps: float, context: BlockContext
    ) -> tuple[Tensor, Activations]:
        if not serves(x, y, shift, scale):
            return super().add_modulated_norm(x, y, shift, scale, eps, context)
        from .kernels.norm import Norm, step

        made = Norm(scale, shift, eps, context.dtype, self.rows8.get("add_modulated_norm"), plus_one=True)
        return x, step(x, context.noisy_tokens, y, norm=made)

    def heads_of(self, x: Tensor, norm: nn.RMSNorm, heads: int, rope: Tensor | None = None) -> Tensor:
        if not (serves(x, rope) and type(norm) is nn.RMSNorm and norm.weight is not None):
            return super().heads_of(x, norm, heads, rope)
        from .kernels.rotary import norm_and_turn

        return norm_and_turn(x, norm.weight, norm.eps, heads, rope)

    def activated(self, linear: nn.Module, x: Activations) -> Activations:
        if torch.is_grad_enabled():
            return super().activated(linear, x)
        rows8 = self.rows8.get("activated")
        if self.gelu_in_product and not rows8 and multiplies_plainly(linear, x):
            return product_with_gelu(x.flatten(0, -2), linear).unflatten(0, x.shape[:-1])
        hidden = linear(x)
        if rows8 and serves(hidden):
            from .kernels.rows8 import quantize

            return quantize(hidden, rows8, has_gelu=True)
        return torch.ops.aten.gelu_(hidden, approximate="tanh")

    def frame_norm(
        self, x: Tensor, shift: Tensor | None, gain: Tensor | None, eps: float, context: BlockContext
    ) -> Activations:
        if not serves(x, shift, gain):
            return super().frame_norm(x, shift, gain, eps, context)
        from .kernels.norm import Norm, step

        noisy, _ = context.segments(x)
        frame_index = None if gain is None else context.frame_index
        made = Norm(gain, shift, eps, context.dtype, rows8=self.rows8.get("frame_norm"), frame_index=frame_index)
        return step(noisy, context.noisy_tokens, norm=made)

    def add_to_noisy(self, x: Tensor, y: Tensor, context: BlockContext) -> Tensor:
        if torch.is_grad_enabled():
            return super().add_to_noisy(x, y, context)
        noisy, _ = context.segments(x)
        if serves(noisy, y):
            from .kernels.norm import step

            step(noisy, context.noisy_tokens, y)
        else:
            noisy.add_(y)
        return x


def serves(*tensors: Tensor | None) -> bool:
    """Whether the kernels can take tensors: no gradients, on a card or interpreted, channels side by side."""
    if torch.is_grad_enabled():
        return False
    given = [t for t in tensors if t is not None]
    if not all(t.stride(-1) == 1 and t.shape[-1] > 1 for t in given):
        return False
    return all(t.is_cuda for t in given) or are_interpreted()


def are_interpreted() -> bool:
    """Whether Triton is there and runs kernels as Python, for tests without a card."""
    try:
        from .kernels.rows import is_interpreted
    except ImportError:
        return False
    return is_interpreted()


def multiplies_plainly(linear: nn.Module, x: Activations) -> bool:
    """Whether a layer is an ordinary product of half-precision tensors on a card, with nothing hooked to it."""
    if type(linear) is not nn.Linear or has_hooks(linear) or linear.bias is None:
        return False
    return isinstance(x, Tensor) and x.is_cuda and x.dtype in (torch.bfloat16, torch.float16)


def fused_steps(device: torch.device | None = None, gelu_in_product: bool = False) -> Technique:
    """Every step between the products of a model's blocks and injectors as one kernel, where kernels run.

    That is not on CPUs, nor where Triton is missing or does not work: nothing is changed there.

    Args:
        device: where the model computes, if it is elsewhere when this is attached.
        gelu_in_product: see `FusedPointwise`.
    """
    fuse = fused_everywhere(gelu_in_product)

    @contextmanager
    def attached(model: S2VTransformer) -> Iterator[None]:
        with fuse(model) if kernels_work(device or model.device) else nullcontext():
            yield

    return attached


def fused_everywhere(gelu_in_product: bool = False) -> Technique:
    """The same wherever the model is: what kernels do not serve takes the plain way, step by step.

    Which products take 8-bit rows, and of which type, is asked when it is attached: those get them from the kernels.
    """

    @contextmanager
    def attached(model: nn.Module) -> Iterator[None]:
        steps = {owner: FusedPointwise(steps_in_8_bits(owner), gelu_in_product) for owner in owners_of(model)}
        count = sum(len(one.rows8) for one in steps.values())
        log.debug("steps between products: one kernel each in %d modules, %d of them to 8-bit rows", len(steps), count)
        with replaced((owner, "pointwise", one) for owner, one in steps.items()):
            yield

    return attached


def owners_of(model: nn.Module) -> list[nn.Module]:
    """The modules that have steps between products."""
    return [module for module in model.modules() if isinstance(module, Block | FeedForward | AudioInjector)]


def steps_in_8_bits(module: nn.Module) -> dict[str, torch.dtype]:
    """The steps of a block, feed-forward or injector whose results only enter products that take 8-bit rows of one
    type, and that type."""
    if isinstance(module, Block):
        own, crossing, forward = module.attention, module.cross_attention, module.feed_forward
        readers = {
            "modulated_norm": (own.q, own.k, own.v),
            "gated_add_norm": (crossing.q,),
            "add_modulated_norm": (forward.up if isinstance(forward, FeedForward) else forward,),
        }
    elif isinstance(module, AudioInjector):
        readers = {"frame_norm": (module.attention.q,)}
    else:
        readers = {"activated": (module.down,)}
    wanted = {step: {getattr(layer, "rows_dtype", None) for layer in layers} for step, layers in readers.items()}
    return {step: dtypes.pop() for step, dtypes in wanted.items() if len(dtypes) == 1 and None not in dtypes}

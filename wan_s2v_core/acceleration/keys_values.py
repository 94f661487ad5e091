"""Keys and values of the text and of the voice, computed once per clip and guidance branch instead of in every step.

Exact: they depend on the prompt or the voice and on the weights alone. What is kept in bfloat16 at 14B, for each
guidance branch: 0.42 GB for the text (40 blocks of 512 tokens), 25 MB for the voice (12 injectors, 20 latent frames of
5 tokens).
"""

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from ..model.attention import CrossAttention


class KeptKeysValues:
    """At the seam `cross_attention.keys_values`: what was computed from a tensor stays as long as that tensor does.

    Tensors are told apart by identity and held weakly, and each branch of a clip has its own (`ClipCondition.text`,
    `.audio_tokens`), so there is one entry per branch, which goes with the clip. Who changes such a tensor in place,
    or the weights, calls `forget_keys_values`. With gradients on nothing is kept.
    """

    def __init__(self, attention: CrossAttention):
        self.attention = weakref.ref(attention)  # no circle: a network is freed as soon as nobody holds it
        self.kept = WeakIdKeyDictionary()

    def __deepcopy__(self, memo: dict[int, Any]) -> "KeptKeysValues":
        """Of the copied layer, which deepcopy has put into `memo` by now. What is kept stays with the original."""
        return KeptKeysValues(memo[id(self.attention())])

    def compute(self, others: Tensor) -> tuple[Tensor, Tensor]:
        return CrossAttention.keys_values(self.attention(), others)

    def __call__(self, others: Tensor) -> tuple[Tensor, Tensor]:
        if torch.is_grad_enabled():
            return self.compute(others)
        if others not in self.kept:
            self.kept[others] = self.compute(others)
        return self.kept[others]


def kept_of(model: nn.Module) -> list[KeptKeysValues]:
    """Those of a model, in no order."""
    attentions = (module for module in model.modules() if isinstance(module, CrossAttention))
    return [one.keys_values for one in attentions if isinstance(one.keys_values, KeptKeysValues)]


def keep_keys_values(model: nn.Module) -> None:
    """Let every cross-attention of a model, to text or voice, keep its keys and values while their source lives."""
    for module in model.modules():
        if isinstance(module, CrossAttention) and not isinstance(module.keys_values, KeptKeysValues):
            module.keys_values = KeptKeysValues(module)


def compute_keys_values(model: nn.Module) -> None:
    """Let every cross-attention compute its keys and values each time again: none stay in memory."""
    for kept in kept_of(model):
        del kept.attention().keys_values  # the class has the plain way


def forget_keys_values(model: nn.Module) -> None:
    """Drop all that is kept, because weights have changed."""
    for kept in kept_of(model):
        kept.kept.clear()


def kept_bytes(model: nn.Module) -> int:
    """Memory of what is kept now."""
    pairs = (pair for kept in kept_of(model) for pair in kept.kept.values())
    return sum(tensor.untyped_storage().nbytes() for pair in pairs for tensor in pair)

"""Keys and values of the text and of the voice, computed once per clip and guidance branch instead of in every step.

Exact: they depend on the prompt or the voice and on the weights alone. What is kept in bfloat16 at 14B, for each
guidance branch: 0.42 GB for the text (40 blocks of 512 tokens), 25 MB for the voice (12 injectors, 20 latent frames of
5 tokens).
"""

import copy
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from ..model.attention import CrossAttention
from ..model.audio import AudioInjector
from ..model.block import Block
from ..model.dit import ClipCondition, S2VTransformer


class Shelf:
    """Memory for the keys and values of all attentions that read the same tensor: one piece, taken before a forward.

    Pieces of 5 MB between the activations of the first forward would stay there, and break up memory that a card's
    allocator could otherwise give to the next activations of that size.

    Args:
        places: how many attentions there are.
    """

    def __init__(self, places: int):
        self.places = places
        self.memory = WeakIdKeyDictionary()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Shelf":
        return Shelf(self.places)

    @torch.inference_mode(False)  # it is written to in forwards outside of it as well
    def reserve(self, others: Tensor) -> Tensor:
        """Memory for what is made of `others`, B ... E -> places 2 B ... E."""
        if others not in self.memory:
            self.memory[others] = others.new_empty(self.places, 2, *others.shape)
        return self.memory[others]


class KeptKeysValues:
    """At the seam `cross_attention.keys_values`: what was computed from a tensor stays as long as that tensor does.

    Tensors are told apart by identity and held weakly, and each branch of a clip has its own (`ClipCondition.text`,
    `.audio_tokens`), so there is one entry per branch, which goes with the clip. Who changes such a tensor in place,
    or the weights, calls `forget_keys_values`. With gradients on nothing is kept.

    Args:
        place: of the attention on the shelf.
    """

    def __init__(self, attention: CrossAttention, shelf: Shelf, place: int):
        self.attention = weakref.ref(attention)  # no circle: a network is freed as soon as nobody holds it
        self.shelf, self.place = shelf, place
        self.kept = WeakIdKeyDictionary()

    def __deepcopy__(self, memo: dict[int, Any]) -> "KeptKeysValues":
        """Of the copied layer, which deepcopy has put into `memo` by now. What is kept stays with the original."""
        return KeptKeysValues(memo[id(self.attention())], copy.deepcopy(self.shelf, memo), self.place)

    def compute(self, others: Tensor) -> tuple[Tensor, Tensor]:
        return CrossAttention.keys_values(self.attention(), others)

    def __call__(self, others: Tensor) -> tuple[Tensor, Tensor]:
        if torch.is_grad_enabled():
            return self.compute(others)
        if others not in self.kept:
            k, v = self.shelf.reserve(others)[self.place].unflatten(-1, (self.attention().heads, -1))
            for held, made in zip((k, v), self.compute(others), strict=True):
                held.copy_(made)
            self.kept[others] = k, v
        return self.kept[others]

    def forget(self) -> None:
        self.kept.clear()
        self.shelf.memory.clear()


def kept_of(model: nn.Module) -> list[KeptKeysValues]:
    """Those of a model, in no order."""
    attentions = (module for module in model.modules() if isinstance(module, CrossAttention))
    return [one.keys_values for one in attentions if isinstance(one.keys_values, KeptKeysValues)]


def keep_keys_values(model: S2VTransformer) -> None:
    """Let every cross-attention of a model, to text or voice, keep its keys and values while their source lives."""
    if kept_of(model):
        return
    for attentions in (text_readers(model), voice_readers(model)):
        shelf = Shelf(len(attentions))
        for place, attention in enumerate(attentions):
            attention.keys_values = KeptKeysValues(attention, shelf, place)
    model.on_condition = reserve_keys_values


def text_readers(model: nn.Module) -> list[CrossAttention]:
    return [module.cross_attention for module in model.modules() if isinstance(module, Block)]


def voice_readers(model: nn.Module) -> list[CrossAttention]:
    return [module.attention for module in model.modules() if isinstance(module, AudioInjector)]


def reserve_keys_values(model: S2VTransformer, condition: ClipCondition) -> None:
    """At the seam `S2VTransformer.on_condition`: memory for what will be kept of a clip, in one piece for its text and
    one for its voice."""
    if torch.is_grad_enabled():
        return
    for attentions, others in ((text_readers(model), condition.text), (voice_readers(model), condition.audio_tokens)):
        if attentions:
            attentions[0].keys_values.shelf.reserve(others)


def compute_keys_values(model: S2VTransformer) -> None:
    """Let every cross-attention compute its keys and values each time again: none stay in memory."""
    for kept in kept_of(model):
        del kept.attention().keys_values  # the class has the plain way
    model.on_condition = None


def forget_keys_values(model: nn.Module) -> None:
    """Drop all that is kept, because weights have changed."""
    for kept in kept_of(model):
        kept.forget()


def kept_bytes(model: nn.Module) -> int:
    """Memory for what is kept now."""
    shelves = {id(kept.shelf): kept.shelf for kept in kept_of(model)}
    return sum(memory.nbytes for shelf in shelves.values() for memory in shelf.memory.values())

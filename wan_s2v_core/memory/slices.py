"""Activations in slices of tokens: how much a forward of the DiT holds at its peak becomes a choice. Exact to rounding.

A block first makes keys and values of all tokens, slice by slice; then each slice of the stream passes the whole block
and is written back to where it was, which nobody reads any more. What is held: the stream, keys and values, and what
one slice needs. The normed stream is computed twice, which is a pass over memory. Blocks, injectors, embedding and
head are sliced alike; `activations.activation_bytes` says what comes of it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..geometry import TILE, frame_slices, token_slices
from ..model.audio import AudioInjector, inject_whole
from ..model.block import Block
from ..model.dit import S2VTransformer
from ..model.experts import RoutedFeedForward
from ..model.pointwise import Activations
from ..seams import AttendQueries, BlockContext, KeysValues, Technique, replaced, with_keys

Slices = list[tuple[int, int]]
"""Start and stop of each."""


def in_slices(tokens: int | None) -> Technique:
    """At most so many tokens are computed at once where tokens do not see each other; None: all of them.

    Slices are whole tiles of 128 tokens, one at least: choices and scales that attention makes per tile stay what they
    are. With gradients on, and for shorter sequences, everything is computed at once.
    """
    if tokens is None:
        return nullcontext
    size = max(TILE, tokens)
    run_block, run_injector = partial(run_in_slices, size=size), partial(inject_in_slices, size=size)

    @contextmanager
    def attached(model: S2VTransformer) -> Iterator[None]:
        changes: list[tuple[Any, str, Any]] = [(model, "tokens_at_once", size), (model.head, "tokens_at_once", size)]
        changes += [(block, "run", run_block) for block in model.stack.blocks]
        changes += [(injector, "run", run_injector) for injector in model.stack.injectors]
        with replaced(changes):
            yield

    return attached


def run_in_slices(block: Block, x: Tensor, context: BlockContext, size: int) -> Tensor:
    """At `Block.run`: the result is written over x, B L E."""
    slices = token_slices(x.shape[1], size)
    if len(slices) < 2 or torch.is_grad_enabled():
        return block.whole(x, context)
    sliced = SlicedBlock(block, x, context, slices)
    forward = block.feed_forward
    if isinstance(forward, RoutedFeedForward) and not forward.is_by_token:
        normed = sliced.attend_all()
        return block.pointwise.gated_add(x, block.feed_forward(normed), sliced.rows.next_gate, context)
    for start, stop in slices:
        sliced.run(start, stop)
    return x


class SlicedBlock:
    """One forward of a block, slice by slice. Keys and values of all tokens are made at once.

    No method leaves a tensor of one slice behind for the next.
    """

    def __init__(self, block: Block, x: Tensor, context: BlockContext, slices: Slices):
        self.block, self.x, self.context, self.slices = block, x, context, slices
        self.rows = block.rows(context)
        self.text = block.text(context)
        made = KeysValues(self._keys, self._values, self._both)
        self.attend: AttendQueries = with_keys(block.attention.attend, made, context)

    def _keys(self) -> Tensor:
        return self._gathered(lambda *given: (self.block.attention.keys(*given),))[0]

    def _values(self) -> Tensor:
        return self._gathered(lambda normed, *_: (self.block.attention.values(normed),))[0]

    def _both(self) -> tuple[Tensor, Tensor]:
        k, v = self._gathered(self.block.attention.keys_values)
        return k, v

    def _gathered(self, make: Callable[..., tuple[Tensor, ...]]) -> list[Tensor]:
        """What `make` makes of the normed stream, a tuple of B L N D, put together from all slices."""
        whole: list[Tensor] = []
        for start, stop in self.slices:
            self._gather(make, start, stop, whole)
        return whole

    def _gather(self, make: Callable[..., tuple[Tensor, ...]], start: int, stop: int, whole: list[Tensor]) -> None:
        own, ops = self.context.part(start, stop), self.block.pointwise
        parts = make(self._normed(self.x[:, start:stop], own), own, ops)
        if not whole:
            whole.extend(part.new_empty(len(part), self.x.shape[1], *part.shape[2:]) for part in parts)
        for all_tokens, part in zip(whole, parts, strict=True):
            all_tokens[:, start:stop] = part

    def _normed(self, x: Tensor, context: BlockContext) -> Activations:
        """What self-attention reads of a slice."""
        return self.block.pointwise.modulated_norm(x, self.rows.shift, self.rows.scale, self.block.eps, context)

    def _attended(self, start: int, own: BlockContext) -> Tensor:
        """What self-attention gives for a slice, B L E."""
        attention, ops = self.block.attention, self.block.pointwise
        here = self.x[:, start : start + len(own.rope)]
        q = attention.queries(self._normed(here, own), own, ops)
        return attention.out(self.attend(q, start).flatten(2))

    def attend_part(self, start: int, stop: int) -> Activations:
        """Self-attention and cross-attention of a slice, written into the stream -> what its feed-forward reads."""
        here, own = self.x[:, start:stop], self.context.part(start, stop)
        block, ops, rows = self.block, self.block.pointwise, self.rows
        x, normed = ops.gated_add_norm(here, self._attended(start, own), rows.gate, block.cross_norm, own)
        x, normed = ops.add_modulated_norm(
            x, block.cross_attention(normed, self.text, ops), rows.next_shift, rows.next_scale, block.eps, own
        )
        write(here, x)
        return normed

    def run(self, start: int, stop: int) -> None:
        """All of a slice."""
        here, own = self.x[:, start:stop], self.context.part(start, stop)
        normed = self.attend_part(start, stop)
        write(here, self.block.pointwise.gated_add(here, self.block.feed_forward(normed), self.rows.next_gate, own))

    def attend_all(self) -> Tensor:
        """What a feed-forward reads that must see all tokens together. Keys and values are gone then."""
        normed = self.x.new_empty(self.x.shape, dtype=self.context.dtype)
        for start, stop in self.slices:
            normed[:, start:stop] = self.attend_part(start, stop)
        del self.attend
        return normed


def inject_in_slices(injector: AudioInjector, x: Tensor, context: BlockContext, size: int) -> Tensor:
    """At `AudioInjector.run`: the result is written over x, B L E."""
    if x.shape[1] <= size or torch.is_grad_enabled():
        return inject_whole(injector, x, context)
    voice = injector.voice(context)
    if not context.has_all_frames:  # of a split sequence
        for start, stop in token_slices(context.noisy_tokens, size):
            here, own = x[:, start:stop], context.part(start, stop)
            write(here, injector.inject(here, voice, own.frame_index, own))
        return x
    for first, last, start, stop in runs_of_frames(context.grid, size):
        here = x[:, start:stop]
        write(here, injector.inject(here, voice.of_frames(first, last), None, context.part(start, stop)))
    return x


def runs_of_frames(grid: tuple[int, int, int], size: int) -> Iterator[tuple[int, int, int, int]]:
    """First latent frame and the one behind the last, first token and the one behind the last, of parts that are whole
    latent frames, or lie within one where those are larger than a slice."""
    frames, rows, columns = grid
    for first, last in frame_slices(frames, rows * columns, size):
        before, tokens = first * rows * columns, (last - first) * rows * columns
        cuts = token_slices(tokens, size) if last - first == 1 else [(0, tokens)]
        for start, stop in cuts:
            yield first, last, before + start, before + stop


def write(here: Tensor, new: Tensor) -> None:
    """Into a slice of the stream what has become of it; fused steps have done so."""
    if new is not here:
        here.copy_(new)

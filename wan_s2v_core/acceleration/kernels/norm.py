"""Additions to the stream of tokens and norms of it, as one pass over memory."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...seams import Rows8
from .rows import load_part, on_device, store_part, store_row8, two_parts, without_rest

NUM_WARPS, ROWS = 8, 4
"""Warps of a program, and how many tokens it takes one after the other, with gates, gains and shifts read once."""


@triton.jit
def moved(values, gain, shift, PLUS_ONE: tl.constexpr):
    if PLUS_ONE:
        return values * (1.0 + gain) + shift
    return values * gain + shift


@triton.jit(do_not_specialize=["tokens", "noisy"])  # else sizes would be compiled anew
def stream_kernel(
    x, x_batch, x_row, tokens, noisy,
    y, y_batch, y_row, gate, gate_batch, gate_row,
    gain, gain_batch, gain_row, shift, shift_batch, shift_row, frame_index,
    out, scales, eps,
    WIDTH: tl.constexpr, LONG: tl.constexpr, SHORT: tl.constexpr, ROWS: tl.constexpr,
    ADDS: tl.constexpr, GATED: tl.constexpr, NORMS: tl.constexpr, MOVES: tl.constexpr, PLUS_ONE: tl.constexpr,
    INDEXED: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """x += y or x += gate * y where ADDS, then out = LayerNorm(x) * gain + shift where NORMS.

    A program takes up to ROWS tokens of one segment: the first `noisy` ones read row 0 of gate, gain and shift, the
    others row 1. INDEXED: gain and shift have a row per latent frame and `frame_index` tells which; ROWS is 1.
    """
    group, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    noisy_groups = tl.cdiv(noisy, ROWS)
    is_rest = group >= noisy_groups
    first = tl.where(is_rest, noisy + (group - noisy_groups) * ROWS, group * ROWS)
    stop = tl.minimum(first + ROWS, tl.where(is_rest, tokens, noisy))
    row = is_rest.to(tl.int64)
    if ADDS and GATED:
        gate += batch * gate_batch + row * gate_row
        gate_long, gate_short = load_part(gate, 0, LONG, WIDTH), load_part(gate, LONG, SHORT, WIDTH)
    if MOVES:
        if INDEXED:
            row = tl.load(frame_index + first).to(tl.int64)
        gain += batch * gain_batch + row * gain_row
        shift += batch * shift_batch + row * shift_row
        gain_long, gain_short = load_part(gain, 0, LONG, WIDTH), load_part(gain, LONG, SHORT, WIDTH)
        shift_long, shift_short = load_part(shift, 0, LONG, WIDTH), load_part(shift, LONG, SHORT, WIDTH)
    for index in range(ROWS):
        token = first + index
        if token < stop:
            here = x + batch * x_batch + token.to(tl.int64) * x_row
            long, short = load_part(here, 0, LONG, WIDTH), load_part(here, LONG, SHORT, WIDTH)
            if ADDS:
                added = y + batch * y_batch + token.to(tl.int64) * y_row
                added_long, added_short = load_part(added, 0, LONG, WIDTH), load_part(added, LONG, SHORT, WIDTH)
                if GATED:
                    added_long, added_short = added_long * gate_long, added_short * gate_short
                long, short = long + added_long, short + added_short
                store_part(here, long, 0, LONG, WIDTH)
                store_part(here, short, LONG, SHORT, WIDTH)
            if NORMS:
                mean = (tl.sum(long, axis=0) + tl.sum(short, axis=0)) / WIDTH
                long, short = long - mean, without_rest(short - mean, LONG, SHORT, WIDTH)
                variance = (tl.sum(long * long, axis=0) + tl.sum(short * short, axis=0)) / WIDTH
                factor = tl.rsqrt(variance + eps)
                long, short = long * factor, short * factor
                if MOVES:
                    long = moved(long, gain_long, shift_long, PLUS_ONE)
                    short = without_rest(moved(short, gain_short, shift_short, PLUS_ONE), LONG, SHORT, WIDTH)
                place = batch * tokens + token
                if LIMIT > 0:
                    store_row8(out + place * WIDTH, scales + place, long, short, WIDTH, LONG, SHORT, LIMIT)
                else:
                    store_part(out + place * WIDTH, long, 0, LONG, WIDTH)
                    store_part(out + place * WIDTH, short, LONG, SHORT, WIDTH)


@dataclass(frozen=True)
class Norm:
    """A LayerNorm and where it goes.

    `gain` and `shift`: B R E with a row per segment, or per latent frame if there is a `frame_index`; None leaves the
    norm as it is. `plus_one`: 1 is added to the gain. `rows8`: an 8-bit type, or None for `dtype`.
    """

    gain: Tensor | None
    shift: Tensor | None
    eps: float
    dtype: torch.dtype
    rows8: torch.dtype | None = None
    plus_one: bool = False
    frame_index: Tensor | None = None


def step(
    x: Tensor,
    noisy: int,
    y: Tensor | None = None,
    gate: Tensor | None = None,
    norm: Norm | None = None,
    num_warps: int = NUM_WARPS,
    rows: int = ROWS,
) -> Tensor | Rows8 | None:
    """Write x + y or x + gate * y over x, and return a norm of it. Without y or norm that part is left out.

    Args:
        x: B L E, float32.
        noisy: how many of the tokens read row 0 of gate, gain and shift; they come first.
        y: B L E; gate: B 2 E.
    Returns:
        B L E, or None without a norm.
    """
    batch, tokens, width = x.shape
    out = scales = frame_index = None
    moves = norm is not None and norm.gain is not None
    if norm:
        out = torch.empty(x.shape, dtype=norm.rows8 or norm.dtype, device=x.device)
        scales = torch.empty(batch, tokens, 1, device=x.device) if norm.rows8 else None
        frame_index = norm.frame_index
        rows = 1 if frame_index is not None else rows
    gain, shift = (t.expand(batch, -1, -1) for t in (norm.gain, norm.shift)) if moves else (x, x)
    gate = gate if gate is None else gate.expand(batch, -1, -1)
    if x.numel():
        with on_device(x):
            stream_kernel[triton.cdiv(noisy, rows) + triton.cdiv(tokens - noisy, rows), batch](
                x, *x.stride()[:2], tokens, noisy,
                *((x, 0, 0) if y is None else (y, *y.stride()[:2])),
                *((x, 0, 0) if gate is None else (gate, *gate.stride()[:2])),
                gain, *gain.stride()[:2], shift, *shift.stride()[:2], x if frame_index is None else frame_index,
                x if out is None else out, x if scales is None else scales, norm.eps if norm else 0.0,
                **two_parts(width), ROWS=rows, ADDS=y is not None, GATED=gate is not None, NORMS=norm is not None,
                MOVES=moves, PLUS_ONE=moves and norm.plus_one, INDEXED=frame_index is not None,
                LIMIT=Rows8.LARGEST[norm.rows8] if norm and norm.rows8 else 0.0, num_warps=num_warps,
            )  # fmt: skip
    return Rows8(out, scales, norm.dtype) if norm and norm.rows8 else out

"""Block-sparse self-attention: a tile of 128 queries looks at some of the tiles of 128 keys, and not at the others.

Which ones is chosen anew in every forward from the means of queries and keys in a tile (`scores`), or once per size by
how near tiles are in picture and time (`distance`). Always looked at: a tile itself, the first latent frame, and the
tokens of reference picture and motion, which hold the face and the join to the clip before. So that tiles are local,
tokens of a frame are put into the order of strips of 11 columns while they pass the stack.

Sources: Sparse VideoGen (arXiv 2502.01776), SpargeAttention (2502.18137), radial attention (2506.19852); the choice
here is the simplest of its kind.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...config import SPARSE_BY_DISTANCE
from ...geometry import TILE, tiles_of
from ...seams import (
    Attend,
    AttendQueries,
    BlockContext,
    KeysValues,
    Memory,
    PreparedAttend,
    RunStack,
    replaced,
    with_keys,
)
from .registry import AttendListed, listed_with_keys

CPU = torch.device("cpu")
FRAMES_WEIGHT = 4.0
"""How many tokens of distance in a picture one latent frame counts as."""


@dataclass(frozen=True)
class TileGrid:
    """What a choice of tiles has to know of the tokens."""

    frames: int
    rows: int
    columns: int
    tokens: int
    """With those of reference picture and motion, which come last."""

    @property
    def tiles(self) -> int:
        return tiles_of(self.tokens)

    @property
    def frame_tokens(self) -> int:
        return self.rows * self.columns

    def kept_tiles(self, share: float) -> int:
        """Tiles that each tile looks at."""
        first = tiles_of(self.frame_tokens)
        rest = min(self.frames * self.frame_tokens // TILE, self.tiles - 1)
        always = first + self.tiles - max(first, rest)  # as many as `always_kept` has
        return min(self.tiles, max(always + 1, round(share * self.tiles)))


@lru_cache(maxsize=16)
@torch.inference_mode(False)  # what is kept must serve training as well
def always_kept(grid: TileGrid, device: torch.device = CPU) -> Tensor:
    """Which tiles every tile looks at: first latent frame, reference picture and motion, and the last tile."""
    tiles, noisy = torch.arange(grid.tiles), grid.frames * grid.frame_tokens
    always = (tiles * TILE < grid.frame_tokens) | ((tiles + 1) * TILE > noisy) | (tiles == grid.tiles - 1)
    return always.to(device)


def tile_means(x: Tensor) -> Tensor:
    """Mean of each tile of tokens. B L N D -> B N tiles D, float32."""
    tokens = x.shape[1]
    whole = tokens // TILE * TILE
    means = x[:, :whole].unflatten(1, (-1, TILE)).mean(dim=2, dtype=torch.float32)
    if whole < tokens:
        means = torch.cat([means, x[:, whole:].mean(dim=1, keepdim=True, dtype=torch.float32)], dim=1)
    return means.transpose(1, 2)


def list_best(scores: Tensor, grid: TileGrid, share: float, first: int = 0) -> tuple[Tensor, Tensor]:
    """For each tile of queries the tiles of keys with the highest scores, after those that are always looked at.

    Args:
        scores: ... tiles(q) tiles(k); changed in place.
        first: number of the first tile of queries, where they are a slice of all.
    Returns:
        listed ... tiles(q) tiles(k), of which the first are used, the last of these being the last tile of all, which
        may be partly filled; and counts ... tiles(q); int32.
    """
    tiles, kept = grid.tiles, grid.kept_tiles(share)
    scores.masked_fill_(always_kept(grid, scores.device), torch.inf)
    scores.diagonal(first, dim1=-2, dim2=-1).fill_(torch.inf)
    best = scores[..., : tiles - 1].topk(kept - 1, dim=-1, sorted=False).indices
    listed = F.pad(best.int(), (0, tiles - kept + 1), value=tiles - 1)
    return listed, torch.full(listed.shape[:-1], kept, dtype=torch.int32, device=scores.device)


def list_by_scores(q: Tensor, key_means: Tensor, grid: TileGrid, share: float, first: int = 0) -> tuple[Tensor, Tensor]:
    """The choice by means of queries and keys.

    Args:
        q: B L N D, all queries or those from the tile `first` on.
        key_means: B N tiles D.
    Returns:
        B*N tiles(q) tiles, B*N tiles(q).
    """
    scores = (tile_means(q) @ key_means.transpose(-1, -2)).flatten(0, 1)
    return list_best(scores, grid, share, first)


@torch.inference_mode(False)  # what is kept must serve training as well
def list_by_distance(grid: TileGrid, share: float, heads: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The choice by how near the middles of tiles are. heads tiles tiles, heads tiles, the same for all heads."""
    order = strip_order(grid.frames, grid.rows, grid.columns)
    places = torch.stack(
        [
            order // grid.frame_tokens * FRAMES_WEIGHT,
            order % grid.frame_tokens // grid.columns,
            order % grid.columns,
        ],
        dim=1,
    ).float()
    missing = grid.tiles * TILE - len(places)
    places = torch.cat([places, places.new_full((missing, 3), torch.nan)]).unflatten(0, (-1, TILE))
    middles = places.nanmean(dim=1).nan_to_num(0.0)  # tiles of reference and motion are looked at by all anyway
    listed, counts = list_best(-torch.cdist(middles, middles), grid, share)
    listed, counts = (x.to(device).expand(heads, *x.shape).contiguous() for x in (listed, counts))
    return listed, counts


def part_by_distance(q: Tensor, grid: TileGrid, share: float, first: int, memory: Memory) -> tuple[Tensor, ...]:
    """The rows of `list_by_distance` for queries B L N D that begin with the tile `first`; a clip remembers them."""
    known = "tiles by distance", grid, share, q.shape[0] * q.shape[2]
    if known not in memory.clip:
        memory.clip[known] = list_by_distance(*known[1:], q.device)
    lists = memory.clip[known]
    return tuple(x[:, first : first + tiles_of(q.shape[1])].contiguous() for x in lists)


@lru_cache(maxsize=8)
@torch.inference_mode(False)  # what is kept must serve training as well
def strip_order(frames: int, rows: int, columns: int) -> Tensor:
    """Numbers of the noisy tokens, frame by frame, down one strip of columns and up the next.

    Strips are about as wide as a tile is high, so that any 128 tokens in a row are a block of neighbours, wherever the
    tiles of a frame happen to begin.
    """
    strips = max(1, round(columns / TILE**0.5))
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    strip = column * strips // columns
    along = torch.where(strip % 2 == 0, row, rows - 1 - row)
    order = ((strip * rows + along) * columns + column).flatten().argsort()
    return (torch.arange(frames)[:, None] * rows * columns + order).flatten()


@lru_cache(maxsize=4)
@torch.inference_mode(False)  # what is kept must serve training as well
def token_order(grid: tuple[int, int, int], tokens: int, device: torch.device) -> Tensor:
    """The same for all tokens: those of reference picture and motion stay where they are."""
    noisy = grid[0] * grid[1] * grid[2]
    return torch.cat([strip_order(*grid), torch.arange(noisy, tokens)]).to(device)


@dataclass(frozen=True)
class SparsePlan:
    """How much attention looks at, and when at everything."""

    share: float
    by: str
    dense_from: float = float("inf")
    """Timestep from which on attention is dense: the first steps of a clip."""


def sparse_attend(dense: Attend, listed: AttendListed, plan: SparsePlan) -> PreparedAttend:
    """Attention that gives queries part of the keys; `dense` is for steps that are to see everything."""

    def prepare(made: KeysValues, context: BlockContext) -> AttendQueries:
        grid = TileGrid(*context.grid, tokens=len(context.rope))
        if context.timestep >= plan.dense_from or grid.kept_tiles(plan.share) == grid.tiles:
            return with_keys(dense, made, context)
        if plan.by == SPARSE_BY_DISTANCE:
            attend = listed_with_keys(listed, made)
            return lambda q, start: attend(q, *part_by_distance(q, grid, plan.share, start // TILE, context.memory))
        means: list[Tensor] = []
        attend = listed_with_keys(listed, averaged(made, means))
        return lambda q, start: attend(q, *list_by_scores(q, *means, grid, plan.share, start // TILE))

    return PreparedAttend(prepare)


def averaged(made: KeysValues, means: list[Tensor]) -> KeysValues:
    """The same; when keys are made, `means` gets the mean of each tile of them."""

    def watched(k: Tensor) -> Tensor:
        means.append(tile_means(k))
        return k

    def both() -> tuple[Tensor, Tensor]:
        k, v = made.both()
        return watched(k), v

    return KeysValues(lambda: watched(made.keys()), made.values, both)


@contextmanager
def strips(model: nn.Module) -> Iterator[None]:
    """Within, tokens are in the order of strips inside of a model's stack, and as they were outside. Exact: blocks know
    no order."""
    with replaced([(model, "run_stack", in_strips(model.run_stack))]):
        yield


def in_strips(run_stack: RunStack) -> RunStack:
    """The same for what runs the stack."""

    def run(stack: nn.Module, tokens: Tensor, context: BlockContext) -> Tensor:
        order = token_order(context.grid, tokens.shape[1], tokens.device)
        inside = replace(context, rope=context.rope[order])
        out = run_stack(stack, in_order(tokens, order, context.grid), inside)
        return in_order(out, order.argsort(), context.grid)

    return run


def in_order(tokens: Tensor, order: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """tokens[:, order], for an order within each latent frame; outside of training written over what is given, with a
    copy of no more than one latent frame, since the stream is the largest tensor of a forward. B L E, L -> B L E."""
    if torch.is_grad_enabled():
        return tokens[:, order]
    frames, rows, columns = grid
    for frame in tokens[:, : frames * rows * columns].unflatten(1, (frames, -1)).unbind(1):
        frame.copy_(frame[:, order[: rows * columns]])
    return tokens

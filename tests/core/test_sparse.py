"""Sparse attention: which tiles are looked at, in which order tokens lie, and when all is looked at."""

import copy
from collections import Counter
from dataclasses import replace

import pytest
import torch
from conftest import TINY
from hypothesis import given, settings
from hypothesis import strategies as st

from wan_s2v_core.acceleration.attention import registry
from wan_s2v_core.acceleration.attention.reference import attend_listed
from wan_s2v_core.acceleration.attention.sparse import (
    TILE,
    SparsePlan,
    TileGrid,
    always_kept,
    list_best,
    list_by_distance,
    list_by_scores,
    sparse_attend,
    strip_order,
    strips,
    tile_means,
)
from wan_s2v_core.attach import accelerated
from wan_s2v_core.clip_sampler import ClipWork, LocalSampler
from wan_s2v_core.config import SPARSE_BY_DISTANCE, SPARSE_BY_SCORES, AccelerationPlan, SamplingConfig
from wan_s2v_core.model.attention import sdpa
from wan_s2v_core.model.checkpoint import DIT
from wan_s2v_core.model.loading import load_transformer
from wan_s2v_core.model.parts import Checkpoint
from wan_s2v_core.networks import CheckpointNetworks
from wan_s2v_core.prepare import plan_loading

CPU = torch.device("cpu")
DENSE = AccelerationPlan(attention="sdpa")
SPARSE = AccelerationPlan(sparse_keep=0.3, sparse_dense_blocks=1, sparse_dense_steps=0)
BIG = dict(frames=6, h=16, w=20)
"""Of latents, such that there are more tiles than are always looked at: 480 noisy tokens, 80 of the picture."""


@pytest.fixture(autouse=True)
def fresh_content(fresh_seed):
    torch.manual_seed(fresh_seed)


@st.composite
def grids(draw):
    """Any clip, with tokens of a picture behind, and often of motion."""
    frames, rows, columns = draw(st.integers(1, 12)), draw(st.integers(1, 20)), draw(st.integers(1, 20))
    side = draw(st.integers(1, 2 * rows * columns + 1))
    return TileGrid(frames, rows, columns, tokens=frames * rows * columns + side)


def used(listed, counts):
    """The lists as sets and as lists of what is used of them, one for each tile of queries of the first head."""
    rows = [row[:count].tolist() for row, count in zip(listed[0], counts[0].tolist(), strict=True)]
    return [set(row) for row in rows], rows


# --- what is always looked at --------------------------------------------------------------------------------------


@given(grids())
@settings(max_examples=80, deadline=None)
def test_first_frame_reference_and_motion_are_always_seen(grid):
    """Every token of the first latent frame, of the reference picture and of motion, which come after all noisy ones,
    lies in a tile that every tile looks at; so does the last tile, which may be partly filled."""
    always, noisy = always_kept(grid), grid.frames * grid.rows * grid.columns
    assert always.shape == (grid.tiles,) and grid.tiles == -(-grid.tokens // TILE)
    tokens = torch.cat([torch.arange(grid.rows * grid.columns), torch.arange(noisy, grid.tokens)])
    assert always[tokens // TILE].all() and always[-1]
    assert set(always.nonzero().flatten().tolist()) == {*(tokens // TILE).tolist(), grid.tiles - 1}, "and no others"


@given(grids(), st.floats(0.01, 1))
@settings(max_examples=80, deadline=None)
def test_kept_tiles(grid, share):
    kept, always = grid.kept_tiles(share), int(always_kept(grid).sum())
    assert 1 <= kept <= grid.tiles and kept >= min(grid.tiles, always + 1), "and the tile itself"
    assert kept >= round(share * grid.tiles) and grid.kept_tiles(1.0) == grid.tiles
    if kept > always + 1:
        assert kept == round(share * grid.tiles), "no more than the share, where that is enough"


@given(grids(), st.floats(0.01, 1), st.integers(0, 2**31))
@settings(max_examples=80, deadline=None)
def test_lists_are_complete(grid, share, seed):
    """Each tile, those that are always looked at, the best of the others, none twice, and the last tile at the end."""
    tiles = grid.tiles
    scores = torch.randn(2, tiles, tiles, generator=torch.Generator().manual_seed(seed))
    listed, counts = list_best(scores.clone(), grid, share)
    kept = grid.kept_tiles(share)
    assert listed.dtype == counts.dtype == torch.int32 and listed.shape == scores.shape
    assert counts.shape == scores.shape[:-1] and (counts == kept).all()
    assert listed.is_contiguous() and counts.is_contiguous(), "kernels read them as they lie"
    always = set(always_kept(grid).nonzero().flatten().tolist())
    for head in range(2):
        sets, rows = used(listed[head:], counts[head:])
        for query, (seen, row) in enumerate(zip(sets, rows, strict=True)):
            assert len(seen) == len(row) == kept and row[-1] == tiles - 1 and always | {query} <= seen
            left = [scores[head, query, key] for key in set(range(tiles)) - seen]
            chosen = [scores[head, query, key] for key in seen - always - {query}]
            assert not left or not chosen or max(left) <= min(chosen)


# --- which are chosen ----------------------------------------------------------------------------------------------


def test_means_of_tiles():
    x = torch.randn(2, 2 * TILE + 5, 3, 8).bfloat16()
    means = tile_means(x)
    assert means.dtype == torch.float32 and means.shape == (2, 3, 3, 8)
    for tile in range(3):
        part = x[:, tile * TILE : (tile + 1) * TILE].float().mean(dim=1)
        torch.testing.assert_close(means[:, :, tile], part, atol=1e-5, rtol=1e-5)


def test_planted_tiles_are_found():
    """Each tile of queries points the way of one tile of keys, another one in each head and each batch entry."""
    grid = TileGrid(20, 8, 16, tokens=21 * TILE - 30)
    batch, heads, width = 2, 3, 64
    ways = torch.nn.functional.normalize(torch.randn(grid.tiles, width), dim=-1)
    wanted = torch.stack([torch.randperm(grid.tiles) for _ in range(batch * heads)])

    def tokens_of(tile_rows):  # B*N tiles D -> B L N D
        x = tile_rows.repeat_interleave(TILE, dim=1)[:, : grid.tokens].unflatten(0, (batch, heads)).transpose(1, 2)
        return x + 0.3 * torch.randn_like(x)

    k = tokens_of(ways.expand(batch * heads, -1, -1))
    q = tokens_of(5 * ways[wanted])
    means = tile_means(k)
    listed, counts = list_by_scores(q, means, grid, share=0.2)  # 4 of 21: the first, the last, itself and one more
    assert listed.shape == (batch * heads, grid.tiles, grid.tiles) and (counts == 4).all()
    for head in range(batch * heads):
        sets, _ = used(listed[head:], counts[head:])
        found = [int(key) in seen for key, seen in zip(wanted[head], sets, strict=True)]
        assert all(found), (head, found)


@pytest.mark.parametrize("heads", [1, 4])
def test_near_tiles_are_kept(heads):
    grid = TileGrid(9, 16, 32, tokens=9 * 512 + 700)
    listed, counts = list_by_distance(grid, 0.5, heads, CPU)
    assert listed.shape == (heads, grid.tiles, grid.tiles) and counts.shape == (heads, grid.tiles)
    assert all(torch.equal(one, listed[0]) for one in listed)
    sets, _ = used(listed, counts)
    always = set(always_kept(grid).nonzero().flatten().tolist())
    free = sorted(set(range(36)) - always)  # four tiles are a latent frame, which counts as 4 tokens
    order = strip_order(9, 16, 32).unflatten(0, (36, TILE))
    places = torch.stack([order // 512 * 4.0, (order % 512 // 32).float(), (order % 32).float()], dim=-1)
    middles = places.mean(dim=1)
    far = torch.cdist(middles, middles)
    for query in free:
        chosen, left = [key for key in free if key in sets[query]], [key for key in free if key not in sets[query]]
        assert query in chosen and left and far[query, chosen].max() <= far[query, left].min() + 1e-3
        assert {key // 4 for key in chosen} > {query // 4}, "its neighbours in time as well"


# --- the order of tokens -------------------------------------------------------------------------------------------


def distance_in_tiles(order, rows, columns):
    """Mean distance in the picture of two tokens of one tile, over the whole tiles of one latent frame."""
    whole = order[: len(order) // TILE * TILE].unflatten(0, (-1, TILE))
    places = torch.stack([whole // columns, whole % columns], dim=-1).float()
    return float(torch.cdist(places, places).mean())


@given(st.integers(1, 5), st.integers(1, 50), st.integers(1, 50))
@settings(max_examples=60, deadline=None)
def test_strips_are_a_new_order_within_each_frame(frames, rows, columns):
    order, count = strip_order(frames, rows, columns), rows * columns
    for frame in range(frames):
        part = order[frame * count : (frame + 1) * count]
        assert torch.equal(part.sort().values, torch.arange(frame * count, (frame + 1) * count))
        assert torch.equal(part - frame * count, order[:count]), "the same in all of them"


@pytest.mark.parametrize(
    ("rows", "columns", "share"),
    [(30, 52, 0.75), (44, 80, 0.5), (45, 80, 0.6), (52, 30, 1), (80, 44, 0.8), (32, 32, 0.6)],
    ids=lambda value: str(value),
)
def test_strips_are_local(rows, columns, share):
    """At 832x480, 1280x704, 1280x720, upright and square: tokens of a tile are nearer than they lie in a picture."""
    strips, raster = strip_order(1, rows, columns), torch.arange(rows * columns)
    assert distance_in_tiles(strips, rows, columns) < share * distance_in_tiles(raster, rows, columns)


@pytest.mark.parametrize("batch", [1, 2])
def test_a_stack_in_strips_is_the_plain_one(batch, make_model, make_inputs):
    model, (inputs, noise) = make_model(), make_inputs(h=22, w=36, batch=batch)  # no multiples of a strip
    with torch.inference_mode():
        moments = torch.tensor([500.0, 9.0])[:batch]
        plain = model(noise, moments, model.condition(inputs))
        seen = []
        hook = model.stack.blocks[0].register_forward_pre_hook(lambda _, given: seen.append(given))
        with strips(model):
            in_strips = model(noise, moments, model.condition(inputs))
        hook.remove()
    torch.testing.assert_close(in_strips, plain, atol=2e-5, rtol=2e-5)
    ((_, context),) = seen
    order = strip_order(*context.grid)
    assert not torch.equal(order, torch.arange(len(order))), "something is put into another order here"
    rope = model.condition(inputs).rope
    assert torch.equal(context.rope, torch.cat([rope[order], rope[len(order) :]]))


# --- attention -----------------------------------------------------------------------------------------------------


def in_block(make_model, make_inputs, timestep=500.0, **changes):
    """Queries, keys, values and context of a clip's first block."""
    model, (inputs, noise) = make_model(), make_inputs(**(BIG | changes))
    modulation = model.embed_time(timestep)[1]
    tokens, context = model.embed(noise, modulation, model.condition(inputs), timestep)
    shape = (len(tokens), tokens.shape[1], TINY.heads, TINY.head_width)
    return *(torch.randn(shape) for _ in range(3)), context


def masked(q, k, v, lists):
    """Attention under a mask that is made from the lists one by one."""
    seen = torch.zeros(q.shape[0], q.shape[2], q.shape[1], k.shape[1], dtype=torch.bool)
    listed, counts = (x.unflatten(0, (q.shape[0], q.shape[2])) for x in lists)
    for batch in range(q.shape[0]):
        for head in range(q.shape[2]):
            for tile, count in enumerate(counts[batch, head].tolist()):
                for key in listed[batch, head, tile, :count].tolist():
                    seen[batch, head, tile * TILE : (tile + 1) * TILE, key * TILE : (key + 1) * TILE] = True
    heads = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=seen).transpose(1, 2)


@pytest.mark.parametrize("by", [SPARSE_BY_SCORES, SPARSE_BY_DISTANCE])
@pytest.mark.parametrize("batch", [1, 2])
def test_what_is_listed_is_seen(by, batch, make_model, make_inputs):
    q, k, v, context = in_block(make_model, make_inputs, batch=batch)
    grid = TileGrid(*context.grid, tokens=k.shape[1])
    assert grid.kept_tiles(0.3) < grid.tiles
    if by == SPARSE_BY_SCORES:
        lists = list_by_scores(q, tile_means(k), grid, 0.3)
    else:
        lists = list_by_distance(grid, 0.3, batch * TINY.heads, CPU)
    out = sparse_attend(sdpa, attend_listed, SparsePlan(0.3, by))(q, k, v, context)
    torch.testing.assert_close(out, masked(q, k, v, lists), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(out, sdpa(q, k, v, context), atol=1e-3), "something is left out"


def test_all_of_it_is_dense(make_model, make_inputs):
    q, k, v, context = in_block(make_model, make_inputs)
    attend = sparse_attend(sdpa, attend_listed, SparsePlan(1.0, SPARSE_BY_SCORES))
    assert torch.equal(attend(q, k, v, context), sdpa(q, k, v, context))
    grid = TileGrid(*context.grid, tokens=k.shape[1])
    everything = attend_listed(q, k, v, *list_by_scores(q, tile_means(k), grid, 1.0))
    torch.testing.assert_close(everything, sdpa(q, k, v, context), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("timestep", "is_dense"), [(100.0, False), (899.0, False), (900.0, True), (999.0, True)])
def test_first_steps_are_dense(timestep, is_dense, make_model, make_inputs):
    *given, context = in_block(make_model, make_inputs, timestep)
    plan = SparsePlan(0.3, SPARSE_BY_SCORES, dense_from=900.0)
    calls = []

    def dense(q, k, v, context):
        calls.append("dense")
        return q

    def listed(q, k, v, *lists):
        calls.append("sparse")
        return q

    sparse_attend(dense, listed, plan)(*given, context)
    assert calls == ["dense" if is_dense else "sparse"]


# --- attached to a model -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", [SPARSE_BY_SCORES, SPARSE_BY_DISTANCE])
def test_a_sparse_model(by, make_model, make_inputs):
    """Not the plain model, near it, and the plain one when all blocks are dense."""
    model, (inputs, noise) = make_model(), make_inputs(**BIG)
    with torch.inference_mode():
        condition = model.condition(inputs)
        plain = model(noise, 500.0, condition)
        with accelerated(model, replace(SPARSE, sparse_by=by)):
            sparse = model(noise, 500.0, condition)
        error = (sparse - plain).norm() / plain.norm()
        assert 1e-5 < error < 0.3, error
        with accelerated(model, replace(SPARSE, sparse_by=by, sparse_dense_blocks=TINY.blocks)):
            torch.testing.assert_close(model(noise, 500.0, condition), plain, atol=2e-5, rtol=2e-5)


def test_a_sparse_model_learns(make_model, make_inputs):
    """Tables that were made in inference serve training as well."""
    model, (inputs, noise) = make_model().requires_grad_(True), make_inputs(**BIG)
    with accelerated(model, replace(SPARSE, sparse_by=SPARSE_BY_DISTANCE)):
        with torch.inference_mode():
            model(noise, 500.0, model.condition(inputs))
        model(noise, 500.0, model.condition(inputs)).square().mean().backward()
    assert all(block.attention.q.weight.grad.abs().sum() > 0 for block in model.stack.blocks)


# --- first steps ---------------------------------------------------------------------------------------------------


@pytest.fixture
def counted(monkeypatch):
    """How often attention was dense and how often sparse."""
    counts = Counter()

    def dense(q, k, v, context):
        counts["dense"] += context is not None  # without one it is tried, before it is trusted
        return sdpa(q, k, v, context)

    def listed(*given):
        counts["sparse"] += given[0].shape[:3] != registry.TRIAL_SHAPE  # it is tried as well
        return attend_listed(*given)

    registry.try_backend.cache_clear()
    backend = replace(registry.BACKENDS[registry.SDPA], load=lambda setting: (dense, listed))
    monkeypatch.setitem(registry.BACKENDS, registry.SDPA, backend)
    yield counts
    registry.try_backend.cache_clear()


@pytest.fixture(scope="module")
def tiny_dit(tiny_checkpoint):
    return load_transformer(tiny_checkpoint, torch.float32)


@pytest.mark.parametrize("solver", ["unipc", "dpm++", "euler"])
@pytest.mark.parametrize("steps", [(0, 4), (1, 4), (2, 3), (9, 3)], ids=lambda steps: f"{steps[0]} of {steps[1]}")
def test_the_pipeline_lets_the_first_steps_see_everything(solver, steps, counted, tiny_dit):
    """Through the stages of a clip, with guidance: two forwards a step."""
    dense_steps, all_steps = steps
    plan = AccelerationPlan("sdpa", sparse_keep=0.3, sparse_dense_steps=dense_steps, sparse_dense_blocks=1)
    networks = CheckpointNetworks(Checkpoint({}), plan_loading("auto", CPU, acceleration=plan))
    networks.put(DIT, copy.deepcopy(tiny_dit))
    config = networks.dit_config()
    noise = torch.randn(1, 16, 5, 16, 20)
    inputs, negative = clip_inputs(config, noise)
    sampling = SamplingConfig(steps=all_steps, solver=solver)
    counted.clear()
    with torch.inference_mode():
        for _ in range(2):  # two clips
            LocalSampler(networks).sample(noise, ClipWork(inputs, negative, sampling), lambda step, clean: None)
    dense = min(dense_steps, all_steps)
    sparse = (all_steps - dense) * (config.blocks - 1)
    assert counted["sparse"] == 4 * sparse and counted["dense"] == 4 * (all_steps * config.blocks - sparse)


def clip_inputs(config, noise):
    from wan_s2v_core.model.dit import ClipInputs

    inputs = ClipInputs(
        reference_latents=torch.randn(1, 16, 1, *noise.shape[3:]),
        motion_latents=torch.randn(1, 16, 19, *noise.shape[3:]),
        pose_latents=None,
        audio=torch.randn(1, config.audio_layers, config.audio_width, 4 * noise.shape[2]),
        text=torch.randn(1, 5, config.text_width),
        motion_frames=73,
    )
    return inputs, torch.randn(1, 3, config.text_width)

"""Experts: routing is exact where it says so, drops exactly what it says, and splits of dense layers lose nothing."""

import copy
import json
from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from wan_s2v_core.acceleration.experts import grouped
from wan_s2v_core.acceleration.experts.grouped import (
    apply_grouped,
    are_plain,
    group_products,
    multiply_grouped,
    multiply_padded,
)
from wan_s2v_core.acceleration.experts.router import (
    check_routing,
    describe_experts,
    gate_losses,
    routed,
    routed_layers,
    take_load,
)
from wan_s2v_core.acceleration.quantization import Float8Linear, swap_linears
from wan_s2v_core.config import ExpertRouting, S2VModelConfig
from wan_s2v_core.errors import CheckpointError, ConfigError
from wan_s2v_core.model import checkpoint as names
from wan_s2v_core.model.block import FeedForward
from wan_s2v_core.model.dit import S2VTransformer
from wan_s2v_core.model.experts import ExpertLoad, Gate, RoutedFeedForward, apply_each
from wan_s2v_core.model.loading import find_part, load_transformer
from wan_s2v_core.private_torch import HAS_GROUPED_PRODUCT
from wan_s2v_core.research.split import (
    TokenSample,
    assign_balanced,
    check_split,
    plan_split,
    sampled_tokens,
    split_feed_forward,
    split_layer,
)

MOE = replace(TINY, num_experts=4, top_k=2)
WIDTH, HIDDEN = 16, 24
CLOSE = {"atol": 2e-5, "rtol": 1e-5}


def split_experts(model, num_experts, samples=None):
    """Split the feed-forwards of a model in place."""
    split = plan_split(model, num_experts, samples)
    for block, layer in zip(model.stack.blocks, split.layers, strict=True):
        block.feed_forward = split_feed_forward(block.feed_forward, layer)
    return split


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


def make_layer(seed: int, experts=4, top_k=2, gate_over="chosen", routing=None) -> RoutedFeedForward:
    torch.manual_seed(seed)
    with torch.inference_mode():
        parts = [FeedForward(WIDTH, HIDDEN) for _ in range(experts)]
        layer = RoutedFeedForward(parts, Gate(WIDTH, experts), top_k, gate_over).eval()
        layer.gate.weight.mul_(4)
    layer.routing = routing or ExpertRouting()
    return layer


def by_definition(layer: RoutedFeedForward, x: torch.Tensor) -> torch.Tensor:
    """The formula, token by token."""
    out = torch.zeros_like(x)
    for index, token in enumerate(x):
        logits = layer.gate.weight @ token
        chosen = logits.argsort(descending=True)[: layer.routing.top_k or layer.top_k]
        among = logits[chosen] if layer.gate_over == "chosen" else logits
        for expert in chosen.tolist():
            out[index] += (logits[expert] - among.logsumexp(0)).exp() * layer.experts[expert](token)
    return out


sizes = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**31),
        "tokens": st.integers(1, 40),
        "experts": st.integers(1, 6),
        "capacity": st.integers(1, 45),
        "gate_over": st.sampled_from(("chosen", "all")),
        "fraction": st.floats(0, 1),
    }
)


def sized(case, **routing) -> tuple[RoutedFeedForward, torch.Tensor]:
    """A layer and tokens of a drawn size."""
    top_k = 1 + round(case["fraction"] * (case["experts"] - 1))
    layer = make_layer(case["seed"], case["experts"], top_k, case["gate_over"], ExpertRouting(**routing))
    return layer, torch.randn(case["tokens"], WIDTH)


# --- routing -----------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(case=sizes)
def test_a_layer_is_the_weighted_sum_of_the_chosen(case):
    layer, x = sized(case)
    torch.testing.assert_close(layer(x[None])[0], by_definition(layer, x), **CLOSE)


@settings(deadline=None)
@given(case=sizes)
def test_spilling_changes_nothing_at_any_capacity(case):
    layer, x = sized(case)
    expected, free = layer(x), layer.load
    layer.routing, layer.load = ExpertRouting(expert_capacity=case["capacity"]), ExpertLoad()
    largest = []

    def watched(tokens, experts, rounds):
        largest.extend(len(share.tokens) for one in rounds for share in one)
        return plain(tokens, experts, rounds)

    plain, layer.apply_experts = layer.apply_experts, watched
    torch.testing.assert_close(layer(x), expected, **CLOSE)
    assert max(largest) <= case["capacity"], "no expert takes more at once"
    assert layer.load.chosen == free.chosen and not any(layer.load.dropped)
    assert layer.load.overflow == tuple(max(0, count - case["capacity"]) for count in free.chosen)


@settings(deadline=None)
@given(case=sizes, drop=st.booleans())
def test_what_every_token_has_chosen_is_not_copied(case, drop):
    """Tokens without a gap are a view, and the sum is what it is when they are picked one by one."""
    layer, x = sized(case, expert_capacity=case["capacity"], overflow="drop" if drop else "spill")
    taken, weights = layer.choose(layer.gate(x))
    rounds = list(layer.rounds(taken, weights))
    for share in (share for shares in rounds for share in shares):
        rows = share.rows(x)
        assert torch.equal(rows, x[share.tokens])
        is_view = rows.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
        assert is_view == bool(taken[:, share.expert].all())
    picked = [[replace(share, first=None) for share in shares] for shares in rounds]
    expected = apply_each(x, layer.experts, picked)
    torch.testing.assert_close(apply_each(x, layer.experts, rounds), expected, **CLOSE)


@settings(deadline=None)
@given(case=sizes)
def test_dropping_skips_the_overflow_in_token_order(case):
    """Dropped tokens lose that expert's part; the weights of their other experts stay."""
    layer, x = sized(case, expert_capacity=case["capacity"], overflow="drop")
    taken, weights = layer.choose(layer.gate(x))
    kept = taken & (taken.cumsum(dim=0) <= case["capacity"])
    results = torch.stack([expert(x) for expert in layer.experts], dim=1)
    torch.testing.assert_close(layer(x), (results * (weights * kept)[..., None]).sum(dim=1), **CLOSE)
    assert layer.load.dropped == tuple((taken & ~kept).sum(dim=0).tolist()) == layer.load.overflow


@settings(deadline=None)
@given(case=sizes, forwards=st.integers(1, 3))
def test_load_adds_up(case, forwards):
    layer, x = sized(case, expert_capacity=case["capacity"])
    for _ in range(forwards):
        layer(x)
    assert layer.load.tokens == forwards * len(x)
    assert sum(layer.load.chosen) == forwards * len(x) * layer.top_k
    assert ExpertLoad.from_dict(json.loads(json.dumps(layer.load.to_dict()))) == layer.load
    assert len(str(layer.load).splitlines()) == 1 + case["experts"]


def test_load_is_a_table_of_shares():
    load = ExpertLoad(100, (100, 50), (20, 0), (20, 0)) + ExpertLoad(100, (100, 0), (0, 0), (0, 0)) + ExpertLoad()
    assert [line.split() for line in str(load).splitlines()] == [
        ["expert", "tokens", "overflow", "dropped"],
        ["0", "100.0%", "10.0%", "10.0%"],
        ["1", "25.0%", "0.0%", "0.0%"],
    ]
    assert "no tokens" in str(ExpertLoad())


@settings(deadline=None)
@given(case=sizes, seed=st.integers(0, 2**31))
def test_gate_dropout_in_inference_needs_a_seed_and_repeats_with_it(case, seed):
    layer, x = sized(case)
    expected = layer(x)
    for routing in (ExpertRouting(gate_dropout=0.9), ExpertRouting(gate_dropout=0.0, gate_dropout_seed=seed)):
        layer.routing = routing
        assert torch.equal(layer(x), expected)
    layer.routing = ExpertRouting(gate_dropout=0.5, gate_dropout_seed=seed)
    torch.randn(3)  # what else is drawn does not matter
    assert torch.equal(layer(x), layer(x))
    taken, weights = layer.choose(layer.gate(x))
    best = layer.gate(x).argmax(dim=1, keepdim=True)
    assert taken.gather(1, best).all(), "a token keeps its best expert"
    assert (taken.sum(dim=1) <= layer.top_k).all()
    if case["gate_over"] == "chosen":
        torch.testing.assert_close((weights * taken).sum(dim=1), torch.ones(len(x)))


def test_gate_dropout_hides_as_many_as_it_says():
    layer = make_layer(0, experts=8, top_k=8, routing=ExpertRouting(gate_dropout=0.3, gate_dropout_seed=5))
    x = torch.randn(4000, WIDTH)
    taken, _ = layer.choose(layer.gate(x))
    assert abs(taken.float().mean() - (1 + 7 * 0.7) / 8) < 0.01
    layer.routing = replace(layer.routing, gate_dropout_seed=6)
    assert not torch.equal(layer.choose(layer.gate(x))[0], taken)


def test_gate_dropout_in_training_is_new_every_time():
    layer = make_layer(0, experts=8, top_k=4, routing=ExpertRouting(gate_dropout=0.3)).train()
    x = torch.randn(50, WIDTH)
    assert not torch.equal(layer(x), layer(x))


# --- grouped products --------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(case=sizes, drop=st.booleans(), large=st.sampled_from((3, grouped.LARGE_SHARE)))
def test_padded_products_equal_the_loop(case, drop, large):
    """Also where they are not grouped, because an expert has a large share."""
    layer, x = sized(case, expert_capacity=case["capacity"], overflow="drop" if drop else "spill")
    expected = layer(x)
    layer.apply_experts = lambda *arguments: apply_grouped(*arguments, multiply=multiply_padded)
    with mock.patch.object(grouped, "LARGE_SHARE", large):
        torch.testing.assert_close(layer(x), expected, **CLOSE)


@pytest.mark.skipif(not HAS_GROUPED_PRODUCT, reason="torch has no grouped product")
@pytest.mark.parametrize("capacity", [None, 7])
def test_grouped_kernel_equals_the_loop(capacity, fresh_seed):
    """torch multiplies groups on a CPU too, slowly; one expert gets no tokens."""
    layer = make_layer(fresh_seed, top_k=2, routing=ExpertRouting(expert_capacity=capacity)).bfloat16()
    layer.gate.weight[1] = -100 * layer.gate.weight.sum(dim=0).sign()
    x = torch.randn(33, WIDTH).bfloat16()
    exact = copy.deepcopy(layer).float()(x.float())
    try:
        multiply_grouped(x, torch.zeros(1, 8, WIDTH).bfloat16(), [33])
    except RuntimeError as error:
        pytest.skip(f"not on this CPU: {error}")
    plain = layer(x).float()
    layer.apply_experts = lambda *arguments: apply_grouped(*arguments, multiply=multiply_grouped)
    together = layer(x).float()
    assert (together - exact).norm() < 1.5 * (plain - exact).norm() + 1e-6


def test_experts_that_are_not_plain_run_one_by_one(fresh_seed):
    layer = make_layer(fresh_seed)
    x = torch.randn(9, WIDTH)
    layer.experts[1].up = Float8Linear(layer.experts[1].up)
    assert not are_plain(layer.experts)
    assert torch.equal(apply_grouped(x, layer.experts, list(layer.rounds(*layer.choose(layer.gate(x))))), layer(x))
    hooked = make_layer(fresh_seed)
    hooked.experts[0].down.register_forward_hook(lambda module, inputs, out: 2 * out)
    assert not are_plain(hooked.experts) and are_plain(make_layer(fresh_seed).experts)


# --- splitting a dense layer -------------------------------------------------------------------------------------


def dense_layer(seed: int, neurons: int) -> tuple[FeedForward, torch.Tensor]:
    torch.manual_seed(seed)
    return FeedForward(WIDTH, neurons).requires_grad_(False).eval(), torch.randn(60, WIDTH)


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**31),
    experts=st.integers(2, 6),
    size=st.integers(1, 8),
    capacity=st.none() | st.integers(1, 70),
    calibrated=st.booleans(),
)
def test_all_experts_of_a_split_are_the_dense_layer(seed, experts, size, capacity, calibrated):
    dense, x = dense_layer(seed, experts * size)
    split = split_layer(dense, experts, x if calibrated else None)
    assert torch.equal(split.groups.flatten().sort().values, torch.arange(experts * size)), "each neuron once"
    layer = split_feed_forward(dense, split)
    layer.routing = ExpertRouting(expert_capacity=capacity)
    torch.testing.assert_close(layer(x), dense(x), **CLOSE)
    assert layer.load.chosen == (len(x),) * experts


@settings(deadline=None)
@given(seed=st.integers(0, 2**31), top_k=st.integers(1, 6))
def test_fewer_experts_leave_out_what_the_gate_ranks_last(seed, top_k):
    dense, x = dense_layer(seed, 24)
    layer = split_feed_forward(dense, split_layer(dense, 6, x))
    layer.routing = ExpertRouting(top_k=top_k)
    ranks = layer.gate(x).argsort(dim=1, descending=True)
    expected = dense.down.bias.expand(len(x), -1).clone()
    for index, token in enumerate(x):
        for expert in ranks[index, :top_k].tolist():
            expected[index] += layer.experts[expert](token)
    torch.testing.assert_close(layer(x), expected, **CLOSE)


@settings(deadline=None)
@given(seed=st.integers(0, 2**31), columns=st.integers(1, 6), size=st.integers(1, 9))
def test_balanced_assignment_is_balanced_and_stable(seed, columns, size):
    likeness = torch.rand(columns * size, columns, generator=torch.Generator().manual_seed(seed))
    assigned = assign_balanced(likeness, size)
    assert (assigned.bincount(minlength=columns) == size).all()
    own = likeness.gather(1, assigned[:, None])[:, 0]
    for column in range(columns):
        would_move = likeness[:, column] > own
        weakest = own[assigned == column].min()
        assert not (would_move & (likeness[:, column] > weakest)).any(), (
            "no row and column would rather have each other"
        )


def structured_layer(seed: int, groups=4, size=32) -> tuple[FeedForward, torch.Tensor]:
    """Neurons that listen to one of a few directions each, shuffled, and tokens along one direction each."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.linalg.qr(torch.randn(WIDTH, groups, generator=generator)).Q.T
    owner = torch.arange(groups).repeat_interleave(size)[torch.randperm(groups * size, generator=generator)]
    dense = FeedForward(WIDTH, groups * size).requires_grad_(False).eval()
    noise = torch.randn(groups * size, WIDTH, generator=generator)
    dense.up.weight.copy_(3 * directions[owner] + 0.2 * noise)
    dense.up.bias.fill_(-2.0)
    dense.down.weight.copy_(torch.randn(WIDTH, groups * size, generator=generator) / size)
    spread = torch.randn(400, WIDTH, generator=generator)
    return dense, 2 * directions[torch.arange(400) % groups] + 0.1 * spread


def test_groups_and_gate_find_structure_that_is_there(fresh_seed):
    """A layer that is made of experts is taken apart into them; one expert then does nearly all for a token."""
    dense, x = structured_layer(fresh_seed)
    split = split_layer(dense, 4, samples=x)
    heard = (dense.up.weight @ x.T).unflatten(1, (-1, 4)).mean(dim=1).argmax(dim=1)
    assert all(len(heard[group].unique()) == 1 for group in split.groups)
    assert split.errors[0] < 0.1 and split.errors[-1] < 1e-6
    weights_only = split_feed_forward(dense, split_layer(dense, 4))
    for layer in (split_feed_forward(dense, split), weights_only):
        layer.routing = ExpertRouting(top_k=1)
        assert (layer(x) - dense(x)).norm() / dense(x).norm() < 0.1


def test_measured_errors_fall_to_nothing(make_model, make_inputs):
    model, (inputs, noise) = make_model(), make_inputs()
    condition = model.condition(inputs)
    with sampled_tokens(model, 128) as seen:
        expected = [model(noise, moment, condition) for moment in (900.0, 300.0)][1]
    assert torch.equal(model(noise, 300.0, condition), expected), "looking changes nothing"
    samples = [sample.tokens for sample in seen]
    assert [tokens.shape for tokens in samples] == [(128, TINY.width)] * TINY.blocks
    split = split_experts(model, 8, samples=samples)
    for layer in split.layers:
        assert layer.errors[-1] < 1e-6 and layer.errors[0] > layer.errors[4] > 0
    lines = str(split).splitlines()
    assert len(lines) == 9 and lines[-1].split() == ["8", "0.0%", "0.0%"]
    half = sorted(float(layer.errors[3]) for layer in split.layers)
    assert split.top_k_errors()[3] == pytest.approx((4, half[1], half[2])), "of three layers"
    assert [float(part.rstrip("%")) / 100 for part in lines[4].split()[1:]] == pytest.approx(half[1:], abs=6e-4)
    errors = []
    for top_k in (8, 6, 2):
        with routed(ExpertRouting(top_k=top_k))(model):
            errors.append(float((model(noise, 300.0, condition) - expected).norm() / expected.norm()))
    assert errors[0] < 1e-5 < errors[1] < errors[2] < 1
    assert "not measured" in str(plan_split(make_model(), 2))


@settings(deadline=None)
@given(size=st.integers(1, 60), counts=st.lists(st.integers(1, 40), min_size=1, max_size=4))
def test_a_sample_holds_so_many_tokens_and_no_token_twice(size, counts):
    """Whatever comes in whichever pieces; the numbers of the tokens stand for them."""
    sample = TokenSample(size, torch.Generator().manual_seed(size))
    for numbers in torch.arange(sum(counts), dtype=torch.float32).split(counts):
        sample.show(numbers[None, :, None].expand(1, -1, 3))
    assert sample.tokens.shape == (min(size, sum(counts)), 3) and sample.tokens.dtype == torch.bfloat16
    kept = sample.tokens[:, 0].tolist()
    assert len(set(kept)) == len(kept) and set(kept) <= set(range(sum(counts)))


def test_a_sample_has_no_favourites(fresh_seed):
    """Of tokens that come in four unequal pieces each is kept as often as another."""
    generator, often = torch.Generator().manual_seed(fresh_seed), torch.zeros(100)
    for _ in range(500):
        sample = TokenSample(20, generator)
        for numbers in torch.arange(100.0).split([10, 60, 5, 25]):
            sample.show(numbers[:, None])
        often[sample.tokens[:, 0].long()] += 1
    assert often.sum() == 500 * 20 and (often - 100).abs().max() < 6 * (500 * 0.2 * 0.8) ** 0.5


# --- settings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: check_split(96, 5), "experts=5 .* 96 neurons.*2, 3, 4, 6"),
        (lambda: check_split(96, 1), "experts=1"),
        (lambda: check_routing(MOE, ExpertRouting(top_k=5)), "top_k=5 with 4 experts.*1 to 4"),
        (lambda: check_routing(TINY, ExpertRouting(top_k=2)), "Not applicable.*dense.*research split"),
        (lambda: replace(TINY, num_experts=4, top_k=5), "top_k=5 with 4 experts"),
        (lambda: replace(TINY, num_experts=4, top_k=0), "top_k=0"),
        (lambda: replace(TINY, num_experts=4, gate_over="some"), "gate_over='some'.*chosen, all, none"),
        (lambda: ExpertRouting(top_k=0), "top_k=0"),
        (lambda: ExpertRouting(expert_capacity=0), "expert_capacity=0"),
        (lambda: ExpertRouting(overflow="lose"), "overflow='lose'.*spill"),
        (lambda: ExpertRouting(overflow="drop"), "Give a capacity"),
        (lambda: ExpertRouting(gate_dropout=1.0), "gate_dropout=1.0"),
        (lambda: routed(ExpertRouting(top_k=2))(S2VTransformer(TINY)).__enter__(), "Not applicable"),
        (lambda: routed(ExpertRouting(top_k=5))(S2VTransformer(MOE)).__enter__(), "top_k=5 with 4 experts"),
        (lambda: plan_split(S2VTransformer(TINY), 7), "experts=7 does not divide"),
        (lambda: plan_split(S2VTransformer(MOE), 4), "4 experts already"),
        (lambda: gate_losses(S2VTransformer(MOE)), "training mode"),
    ],
)
def test_mistakes_are_named(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_settings_survive_json_and_fit():
    routing = ExpertRouting(top_k=4, expert_capacity=256, overflow="drop", gate_dropout=0.1, gate_dropout_seed=3)
    assert ExpertRouting.from_dict(json.loads(json.dumps(routing.to_dict()))) == routing
    check_routing(TINY, ExpertRouting())
    check_routing(MOE, routing)


def test_what_people_are_told():
    released = S2VModelConfig()
    assert "Not applicable" in describe_experts(released) and "research split" in describe_experts(released)
    parts = replace(released, num_experts=8, top_k=8, feed_forward_width=1728, gate_over="none")
    assert "parts of a dense layer" in describe_experts(parts) and "1728 wide" in describe_experts(parts)
    assert "4 learned experts" in describe_experts(MOE) and "sees 2" in describe_experts(MOE)


# --- models with experts -----------------------------------------------------------------------------------------


def write_folder(model: S2VTransformer, folder) -> None:
    """A checkpoint in the official layout, one shard."""
    folder.mkdir()
    weights = {names.dit_name(name): value.clone() for name, value in model.state_dict().items()}
    save_file(weights, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps(names.official_dit_config(model.config)))


@pytest.mark.parametrize(
    "change", [{}, {"gate_over": "all", "num_experts": 3, "top_k": 1}, {"gate_over": "none"}, {"gate_probes": 5}]
)
def test_native_checkpoints_survive_the_official_layout(change, make_model, make_inputs, tmp_path):
    config = replace(MOE, **change)
    model, (inputs, noise) = make_model(config), make_inputs(config)
    write_folder(model, tmp_path / "moe")
    part = find_part(tmp_path / "moe", names.DIT)
    gate = ("weight", "bias", "readout", "offset") if config.gate_probes else ("weight",)
    wanted = {f"gate.{name}" for name in gate} | {
        f"experts.{expert}.{place}.{kind}"
        for expert in range(config.num_experts)
        for place in (0, 2)
        for kind in ("weight", "bias")
    }
    if config.gate_over == "none":
        wanted = {name for name in wanted if not name.endswith("2.bias")} | {"bias"}
    start = "blocks.1.ffn."
    assert {name.removeprefix(start) for name in part.weights.entries if name.startswith(start)} == wanted
    settings = json.loads((tmp_path / "moe" / "config.json").read_text())
    assert (settings["num_experts"], settings["top_k"]) == (config.num_experts, config.top_k)
    again = load_transformer(tmp_path / "moe", torch.float32)
    assert again.config == config
    outputs = [one(noise, 500.0, one.condition(inputs)) for one in (model, again)]
    assert torch.equal(*outputs)
    assert load_transformer(tmp_path / "moe", torch.bfloat16).stack.blocks[0].feed_forward.gate.weight.dtype == (
        torch.float32
    )


def test_dense_config_names_no_experts():
    assert not {"num_experts", "top_k", "gate_over", "gate_probes"} & set(names.official_dit_config(TINY))


def test_a_file_that_does_not_say_top_k_is_refused(make_model, tmp_path):
    write_folder(make_model(MOE), tmp_path / "moe")
    settings = json.loads((tmp_path / "moe" / "config.json").read_text())
    del settings["top_k"]
    (tmp_path / "moe" / "config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match="num_experts=4 but no top_k"):
        find_part(tmp_path / "moe", names.DIT)
    (tmp_path / "moe" / "diffusion_pytorch_model.safetensors").rename(tmp_path / "single.safetensors")
    with pytest.raises(CheckpointError, match="4 experts in a feed-forward and no config"):
        find_part(tmp_path / "single.safetensors", names.DIT)


def test_knobs_of_a_native_model(make_model, make_inputs, attach):
    model, (inputs, noise) = make_model(MOE), make_inputs()
    condition = model.condition(inputs)
    expected = model(noise, 500.0, condition)
    load = take_load(model)
    tokens = condition.rope.shape[0]
    assert load.tokens == TINY.blocks * tokens and sum(load.chosen) == 2 * load.tokens
    assert take_load(model) == ExpertLoad(), "taking it starts anew"
    group_products(model)
    with routed(ExpertRouting(expert_capacity=11))(model):
        torch.testing.assert_close(model(noise, 500.0, condition), expected, atol=1e-5, rtol=1e-5)
    with routed(ExpertRouting(expert_capacity=11, overflow="drop"))(model):
        assert not torch.allclose(model(noise, 500.0, condition), expected)
        seeds = {layer.routing.gate_dropout_seed for layer in routed_layers(model)}
    assert seeds == {None}
    attach(model, routed(ExpertRouting(gate_dropout=0.5, gate_dropout_seed=7)))
    assert [layer.routing.gate_dropout_seed for layer in routed_layers(model)] == [7, 8, 9]
    dropped = model(noise, 500.0, condition)
    assert torch.equal(model(noise, 500.0, condition), dropped) and not torch.allclose(dropped, expected)


def test_8_bit_weights_leave_the_gate_alone(make_model):
    model = make_model(MOE)
    swap_linears(model)
    layer = model.stack.blocks[0].feed_forward
    assert type(layer.gate) is Gate and isinstance(layer.experts[3].down, Float8Linear)


@pytest.mark.parametrize(("top_k", "gate_dropout"), [(2, 0.1), (4, 0.0)])
def test_gradients_reach_every_parameter_of_a_routed_model(top_k, gate_dropout, make_model, make_inputs, attach):
    with torch.inference_mode(False), torch.enable_grad():
        model = make_model(replace(MOE, top_k=top_k)).requires_grad_(True).train()
        attach(model, routed(ExpertRouting(gate_dropout=gate_dropout)))
        inputs, noise = make_inputs(batch=2)
        loss = model(noise, torch.tensor([500.0, 3.0]), model.condition(inputs)).square().mean()
        balance, z = gate_losses(model)
        (loss + 0.01 * balance + 0.001 * z).backward()
        assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
        model.eval()(noise[:1], 3.0, model.condition(make_inputs()[0]))
        assert all(layer.record is None for layer in routed_layers(model)), "nothing is kept in inference"


def test_balance_loss_is_least_when_all_are_used_evenly():
    layer = make_layer(0, experts=4, top_k=1, gate_over="all").train()
    with torch.inference_mode():
        layer.gate.weight.zero_()[:, :4] = 5 * torch.eye(4)
    even = F.pad(torch.eye(4).repeat(8, 1), (0, WIDTH - 4))
    values = []
    for x in (even, even[:1].expand(32, -1)):
        layer(x)
        values.append([float(loss) for loss in gate_losses(nn.ModuleList([layer]))])
    assert values[0][0] == pytest.approx(1) and values[1][0] > 3.5
    assert values[0][1] == pytest.approx(torch.tensor([5.0, 0, 0, 0]).logsumexp(0).square().item())

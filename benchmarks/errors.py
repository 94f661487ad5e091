"""How far each way of computing the DiT is from float32: the stream after every block, and the velocity at the end.

    python benchmarks/errors.py [--size 832x480] [--out FOLDER]
    python benchmarks/errors.py --model demo --size 256x256     # without a card

One forward of a second clip on random inputs, with the same weights for all: random ones of the 14B model, equal in
every precision because they come from a seed, or the embedded demo's. float32 is computed without TF32, with torch's
own attention and without fused steps. Exits with 1 if our exact bfloat16 is more than 1.5 times as far off as plain
bfloat16. 14B needs a card with 80 GB at 416x240, and 140 GB at 832x480. Takes a minute at 416x240.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from wan_s2v_core.acceleration.attention.sparse import strip_order  # noqa: E402
from wan_s2v_core.attach import accelerated  # noqa: E402
from wan_s2v_core.bench.engine import (  # noqa: E402
    DIT,
    MODELS,
    RELEASED_MODEL,
    ModelSource,
    build_network,
    build_short_dit,
    loading_of,
    make_inputs,
    resolve,
    with_blocks,
)
from wan_s2v_core.bench.flops import ForwardShape  # noqa: E402
from wan_s2v_core.bench.measure import device_name, now, read_commit, relative_l2, release  # noqa: E402
from wan_s2v_core.config import AccelerationPlan  # noqa: E402
from wan_s2v_core.errors import BackendUnavailable  # noqa: E402
from wan_s2v_core.model.dit import S2VTransformer  # noqa: E402
from wan_s2v_core.seams import BlockContext  # noqa: E402

TIMESTEP = 723.0
ACCEPTED = 1.5
"""What our exact bfloat16 may be off, of what plain bfloat16 is."""
PLAIN = AccelerationPlan(attention="sdpa", fused=False)
PLAIN_BF16, EXACT_BF16 = "bfloat16, plain", "bfloat16, ours"
SPARSE = AccelerationPlan(attention="auto8", sparse_keep=0.5)
WAYS = {
    PLAIN_BF16: ("bfloat16", PLAIN),
    EXACT_BF16: ("bfloat16", AccelerationPlan()),
    "float8, 8-bit attention": ("float8", AccelerationPlan(attention="auto8")),
    "the same, half of the attention": ("float8", SPARSE),
    "int8, 8-bit attention": ("int8", AccelerationPlan(attention="auto8")),
}
"""Label -> precision and plan. Those of one precision follow each other and share their weights."""
NOTE = (
    "Relative L2 to the same model in float32. The error of sparse attention on random weights says nothing about "
    "pictures: there attention is nearly even, so what is left out weighs as much as what is kept; a trained model "
    "looks at few tokens, and those are what is kept."
)


@dataclass(frozen=True)
class Work:
    """What is computed, by every way alike."""

    source: ModelSource
    shape: ForwardShape
    device: torch.device
    blocks: int
    """At most so many; less than all of them for a quick look."""

    def build(self, precision: str) -> S2VTransformer:
        config = self.source.config(DIT)
        if self.source.path:
            return build_network(DIT, self.source, loading_of(precision, self.device))
        return build_short_dit(with_blocks(config, self.blocks), precision, self.device)

    @torch.inference_mode()
    def forward(self, model: S2VTransformer) -> Tensor:
        inputs, noise = make_inputs(model.config, self.shape, self.device)
        return model(noise, TIMESTEP, model.condition(inputs))


@contextmanager
def watched(
    model: S2VTransformer, plan: AccelerationPlan, tell: Callable[[int, Tensor], None], every: int
) -> Iterator[None]:
    """Within, `tell` gets the number of every so-manieth block, and of the last, and the stream after it, B L E.

    The stream is overwritten by the next block: it is looked at, or copied, at once. Its tokens are in the order that
    they have outside of the stack.
    """

    def hook(number: int) -> Callable[..., None]:
        def look(_, arguments: tuple[Tensor, BlockContext], stream: Tensor) -> None:
            tell(number, in_plain_order(plan, stream, arguments[1]))

        return look

    blocks = list(model.stack.blocks)
    chosen = {number for number in range(len(blocks)) if number % every == every - 1} | {0, len(blocks) - 1}
    hooks = [blocks[number].register_forward_hook(hook(number)) for number in sorted(chosen)]
    try:
        yield
    finally:
        for one in hooks:
            one.remove()


def in_plain_order(plan: AccelerationPlan, stream: Tensor, context: BlockContext) -> Tensor:
    """Sparse attention has the noisy tokens in the order of strips while they pass the blocks."""
    if plan.sparse_keep == 1:
        return stream
    order = strip_order(*context.grid).to(stream.device)
    out = stream.clone()
    out[:, order] = stream[:, : len(order)]
    return out


def distance(value: Tensor, exact: Tensor) -> float:
    """Relative L2, of tensors that may lie on different devices, without a float64 copy of either."""
    exact = exact.to(value.device)
    norms = [float(torch.linalg.vector_norm(x, dtype=torch.float64)) for x in (value.float() - exact, exact)]
    return norms[0] / norms[1]


def exact_stream(work: Work, home: torch.device, every: int) -> tuple[dict[int, Tensor], Tensor]:
    """The stream after the blocks in float32, kept on `home`, and the velocity."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    model, kept = work.build("float32"), {}

    def keep(number: int, stream: Tensor) -> None:
        kept[number] = stream.to(home, copy=True)

    with accelerated(model, PLAIN), watched(model, PLAIN, keep, every):
        velocity = work.forward(model)
    return kept, velocity


def errors_of(
    work: Work,
    model: S2VTransformer,
    plan: AccelerationPlan,
    exact: dict[int, Tensor],
    velocity: Tensor,
    every: int,
) -> dict:
    """By block, and of the output."""
    by_block = {}

    def look(number: int, stream: Tensor) -> None:
        by_block[number] = distance(stream, exact[number])

    with accelerated(model, plan), watched(model, plan, look, every):
        output = work.forward(model)
    return {"blocks": by_block, "output": relative_l2(output, velocity)}


def measure(work: Work, home: torch.device, every: int) -> Iterator[dict[str, Any]]:
    """One entry after the other, as they are measured."""
    began = now(work.device)
    exact, velocity = exact_stream(work, home, every)
    release(work.device)
    yield {"way": "float32", "seconds": now(work.device) - began, "velocity_std": float(velocity.std())}
    model, built = None, None
    for label, (precision, plan) in WAYS.items():
        began = now(work.device)
        try:
            if precision != built:
                model, built = None, None  # two models do not fit
                release(work.device)
                model, built = work.build(precision), precision
            attention = resolve(plan, model.config, precision, work.device).attention
            found = errors_of(work, model, plan, exact, velocity, every)
        except BackendUnavailable as error:
            yield {"way": label, "cannot": str(error)}
            continue
        facts = {"way": label, "precision": precision, "attention": attention, "plan": plan.to_dict()}
        yield facts | found | {"seconds": now(work.device) - began}


def shown_blocks(blocks: int) -> list[int]:
    """The first, and the ends of four parts: 0, 9, 19, 29, 39 of 40."""
    return sorted({0, *(max(1, blocks * part // 4) - 1 for part in range(1, 5))})


def table(entries: list[dict[str, Any]], blocks: int) -> str:
    """One line for each way."""
    numbers = shown_blocks(blocks)
    heads = ["way", "attention", *(f"block {number}" for number in numbers), "output"]
    rows = [heads, ["---"] * len(heads)]
    for entry in entries:
        if "output" in entry:
            errors = [*(entry["blocks"].get(number) for number in numbers), entry["output"]]
            told = ["" if error is None else f"{error:.5f}" for error in errors]
            rows.append([entry["way"], entry["attention"], *told])
        elif "cannot" in entry:
            rows.append([entry["way"], "", *[""] * len(numbers), entry["cannot"]])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def ratio_of(entries: list[dict[str, Any]]) -> float | None:
    """Error of our exact bfloat16 at the output, of that of plain bfloat16."""
    found = {entry["way"]: entry["output"] for entry in entries if "output" in entry}
    return found[EXACT_BF16] / found[PLAIN_BF16] if {EXACT_BF16, PLAIN_BF16} <= set(found) else None


def read_options(words: list[str] | None = None) -> argparse.Namespace:
    has_card = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default=RELEASED_MODEL)
    parser.add_argument("--size", default="416x240", help="width and height (default %(default)s)")
    parser.add_argument("--latent_frames", type=int, default=20)
    parser.add_argument("--blocks", type=int, default=40, help="fewer for a quick look; of random weights alone")
    parser.add_argument("--every", type=int, default=1, help="look at every so-manieth block (default all)")
    parser.add_argument("--device", default="cuda" if has_card else "cpu")
    parser.add_argument("--references", help="device that keeps the float32 streams, such as cpu (default --device)")
    parser.add_argument("--commit", default=read_commit(), help="to record, where the checkout has no git history")
    parser.add_argument("--out", type=Path, default=Path("."))
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> int:
    options = read_options(words)
    device, source = torch.device(options.device), ModelSource(options.model)
    shape = ForwardShape(*map(int, options.size.split("x")), latent_frames=options.latent_frames)
    work = Work(source, shape, device, options.blocks)
    config = source.config(DIT) if source.path else with_blocks(source.config(DIT), options.blocks)
    tokens = shape.tokens(config.packs_motion)
    facts = (source.label, options.size, f"{tokens:,} tokens", f"{config.blocks} blocks", device_name(device))
    print(", ".join(facts), flush=True)
    report = {
        "device": device_name(device), "torch": torch.__version__, "commit": options.commit, "weights": source.label,
        "size": options.size, "tokens": tokens, "blocks": config.blocks, "timestep": TIMESTEP, "note": NOTE,
    }  # fmt: skip
    entries = []
    for entry in measure(work, torch.device(options.references or device), options.every):
        entries.append(entry)
        seconds = f"{entry['seconds']:.1f} s" if "seconds" in entry else entry["cannot"]
        print(f"{entry['way']}: {seconds}", file=sys.stderr, flush=True)
    ratio = ratio_of(entries)
    report |= {"entries": entries, "ratio": ratio, "accepted": ACCEPTED}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "errors.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    print(table(entries, config.blocks), f"\n{NOTE}", sep="\n")
    if ratio is None:
        return 1
    print(f"\n{EXACT_BF16}, of {PLAIN_BF16}, at the output: {ratio:.3f} ({ACCEPTED} is accepted)")
    return int(not ratio <= ACCEPTED)


if __name__ == "__main__":
    sys.exit(main())

"""Write a random checkpoint of real size, in the layout of the official Wan2.2-S2V-14B folder.

    python dev/random_checkpoint.py FOLDER [--blocks 40] [--tiny]

The DiT's shards are written side by side, so the disk sets the pace: 44.8 GB. Fewer blocks make a smaller DiT that is
otherwise the same. --tiny takes the sizes of demo/tiny_checkpoint.py.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "demo")]

import tiny_checkpoint as tiny  # noqa: E402

from wan_s2v_core.bench.engine import RELEASED, with_blocks  # noqa: E402
from wan_s2v_core.bench.random_weights import fill_random, random_tensor, shapes_of  # noqa: E402
from wan_s2v_core.model.checkpoint import (  # noqa: E402
    DIT,
    SPEECH_ENCODER,
    SPEECH_PREFIX,
    TEXT_ENCODER,
    VAE,
    dit_name,
    official_dit_config,
    text_encoder_name,
    vae_name,
)
from wan_s2v_core.model.loading import DIT_STEM, OFFICIAL_FILES  # noqa: E402

SHARDS, SEED = 4, 7
DONE = "made-from.json"
"""Written last: what was made."""
Shapes = list[tuple[str, tuple[int, ...]]]


def write_shard(path: Path, shapes: Shapes, make: Callable[[str, tuple[int, ...]], torch.Tensor]) -> None:
    """A safetensors file in bfloat16 that never lies in memory as a whole."""
    header, position = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes:
        end = position + 2 * math.prod(shape)
        header[dit_name(name)] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [position, end]}
        position = end
    told = json.dumps(header).encode()
    told += b" " * (-len(told) % 8)
    with path.open("wb") as file:
        file.write(len(told).to_bytes(8, "little") + told)
        for name, shape in shapes:
            file.write(make(name, shape).bfloat16().cpu().contiguous().view(torch.uint8).numpy().data)


def write_dit(folder: Path, config, device: str) -> None:
    with torch.device("meta"):
        network = tiny.S2VTransformer(config)
    shapes, depth = list(shapes_of(network)), 3 * config.blocks
    total = sum(math.prod(shape) for _, shape in shapes)
    parts: list[Shapes] = [[] for _ in range(SHARDS)]
    taken = 0
    for name, shape in shapes:
        parts[min(SHARDS - 1, taken * SHARDS // total)].append((name, shape))
        taken += math.prod(shape)
    names = [f"{DIT_STEM}-{number + 1:05d}-of-{SHARDS:05d}.safetensors" for number in range(SHARDS)]

    def make(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        return random_tensor(name, shape, SEED, depth, device)

    with ThreadPoolExecutor(SHARDS) as writers:
        list(writers.map(lambda file, part: write_shard(folder / file, part, make), names, parts))
    places = {dit_name(name): file for file, part in zip(names, parts, strict=True) for name, _ in part}
    tiny.write_json(
        folder / f"{DIT_STEM}.safetensors.index.json", {"metadata": {"total_size": 2 * total}, "weight_map": places}
    )
    tiny.write_json(folder / "config.json", official_dit_config(config))


def on_cpu(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.cpu() for name, value in weights.items()}


def random_one(make: Callable[[], torch.nn.Module], device: str) -> torch.nn.Module:
    """A network with random weights, which are drawn on a device."""
    with torch.device("meta"):
        network = make()
    fill_random(network, SEED, torch.bfloat16, device)
    return network


@torch.inference_mode()
def write_checkpoint(folder: Path, blocks: int, is_tiny: bool) -> None:
    device = "cuda" if torch.cuda.is_available() and not is_tiny else "cpu"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / DONE).unlink(missing_ok=True)
    tokenizer = tiny.train_tokenizer()
    tiny.write_tokenizer(folder, tokenizer)
    if is_tiny:
        text_sizes = tiny.TEXT_SIZES | {"vocab_size": tiny.vocabulary_size(tokenizer)}
        config, speech_sizes, vae_width = tiny.DIT_CONFIG, tiny.SPEECH_SETTINGS, tiny.VAE_WIDTH
    else:
        text_sizes, speech_sizes, vae_width = RELEASED[TEXT_ENCODER], RELEASED[SPEECH_ENCODER], RELEASED[VAE]["width"]
        config = with_blocks(RELEASED[DIT], blocks)
    text = random_one(lambda: tiny.TextEncoder(text_sizes), device)
    text_file = folder / OFFICIAL_FILES[TEXT_ENCODER][0]
    with ThreadPoolExecutor(1) as beside:
        saving = beside.submit(torch.save, on_cpu(tiny.bfloat16_weights(text, text_encoder_name)), text_file)
        del text
        write_dit(folder, config, device)
        saving.result()
    vae = random_one(lambda: tiny.VideoVAE(vae_width), device)
    torch.save(on_cpu(tiny.bfloat16_weights(vae, vae_name)), folder / OFFICIAL_FILES[VAE][0])
    speech, speech_folder = (
        random_one(lambda: tiny.SpeechEncoder(speech_sizes), device),
        OFFICIAL_FILES[SPEECH_ENCODER][0],
    )
    (folder / speech_folder).mkdir(exist_ok=True)
    weights = on_cpu(tiny.bfloat16_weights(speech, lambda name: SPEECH_PREFIX + name))
    tiny.save_file(weights, folder / speech_folder / "model.safetensors")
    tiny.write_json(folder / speech_folder / "config.json", {"model_type": "wav2vec2", **speech_sizes})
    tiny.write_json(folder / DONE, {"blocks": config.blocks, "tiny": is_tiny, "bytes": tiny.size_of(folder)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--blocks", type=int, default=RELEASED[DIT].blocks)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    began = time.monotonic()
    write_checkpoint(options.folder, options.blocks, options.tiny)
    print(f"{options.folder}: {tiny.size_of(options.folder) / 1e9:.1f} GB, {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()

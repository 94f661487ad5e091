"""Put the trained networks together into the embedded checkpoint, in the layout of the official Wan2.2-S2V-14B folder.

    python demo/pack_checkpoint.py FOLDER [--source .demo]
    python demo/pack_checkpoint.py FOLDER --unpack [--source .demo]     # the reverse, to train it further

The text encoder has random weights, from the seed that the DiT was trained with, and the tokenizer is the one that
comes with the pack. FOLDER may be assets/checkpoint itself.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors import safe_open

HERE = Path(__file__).resolve().parent
for place in (HERE, HERE.parent):
    if str(place) not in sys.path:
        sys.path.append(str(place))

from tiny_checkpoint import size_of, write_networks, write_tokenizer  # noqa: E402
from train_dit import TOKENIZER, load_speech_encoder, load_tiny_vae, make_text_encoder  # noqa: E402
from training import load_weights, save_weights  # noqa: E402

from wan_s2v_core.config import S2VModelConfig  # noqa: E402
from wan_s2v_core.model.checkpoint import DIT, PART_LABELS, SPEECH_ENCODER, VAE  # noqa: E402
from wan_s2v_core.model.dit import S2VTransformer  # noqa: E402
from wan_s2v_core.model.loading import load  # noqa: E402
from wan_s2v_core.model.parts import Checkpoint  # noqa: E402

LARGEST_BYTES = 14_000_000
RECORDS = HERE / "trained"
"""What the trainers told of the embedded checkpoint: settings, seeds, losses."""


def load_trained_dit(path: Path) -> S2VTransformer:
    """What train_dit.py wrote; its sizes are in the file's metadata."""
    with safe_open(path, "pt") as file:
        config = S2VModelConfig.from_dict(json.loads(file.metadata()["config"]))
    model = S2VTransformer(config)
    model.load_state_dict({name: value.float() for name, value in load_weights(path).items()})
    return model


def text_seed_of(source: Path) -> int:
    return json.loads((source / "dit.json").read_text(encoding="utf-8"))["text_seed"]


def pack(folder: Path, source: Path, tokenizer: Path = TOKENIZER) -> Path:
    """Write the checkpoint into `folder`, check it and return it."""
    text = make_text_encoder(text_seed_of(source), tokenizer)
    speech, settings = load_speech_encoder(source)
    pieces = (tokenizer / "spiece.model").read_bytes()
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder, pieces)
    dit, vae = load_trained_dit(source / "dit.safetensors"), load_tiny_vae(source / "vae.safetensors")
    write_networks(folder, dit, vae, text, speech, settings)
    check(folder)
    return folder


def check(folder: Path) -> dict[str, int]:
    """Parameters of each part, as the pack's own loaders read the folder.

    Raises:
        SystemExit: if the folder is larger than what the pack may carry.
    """
    Checkpoint(dict.fromkeys(PART_LABELS, folder)).check()
    counts = {kind: sum(p.numel() for p in load(folder, kind, torch.float32).parameters()) for kind in PART_LABELS}
    if (size := size_of(folder)) > LARGEST_BYTES:
        raise SystemExit(f"{folder} has {size / 1e6:.1f} MB, more than {LARGEST_BYTES / 1e6:.0f}. Train a smaller DiT.")
    return counts


def unpack(folder: Path, target: Path) -> None:
    """Write what the trainers go on from: the networks of a packed checkpoint, and the records of its training."""
    target.mkdir(parents=True, exist_ok=True)
    for file in RECORDS.iterdir():
        shutil.copy(file, target)
    dit, vae, speech = (load(folder, kind, torch.float32) for kind in (DIT, VAE, SPEECH_ENCODER))
    weights = {name: value.bfloat16() for name, value in dit.state_dict().items()}
    save_weights(weights, target / "dit.safetensors", {"config": json.dumps(dit.config.to_dict())})
    save_weights(vae.network.state_dict(), target / "vae.safetensors")
    save_weights(speech.state_dict(), target / "audio_encoder.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--source", type=Path, default=Path(".demo"))
    parser.add_argument("--unpack", action="store_true")
    options = parser.parse_args()
    if options.unpack:
        return unpack(options.folder, options.source)
    folder = pack(options.folder, options.source)
    print(f"{folder}: {size_of(folder) / 1e6:.1f} MB, parameters {check(folder)}")


if __name__ == "__main__":
    main()

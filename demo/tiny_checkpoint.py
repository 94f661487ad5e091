"""Make a tiny checkpoint with random weights in the layout of the official Wan2.2-S2V-14B folder.

    python demo/tiny_checkpoint.py FOLDER [--seed 0]

Same files, names and loading code as the real one, a few megabytes, the same bytes for the same seed. It draws noise:
it is for trying the machinery, not for pictures.
"""

import argparse
import io
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

from wan_s2v_core.bench.random_weights import fill_random  # noqa: E402
from wan_s2v_core.config import S2VModelConfig  # noqa: E402
from wan_s2v_core.model.audio_encoder import SpeechEncoder  # noqa: E402
from wan_s2v_core.model.checkpoint import (  # noqa: E402
    SPEECH_ENCODER,
    SPEECH_PREFIX,
    TEXT_ENCODER,
    TIED_TEXT_NAMES,
    VAE,
    dit_name,
    official_dit_config,
    text_encoder_name,
    vae_name,
)
from wan_s2v_core.model.dit import S2VTransformer  # noqa: E402
from wan_s2v_core.model.loading import DIT_STEM, OFFICIAL_FILES, TOKENIZER_FOLDER, WRAPPED  # noqa: E402
from wan_s2v_core.model.text_encoder import TextEncoder  # noqa: E402
from wan_s2v_core.model.vae import VideoVAE  # noqa: E402

SPEECH_SETTINGS = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "conv_dim": [16] * 7,
    "conv_bias": True,
    "feat_extract_norm": "layer",
    "do_stable_layer_norm": True,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
TEXT_SIZES = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
DIT_CONFIG = S2VModelConfig(
    width=96,
    feed_forward_width=256,
    heads=4,
    blocks=6,
    text_width=TEXT_SIZES["d_model"],
    audio_width=SPEECH_SETTINGS["hidden_size"],
    audio_layers=SPEECH_SETTINGS["num_hidden_layers"] + 1,
    injected_blocks=(0, 2, 4),
)
VAE_WIDTH = 8
SHARDS = 2
CORPUS = (
    "A person talks to the camera. A woman sings a song on a stage. A man speaks slowly in a quiet room.",
    "The face is drawn with simple lines, the mouth opens and closes with the voice, the eyes blink.",
    "Blurry picture, worst quality, static frame, subtitles, extra fingers, bad hands, walking backwards.",
    "一个人在说话。一个女人在唱歌。画面模糊，最差质量，静止不动的画面，杂乱的背景，倒着走。",
)


def train_tokenizer() -> bytes:
    """A sentencepiece model with umT5's special ids, small enough for the corpus above."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 4),
        model_writer=model,
        model_type="unigram",
        vocab_size=512,
        hard_vocab_limit=False,
        byte_fallback=True,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def bfloat16_weights(network: torch.nn.Module, naming) -> dict[str, torch.Tensor]:
    """A network's weights under foreign names, tied ones once."""
    weights = {name.removeprefix(WRAPPED): value for name, value in network.state_dict().items()}
    return {
        naming(name): value.bfloat16().contiguous() for name, value in weights.items() if name not in TIED_TEXT_NAMES
    }


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_shards(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    names = sorted(weights)
    size = -(-len(names) // SHARDS)
    places = {}
    for number in range(SHARDS):
        file = f"{DIT_STEM}-{number + 1:05d}-of-{SHARDS:05d}.safetensors"
        part = {name: weights[name] for name in names[number * size : (number + 1) * size]}
        save_file(part, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(part, file)
    total = sum(value.numel() * value.element_size() for value in weights.values())
    write_json(folder / f"{DIT_STEM}.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": places})


def write_tokenizer(folder: Path, model: bytes) -> None:
    (folder / TOKENIZER_FOLDER).mkdir(parents=True, exist_ok=True)
    (folder / TOKENIZER_FOLDER / "spiece.model").write_bytes(model)


def vocabulary_size(tokenizer: bytes) -> int:
    from sentencepiece import SentencePieceProcessor

    return SentencePieceProcessor(model_proto=tokenizer).vocab_size()


def write_networks(
    folder: Path, dit: S2VTransformer, vae: VideoVAE, text: TextEncoder, speech: SpeechEncoder, speech_settings: dict
) -> None:
    """All four networks in bfloat16, where the official folder has them."""
    write_shards(folder, bfloat16_weights(dit, dit_name))
    write_json(folder / "config.json", official_dit_config(dit.config))
    torch.save(bfloat16_weights(vae, vae_name), folder / OFFICIAL_FILES[VAE][0])
    torch.save(bfloat16_weights(text, text_encoder_name), folder / OFFICIAL_FILES[TEXT_ENCODER][0])
    speech_folder = folder / OFFICIAL_FILES[SPEECH_ENCODER][0]
    speech_folder.mkdir(exist_ok=True)
    save_file(bfloat16_weights(speech, lambda name: SPEECH_PREFIX + name), speech_folder / "model.safetensors")
    write_json(speech_folder / "config.json", {"model_type": "wav2vec2", **speech_settings})


def size_of(folder: Path) -> int:
    """Bytes of all files."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def make_checkpoint(folder: Path, seed: int = 0) -> Path:
    """Write the checkpoint into `folder` and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer()
    write_tokenizer(folder, tokenizer)
    dit, vae = S2VTransformer(DIT_CONFIG), VideoVAE(VAE_WIDTH)
    text = TextEncoder(TEXT_SIZES | {"vocab_size": vocabulary_size(tokenizer)})
    speech = SpeechEncoder(SPEECH_SETTINGS)
    for network in (dit, vae, text, speech):
        fill_random(network, seed)
    write_networks(folder, dit, vae, text, speech, SPEECH_SETTINGS)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    made = make_checkpoint(options.folder, options.seed)
    print(f"{made}: {size_of(made) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()

"""Train the small speech encoder of the demo model.

    python demo/train_audio.py FOLDER [--minutes 5] [--seed 0] [--listen RECORDING ...]

FOLDER holds the voices that demo/voices.py made; `audio_encoder.safetensors` (float32, names of SpeechEncoder) and
`audio_encoder.json` (its settings) are written there. The encoder learns to keep, in every layer, how loud a voice is
now and in the next moments, and its spectrum: what a mouth that follows a voice needs. Linear heads read that off the
hidden states; they are dropped afterwards. `--listen` names recordings that the result is judged on too.
"""

import argparse
import itertools
import json
import logging
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

ROOT, DEMO = Path(__file__).resolve().parents[1], Path(__file__).resolve().parent
for folder in (ROOT, DEMO):
    if str(folder) not in sys.path:
        sys.path.append(str(folder))

from scenes import envelope  # noqa: E402
from voices import HELDOUT, TRAIN, augment, load_voices  # noqa: E402

from wan_s2v_core.conditioning.audio import audio_embeddings, resample_features  # noqa: E402
from wan_s2v_core.io.audio import SPEECH_HZ, read_recording  # noqa: E402
from wan_s2v_core.model.audio_encoder import SPEECH_FEATURE_HZ, SpeechEncoder, normalize_waveform  # noqa: E402

log = logging.getLogger(__name__)

WEIGHTS, SETTINGS_FILE = "audio_encoder.safetensors", "audio_encoder.json"
SETTINGS = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "conv_dim": [32] * 7,
    "conv_bias": True,
    "feat_extract_norm": "layer",
    "do_stable_layer_norm": True,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
FPS = 16.0
HOP, WINDOW = 320, 400
"""Samples from one feature to the next, and those that a feature's convolutions see."""
BANDS = 20
LOUDNESS_AT = (-1, 0, 1, 2, 3, 4)
"""Features before and after this one whose loudness it should know too: where a video frame begins is not known."""
AUGMENTED_COPIES = 4
CROP_SECONDS, BATCH = 5.0, 5
LEARNING_RATE, WARMUP_SHARE = 4e-3, 0.05
SPECTRUM_WEIGHT, SIZE_WEIGHT = 0.4, 1e-3


# --- what is learned ------------------------------------------------------------------------------------------------


def mel_filters(bands: int = BANDS, low_hz: float = 60.0, high_hz: float = 7600.0) -> Tensor:
    """Triangles on the mel scale, `bands` by frequencies."""
    mel = np.linspace(*(2595 * np.log10(1 + hz / 700) for hz in (low_hz, high_hz)), bands + 2)
    edges = 700 * (10 ** (mel / 2595) - 1)
    frequency = np.fft.rfftfreq(WINDOW, 1 / SPEECH_HZ)
    rising = (frequency - edges[:-2, None]) / np.diff(edges)[:-1, None]
    falling = (edges[2:, None] - frequency) / np.diff(edges)[1:, None]
    return torch.from_numpy(np.clip(np.minimum(rising, falling), 0, None)).float()


MEL_FILTERS = mel_filters()


def targets(samples: Tensor) -> tuple[Tensor, Tensor]:
    """What the features of normalised sound (B N) should tell.

    Returns:
        loudness B T L: linear RMS of the video frame that starts with the feature, and of the features around it;
        spectrum B T 20: log energies of mel bands, about zero mean and unit variance.
    """
    windows = samples.unfold(-1, WINDOW, HOP)  # B T 400
    steps = windows.shape[1]
    power = F.pad(samples.square(), (HOP, 5 * HOP))  # one feature before, four after and the rest of a frame
    frame = power[:, HOP:].unfold(-1, round(SPEECH_HZ / FPS), HOP).mean(-1)[:, :steps]
    step = power.unfold(-1, HOP, HOP).mean(-1)  # from feature -1 on
    around = [step[:, 1 + at : 1 + at + steps] for at in LOUDNESS_AT]
    energies = torch.fft.rfft(windows * torch.hann_window(WINDOW)).abs().square() @ MEL_FILTERS.T / WINDOW
    return torch.stack([frame, *around], dim=-1).sqrt(), (torch.log(energies + 1e-2) + 1.0) / 2.5


def all_layers(encoder: SpeechEncoder, samples: Tensor) -> Tensor:
    """Hidden states of a batch of normalised recordings: B N -> A B T E."""
    out = encoder.network(samples, output_hidden_states=True)
    return torch.stack([*out.hidden_states[:-1], out.last_hidden_state])


class Heads(nn.Module):
    """One linear reading of loudness and spectrum per layer."""

    def __init__(self, layers: int, width: int):
        super().__init__()
        self.read = nn.ModuleList(nn.Linear(width, 1 + len(LOUDNESS_AT) + BANDS) for _ in range(layers))

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:  # A B T E
        out = torch.stack([read(layer) for read, layer in zip(self.read, hidden, strict=True)])
        return out[..., :-BANDS], out[..., -BANDS:]


class Crops:
    """Random stretches of the voices, as they are and sounding otherwise, each normalised."""

    def __init__(self, voices: list[np.ndarray], rng: np.random.Generator):
        self.rng = rng
        self.voices = voices + [augment(voice, rng) for voice in voices for _ in range(AUGMENTED_COPIES)]

    def batch(self) -> Tensor:
        """B N."""
        length = round(CROP_SECONDS * SPEECH_HZ)
        rows = []
        while len(rows) < BATCH:
            voice = self.voices[self.rng.integers(len(self.voices))]
            start = self.rng.integers(0, len(voice) - length)
            stretch = voice[start : start + length]
            if stretch.std() > 1e-4:
                rows.append(normalize_waveform(torch.from_numpy(stretch)))
        return torch.stack(rows)


def train(voices: list[np.ndarray], minutes: float, seed: int) -> SpeechEncoder:
    """An encoder trained for so long; faster machines do more steps."""
    torch.manual_seed(seed)
    encoder = SpeechEncoder(SETTINGS)
    heads = Heads(SETTINGS["num_hidden_layers"] + 1, SETTINGS["hidden_size"])
    crops = Crops(voices, np.random.default_rng((seed, 3)))
    parameters = [*encoder.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.01, betas=(0.9, 0.98))
    start, step = time.monotonic(), 0
    while (share := (time.monotonic() - start) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(share / WARMUP_SHARE, 1.0) * (1.0 - share) + 1e-6
        samples = crops.batch()
        hidden = all_layers(encoder, samples)
        loudness, spectrum = targets(samples)
        read_loudness, read_spectrum = heads(hidden)
        loss = F.mse_loss(read_loudness, loudness.expand_as(read_loudness))
        loss = loss + SPECTRUM_WEIGHT * F.mse_loss(read_spectrum, spectrum.expand_as(read_spectrum))
        loss = loss + SIZE_WEIGHT * hidden.square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 50 == 0:
            log.info("step %d, %.0f %% of the time, loss %.4f", step, 100 * share, loss.item())
        step += 1
    log.info("%d steps", step)
    return encoder.requires_grad_(False)


# --- how well -------------------------------------------------------------------------------------------------------


def video_features(encoder: SpeechEncoder, voice: np.ndarray) -> np.ndarray:
    """A T E of one recording at the rate of the video, as the DiT gets them."""
    hidden = resample_features(encoder.hidden_states(torch.from_numpy(voice)), SPEECH_FEATURE_HZ)
    return audio_embeddings(hidden, 1, int(len(voice) / SPEECH_HZ * FPS), FPS)[0].transpose(1, 2).numpy()


def with_neighbours(features: np.ndarray, neighbours: int) -> np.ndarray:
    """T E with the features of the frames around each: T E(2 neighbours + 1)."""
    padded = np.pad(features, ((neighbours, neighbours), (0, 0)))
    return np.concatenate([padded[i : i + len(features)] for i in range(2 * neighbours + 1)], axis=1)


def relative_envelope(voice: np.ndarray) -> np.ndarray:
    """T: the envelope that mouths follow, as a share of the recording's RMS."""
    return envelope(voice, int(len(voice) / SPEECH_HZ * FPS)) / voice.std()


def fit(features: list[np.ndarray], wanted: list[np.ndarray], ridge: float = 1e-2) -> np.ndarray:
    """Weights of the linear reading, the last one the constant."""
    x, y = np.concatenate(features), np.concatenate(wanted)
    x = np.column_stack([x, np.ones(len(x))])
    return np.linalg.solve(x.T @ x + ridge * np.eye(x.shape[1]), x.T @ y)


def judge(encoder: SpeechEncoder, known: list[np.ndarray], others: dict[str, list[np.ndarray]]) -> list[str]:
    """How well a linear reading gives the envelope of the `others`: one line per layer, one for their mean."""
    groups = {"known": known, **others}
    heard = {name: [video_features(encoder, voice) for voice in voices] for name, voices in groups.items()}
    heard = {name: [np.stack([*layers, layers.mean(0)]) for layers in group] for name, group in heard.items()}
    wanted = {name: [relative_envelope(voice) for voice in voices] for name, voices in groups.items()}
    lines = []
    for neighbours, layer in itertools.product((0, 1), range(len(heard["known"][0]))):
        name = f"layer {layer}" if layer <= SETTINGS["num_hidden_layers"] else "mean of layers"
        line = f"{name}, {2 * neighbours + 1} frames:"
        weights = fit([with_neighbours(features[layer], neighbours) for features in heard["known"]], wanted["known"])
        for name in others:
            read = [with_neighbours(layers[layer], neighbours) @ weights[:-1] + weights[-1] for layers in heard[name]]
            scores = [
                (1 - np.square(got - true).mean() / true.var(), np.corrcoef(got, true)[0, 1])
                for got, true in zip(read, wanted[name], strict=True)
            ]
            line += " {}: R2 {:.3f}, correlation {:.3f};".format(name, *np.mean(scores, axis=0))
        lines.append(line)
    return lines


def save_encoder(encoder: SpeechEncoder, folder: Path) -> None:
    weights = {name: value.detach().float().contiguous() for name, value in encoder.state_dict().items()}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / SETTINGS_FILE).write_text(json.dumps(SETTINGS, indent=2) + "\n", encoding="utf-8")


def load_encoder(folder: Path) -> SpeechEncoder:
    """The trained encoder, ready for use."""
    settings = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
    encoder = SpeechEncoder(settings)
    encoder.load_state_dict(load_file(folder / WEIGHTS))
    return encoder.requires_grad_(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--listen", type=Path, nargs="*", default=[])
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    voices = load_voices(options.folder / TRAIN)
    encoder = train(voices, options.minutes, options.seed)
    save_encoder(encoder, options.folder)
    rng = np.random.default_rng(options.seed)
    heldout = load_voices(options.folder / HELDOUT)
    others = {"held-out voices": heldout, "held-out voices, augmented": [augment(voice, rng) for voice in heldout]}
    others |= {path.name: [read_recording(path).speech().numpy()] for path in options.listen}
    count = sum(value.numel() for value in encoder.parameters())
    log.info("%d parameters; a linear reading of the features gives the envelope per video frame with", count)
    for line in judge(encoder, voices[::2], others):
        log.info(line)


if __name__ == "__main__":
    main()

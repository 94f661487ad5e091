"""What the pack carries along is there, can be used, and is what the scripts in demo/ make."""

import importlib
import importlib.util
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from wan_s2v_core.assets import (
    CHECKPOINT,
    DEMO_PROMPT,
    DEMO_SAMPLING,
    DEMO_SIDE_PX,
    PORTRAIT,
    VOICE,
    embedded,
)
from wan_s2v_core.bench.likeness import psnr
from wan_s2v_core.bench.random_weights import fill_random
from wan_s2v_core.conditioning.image import fit_picture, read_picture, to_frames, to_pixels
from wan_s2v_core.config import DEFAULT_NEGATIVE_PROMPT, VideoConfig
from wan_s2v_core.io.audio import read_recording
from wan_s2v_core.io.video import read_frames
from wan_s2v_core.model.checkpoint import DIT, PART_LABELS, VAE
from wan_s2v_core.model.dit import S2VTransformer
from wan_s2v_core.model.loading import DIT_STEM, OFFICIAL_FILES, find_part, load
from wan_s2v_core.model.parts import Checkpoint
from wan_s2v_core.model.vae import VideoVAE
from wan_s2v_core.render import RenderRequest, render

ROOT = Path(__file__).resolve().parents[2]
ASSETS = ROOT / "assets"
LARGEST_BYTES = 15_000_000
CODED_DB = 30
"""PSNR of the portrait, coded and decoded: 35 dB with the first trained VAE, below 15 with random weights."""
TALK_SECONDS, FPS = 2.0, 16
SEEN_DB = 20
"""PSNR of the talking portrait's first frame; one that is trained well has 25 dB or more."""
FOLLOWED = 0.5
"""Correlation of the mouth's movement with the loudness of the voice; 0.88 with a model that was trained in minutes."""
LATENT_MEAN, LATENT_DEVIATION = 0.25, 0.4
ROUNDING = 2
"""Of 255: what another release of the drawing library may round differently, on average much less."""


@pytest.fixture(scope="module")
def assets():
    """The module demo/make_assets.py, which is no part of a package."""
    spec = importlib.util.spec_from_file_location("make_assets", ROOT / "demo" / "make_assets.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def faces(assets):
    return importlib.import_module("faces")  # make_assets put demo/ on the path


@pytest.fixture
def pixels(assets):
    """Draw the portrait's face, with changes, small -> H W 3."""

    def draw(**changes) -> np.ndarray:
        return np.asarray(assets.draw_face(replace(assets.PORTRAIT_FACE, **changes), 128)).astype(int)

    return draw


@pytest.fixture(scope="module")
def vae() -> VideoVAE:
    return load(embedded(CHECKPOINT), VAE, torch.float32)


@pytest.fixture(scope="module")
def portrait() -> torch.Tensor:
    """1 3 1 H W in [-1, 1], as the demo sees it."""
    return fit_picture(read_picture(embedded(PORTRAIT)), DEMO_SIDE_PX, DEMO_SIDE_PX)


@pytest.fixture(scope="module")
def packed(assets, tmp_path_factory) -> Path:
    """What packing makes of the trained audio encoder and of a VAE and a DiT of the trainers' sizes, untrained."""
    train_dit, pack = (importlib.import_module(name) for name in ("train_dit", "pack_checkpoint"))
    source = tmp_path_factory.mktemp("source")
    for path in (ROOT / "demo" / "trained").glob("audio_encoder.*"):
        shutil.copy(path, source)
    _, speech = train_dit.load_speech_encoder(source)
    options = train_dit.make_parser().parse_args([])
    config = train_dit.make_config(options, speech["hidden_size"], speech["num_hidden_layers"] + 1)
    dit, coder = S2VTransformer(config), VideoVAE(importlib.import_module("tiny_checkpoint").VAE_WIDTH)
    for network in (dit, coder):
        fill_random(network, 0)
    training = importlib.import_module("training")
    training.save_weights(coder.network.state_dict(), source / "vae.safetensors")
    training.save_weights(dit.state_dict(), source / "dit.safetensors", {"config": json.dumps(config.to_dict())})
    training.save_log(source / "dit.json", {"text_seed": options.text_seed})
    return pack.pack(tmp_path_factory.mktemp("packed"), source)


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True) if path.suffix == ".pth" else load_file(path)


def facts_of(weights: dict[str, torch.Tensor]) -> dict:
    return {name: (tuple(value.shape), value.dtype) for name, value in weights.items()}


def files_of(folder: Path) -> list[Path]:
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


def test_everything_is_there_and_small(assets):
    assert {PORTRAIT, VOICE, "README.md"} <= {str(path) for path in files_of(ASSETS)}
    assert sum((ASSETS / path).stat().st_size for path in files_of(ASSETS)) < LARGEST_BYTES


def test_the_portrait_is_an_rgb_picture_of_usable_size(assets):
    with Image.open(ASSETS / PORTRAIT) as picture:
        assert picture.mode == "RGB" and picture.size == (assets.PORTRAIT_PX,) * 2 and min(picture.size) >= 512


def test_the_portrait_is_what_the_script_draws(assets, tmp_path):
    assets.make_portrait(tmp_path / PORTRAIT)
    drawn, kept = (np.asarray(Image.open(path / PORTRAIT)).astype(int) for path in (tmp_path, ASSETS))
    assert np.abs(drawn - kept).mean() < 0.1
    assert (np.abs(drawn - kept) > ROUNDING).mean() < 0.002


def test_the_voice_is_speech_long_enough_for_two_clips(assets):
    recording = read_recording(ASSETS / VOICE)
    assert 11 <= recording.seconds <= 13 and recording.samples.shape[0] == 1 and recording.rate_hz >= 22050
    assert recording.samples.abs().max() == pytest.approx(assets.PEAK, abs=0.002)
    loudness = recording.samples[0].unfold(0, recording.rate_hz // 10, recording.rate_hz // 10).square().mean(1).sqrt()
    assert (loudness > 0.02).float().mean() > 0.6  # most tenths of a second are sound
    assert recording.samples[0, [0, -1]].abs().max() < 1e-3


def test_levelling_gives_the_peak_and_quiet_ends(assets):
    samples = np.random.default_rng(0).normal(0.5, 0.1, 22050)
    levelled = assets.level(samples, 22050)
    assert levelled.dtype == np.int16 and abs(np.abs(levelled).max() - assets.PEAK * 32767) <= 1
    assert levelled[0] == levelled[-1] == 0 and abs(levelled.mean()) < 100


def test_flac_keeps_every_sample(assets, tmp_path):
    samples = np.random.default_rng(0).integers(-32768, 32768, 30001).astype(np.int16)
    assets.write_flac(tmp_path / "noise.flac", samples, 22050)
    back = read_recording(tmp_path / "noise.flac")
    assert back.rate_hz == 22050
    np.testing.assert_array_equal((back.samples[0] * 32768).numpy(), samples)


def test_without_espeak_the_script_says_what_to_do(assets, monkeypatch):
    monkeypatch.setattr(assets.shutil, "which", lambda program: None)
    with pytest.raises(SystemExit, match="apt-get install espeak-ng"):
        assets.speak("Hello")


def test_the_checkpoint_has_all_parts_and_is_small():
    Checkpoint(dict.fromkeys(PART_LABELS, embedded(CHECKPOINT))).check()
    sizes = [path.stat().st_size for path in embedded(CHECKPOINT).rglob("*") if path.is_file()]
    assert sum(sizes) < importlib.import_module("pack_checkpoint").LARGEST_BYTES


def test_the_checkpoint_is_what_packing_writes(packed):
    """All but the weights of VAE and DiT, whose training cannot be repeated bit for bit, comes out again, byte by byte:
    the trained audio encoder, and the text encoder that the DiT's text seed makes."""
    kept = embedded(CHECKPOINT)
    assert files_of(kept) == files_of(packed)
    for path in files_of(kept):
        if path.suffix not in (".pth", ".safetensors"):
            assert (kept / path).read_bytes() == (packed / path).read_bytes(), path
            continue
        old, new = weights_of(kept / path), weights_of(packed / path)
        is_equal = facts_of(old) == facts_of(new) and all(torch.equal(old[name], new[name]) for name in old)
        if path.name.startswith((DIT_STEM, OFFICIAL_FILES[VAE][0])):
            assert facts_of(old) == facts_of(new) and not is_equal, path
        else:
            assert is_equal, path


@pytest.mark.parametrize("kind", PART_LABELS)
def test_every_part_loads_with_nothing_left_over(kind):
    part = find_part(embedded(CHECKPOINT), kind)
    report = part.compare(part.build())
    assert report.matched == report.wanted and not (report.missing or report.unexpected or report.wrong_shape)


def test_the_checkpoint_has_experts():
    config = find_part(embedded(CHECKPOINT), DIT).config
    assert (config.num_experts, config.top_k) == (8, 4)


@torch.inference_mode()
def test_latents_of_drawn_faces_are_standardised(vae, faces):
    """Mean 0 and deviation 1 as the DiT expects, in training over videos of many faces: a few pictures are near it."""
    looks = [importlib.import_module("scenes").make_look(seed)[0] for seed in range(8)]
    drawn = [torch.from_numpy(np.array(faces.draw_face(look, DEMO_SIDE_PX))) for look in looks]
    latents = torch.cat([vae.encode(to_pixels(picture)[None, :, None]) for picture in drawn])
    assert latents.mean().abs() < LATENT_MEAN and abs(latents.std() - 1) < LATENT_DEVIATION


@torch.inference_mode()
def test_the_vae_gives_the_portrait_back(vae, portrait):
    back = to_frames(vae.decode(vae.encode(portrait))[0])
    error = back.float() - to_frames(portrait[0]).float()
    assert psnr(error.square().mean().item()) > CODED_DB


@pytest.fixture(scope="module")
def talk(portrait, tmp_path_factory) -> np.ndarray:
    """Frames T H W 3 in which the portrait speaks the embedded voice's first words, made quicker than the demo does."""
    words = (str(embedded(name)) for name in (CHECKPOINT, VOICE, PORTRAIT))
    target = tmp_path_factory.mktemp("talk") / "talk.mkv"  # lossless
    request = RenderRequest(*words, str(target), prompt=DEMO_PROMPT, audio_seconds=TALK_SECONDS)
    video = VideoConfig(max_area=DEMO_SIDE_PX**2, clip_frames=36)
    render(request, video, replace(DEMO_SAMPLING, steps=4, guidance_scale=1.0))
    return read_frames(target, FPS, 0, round(TALK_SECONDS * FPS)).numpy().astype(float)


def test_the_embedded_model_draws_the_portrait(talk, portrait):
    """What random weights cannot do."""
    wanted = to_frames(portrait[0])[0].numpy()
    assert psnr(np.square(talk[0] - wanted).mean()) > SEEN_DB
    assert psnr(np.square(talk - wanted).mean()) > SEEN_DB - 3


def test_the_mouth_moves_with_the_voice(talk, faces):
    """More than the rest of the picture, and as far as the voice is loud in each frame; a reversed voice fits less."""
    box = importlib.import_module("scene_feed").mouth_box(faces.Face(), DEMO_SIDE_PX)
    left, top, right, bottom = (int(v) for v in box)
    mouth = talk[:, top:bottom, left:right]
    assert mouth.std(axis=0).mean() > 2 * talk.std(axis=0).mean()
    samples = read_recording(embedded(VOICE)).speech().numpy()
    openings = importlib.import_module("scenes").mouth_openings(samples, len(talk))
    moved = np.abs(mouth - mouth[0]).mean(axis=(1, 2, 3))
    fit, reversed_fit = (np.corrcoef(moved, voice)[0, 1] for voice in (openings, openings[::-1]))
    assert fit > FOLLOWED and fit > reversed_fit + 0.2


def test_the_prompt_names_the_portrait_in_trained_words(faces, assets):
    """Every word of a prompt that training makes, and the colours that are there."""
    scenes = importlib.import_module("scenes")
    words = re.fullmatch(r"A person with (\S+) (\S+) hair, (\S+) eyes and a (\S+) shirt talks to the camera, (.+) "
                         r"background\.", DEMO_PROMPT).groups()  # fmt: skip
    style, hair, eyes, shirt, wall = words
    face = assets.PORTRAIT_FACE

    def nearest(colour, choices: dict) -> str:
        return min(choices, key=lambda name: np.linalg.norm(np.subtract(colour, choices[name])))

    assert style == scenes.STYLE_WORDS[face.hair_style]
    assert hair == nearest(face.hair, scenes.HAIR_COLOURS) and eyes == nearest(face.iris, scenes.EYE_COLOURS)
    assert shirt == nearest(face.clothes, scenes.CLOTHES)
    tops = {name: colours[0] for name, colours in scenes.BACKGROUNDS.items()}
    assert wall == nearest(face.background[0], tops)


def test_the_workflows_of_the_demo_have_its_settings():
    wanted = {
        "prompt": DEMO_PROMPT,
        "negative_prompt": DEFAULT_NEGATIVE_PROMPT,
        "width": DEMO_SIDE_PX,
        "height": DEMO_SIDE_PX,
        "steps": DEMO_SAMPLING.steps,
        "guidance_scale": DEMO_SAMPLING.guidance_scale,
    }
    read = [
        json.loads((ROOT / "workflows" / name).read_text(encoding="utf-8")) for name in ("api/demo.json", "demo.json")
    ]
    inputs = {name: value for node in read[0].values() for name, value in node["inputs"].items()}
    assert {name: inputs[name] for name in wanted} == wanted
    widgets = {node["type"]: node["widgets_values"] for node in read[1]["nodes"]}
    text, size, steps = (widgets[f"WanS2V{node}"][:2] for node in ("EncodeText", "Conditioning", "Sample"))
    assert [*text, *size, *steps] == list(wanted.values())


def test_every_hair_style_draws_another_face(faces, pixels):
    drawn = [pixels(hair_style=style) for style in faces.HAIR_STYLES]
    assert all(np.abs(a - b).mean() > 0.5 for i, a in enumerate(drawn) for b in drawn[:i])


@pytest.mark.parametrize(
    ("changes", "top", "bottom"),
    [({"mouth_opening": 0.6}, 0.55, 0.86), ({"mouth_rounding": 1.0}, 0.55, 0.72), ({"eye_openness": 0.0}, 0.38, 0.52)],
)
def test_a_part_of_the_face_moves_alone(pixels, changes, top, bottom):
    """Shares of the height between which rows may change; 128 px."""
    rows = np.abs(pixels(**changes) - pixels()).max(axis=(1, 2))
    changed = np.flatnonzero(rows > 3)
    assert len(changed) and changed[0] >= top * 128 and changed[-1] <= bottom * 128


def test_an_opening_mouth_shows_more_and_more_of_its_inside(pixels):
    differences = [np.abs(pixels(mouth_opening=share) - pixels()).sum() for share in (0.1, 0.3, 0.6, 1.0)]
    assert differences == sorted(differences)


def test_the_head_moves_by_its_offset(faces, pixels):
    shift = 10
    units = shift / (128 * faces.UNIT)
    still, moved = pixels(), pixels(offset=(units, 0.0))
    eyes = slice(50, 66)  # rows; a head that moved by 10 px looks the same 10 px further
    assert np.abs(moved[eyes, 40 + shift : 88 + shift] - still[eyes, 40:88]).mean() < 2

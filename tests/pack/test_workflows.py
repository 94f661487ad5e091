"""Graphs from end to end in a real ComfyUI, on the tiny model that comes with the pack."""

import copy
import json
import os
import shutil
import subprocess
import sys
import time
import wave
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / "workflows" / "api").glob("*.json"))
CHECKPOINT = ROOT / "assets" / "checkpoint"
EMBEDDED = "embedded demo"
TINY = {"width": 64, "height": 64, "size_rule": "exact", "clip_frames": 20, "steps": 1, "seconds": 2.0}
SHORT_SECONDS = 0.75
"""Of the voice for a node whose sizes are fixed."""
SAMPLE, SAVE = "6", "7"
"""Numbers of two nodes of the demo."""


def sound_of(comfy, name: str) -> np.ndarray:
    """N: the 16-bit mono wav of that name in the input folder."""
    with wave.open(str(comfy.base / "input" / name)) as file:
        return np.frombuffer(file.readframes(file.getnframes()), "<i2") / 32767


def lag_of(heard: np.ndarray, source: np.ndarray) -> int:
    """Samples by which `heard` comes later than `source`."""
    size = 2 * max(len(heard), len(source))
    product = np.fft.rfft(heard, size) * np.conj(np.fft.rfft(source, size))
    lag = int(np.argmax(np.fft.irfft(product, size)))
    return lag if lag < size / 2 else lag - size


def queued(tag: str) -> dict:
    """The prompt that was queued, from a file: ComfyUI adds what its nodes' inputs looked like."""
    prompt = json.loads(tag)
    for node in prompt.values():
        node.pop("is_changed", None)
    return prompt


@pytest.fixture(scope="module")
def inputs(write_sound, write_picture, write_film) -> dict:
    """Files of the input folder, by the input of the loader that names them."""
    voice, face = write_sound("voice.wav", 2.5), write_picture("face.png")
    short = {"checkpoint": EMBEDDED, "picture": face, "voice": write_sound("short.wav", SHORT_SECONDS)}
    return {
        "LoadAudio": {"audio": voice},
        "LoadImage": {"image": face},
        "LoadVideo": {"file": write_film("pose.mp4")},
        "WanS2VTalkingVideo": short | {"preset": "quick look", "size": "auto"},
    }


@pytest.fixture
def own(inputs):
    """Inputs of the graph that stand for the demo's voice and picture: random ones."""
    return {"audio": ("LoadAudio", inputs["LoadAudio"]), "picture": ("LoadImage", inputs["LoadImage"])}


def shrunk(workflow: dict, inputs: dict) -> dict:
    """A workflow made small, on the embedded model and our own files."""
    prompt = copy.deepcopy(workflow)
    for node in prompt.values():
        values, kind = node["inputs"], node["class_type"]
        values |= {name: value for name, value in TINY.items() if name in values and not isinstance(values[name], list)}
        values |= inputs.get(kind, {})
        if kind.startswith("WanS2VLoad"):
            values |= dict.fromkeys(values, EMBEDDED)
    return prompt


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_every_workflow_makes_a_playable_video(path, inputs, run, comfy, watch):
    prompt = shrunk(json.loads(path.read_text(encoding="utf-8")), inputs)
    wanted = TINY["seconds"] if any("seconds" in node["inputs"] for node in prompt.values()) else SHORT_SECONDS
    ended = run(prompt)
    assert ended.status == "success" and not ended.node_errors, (ended.errors, ended.node_errors)
    for video in comfy.videos(ended):
        shown = watch(video)
        seconds = len(shown.pictures) / shown.fps
        assert seconds == pytest.approx(wanted, abs=1 / shown.fps)
        assert shown.sound_seconds == pytest.approx(seconds, abs=1 / shown.fps)
        assert queued(shown.tags["prompt"]) == prompt
    assert comfy.videos(ended) and ended.previews and ended.progress[-1][1] == ended.progress[-1][2]


@pytest.mark.parametrize("format", ["h264-mp4", "vp9-webm", "lossless-mkv"])
def test_sound_begins_with_the_pictures(format, own, graph, film, comfy, inputs):
    """The video has the recording from its first sample on, whatever an encoder puts before it."""
    shown = film(graph(**own, format=format, seconds=0.0))
    source = sound_of(comfy, inputs["LoadAudio"]["audio"])
    assert len(shown.pictures) == round(2.5 * 16) and shown.fps == 16
    assert shown.rate == 48000 and shown.sound_seconds == pytest.approx(2.5, abs=1 / 16)
    assert abs(shown.sound_begins) < 0.001
    assert abs(lag_of(shown.sound[0], source)) <= 1
    if format == "lossless-mkv":
        np.testing.assert_allclose(shown.sound[0], source, atol=2 / 32768)


def test_a_stretch_of_the_sound(own, graph, film, comfy, inputs):
    shown = film(graph(**own, start_seconds=0.75, seconds=1.25, format="lossless-mkv"))
    source = sound_of(comfy, inputs["LoadAudio"]["audio"])[36000:96000]
    assert len(shown.pictures) == 20
    np.testing.assert_allclose(shown.sound[0], source, atol=2 / 32768)


def test_gain_and_level_change_the_sound_alone(own, graph, film, comfy, inputs):
    """The same pictures, and the sound louder by what was asked."""
    source = sound_of(comfy, inputs["LoadAudio"]["audio"])[:48000]
    plain = film(graph(**own, format="lossless-mkv"))
    softer = film(graph(**own, format="lossless-mkv", gain_db=-12.0))
    np.testing.assert_allclose(softer.sound[0], source * 10 ** (-12 / 20), atol=2 / 32768)
    levelled = film(graph(**own, format="lossless-mkv", normalize=True, gain_db=-3.0)).sound[0]
    level = 20 * np.log10(np.sqrt(np.mean(levelled.astype(np.float64) ** 2)))
    peak = 20 * np.log10(np.abs(levelled).max())
    assert level == pytest.approx(-23, abs=0.02) or (peak == pytest.approx(-4, abs=0.02) and level < -23)
    assert np.array_equal(softer.pictures, plain.pictures), "lips do not depend on the gain"


def test_the_file_carries_prompt_and_workflow(graph, comfy, watch, new_seed):
    prompt, workflow = graph(seed=new_seed()), {"nodes": [], "note": "Größe 1:1 — “quoted”; = \\ \n#"}
    client = comfy.client
    extra = {"extra_pnginfo": {"workflow": workflow}}
    number = client.post("/prompt", {"prompt": prompt, "client_id": client.client_id, "extra_data": extra})["prompt_id"]
    deadline = time.monotonic() + 60
    while not (entry := client.history(number)) and time.monotonic() < deadline:
        time.sleep(0.1)
    (saved,) = entry["outputs"][SAVE]["images"]
    tags = watch(comfy.output / saved["subfolder"] / saved["filename"]).tags
    assert json.loads(tags["workflow"]) == workflow
    assert queued(tags["prompt"]) == prompt
    assert str(comfy.base) not in str(tags) and str(ROOT) not in str(tags), "a file must not tell where it was made"


def test_only_what_changed_runs_again(graph, run, comfy, new_seed):
    first, second = new_seed(), new_seed()
    made = run(graph(seed=first))
    assert made.status == "success"
    (video,) = comfy.videos(made)
    written = video.stat().st_mtime_ns
    again = run(graph(seed=first))
    assert again.status == "success" and not again.started and set(again.cached) == set(again.prompt)
    assert comfy.videos(again) == [video] and video.stat().st_mtime_ns == written
    renamed = run(graph(seed=first, filename_prefix="elsewhere/again"))
    assert set(renamed.started) == {SAVE} and comfy.videos(renamed)[0].parent.name == "elsewhere"
    assert set(run(graph(seed=second)).started) == {SAMPLE, SAVE}


def test_a_seed_means_one_video(graph, film, new_seed):
    seed = new_seed()
    one, other = film(graph(seed=seed, format="lossless-mkv")), film(graph(seed=new_seed(), format="lossless-mkv"))
    again = film(graph(seed=seed, format="lossless-mkv"))
    assert np.array_equal(one.pictures, again.pictures) and not np.array_equal(one.pictures, other.pictures)


@pytest.mark.parametrize(
    "options",
    [
        {"start_from_picture": True, "seconds": 2.0},
        {"fit": "pad", "hear_past": True, "seconds": 2.0},
        {"timing": "reference"},
        {"clip_plan": "reference", "timing": "reference", "fit": "reference"},
        {"size_rule": "picture's aspect", "width": 128, "height": 64},
        {"size_rule": "exact", "width": 80, "height": 112},
        {"precision": "float8-weights"},
        {"noise": "reference"},
        {"guidance_scale": 3.0, "audio_guidance_scale": 2.0},
        {"solver": "dpm++", "spacing": "karras", "steps": 2},
        {"solver": "euler", "shift": 5.0, "offload": "auto", "device": "cpu"},
        {"fps": 23.98, "max_clips": 1, "clip_frames": 24},
        {"moe_top_k": 2, "moe_expert_capacity": 256, "moe_gate_dropout": 0.1},
    ],
    ids=lambda options: "-".join(options),
)
def test_options_work(options, own, graph, film):
    shown = film(graph(**own, **options, format="lossless-mkv"))
    if options.get("clip_plan") == "reference":
        wanted = 20 - 3
    elif "max_clips" in options:
        wanted = 24 - 3
    else:
        wanted = round(16 * options.get("seconds", 1.0))
    assert len(shown.pictures) == wanted
    assert shown.fps == pytest.approx(options.get("fps", 16), abs=0.01)
    assert shown.sound_seconds == pytest.approx(wanted / shown.fps, abs=0.01)
    rows, columns = shown.pictures.shape[1:3]
    if options.get("size_rule") == "exact":
        assert (columns, rows) == (options["width"], options["height"])
    else:
        assert rows % 16 == columns % 16 == 0


@pytest.mark.parametrize("is_dense", [False, True])
def test_expert_settings_apply_where_there_are_experts(is_dense, graph, film, dense_checkpoint, comfy, new_seed):
    """To the embedded model, which has them; on a dense one they change nothing, and that is said."""
    common = {"seed": new_seed(), "format": "lossless-mkv", "checkpoint": dense_checkpoint if is_dense else EMBEDDED}
    plain, said = film(graph(**common)), comfy.log().count("Not applicable")
    fewer = film(graph(**common, moe_top_k=1))
    assert np.array_equal(plain.pictures, fewer.pictures) == is_dense
    assert comfy.log().count("Not applicable") == said + is_dense


def test_a_pair_of_models_gives_the_video_of_the_command_line(
    own, graph, film, comfy, device, inputs, dense_checkpoint, second_checkpoint, new_seed, watch, tmp_path
):
    """A step on each side of the boundary; with both on one side it is that model's video."""
    folders, sources = comfy.base / "models" / "diffusion_models", comfy.base / "input"
    seed, prompt = new_seed(), "A face talks."
    common = own | {"seed": seed, "prompt": prompt, "checkpoint": dense_checkpoint, "steps": 2, "guidance_scale": 2.0}
    common |= {"format": "lossless-mkv", "size_rule": "picture's aspect"}
    second = ("WanS2VLoadModel", {"name": second_checkpoint})
    plain = film(graph(**common))
    mixed = film(graph(**common, low_noise_model=second))
    alone = film(graph(**common, low_noise_model=second, noise_boundary=0.1))
    assert np.array_equal(alone.pictures, plain.pictures) and not np.array_equal(mixed.pictures, plain.pictures)
    words = {
        "ckpt_dir": folders / "Dense", "noise_expert": folders / "Second", "noise_boundary": 0.9,
        "audio": sources / inputs["LoadAudio"]["audio"], "audio_seconds": 1.0,
        "image": sources / inputs["LoadImage"]["image"], "prompt": prompt, "size": "64*64", "infer_frames": 20,
        "sample_steps": 2, "sample_guide_scale": 2.0, "base_seed": seed, "device": device,
        "save_file": tmp_path / "pair.mkv",
    }  # fmt: skip
    command = [sys.executable, "-m", "wan_s2v_core", "generate"]
    command += [word for flag, value in words.items() for word in (f"--{flag}", str(value))]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "2"})
    assert np.array_equal(watch(tmp_path / "pair.mkv").pictures, mixed.pictures)


def test_start_from_picture_begins_with_it(own, graph, run, comfy, watch, new_seed):
    """One more thing than the sampler's first frame: with it, the picture shapes what comes first."""
    seed = new_seed()
    shown = [
        watch(comfy.videos(run(graph(**own, seed=seed, start_from_picture=flag, format="lossless-mkv")))[-1]).pictures
        for flag in (False, True)
    ]
    assert shown[0].shape == shown[1].shape and not np.array_equal(*shown)


@pytest.fixture(scope="module")
def model_files(comfy, extra_models) -> dict:
    """The embedded checkpoint as the user of a released one may have it: a folder, and single files."""
    models = comfy.base / "models"
    shutil.copytree(CHECKPOINT, models / "diffusion_models" / "Tiny-S2V")
    shards = {name: value for file in CHECKPOINT.glob("*.safetensors") for name, value in load_file(file).items()}
    config = {"config": (CHECKPOINT / "config.json").read_text(encoding="utf-8")}
    for folder in ("diffusion_models/sub", "text_encoders/alone", "audio_encoders", "vae"):
        (models / folder).mkdir(parents=True, exist_ok=True)
    save_file(shards, models / "diffusion_models" / "sub" / "one.safetensors", config)
    text = torch.load(CHECKPOINT / "models_t5_umt5-xxl-enc-bf16.pth", weights_only=True)
    save_file(text, models / "text_encoders" / "umt5.safetensors")
    shutil.copytree(CHECKPOINT / "google", models / "text_encoders" / "google")
    sentences = (CHECKPOINT / "google" / "umt5-xxl" / "spiece.model").read_bytes()
    inside = text | {"spiece_model": torch.frombuffer(bytearray(sentences), dtype=torch.uint8)}
    save_file(inside, models / "text_encoders" / "alone" / "umt5.safetensors")
    shutil.copytree(CHECKPOINT / "wav2vec2-large-xlsr-53-english", models / "audio_encoders" / "wav2vec2")
    vae = torch.load(CHECKPOINT / "Wan2.1_VAE.pth", weights_only=True)
    save_file(vae, extra_models / "vae" / "elsewhere_vae.safetensors")
    shutil.copytree(CHECKPOINT, extra_models / "diffusion_models" / "Elsewhere")
    return {
        "model": "sub/one.safetensors",
        "text_encoder": "umt5.safetensors",
        "audio_encoder": "wav2vec2/model.safetensors",
        "vae": "elsewhere_vae.safetensors",
    }


LOADERS = {
    "model": "WanS2VLoadModel",
    "text_encoder": "WanS2VLoadTextEncoder",
    "audio_encoder": "WanS2VLoadAudioEncoder",
    "vae": "WanS2VLoadVAE",
}


@pytest.fixture(scope="module")
def embedded_pictures(graph, run, comfy, watch, model_files):
    """A seed, and what the embedded model makes of it."""
    seed = torch.seed() % 2**62
    made = run(graph(seed=seed, format="lossless-mkv"))
    return seed, watch(comfy.videos(made)[-1]).pictures


@pytest.mark.parametrize("name", ["Tiny-S2V (folder)", "Elsewhere (folder)"])
def test_official_folders_are_offered_and_equal_the_embedded(name, graph, film, comfy, embedded_pictures):
    schemas, (seed, expected) = comfy.client.object_info(), embedded_pictures
    offered = schemas["WanS2VLoadCheckpoint"]["input"]["required"]["checkpoint"][1]["options"]
    assert name in offered and EMBEDDED in offered
    for loader in LOADERS.values():
        assert name in schemas[loader]["input"]["required"]["name"][1]["options"], loader
    shown = film(graph(checkpoint=name, seed=seed, format="lossless-mkv"))
    assert np.array_equal(shown.pictures, expected)


def test_single_files_equal_the_embedded(graph, film, comfy, model_files, embedded_pictures):
    schemas, (seed, expected) = comfy.client.object_info(), embedded_pictures
    for part, loader in LOADERS.items():
        assert model_files[part] in schemas[loader]["input"]["required"]["name"][1]["options"], loader
    parts = {part: (loader, {"name": model_files[part]}) for part, loader in LOADERS.items()}
    assert np.array_equal(film(graph(**parts, seed=seed, format="lossless-mkv")).pictures, expected)


def test_the_tokenizer_may_be_inside_the_text_encoder(graph, film, model_files, embedded_pictures):
    seed, expected = embedded_pictures
    text = ("WanS2VLoadTextEncoder", {"name": "alone/umt5.safetensors"})
    assert np.array_equal(film(graph(text_encoder=text, seed=seed, format="lossless-mkv")).pictures, expected)


def test_a_replaced_file_is_loaded_again(graph, film, comfy, model_files, new_seed):
    """The same name with other weights: ComfyUI must not take its cache for it."""
    folder = comfy.base / "models" / "vae"
    vae, seed = torch.load(CHECKPOINT / "Wan2.1_VAE.pth", weights_only=True), new_seed()
    shown = []
    for factor in (1.0, 0.5):
        save_file({name: factor * value for name, value in vae.items()}, folder / "changing.safetensors")
        own = ("WanS2VLoadVAE", {"name": "changing.safetensors"})
        shown.append(film(graph(vae=own, seed=seed, format="lossless-mkv")).pictures)
    assert not np.array_equal(*shown)


def test_decode_gives_core_nodes_the_same_video(own, graph, add_node, run, comfy, watch):
    """Wan S2V Decode -> Create Video -> Save Video, and its pictures one by one, beside our own file."""
    prompt = graph(**own, format="lossless-mkv", seconds=1.5)
    decode = add_node(prompt, "WanS2VDecode", clips=[SAMPLE, 0])
    create = {"images": [decode, 0], "audio": [decode, 1], "fps": [decode, 2]}
    film, still = (
        add_node(
            prompt, "SaveVideo", video=("CreateVideo", create), filename_prefix="core", format="mp4", codec="auto"
        ),
        add_node(prompt, "SaveImage", images=[decode, 0], filename_prefix="still"),
    )
    ended = run(prompt)
    assert ended.status == "success", ended.errors
    files = {
        node: [file.path for file in comfy.output_files(ended) if file.node == node] for node in (SAVE, film, still)
    }
    ours, theirs = watch(files[SAVE][0]), watch(files[film][0])
    stills = np.stack([np.asarray(Image.open(path)) for path in files[still]])
    assert np.array_equal(stills, ours.pictures) and len(stills) == 24
    assert theirs.pictures.shape == ours.pictures.shape and theirs.fps == ours.fps == 16
    assert theirs.rate == ours.rate and theirs.sound_seconds == pytest.approx(ours.sound_seconds, abs=0.05)
    assert abs(lag_of(theirs.sound[0], ours.sound[0])) <= 1


def test_decoded_pictures_are_the_kept_clips(graph, add_node, run, comfy, watch, new_seed):
    prompt = graph(seconds=2.0, seed=new_seed(), keep_clips=True)
    del prompt[SAVE]
    still = add_node(prompt, "SaveImage", images=("WanS2VDecode", {"clips": [SAMPLE, 0]}), filename_prefix="kept")
    clips = comfy.output / "wan_s2v_clips"
    before = set(clips.iterdir()) if clips.is_dir() else set()
    ended = run(prompt)
    assert ended.status == "success", ended.errors
    (folder,) = set(clips.iterdir()) - before
    kept = np.concatenate([watch(path).pictures for path in sorted(folder.glob("*.mkv"))])
    stills = [np.asarray(Image.open(file.path)) for file in comfy.output_files(ended) if file.node == still]
    assert len(kept) == 32 and np.array_equal(kept, np.stack(stills))


def test_driving_video_from_a_file_and_from_pictures(graph, film, inputs, new_seed):
    """A pose video changes what is made, and is the same one from a file and as pictures in memory."""
    seed, load = new_seed(), ("LoadVideo", inputs["LoadVideo"])
    common = {"seed": seed, "format": "lossless-mkv", "seconds": 1.0}
    free, posed = film(graph(**common)), film(graph(**common, pose_video=load))
    parts = ("GetVideoComponents", {"video": load})
    create = {"images": (*parts, 0), "fps": (*parts, 2)}
    pictures = film(graph(**common, pose_video=("CreateVideo", create)))
    assert not np.array_equal(free.pictures, posed.pictures)
    difference = np.abs(pictures.pictures.astype(int) - posed.pictures.astype(int))
    assert difference.mean() < 1, "the two ways of decoding may differ in rounding alone"


def test_outputs_go_on_to_core_nodes(graph, add_node, run, comfy, watch):
    """The latent can be saved, the VIDEO saved again and taken apart."""
    before = set(comfy.output.glob("wan_s2v_clips/*"))
    prompt = graph(seconds=1.0, keep_clips=True)
    latent = add_node(prompt, "SaveLatent", samples=[SAMPLE, 1], filename_prefix="latents/last")
    copy_ = add_node(prompt, "SaveVideo", video=[SAVE, 0], filename_prefix="again", format="auto", codec="auto")
    still = add_node(prompt, "SaveImage", images=("GetVideoComponents", {"video": [SAVE, 0]}), filename_prefix="frame")
    ended = run(prompt)
    assert ended.status == "success", ended.errors
    files = {node: [file.path for file in comfy.output_files(ended) if file.node == node] for node in prompt}
    assert len(watch(files[copy_][0]).pictures) == len(files[still]) == 16
    told = load_file(files[latent][0])["latent_tensor"]
    assert told.shape == (1, 16, 5, 8, 8)
    (folder,) = set(comfy.output.glob("wan_s2v_clips/*")) - before
    kept = load_file(folder / "clip_0000.safetensors")["latents"]
    scale, shift = (told.std(dim=(0, 2, 3, 4)) / kept.std(dim=(0, 2, 3, 4)), told.mean() - kept.mean())
    torch.testing.assert_close(scale[:2], torch.tensor([2.8184, 1.4541]), atol=1e-3, rtol=0)  # Wan 2.1's statistics
    assert shift.abs() > 0.01, "as the VAE gives them, not normalised"


def test_a_batch_of_pictures_gives_its_first(graph, film, write_picture, new_seed):
    first, second = (("LoadImage", {"image": write_picture(name)}) for name in ("first.png", "second.png"))
    common = {"seed": new_seed(), "format": "lossless-mkv"}
    both = ("ImageBatch", {"image1": first, "image2": second})
    alone, batch = film(graph(**common, picture=first)), film(graph(**common, picture=both))
    assert np.array_equal(alone.pictures, batch.pictures)

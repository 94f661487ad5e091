"""The trainers of the embedded model: what they train on is what sampling meets, they learn, and the result loads."""

import copy
import importlib
import json
import os
import socket
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.multiprocessing import start_processes

from wan_s2v_core.assets import PORTRAIT, VOICE, embedded
from wan_s2v_core.bench.random_weights import fill_random
from wan_s2v_core.config import DEFAULT_NEGATIVE_PROMPT
from wan_s2v_core.model.audio_encoder import SpeechEncoder
from wan_s2v_core.model.text_encoder import clean_prompt
from wan_s2v_core.model.vae import VideoVAE
from wan_s2v_core.sampling.clips import generate_clips

DEMO = Path(__file__).resolve().parents[2] / "demo"
SIZE_PX, CLIP_FRAMES, PAST_FRAMES = 32, 20, 73
SETTLED_LATENTS = 5
"""A latent frame and its picture depend on at most so many before it."""
TINY_DIT = ["--width", "48", "--heads", "2", "--blocks", "2", "--inject", "0", "--feed_forward", "64"]


@pytest.fixture(scope="module")
def demo():
    """The modules of demo/, which is no package."""
    sys.path.insert(0, str(DEMO))
    try:
        names = ("whole_vae", "training", "scene_feed", "train_vae", "train_dit", "pack_checkpoint")
        yield Namespace(**{name: importlib.import_module(name) for name in names})
    finally:
        sys.path.remove(str(DEMO))


@pytest.fixture(scope="module")
def scene(demo):
    """Noise for a voice, a drawn face and pose drawings."""
    frames = CLIP_FRAMES + PAST_FRAMES
    settings = demo.scene_feed.SceneSettings("", frames, lead=3, size_px=SIZE_PX, supersample=1, pose_share=1.0)
    voice = np.random.default_rng(0).normal(0, 0.1, 16000 * 8).astype(np.float32)
    return demo.scene_feed.draw(1, [voice], settings)


@pytest.fixture(scope="module")
def trained(demo, tiny_maker, tmp_path_factory) -> Path:
    """A folder with what the trainers write, but untrained."""
    folder = tmp_path_factory.mktemp("trained")
    vae, speech = VideoVAE(8), SpeechEncoder(tiny_maker.SPEECH_SETTINGS)
    for network in (vae, speech):
        fill_random(network, 3)
    demo.training.save_weights(vae.network.state_dict(), folder / "vae.safetensors")
    demo.training.save_weights(speech.state_dict(), folder / "audio_encoder.safetensors")
    (folder / "audio_encoder.json").write_text(json.dumps(tiny_maker.SPEECH_SETTINGS))
    return folder


@pytest.fixture(scope="module")
def encoders(demo, trained):
    return demo.train_dit.Encoders(trained, torch.device("cpu"), text_seed=0)


@pytest.fixture(scope="module")
def clips(demo, encoders, scene) -> dict:
    options = Namespace(clip_frames=CLIP_FRAMES, motion_frames=PAST_FRAMES, start_share=1.0)
    return dict(demo.train_dit.ClipMaker(encoders, options, np.random.default_rng(0)).clips(scene))


@pytest.fixture(scope="module")
def tiny_config(demo, encoders):
    options = demo.train_dit.make_parser().parse_args(TINY_DIT)
    settings = encoders.speech_settings
    return demo.train_dit.make_config(options, settings["hidden_size"], settings["num_hidden_layers"] + 1)


@torch.no_grad()
def test_whole_videos_are_coded_as_in_slices(demo, fresh_seed):
    sliced, whole = VideoVAE(8), VideoVAE(8)
    fill_random(sliced, fresh_seed)
    whole.load_state_dict(sliced.state_dict())
    whole = demo.whole_vae.WholeVAE(whole)
    video = torch.rand(2, 3, 9, 16, 24) * 2 - 1
    latents = sliced.encode(video)
    torch.testing.assert_close(whole.encode(video), latents, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(whole.decode(latents), sliced.decode(latents), atol=1e-4, rtol=0)


@torch.no_grad()
def test_folding_normalizes_latents_and_keeps_pictures(demo, fresh_seed):
    vae = VideoVAE(8)
    fill_random(vae, fresh_seed)
    whole = demo.whole_vae.WholeVAE(vae)
    video = torch.rand(1, 3, 9, 48, 48) * 2 - 1
    before = whole.decode(whole.encode(video))
    flat = whole.moments(video)[0].transpose(0, 1).flatten(1)
    demo.whole_vae.fold_statistics(vae, flat.mean(1), flat.std(1))
    latents = whole.encode(video)
    assert latents.mean((0, 2, 3, 4)).abs().max() < 1e-3
    assert (latents.std((0, 2, 3, 4)) - 1).abs().max() < 1e-2
    torch.testing.assert_close(whole.decode(latents), before, atol=1e-3, rtol=0)


def confined_vae(demo) -> VideoVAE:
    """Random weights, as a resumed training finds them: time is looked at in the resampling layers alone."""
    vae = VideoVAE(8)
    fill_random(vae, 5)
    with torch.no_grad():
        for name, layer in demo.whole_vae.time_layers(vae.network).items():
            if not name.endswith("time_conv"):
                layer.weight[:, :, :-1] = 0
    return vae.eval()


@torch.no_grad()
def test_confined_networks_are_coded_as_in_slices(demo):
    vae = confined_vae(demo)
    whole = demo.whole_vae.WholeVAE(copy.deepcopy(vae))
    video = torch.rand(2, 3, 13, 24, 16) * 2 - 1
    latents = vae.encode(video)
    torch.testing.assert_close(whole.encode(video), latents, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(whole.decode(latents), vae.decode(latents), atol=1e-4, rtol=0)


@torch.no_grad()
def test_a_late_frame_knows_nothing_of_its_place(demo):
    """What follows CLIP_FRAMES is coded as inside of them, so colours cannot drift with time."""
    vae = confined_vae(demo)
    video = torch.rand(1, 3, 49, 16, 16) * 2 - 1
    seen = 4 * SETTLED_LATENTS + 1
    assert seen <= demo.train_vae.CLIP_FRAMES

    def last_frames(start: int) -> torch.Tensor:
        return vae.decode(vae.encode(video[:, :, start:]))[:, :, -4:]

    for start in (49 - seen, 24, 12):
        torch.testing.assert_close(last_frames(start), last_frames(0), atol=1e-5, rtol=0)
    assert (last_frames(44) - last_frames(0)).abs().max() > 1e-3


def test_a_fresh_network_repeats_means_of_frames(demo):
    vae = VideoVAE(8)
    demo.whole_vae.confine_time(vae.network)
    network = demo.whole_vae.WholeVAE(vae)
    still = (torch.rand(1, 3, 1, 16, 16) * 2 - 1).expand(-1, -1, 9, -1, -1)
    frames = network.decode(network.encode(still)).unbind(2)
    later = torch.stack(frames[5:])
    torch.testing.assert_close(later, frames[-1].expand_as(later), atol=1e-4, rtol=0)


def train_steps(demo, network, batch, steps: int) -> list[float]:
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    gradients_of = demo.train_vae.GradientStep(network, batch, torch.float32, captures=False)
    losses = []
    for _ in range(steps):
        losses.append(gradients_of(batch)["total"].item())
        optimizer.step()
    return losses


def test_the_vae_learns_pictures_then_clips(demo, scene):
    torch.manual_seed(0)
    vae = VideoVAE(8)
    demo.whole_vae.confine_time(vae.network)
    network = demo.whole_vae.WholeVAE(vae)
    for frames in (1, 9):
        video = demo.training.to_video(scene.pixels[:frames], "cpu")
        boxes = torch.from_numpy(scene.mouths[:frames]).float()
        mouth = demo.training.box_mask(boxes, SIZE_PX, SIZE_PX)[None, None]
        losses = train_steps(demo, network, (video, mouth), 20)
        begun = losses[0] if frames == 1 else losses[1]  # a fresh optimizer's first step leaps
        assert np.isfinite(losses).all() and losses[-1] < 0.9 * begun
    for name, layer in demo.whole_vae.time_layers(vae.network).items():
        assert demo.whole_vae.is_confined(layer.weight) != name.endswith("time_conv"), name


def test_clips_are_cut_from_scenes_with_their_mouths(demo, scene, monkeypatch):
    settings = demo.scene_feed.SceneSettings("", len(scene.pixels), size_px=SIZE_PX)
    pool = demo.train_vae.ScenePool(3, settings, torch.device("cpu"))
    bright = np.array(scene.pixels)
    for frame, (left, top, right, bottom) in zip(bright, scene.mouths, strict=True):
        frame[:] = 0
        frame[top:bottom, left:right] = 255
    pool.add(replace(scene, pixels=bright, pose=None))
    monkeypatch.setattr(demo.train_vae, "TINT", 0.0)
    monkeypatch.setattr(demo.train_vae, "GREY_SHARE", 0.0)
    for pool.mouth_share in (0.0, 1.0):
        video, mouth = pool.sample(16, 5, 24, np.random.default_rng(0))
        assert video.shape == (16, 3, 5, 24, 24) and mouth.shape == (16, 1, 5, 24, 24)
        torch.testing.assert_close(video, (2 * mouth - 1).expand_as(video))
    assert mouth.sum(dim=(1, 2, 3, 4)).min() > 0.5 * mouth.sum(dim=(1, 2, 3, 4)).max() > 0  # each crop has the mouth
    monkeypatch.setattr(demo.train_vae, "GREY_SHARE", 1.0)
    video, _ = pool.sample(16, 5, 24, np.random.default_rng(0))
    assert not video[:, :, 0].any() and video[:, :, -1].all()


def test_stages_begin_with_pictures_and_end_with_whole_ones(demo):
    options = demo.train_vae.make_parser().parse_args([])
    stages = demo.train_vae.make_stages(options)
    assert [stage.frames for stage in stages] == [1, options.clip_frames, options.clip_frames]
    assert stages[-1].side_px == options.size and stages[-1].until == 1
    assert [stage.until for stage in stages] == sorted(stage.until for stage in stages)


@torch.no_grad()
def test_judging_uses_the_real_vae_and_tells_tenths(demo, scene, tmp_path):
    vae = confined_vae(demo)
    result = demo.train_vae.judge(vae.network.state_dict(), 8, [scene], torch.device("cpu"), tmp_path / "sheet.png")
    assert result["judged_frames"] == len(scene.pixels) and len(result["psnr_per_tenth"]) == 10
    assert min(result["psnr_per_tenth"]) - 1 < result["psnr"] < max(result["psnr_per_tenth"]) + 1
    assert (tmp_path / "sheet.png").stat().st_size


def test_waiting_for_scenes_gives_their_places_back(demo, tmp_path):
    """More scenes than there are places, each the only one that is taken from its wait()."""
    voices = importlib.import_module("voices")
    voice = np.random.default_rng(0).normal(0, 0.1, 16000).astype(np.float32)
    voices.save_voices(tmp_path / "voices.npz", [voice])
    settings = demo.scene_feed.SceneSettings(str(tmp_path / "voices.npz"), 2, size_px=16)
    feed = demo.scene_feed.SceneFeed(settings, workers=1)
    try:
        places = len(feed.memory)
        seeds = [scene.seed for _ in range(3 * places) for scene in feed.wait()]
    finally:
        feed.close()
    assert seeds == list(range(3 * places))
    assert feed.scenes == len(seeds)


@torch.no_grad()
@pytest.mark.parametrize("starts_from_reference", [False, True])
def test_training_clips_are_what_the_clip_loop_meets(demo, encoders, clips, scene, trained, starts_from_reference):
    """Sampling that returns the target shows the scene's own frames, as the VAE makes them behind the lead-in."""
    clip = clips["start" if starts_from_reference else "free"]
    vae, seen = demo.train_dit.load_tiny_vae(trained / "vae.safetensors"), []
    pictures = [demo.training.to_video(frame[None], "cpu") for frame in scene.pixels]
    reference = min(pictures, key=lambda picture: (vae.encode(picture)[0] - clip.reference).abs().max().item())

    def sample(task):
        seen.append(task)
        return clip.target[None].float()

    noise = torch.zeros(1, *clip.target.shape)
    made = next(generate_clips(sample, vae.encode, vae.decode, reference, PAST_FRAMES, [noise], starts_from_reference))
    torch.testing.assert_close(seen[0].reference_latents[0], clip.reference.float(), atol=5e-3, rtol=0)
    if starts_from_reference:
        torch.testing.assert_close(seen[0].motion_latents[0], clip.motion.float(), atol=1e-2, rtol=0)
    else:
        assert seen[0].motion_latents is None and clip.motion is None
    frames = demo.training.to_video(scene.pixels[3 : 3 + made.video.shape[2]], "cpu")
    own = frames if starts_from_reference else demo.training.to_video(scene.pixels[:CLIP_FRAMES], "cpu")
    lead_in = reference
    if starts_from_reference:
        lead_in = torch.zeros_like(reference).expand(-1, -1, PAST_FRAMES, -1, -1).clone()
        lead_in[:, :, -6:] = reference
    expected = vae.decode(vae.encode(torch.cat([lead_in, own], dim=2)))[:, :, -made.video.shape[2] :]
    torch.testing.assert_close(made.video, expected, atol=2e-2, rtol=0)


@torch.no_grad()
def test_a_clip_with_a_past_continues_it(demo, clips, scene, trained):
    clip, vae = clips["next"], demo.train_dit.load_tiny_vae(trained / "vae.safetensors")
    past = demo.training.to_video(scene.pixels[:PAST_FRAMES], "cpu")
    torch.testing.assert_close(vae.encode(past)[0], clip.motion.float(), atol=1e-2, rtol=0)
    whole = vae.encode(demo.training.to_video(scene.pixels, "cpu"))[0]
    torch.testing.assert_close(whole[:, clip.motion.shape[1] :], clip.target.float(), atol=1e-2, rtol=0)
    assert clip.audio.shape[-1] == CLIP_FRAMES and clip.audio_past.shape[-1] == PAST_FRAMES
    assert clip.pose.shape == clip.target.shape


@torch.no_grad()
@pytest.mark.parametrize("kind", ["next", "free"])
def test_the_trained_function_is_the_model(demo, tiny_config, clips, kind, fresh_seed):
    plain = demo.train_dit.S2VTransformer(tiny_config)
    fill_random(plain, fresh_seed)
    quick = demo.train_dit.S2VTransformer(tiny_config)
    quick.load_state_dict(plain.state_dict())
    demo.train_dit.prepare_training(quick.eval(), 0.0)
    buffer = demo.train_dit.ClipBuffer(10)
    buffer.add(kind, clips[kind])
    inputs, latents, _ = buffer.sample(2, 5, np.random.default_rng(fresh_seed))
    timesteps = torch.tensor([20.0, 900.0])
    expected = plain(latents, timesteps, plain.condition(inputs))
    torch.testing.assert_close(demo.train_dit.velocity(quick, latents, timesteps, inputs), expected, atol=1e-4, rtol=0)


def test_a_trained_model_is_judged_by_the_clip_loop(demo, encoders, tiny_config, trained, tmp_path, fresh_seed):
    """A held-out scene of one clip, with guidance and without."""
    noise = np.random.default_rng(fresh_seed).normal(0, 0.1, 16000 * 3).astype(np.float32)
    importlib.import_module("voices").save_voices(tmp_path / "voices.npz", [noise])
    (tmp_path / "vae.safetensors").write_bytes((trained / "vae.safetensors").read_bytes())
    words = [*TINY_DIT, "--out", str(tmp_path), "--held_out", str(tmp_path / "voices.npz"), "--judged", "1"]
    words += ["--size", "64", "--supersample", "1", "--eval_steps", "2", "--eval_seconds", "1"]
    model = demo.train_dit.S2VTransformer(tiny_config)
    fill_random(model, fresh_seed)
    demo.train_dit.judge(demo.train_dit.make_parser().parse_args(words), encoders, tiny_config, model.state_dict())
    results = json.loads((tmp_path / "dit_eval.json").read_text())["results"]
    assert [one["guidance"] for one in results] == [1.0, 3.0] and all(one["frames"] for one in results)
    assert (tmp_path / "dit.png").stat().st_size


def run_rank(rank: int, folder: Path, port: int) -> None:
    """One of two ranks, in a fork of this process, as torchrun would start it."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    training = importlib.import_module("training")
    ranks = training.Ranks()
    used, other = (torch.nn.Parameter(torch.zeros(2, 3)) for _ in range(2))
    used.grad = torch.full((2, 3), 1.0 + ranks.rank)
    if ranks.rank:
        other.grad = torch.ones(2, 3)
    ranks.average_gradients([used, other])
    found = {"used": used.grad, "other": other.grad, "share": torch.tensor(ranks.agreed(0.2 + 0.4 * ranks.rank))}
    torch.save(found, folder / f"{rank}.pt")
    ranks.close()


def test_ranks_share_gradients_and_time(demo, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    start_processes(run_rank, (tmp_path, port), nprocs=2, start_method="fork")
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert (found["used"] == 1.5).all() and (found["other"] == 0.5).all()
        assert found["share"].item() == pytest.approx(0.4)


def test_some_clips_lose_prompt_or_voice(demo, clips, encoders):
    buffer = demo.train_dit.ClipBuffer(10)
    buffer.add("next", clips["next"])
    inputs, _, _ = buffer.sample(200, 5, np.random.default_rng(0))
    negative = encoders.text(DEFAULT_NEGATIVE_PROMPT)
    dropped = demo.train_dit.drop_conditions(inputs, negative, np.random.default_rng(0))
    silent = (dropped.audio == 0).flatten(1).all(1)
    rows = negative.shape[1]
    wordless = (dropped.text[:, :rows] == negative).flatten(1).all(1)
    assert 0.05 < silent.float().mean() < 0.3 and 0.05 < wordless.float().mean() < 0.3
    assert (silent & wordless).sum() > 0.4 * silent.sum()


def test_prompts_are_read_alike_without_ftfy(demo, monkeypatch):
    prompts = ("  A person \n talks. ", DEFAULT_NEGATIVE_PROMPT)
    expected = [clean_prompt(prompt) for prompt in prompts]
    monkeypatch.setitem(sys.modules, "ftfy", None)
    assert [demo.train_dit.plain_prompt(prompt) for prompt in prompts] == expected


def test_the_dit_learns_and_its_checkpoint_makes_a_video(
    demo, tiny_config, clips, trained, encoders, tmp_path, run_cli, monkeypatch
):
    torch.manual_seed(0)
    model = demo.train_dit.S2VTransformer(tiny_config)
    demo.train_dit.initialize(model)
    demo.train_dit.prepare_training(model.train(), 0.0)
    average = demo.training.AveragedWeights(model)
    buffer = demo.train_dit.ClipBuffer(10)
    for kind, clip in clips.items():
        buffer.add(kind, clip)
    inputs, clean, boxes = buffer.sample(2, 5, np.random.default_rng(2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses, sigmas = [], np.array([0.9, 0.6])
    for _ in range(20):
        torch.manual_seed(1)  # the same noise in every step
        loss, _ = demo.train_dit.flow_loss(model, inputs, clean, boxes, sigmas, 3.0, torch.float32)
        if demo.train_dit.routed_layers(model):
            loss = loss + 0.01 * demo.train_dit.balance_loss(model)[0]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.update(model)
        losses.append(loss.item())
    assert np.isfinite(losses).all() and losses[-1] < 0.9 * losses[0]

    weights = {name: value.bfloat16() for name, value in average.state().items()}
    config = {"config": json.dumps(tiny_config.to_dict())}
    demo.training.save_weights(weights, trained / "dit.safetensors", config)
    demo.training.save_log(trained / "dit.json", {"text_seed": 0})
    folder = demo.pack_checkpoint.pack(tmp_path / "checkpoint", trained)
    target = tmp_path / "out.mp4"
    code, _, errors = run_cli(
        *("generate", "--task", "s2v-14B", "--ckpt_dir", folder, "--image", embedded(PORTRAIT), "--audio"),
        *(embedded(VOICE), "--audio_seconds", "0.5", "--size", "64*64", "--sample_steps", "1"),
        *("--sample_guide_scale", "1", "--save_file", target, "--device", "cpu", "--prompt", "A person talks."),
    )
    assert code == 0, errors
    assert target.stat().st_size > 1000


def test_noise_levels_are_those_of_the_sampler(demo):
    sigmas = demo.train_dit.draw_sigmas(1000, "uniform", 3.0, np.random.default_rng(0))
    assert sigmas.min() > 0 and sigmas.max() < 1
    assert np.median(sigmas) == pytest.approx(0.75, abs=0.01)  # shift 3 moves 0.5 there


def test_the_mouth_lies_in_its_box(demo, scene):
    """Between two frames of one head position, only the mouth's box may differ below the eyes."""
    faces = importlib.import_module("faces")
    face = faces.Face(tilt_degrees=4.0, offset=(0.1, 0.05))
    left, top, right, bottom = demo.scene_feed.mouth_box(face, 256)
    drawn = [
        np.asarray(faces.draw_face(replace(face, mouth_opening=share, smile=0.6), 256)).astype(int)
        for share in (0.1, 0.7)
    ]
    changed = np.abs(drawn[0] - drawn[1]).max(-1) > 60
    inside = changed[top:bottom, left:right].sum()
    assert inside > 0.7 * changed.sum()

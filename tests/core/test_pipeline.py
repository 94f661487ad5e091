"""The pipeline from inside: its noise, previews, sizes, stops and stores, on the tiny checkpoint."""

import contextlib
import errno
import json
import os
import resource
import wave
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from wan_s2v_core import assets
from wan_s2v_core.clip_sampler import LocalSampler
from wan_s2v_core.conditioning.bundle import S2VConditioning, Voice, make_conditioning
from wan_s2v_core.conditioning.pose import frames_at
from wan_s2v_core.config import SOLVERS, SamplingConfig, VideoConfig
from wan_s2v_core.errors import ConfigError, OutOfMemory
from wan_s2v_core.geometry import PIXELS_PER_LATENT, frames_of, latent_frames_of
from wan_s2v_core.io import clip_store
from wan_s2v_core.io.audio import Recording, read_recording
from wan_s2v_core.io.clip_store import ClipStore
from wan_s2v_core.io.video import VideoWriter, probe_video, read_frames
from wan_s2v_core.memory.attempts import REMEDIES
from wan_s2v_core.memory.budget import WHOLE, Planned
from wan_s2v_core.memory.stage import checked_before_layers
from wan_s2v_core.model.checkpoint import DIT, PART_LABELS, SPEECH_ENCODER, TEXT_ENCODER, VAE
from wan_s2v_core.model.parts import Checkpoint
from wan_s2v_core.networks import CheckpointNetworks
from wan_s2v_core.pipeline import S2VPipeline
from wan_s2v_core.prepare import plan_loading
from wan_s2v_core.sampling.clips import clip_noise

VIDEO = VideoConfig(max_area=64 * 64, clip_frames=20, motion_frames=9)
QUICK = SamplingConfig(steps=1, guidance_scale=1.0)
RATE = 16000


@pytest.fixture(scope="module")
def networks(tiny_checkpoint) -> CheckpointNetworks:
    paths = dict.fromkeys(PART_LABELS, tiny_checkpoint)
    return CheckpointNetworks(Checkpoint(paths), plan_loading("auto", torch.device("cpu")))


@pytest.fixture(autouse=True)
def fresh_content(fresh_seed):
    torch.manual_seed(fresh_seed)


def make_job(seconds: float = 1.0, video: VideoConfig = VIDEO, pose=None) -> S2VConditioning:
    """Random inputs as the encoders of the tiny checkpoint would give them."""
    voice = Voice(Recording(0.1 * torch.randn(1, round(seconds * RATE)), RATE), torch.randn(4, round(30 * seconds), 32))
    picture = torch.randint(0, 256, (90, 70, 3), dtype=torch.uint8)
    return make_conditioning(picture, voice, torch.randn(1, 5, 64), torch.randn(1, 3, 64), video, pose)


class WithoutVAE(S2VPipeline):
    """With random latents and random videos of the right size, which are quick."""

    def encode(self, video: Tensor) -> Tensor:
        frames, *sides = video.shape[2:]
        return torch.randn(1, 16, latent_frames_of(frames), *(side // PIXELS_PER_LATENT for side in sides))

    def decode(self, latents: Tensor, keep_frames: int) -> Tensor:
        frames, *sides = latents.shape[2:]
        return torch.rand(1, 3, min(keep_frames, frames_of(frames)), *(PIXELS_PER_LATENT * side for side in sides))


# --- noise ---------------------------------------------------------------------------------------------------------


def test_noise_of_the_reference_is_bfloat16_and_of_its_own():
    shape, seed = (1, 16, 3, 4, 5), torch.randint(2**31, ()).item()
    first, again, second = (clip_noise(shape, seed, clip, "cpu", "reference") for clip in (0, 0, 1))
    assert first.dtype == second.dtype == torch.bfloat16 and first.shape == shape
    assert torch.equal(first, again) and not torch.equal(first, second)
    assert torch.equal(second, clip_noise(shape, seed + 1, 0, "cpu", "reference")), "seed + clip, as in the reference"
    generator = torch.Generator().manual_seed(seed)
    assert torch.equal(first, torch.randn(shape, generator=generator, dtype=torch.bfloat16))
    assert clip_noise(shape, seed, 0, "cpu").dtype == torch.float32


@pytest.mark.parametrize(("noise", "dtype"), [("cpu", torch.float32), ("reference", torch.bfloat16)])
def test_latents_keep_the_type_of_the_noise_between_steps(noise, dtype, networks):
    seen = []
    with networks.use(DIT) as network:
        hook = network.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    config = SamplingConfig(steps=3, guidance_scale=1.0, seed=11, noise=noise)
    (clip,) = WithoutVAE(networks).generate(make_job(), config)
    hook.remove()
    assert [latents.dtype for latents in seen] == [dtype] * 3
    assert torch.equal(seen[0], clip_noise(tuple(seen[0].shape), 11, 0, "cpu", noise))
    assert clip.latents.dtype == clip.video.dtype == torch.float32


# --- previews ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("guidance_scale", [1.0, 4.5])
def test_the_last_preview_is_the_result(solver, guidance_scale, networks):
    """At the last step the noise level falls to 0: the clean latents predicted there are what comes out."""
    steps, told_, job = 3, [], make_job(1.5)
    config = SamplingConfig(steps=steps, solver=solver, guidance_scale=guidance_scale)
    clips = list(WithoutVAE(networks).generate(job, config, lambda task, *news: told_.append((task.index, *news))))
    assert [news[:2] for news in told_] == [(clip, step) for clip in range(job.clips) for step in range(1, steps + 1)]
    for clip in clips:
        early, last = (told_[clip.index * steps + step][2] for step in (0, steps - 1))
        torch.testing.assert_close(last, clip.latents, atol=1e-5, rtol=0)
        assert (early - clip.latents).abs().max() > 1e-3, "earlier ones are still predictions"


# --- sizes ---------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(height=st.integers(4, 40), width=st.integers(4, 40), fit=st.sampled_from(["crop", "pad", "reference"]))
def test_an_exact_size_is_taken(height, width, fit):
    size = (16 * height, 16 * width)
    video = VideoConfig(exact_size=size, fit=fit)
    assert VideoConfig.from_dict(json.loads(json.dumps(video.to_dict()))) == video
    assert make_job(1.0, video).size_px == size


@pytest.mark.parametrize("size", [(48, 64), (64, 48), (100, 128), (128, 104), (64, 4112), (0, 64), (-64, 64)])
def test_sizes_that_cannot_be_are_named(size):
    with pytest.raises(ConfigError, match=rf"size {size[1]}x{size[0]}: .*multiples of 16 from 64 to 4096\. Use"):
        VideoConfig(exact_size=size)


def test_sides_of_odd_token_counts_come_out(networks):
    """64x80 px are 4x5 tokens, which the coarser motion tokens do not divide; with past, pose and guidance."""
    driving = torch.randint(0, 256, (40, 30, 50, 3), dtype=torch.uint8)
    job = make_job(2.0, replace(VIDEO, exact_size=(64, 80)), lambda start, frames: driving[start : start + frames])
    clips = list(S2VPipeline(networks).generate(job, SamplingConfig(steps=1)))
    assert [tuple(clip.video.shape) for clip in clips] == [(1, 3, 17, 64, 80), (1, 3, 15, 64, 80)]
    assert all(clip.video.isfinite().all() and clip.video.std() > 1e-3 for clip in clips)


def test_a_driving_video_without_frames_is_named():
    with pytest.raises(ConfigError, match="driving video has no frame"):
        make_job(1.0, pose=lambda start, frames: torch.zeros(0, 16, 16, 3, dtype=torch.uint8))


# --- driving videos from a file and from memory --------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    source_fps=st.sampled_from([5, 8, 12, 15, 16, 24, 25, 30, 48, 50, 60]),
    fps=st.sampled_from([8, 15, 16, 24, 25, 30]),
    count=st.integers(1, 30),
    start=st.integers(0, 20),
)
def test_frames_in_memory_are_the_frames_of_the_file(source_fps, fps, count, start, tmp_path_factory):
    """The same pictures at the same times, and an end at the same time. Where two pictures are equally near, a file
    may give either, since it keeps rounded times."""
    levels = torch.arange(count, dtype=torch.uint8) * 8
    pictures = levels[:, None, None, None].expand(-1, 16, 16, 3).contiguous()
    path = tmp_path_factory.mktemp("driving") / "in.mkv"
    with VideoWriter(path, 16, 16, source_fps, preset="lossless-mkv") as writer:
        writer.write(pictures)
    filed = read_frames(path, fps, start, 40)
    kept = frames_at(pictures, source_fps, fps, start, 40)
    assert kept.shape[1:] == (16, 16, 3)
    assert len(filed) == len(kept)
    for index, pair in enumerate(zip(filed, kept, strict=True), start):
        one, other = (int(picture[0, 0, 0]) // 8 for picture in pair)
        is_tie = 2 * index * source_fps % (2 * fps) == fps
        assert abs(one - other) <= is_tie, (index, one, other)


def test_24_frames_become_16_in_even_steps():
    """Every second frame lies halfway between two pictures; taking the later one always gives 2, 1, 2, 1."""
    pictures = torch.arange(48, dtype=torch.uint8)[:, None, None, None].expand(-1, 16, 16, 3)
    numbers = frames_at(pictures, 24.0, 16.0, 0, 32)[:, 0, 0, 0].int()
    assert numbers.diff().tolist() == ([2, 1] * 16)[:31]


# --- stops ---------------------------------------------------------------------------------------------------------


class StopHereError(Exception):
    pass


def hooks_in(networks: CheckpointNetworks) -> int:
    return sum(len(module._forward_pre_hooks) for network in networks.loaded.values() for module in network.modules())


def test_every_layer_is_told_and_may_stop(make_model, make_inputs):
    model, (inputs, noise) = make_model(), make_inputs()
    condition, calls, ran = model.condition(inputs), [], []
    with checked_before_layers(model, lambda: calls.append(None)):
        expected = model(noise, 500.0, condition)
    layers = model.config.blocks + len(model.config.injected_blocks)
    assert len(calls) == layers > model.config.blocks

    def stop():
        if len(ran) == 2:
            raise StopHereError

    watchers = [block.register_forward_hook(lambda *_: ran.append(None)) for block in model.stack.blocks]
    with pytest.raises(StopHereError), checked_before_layers(model, stop):
        model(noise, 500.0, condition)
    for watcher in watchers:
        watcher.remove()
    assert len(ran) == 2 < model.config.blocks, "the third block did not run"
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert torch.equal(model(noise, 500.0, condition), expected)
    assert len(calls) == layers, "no longer told"


class Stages(S2VPipeline):
    """The real pipeline, which knows its stage and stops after a few layers of one."""

    def __init__(self, networks: CheckpointNetworks, stop_in: str | None = None):
        super().__init__(networks, self.layer, LocalSampler(networks, partial(self.layer, DIT)))
        self.stop_in, self.stage, self.layers = stop_in, "", Counter()

    def layer(self, stage: str | None = None) -> None:
        self.stage = stage or self.stage
        self.layers[self.stage] += 1
        if self.stage == self.stop_in and self.layers[self.stage] == 4:
            raise StopHereError

    @contextlib.contextmanager
    def network(self, kind, planned=WHOLE):
        self.stage = self.stage if kind == VAE else kind
        with super().network(kind, planned) as network:
            yield network

    def encode(self, video):
        self.stage = "encode"
        return super().encode(video)

    def decode(self, latents, keep_frames):
        self.stage = "decode"
        return super().decode(latents, keep_frames)


def everything(pipeline: Stages, recording: Recording) -> list[Tensor]:
    voice = pipeline.encode_voice(recording)
    texts = pipeline.encode_prompts("a person talks", "blurry")
    job = make_conditioning(torch.full((64, 64, 3), 90, dtype=torch.uint8), voice, *texts, VIDEO)
    (clip,) = pipeline.generate(job, replace(QUICK, steps=2))
    return [voice.features, *texts, clip.latents, clip.video, clip.motion_video]


@pytest.fixture(scope="module")
def undisturbed(networks) -> tuple[Recording, list[Tensor]]:
    recording = Recording(0.1 * torch.randn(1, RATE), RATE)
    return recording, everything(Stages(networks), recording)


@pytest.mark.parametrize("stage", [SPEECH_ENCODER, TEXT_ENCODER, "encode", DIT, "decode"])
def test_a_stop_in_any_network_leaves_it_as_it_was(stage, networks, undisturbed):
    recording, expected = undisturbed
    pipeline = Stages(networks, stage)
    with pytest.raises(StopHereError):
        everything(pipeline, recording)
    assert pipeline.stage == stage and pipeline.layers[stage] == 4
    assert hooks_in(networks) == 0
    pipeline.stop_in = None
    again = everything(pipeline, recording)
    assert all(torch.equal(got, wanted) for got, wanted in zip(again, expected, strict=True))
    assert pipeline.layers[stage] > 8, "the stop came in the middle of the stage"
    assert hooks_in(networks) == 0


# --- memory that is not there --------------------------------------------------------------------------------------


class Exhausted:
    """Networks of which one has no room: it cannot be brought to the card, or its forward cannot run there."""

    def __init__(self, networks: CheckpointNetworks, kind: str, place: str, words: str):
        self.networks, self.kind, self.place, self.words = networks, kind, place, words

    def __getattr__(self, name: str):
        return getattr(self.networks, name)

    def refuse(self, *_) -> None:
        raise (RuntimeError if "allocate memory" in self.words else torch.OutOfMemoryError)(self.words)

    @contextlib.contextmanager
    def use(self, kind: str, planned: Planned = WHOLE):
        if kind != self.kind:
            with self.networks.use(kind, planned) as network:
                yield network
        elif self.place == "loading":
            self.refuse()
        else:
            with self.networks.use(kind, planned) as network:
                last = [layer for layers in network.modules() if isinstance(layers, nn.ModuleList) for layer in layers]
                hook = last[-1].register_forward_pre_hook(self.refuse)
                try:
                    yield network
                finally:
                    hook.remove()


IN_MAIN_MEMORY = "[enforce fail at alloc_cpu.cpp:125] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes."


@pytest.mark.parametrize("place", ["loading", "running"])
@pytest.mark.parametrize("kind", PART_LABELS)
@pytest.mark.parametrize(
    "words", ["CUDA out of memory. Tried to allocate 3.00 GiB.\nmore about it", "", IN_MAIN_MEMORY]
)
def test_too_little_memory_is_named(kind, place, words, networks):
    pipeline = S2VPipeline(Exhausted(networks, kind, place, words))
    with pytest.raises(OutOfMemory) as caught:
        pipeline.encode_voice(Recording(0.1 * torch.randn(1, RATE), RATE))
        pipeline.encode_prompts("a person talks")
        list(pipeline.generate(make_job(), QUICK))
    message = str(caught.value)
    assert f"cpu has not enough memory for the {PART_LABELS[kind]}" in message
    assert words.partition("\n")[0] in message and "more about it" not in message
    assert REMEDIES[kind] in message and message.endswith(".")
    assert isinstance(caught.value.__cause__, RuntimeError) and hooks_in(networks) == 0


# --- clips on disk -------------------------------------------------------------------------------------------------


def random_pictures(count: int, height: int = 48, width: int = 64) -> Tensor:
    return torch.randint(0, 256, (count, height, width, 3), dtype=torch.uint8)


def random_sound(seconds: float, rate: int = 22050, channels: int = 1) -> Recording:
    """On the grid of 16-bit samples."""
    return Recording(torch.randint(-30000, 30000, (channels, round(seconds * rate))) / 32768, rate)


def add_all(store: ClipStore, clips: list[Tensor]) -> None:
    for pictures in clips:
        store.add(pictures, torch.randn(1, 16, 5, 6, 8), torch.randn(1, 3, 73, 48, 64))


@pytest.mark.parametrize("fps", [16.0, 25.0, 30000 / 1001, 60.0, 7.3, 1.0])
def test_stored_clips_come_back_bit_by_bit(fps, tmp_path):
    clips = [random_pictures(count) for count in (17, 20, 4, 1)]
    store = ClipStore(tmp_path / "clips", fps, random_sound(1.0), {"seed": 3})
    add_all(store, clips)
    assert store.stored.clip_frames == (17, 20, 4, 1) and store.stored.frames == 42
    for stored, pictures in zip(store.stored, clips, strict=True):
        assert torch.equal(stored, pictures)


@pytest.mark.parametrize(("rate", "channels"), [(22050, 1), (48000, 2), (8000, 1)])
def test_each_clip_has_its_own_stretch_of_sound(rate, channels, tmp_path):
    """Sample by sample, within half a step of 16 bits; the last clip goes on in silence past the end."""
    fps, lengths, seconds = 16.0, (17, 20, 20), 2.9
    recording = random_sound(seconds, rate, channels)
    store = ClipStore(tmp_path / "clips", fps, recording, {})
    add_all(store, [random_pictures(count) for count in lengths])
    start, total = 0, recording.samples.shape[1]
    for index, count in enumerate(lengths):
        own = read_recording(store.stored.path(index))
        first, stop = (round(frame / fps * rate) for frame in (start, start + count))
        assert own.rate_hz == rate and own.samples.shape[0] == channels
        assert abs(own.samples.shape[1] - (stop - first)) <= 1
        sounding = min(stop - first, total - first, own.samples.shape[1])
        expected = recording.samples[:, first : first + sounding]
        torch.testing.assert_close(own.samples[:, :sounding], expected, atol=0.51 / 32768, rtol=0)
        assert not own.samples[:, sounding:].any()
        start += count
    assert total < stop and start / fps > seconds, "the last clip was longer than the sound"


def test_a_clip_that_was_deleted_is_named(tmp_path):
    store = ClipStore(tmp_path / "clips", 16.0, random_sound(1.0), {})
    add_all(store, [random_pictures(4) for _ in range(3)])
    store.stored.path(1).unlink()
    clips = iter(store.stored)
    next(clips)
    with pytest.raises(ConfigError, match=r"clip_0001\.mkv is no longer there.*Run it again"):
        next(clips)


@contextlib.contextmanager
def files_no_larger_than(size: int):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("limit", [0, 30_000, 200_000], ids=["nothing", "half a film", "film but no latents"])
@pytest.mark.parametrize("finished", [0, 2])
def test_a_full_disk_leaves_the_finished_clips(limit, finished, tmp_path):
    """The films take about 90 kB, the motion 2.7 MB. Afterwards the same clip can be kept, when there is room."""
    clips = [random_pictures(10) for _ in range(finished + 1)]
    store = ClipStore(tmp_path / "clips", 16.0, random_sound(3.0), {})
    add_all(store, clips[:finished])
    with (
        files_no_larger_than(limit),
        pytest.raises(ConfigError, match=rf"clip {finished + 1} cannot be kept.*finished clips there: {finished}\."),
    ):
        add_all(store, clips[finished:])
    assert store.stored.clip_frames == (10,) * finished
    for stored, pictures in zip(store.stored, clips, strict=False):
        assert torch.equal(stored, pictures)
    assert not list(tmp_path.rglob("*.part"))
    assert bool(finished) == (tmp_path / "clips").exists(), "a folder without clips would be in the next run's way"
    add_all(store, clips[finished:])
    assert all(torch.equal(*pair) for pair in zip(store.stored, clips, strict=True))


def test_a_disk_without_space_is_one_message(tmp_path, monkeypatch):
    store = ClipStore(tmp_path / "clips", 16.0, random_sound(3.0), {})
    add_all(store, [random_pictures(5)])

    def refuse(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(clip_store, "write_record", refuse)
    with pytest.raises(ConfigError, match=r"clip 2 cannot be kept.*No space left.*Free some space") as caught:
        add_all(store, [random_pictures(5)])
    assert len(str(caught.value).splitlines()) == 1 and str(caught.value).endswith("there: 1.")
    assert len(list(store.stored)) == 1


# --- the command line ----------------------------------------------------------------------------------------------


@pytest.fixture
def voice(tmp_path) -> Path:
    sound = random_sound(1.0).samples[0] / 4
    with wave.open(str(tmp_path / "voice.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(22050)
        file.writeframes((sound * 32767).to(torch.int16).numpy().tobytes())
    return tmp_path / "voice.wav"


def test_the_demo_needs_no_download(voice, run_cli, tmp_path, monkeypatch, caplog):
    """The embedded model and portrait, with another voice, a short one, and what `assets` says, here less of it."""
    monkeypatch.setattr(assets, "DEMO_SIDE_PX", 64)
    monkeypatch.setattr(assets, "DEMO_SAMPLING", SamplingConfig(steps=1, guidance_scale=2.0))
    code, out, err = run_cli("demo", "--json", "--audio", voice, "--save_file", tmp_path / "demo.mp4")
    assert code == 0, err
    report = json.loads(out)
    assert (report["frames"], report["width"], report["height"], report["clips"]) == (16, 64, 64, 1)
    facts = probe_video(tmp_path / "demo.mp4")
    assert facts.frames == 16 and facts.audio_seconds == pytest.approx(1.0, abs=0.05)
    assert sum("drawn faces" in record.message for record in caplog.records) == 1


@pytest.fixture
def generate(voice, tiny_checkpoint, run_cli, tmp_path):
    def run(name: str, *flags: str) -> tuple[int, dict, str]:
        code, out, err = run_cli(
            "generate", "--json", "--ckpt_dir", tiny_checkpoint, "--audio", voice, "--size", "64*64",
            "--infer_frames", 20, "--sample_steps", 1, "--sample_guide_scale", 1, "--base_seed", 5,
            "--save_file", tmp_path / f"{name}.mp4", "--keep_clips", *flags,
        )  # fmt: skip
        return code, json.loads(out), err

    return run


def test_without_a_picture_and_with_newer_flags(generate, tmp_path, caplog):
    """Two runs: as it comes, with the embedded portrait, and with flags that all change the pictures."""
    flags = {"plain": (), "other": ("--precision", "float8-weights", "--noise", "reference", "--hear_past")}
    used, shown = {}, {}
    for name, more in flags.items():
        code, report, err = generate(name, *more)
        assert code == 0 and report["frames"] == 16, err
        folder = tmp_path / f"{name}.mp4.clips"
        settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
        used[name] = settings["request"]["precision"], settings["sampling"]["noise"], settings["video"]["hears_past"]
        shown[name] = read_frames(folder / "clip_0000.mkv", 16, 0, 16)
    assert used == {"plain": ("auto", "cpu", False), "other": ("float8-weights", "reference", True)}
    assert not torch.equal(shown["plain"], shown["other"])
    assert sum("portrait that comes with the pack" in record.message for record in caplog.records) == 2
    assert settings["request"]["image"] == assets.embedded(assets.PORTRAIT).name

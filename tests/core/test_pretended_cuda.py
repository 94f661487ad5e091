"""All of a run with its networks and tensors on a GPU that refuses what CUDA refuses: see pretended_cuda.py."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pretended_cuda import pretended_cuda
from safetensors.torch import save_file
from torch import Tensor

from wan_s2v_core.conditioning import image
from wan_s2v_core.conditioning.bundle import S2VConditioning, make_conditioning
from wan_s2v_core.config import AccelerationPlan, MemoryLimits, SamplingConfig, VideoConfig
from wan_s2v_core.io import small_film
from wan_s2v_core.io.audio import Recording
from wan_s2v_core.io.clip_store import ClipStore, find_earlier
from wan_s2v_core.io.digest import digest_of
from wan_s2v_core.io.encodings import EncodingStore
from wan_s2v_core.io.film import write_film
from wan_s2v_core.io.video import VideoWriter, probe_video
from wan_s2v_core.model.checkpoint import PART_LABELS
from wan_s2v_core.model.parts import Checkpoint
from wan_s2v_core.networks import CheckpointNetworks
from wan_s2v_core.pipeline import S2VPipeline
from wan_s2v_core.prepare import plan_loading
from wan_s2v_core.runs import clip_keys
from wan_s2v_core.sampling.clips import ClipTask
from wan_s2v_core.sampling.preview import colour_factors

WIDTH = HEIGHT = 64
SMALL_FILM_PX = 48
"""Instead of 384: the run is wider, and quick."""
VIDEO = VideoConfig(exact_size=(HEIGHT, WIDTH), clip_frames=20, motion_frames=9)
STEPS = SamplingConfig(steps=1, guidance_scale=2.0, audio_guidance_scale=3.0, colour_match=0.5)
RATE = 16000


@pytest.fixture(autouse=True)
def fresh_content(fresh_seed):
    torch.manual_seed(fresh_seed)


# --- what the pretended GPU refuses, and what it does --------------------------------------------------------------


def resized(mode: str, **options) -> Callable[[Tensor], Tensor]:
    return lambda x: F.interpolate(x, size=(4, 4), mode=mode, **options)


REFUSED = {
    "bytes, bilinear": (resized("bilinear"), RuntimeError),
    "bytes, bilinear with antialias": (resized("bilinear", antialias=True), RuntimeError),
    "bytes, bicubic": (resized("bicubic"), RuntimeError),
    "integers, nearest": (lambda x: resized("nearest")(x.int()), RuntimeError),
    "integers, matrix product": (lambda x: x.long() @ x.long(), RuntimeError),
    "integers, average pool": (lambda x: F.avg_pool2d(x.long(), 2), RuntimeError),
    "numpy": (lambda x: x.numpy(), TypeError),
    "numpy.asarray": (np.asarray, TypeError),
    "numpy.from_dlpack": (np.from_dlpack, TypeError),
    "an array's tensor": (lambda x: x + torch.from_numpy(np.ones((8, 8), np.uint8)), RuntimeError),
    "joined with the CPU's": (lambda x: torch.cat([x, torch.zeros(1, 3, 8, 8, dtype=torch.uint8)]), RuntimeError),
    "a mask of the CPU's": (lambda x: x.masked_fill(torch.zeros(8, 8, dtype=torch.bool), 0), RuntimeError),
    "one value of the GPU's, many of the CPU's": (lambda x: torch.ones(3) * x.sum(), RuntimeError),
    "chosen of the CPU's by indices of the GPU's": (lambda x: torch.ones(9)[x.long().flatten()], RuntimeError),
    "a layer of the CPU's": (lambda x: torch.nn.Linear(8, 8)(x.float()), RuntimeError),
    "into the CPU's": (lambda x: torch.div(x, 255, out=torch.empty(2, 3, 8, 8)), RuntimeError),
    "pinned": (lambda x: x.pin_memory(), RuntimeError),
    "made pinned": (lambda x: torch.empty(3, device=x.device, pin_memory=True), RuntimeError),
    "the CPU's random numbers": (
        lambda x: torch.randn(3, generator=torch.Generator().manual_seed(0), device=x.device),
        RuntimeError,
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_gpu_refuses_is_refused(name):
    work, error = REFUSED[name]
    with pretended_cuda() as gpu:
        given = torch.randint(0, 2, (2, 3, 8, 8), dtype=torch.uint8, device=gpu)
        with pytest.raises(error):
            work(given)
        if name not in ("a mask of the CPU's", "an array's tensor", "one value of the GPU's, many of the CPU's"):
            return
        given = given.cpu()
        assert work(given).device.type == "cpu", "the same on one device is right"


def test_what_lies_on_it_stays_there(tmp_path):
    with pretended_cuda() as gpu:
        x = torch.rand(2, 3, 8, 8, device=gpu)
        layer = torch.nn.Linear(8, 5).to(gpu)
        for made in (
            x + 1,
            x * torch.tensor(2.0),
            x[0, :, 1:],
            x[torch.tensor([1, 0])],
            x.half(),
            layer(x),
            resized("bilinear", antialias=True)(x),
            torch.zeros_like(x),
            x.new_zeros(3),
            torch.nn.Parameter(x),
            torch.ones(3).to(x),
            torch.randn(2, generator=torch.Generator(gpu).manual_seed(1), device=gpu),
            resized("nearest")((255 * x).byte()),
        ):
            assert made.device == gpu and made.is_cuda and not made.is_cpu
        host = torch.empty(x.shape)
        for made in (
            x.cpu(),
            x.to("cpu"),
            host.copy_(x),
            x.to("cpu", torch.float64),
            torch.zeros_like(x, device="cpu"),
        ):
            assert made.device.type == "cpu" and not made.is_cuda
            made.numpy()
        assert torch.equal(host, x.cpu()) and x.tolist() == host.tolist() and x.sum().item() == host.sum().item()
        host[:1] = x[:1]
        assert host.device.type == "cpu" and layer.cpu().weight.device.type == "cpu"
        save_file({"x": x}, tmp_path / "x.safetensors")


# --- a run --------------------------------------------------------------------------------------------------------


@pytest.fixture
def make_run(tiny_checkpoint, tmp_path, monkeypatch):
    """A run wider than a small film, with all that is written, shown or hashed of it -> its folder."""
    monkeypatch.setattr(small_film, "LONGEST_SIDE_PX", SMALL_FILM_PX)
    paths = dict.fromkeys(PART_LABELS, tiny_checkpoint)
    sound, picture = 0.1 * torch.randn(2, 2 * RATE), torch.randint(0, 256, (90, 70, 3), dtype=torch.uint8)
    driving = torch.randint(0, 256, (20, 40, 60, 3), dtype=torch.uint8)

    def look(job: S2VConditioning, task: ClipTask, clean: Tensor) -> None:
        factors, bias = colour_factors(job.reference, task.reference_latents)
        shown = (clean[:, :, 0].float().cpu()[0].movedim(0, -1) @ factors.T + bias).numpy()
        assert np.isfinite(shown).all()

    def run(device: torch.device, clips: int, limits: MemoryLimits = MemoryLimits()) -> Path:  # noqa: B008  (frozen)
        loading = plan_loading("float32", device, acceleration=AccelerationPlan(fused=False))
        networks = CheckpointNetworks(Checkpoint(paths), loading, limits=limits)
        pipeline = S2VPipeline(networks)
        voice = pipeline.encode_voice(Recording(sound, RATE), folder=tmp_path)
        texts = pipeline.encode_prompts("A person talks.", "blurry")
        kept = EncodingStore(tmp_path / "kept").get("text", digest_of(1, *texts), lambda: {"text": texts[0]})
        assert torch.equal(kept["text"], texts[0])
        video = replace(VIDEO, clips=clips)
        job = make_conditioning(picture, voice, *texts, video, lambda start, frames: driving[start : start + frames])
        keys = clip_keys(job, STEPS, None, networks.checkpoint, networks.loading)
        store = ClipStore(tmp_path / "clips", VIDEO.fps, job.recording, {}, keys)
        sampled = pipeline.generate(job, STEPS, lambda task, _, clean: look(job, task, clean))
        for clip in sampled:
            assert clip.latents.device == device
            frames = image.to_frames(clip.video[0])
            store.add(frames, clip.latents, clip.motion_video)
            small_film.write_small_film(tmp_path / f"small_{clip.index}.mp4", frames, VIDEO.fps, job.recording)
            small_film.write_small_film(tmp_path / "there.mp4", frames.to(device), VIDEO.fps, job.recording)
            with VideoWriter(tmp_path / "there.mkv", WIDTH, HEIGHT, VIDEO.fps, job.recording, "lossless-mkv") as writer:
                writer.write(frames.to(device))
        write_film(tmp_path / "video.mkv", store.stored, {})
        if clips > 1:
            (tmp_path / "clips" / "clip_0001.safetensors").unlink()
            earlier = find_earlier([tmp_path / "clips"], keys)
            store = ClipStore(tmp_path / "clips", VIDEO.fps, job.recording, {}, keys, earlier)
            (second,) = pipeline.generate(job, STEPS, finished=store.stored)
            store.add(image.to_frames(second.video[0]), second.latents, second.motion_video)
        assert len(list(store.stored)) == clips
        return tmp_path

    return run


def test_a_run_that_goes_on_on_a_gpu(make_run):
    with pretended_cuda() as gpu:
        folder = make_run(gpu, clips=2)
    assert probe_video(folder / "video.mkv").frames == 17 + 15
    small = probe_video(folder / "small_1.mp4")
    assert max(small.width_px, small.height_px) == SMALL_FILM_PX


def test_a_run_in_parts_on_a_gpu(make_run):
    """Blocks come and go through pinned memory, the VAE works in tiles, and pixels lie in host memory."""
    with pretended_cuda() as gpu:
        make_run(gpu, 1, MemoryLimits(resident_blocks=1, slice_tokens=256, tile_px=48))


def test_frames_that_are_resized_on_the_gpu_are_caught(make_run, monkeypatch):
    """As it was once: pictures stayed on the GPU, and the small film resized them there."""
    monkeypatch.setattr(image, "to_frames", lambda video: ((video.clamp(-1, 1) + 1) * 127.5).byte().movedim(0, -1))
    monkeypatch.setattr(small_film, "write_small_film", lambda path, frames, *_: small_film.shrunk(frames))
    with pretended_cuda() as gpu, pytest.raises(RuntimeError, match=r"_upsample_bilinear2d_aa.*torch.uint8 on cuda:0"):
        make_run(gpu, 1)

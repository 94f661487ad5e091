"""Pairs of DiTs, one for high noise and one for low: who serves which steps, and which is where when."""

import json
import shutil
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_sampling import sent

from wan_s2v_core.acceleration.experts.noise import ranges
from wan_s2v_core.assets import PORTRAIT, VOICE, embedded
from wan_s2v_core.bench.random_weights import fill_random
from wan_s2v_core.clip_denoiser import clip_denoiser
from wan_s2v_core.clip_sampler import ClipWork, LocalSampler
from wan_s2v_core.conditioning.bundle import make_conditioning
from wan_s2v_core.conditioning.image import read_picture
from wan_s2v_core.config import SOLVERS, ExpertRouting, SamplingConfig, VideoConfig
from wan_s2v_core.errors import ConfigError, OutOfMemory
from wan_s2v_core.io.audio import read_recording
from wan_s2v_core.io.video import read_frames
from wan_s2v_core.memory.budget import WHOLE, Planned
from wan_s2v_core.model.checkpoint import DIT, LOW_NOISE_DIT, VAE, dit_name, official_dit_config
from wan_s2v_core.model.dit import S2VTransformer
from wan_s2v_core.model.parts import Checkpoint
from wan_s2v_core.networks import CheckpointNetworks, open_checkpoint
from wan_s2v_core.pipeline import S2VPipeline, noise_of
from wan_s2v_core.prepare import plan_loading
from wan_s2v_core.runs import clip_keys
from wan_s2v_core.sampling.clips import ClipTask
from wan_s2v_core.sampling.denoise import denoise
from wan_s2v_core.sampling.solvers import SolverState, make_solver

pytestmark = pytest.mark.usefixtures("pooled_vae")
CPU = torch.device("cpu")
ONLY_HIGH, MIXED, ONLY_LOW = 0.5, 0.9, 0.9995
"""Boundaries; the two steps of the tests are at sigma 0.999 and 0.75."""
CONFIG = SamplingConfig(steps=2, guidance_scale=3.0, seed=5, noise_boundary=MIXED)


def write_dit(folder: Path, tiny_maker, config, seed: int) -> Path:
    """The DiT of a folder in the official layout, in the place of the one that is there."""
    folder.mkdir(exist_ok=True)
    for shard in folder.glob("diffusion_pytorch_model*"):
        shard.unlink()
    model = S2VTransformer(config)
    fill_random(model, seed)
    tiny_maker.write_shards(folder, tiny_maker.bfloat16_weights(model, dit_name))
    tiny_maker.write_json(folder / "config.json", official_dit_config(config))
    return folder


@pytest.fixture(scope="module")
def other_checkpoint(tiny_checkpoint, tiny_maker, tmp_path_factory) -> Path:
    """The tiny checkpoint with another DiT."""
    folder = shutil.copytree(tiny_checkpoint, tmp_path_factory.mktemp("other") / "checkpoint")
    return write_dit(Path(folder), tiny_maker, tiny_maker.DIT_CONFIG, 1)


@pytest.fixture(scope="module")
def single_file(tiny_maker, tmp_path_factory) -> Path:
    """That other DiT as one file."""
    model = S2VTransformer(tiny_maker.DIT_CONFIG)
    fill_random(model, 1)
    path = tmp_path_factory.mktemp("single") / "low.safetensors"
    config = {"config": json.dumps(official_dit_config(tiny_maker.DIT_CONFIG))}
    save_file(tiny_maker.bfloat16_weights(model, dit_name), path, config)
    return path


def words_of(checkpoint: Path, target: Path, **flags) -> list[str]:
    given = {
        "ckpt_dir": checkpoint, "audio": embedded(VOICE), "image": embedded(PORTRAIT), "audio_seconds": 1.0,
        "size": "64*64", "infer_frames": 20, "sample_steps": 2, "sample_guide_scale": 1, "base_seed": 5,
        "device": "cpu", "save_file": target,
    } | flags  # fmt: skip
    return ["generate", "--json", *(word for flag, value in given.items() for word in (f"--{flag}", str(value)))]


@pytest.fixture
def video_of(run_cli, tmp_path):
    """Run `generate` for one clip -> lossless frames."""

    def make(checkpoint: Path, name: str, **flags):
        code, out, err = run_cli(*words_of(checkpoint, tmp_path / f"{name}.mkv", **flags))
        assert code == 0, err
        return read_frames(json.loads(out)["path"], 16, 0, 99)

    return make


def test_each_model_serves_its_noise(video_of, tiny_checkpoint, other_checkpoint, single_file):
    """All steps on one side of the boundary are the plain run with that model, bit for bit."""
    first, second = video_of(tiny_checkpoint, "first"), video_of(other_checkpoint, "second")
    assert not torch.equal(first, second)
    high, mixed, low = (
        video_of(tiny_checkpoint, f"{boundary}", noise_expert=other_checkpoint, noise_boundary=boundary)
        for boundary in (ONLY_HIGH, MIXED, ONLY_LOW)
    )
    assert torch.equal(high, first) and torch.equal(low, second)
    assert not torch.equal(mixed, first) and not torch.equal(mixed, second)
    assert torch.equal(video_of(tiny_checkpoint, "file", noise_expert=single_file), mixed), "0.9 unless it is said"
    assert torch.equal(video_of(tiny_checkpoint, "same", noise_expert=tiny_checkpoint), first)


class Watched(CheckpointNetworks):
    """Tells which networks are in use, and has only one at a time."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.uses: list[str] = []
        self.in_use: str | None = None

    @contextmanager
    def use(self, name: str, planned: Planned = WHOLE):
        assert self.in_use is None, f"{self.in_use} has not left for {name}"
        self.in_use = name
        self.uses.append(name)
        try:
            with super().use(name, planned) as network:
                yield network
        finally:
            self.in_use = None


@pytest.fixture
def watched(tiny_checkpoint, other_checkpoint) -> Watched:
    plain = open_checkpoint(str(tiny_checkpoint), plan_loading("auto", CPU), noise_expert=str(other_checkpoint))
    return Watched(plain.checkpoint, plain.loading)


@pytest.fixture
def job(watched):
    """Two clips."""
    pipeline = S2VPipeline(watched)
    voice = pipeline.encode_voice(read_recording(embedded(VOICE), 0, 2.0))
    texts = pipeline.encode_prompts("a face", "a wall")
    watched.uses.clear()
    return make_conditioning(
        read_picture(embedded(PORTRAIT)), voice, *texts, VideoConfig(max_area=64 * 64, clip_frames=20)
    )


def test_a_pair_serves_by_the_boundary():
    moments = [999.0, 900.0, 899.0, 500.0, 0.0]
    assert ranges(moments, 0.9) == [(DIT, range(2)), (LOW_NOISE_DIT, range(2, 5))]
    assert ranges([875.0, 874.9], 0.875) == [(DIT, range(1)), (LOW_NOISE_DIT, range(1, 2))], "of the noisier side"
    assert ranges(moments, None) == [(DIT, range(5))]
    assert ranges(moments, 0.9999) == [(LOW_NOISE_DIT, range(5))], "one without steps is left out"


def test_one_at_a_time_and_changed_once_a_clip(watched, job):
    clips = list(S2VPipeline(watched).generate(job, CONFIG))
    assert len(clips) == 2
    served = [name for name in watched.uses if name != VAE]
    assert served == [DIT, LOW_NOISE_DIT] * 2
    watched.uses.clear()
    list(S2VPipeline(watched).generate(job, replace(CONFIG, noise_boundary=ONLY_LOW)))
    assert DIT not in watched.uses, "a model without steps is not loaded"


@torch.inference_mode()
def test_a_clip_is_what_the_two_denoisers_make(watched, job):
    (clip, _) = S2VPipeline(watched).generate(job, CONFIG)
    pipeline, noise = S2VPipeline(watched), noise_of(job, 0, CONFIG, CPU)
    inputs = pipeline.clip_inputs(job, ClipTask(0, noise, pipeline.encode(job.reference), None), job.text)
    solver, state = make_solver(CONFIG), SolverState(noise)
    for step, name in enumerate((DIT, LOW_NOISE_DIT)):
        denoiser = clip_denoiser(watched.loaded[name], inputs, job.negative_text, CONFIG)
        state = denoise(denoiser, solver, state, range(step, step + 1))
    assert torch.equal(state.latents, clip.latents)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_clip_that_was_left_between_two_steps_goes_on(solver, watched, job):
    """In another sampler, from a state that was sent: the same bits, and only the models that are still needed."""
    config = replace(CONFIG, steps=4, solver=solver, noise_boundary=0.8)  # at sigma 1, 0.9, 0.75, 0.5
    (clip, _) = S2VPipeline(watched).generate(job, config)
    pipeline, noise = S2VPipeline(watched), noise_of(job, 0, config, CPU)
    inputs = pipeline.clip_inputs(job, ClipTask(0, noise, pipeline.encode(job.reference), None), job.text)
    for cut in range(5):
        steps, uses = [], []
        given = ClipWork(inputs, job.negative_text, config), lambda step, _, steps=steps: steps.append(step)
        state = SolverState(noise)
        for stop in (cut, 4):
            watched.uses.clear()
            state = LocalSampler(watched).denoise_until(sent(state), stop, *given)
            uses.append(list(watched.uses))
        assert torch.equal(state.latents, clip.latents) and state.step == 4 and steps == [1, 2, 3, 4]
        served = [DIT] * 2 + [LOW_NOISE_DIT] * 2
        assert uses == [list(dict.fromkeys(served[:cut])), list(dict.fromkeys(served[cut:]))]


def test_progress_and_previews_are_those_of_one_model(watched, job):
    told = []
    clips = list(S2VPipeline(watched).generate(job, CONFIG, lambda task, *news: told.append((task.index, *news))))
    assert [news[:2] for news in told] == [(clip, step) for clip in (0, 1) for step in (1, 2)]
    for clip in clips:
        torch.testing.assert_close(told[2 * clip.index + 1][2], clip.latents, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", [DIT, LOW_NOISE_DIT])
def test_cancel_takes_the_model_off(name, watched, job):
    class StopHereError(Exception):
        pass

    def check():
        if watched.in_use == name:
            raise StopHereError

    with pytest.raises(StopHereError):
        list(S2VPipeline(watched, check).generate(job, CONFIG))
    assert watched.in_use is None and watched.uses[-1] == name


def test_a_second_model_that_does_not_fit_is_told(watched, job, monkeypatch):
    """As for the first: memory may be short when they change over."""
    use = Watched.use

    def short(self, name, planned=WHOLE):
        if name == LOW_NOISE_DIT:
            raise torch.OutOfMemoryError("Tried to allocate 33 GB.")
        return use(self, name, planned)

    monkeypatch.setattr(Watched, "use", short)
    with pytest.raises(OutOfMemory, match=r"for the S2V DiT \(Tried to allocate 33 GB"):
        list(S2VPipeline(watched).generate(job, CONFIG))
    assert watched.in_use is None


def test_routing_and_load_are_of_both(tiny_checkpoint, tiny_maker, tmp_path, job):
    """Of two models with learned experts."""
    config = replace(tiny_maker.DIT_CONFIG, num_experts=4, top_k=3, feed_forward_width=32)
    paths = {DIT: write_dit(tmp_path / "high", tiny_maker, config, 2), VAE: tiny_checkpoint}
    pair = paths | {LOW_NOISE_DIT: write_dit(tmp_path / "low", tiny_maker, config, 3)}
    loads = []
    for given, boundary in ((paths, None), (pair, MIXED)):
        pipeline = S2VPipeline(CheckpointNetworks(Checkpoint(given), plan_loading("auto", CPU)))
        for _ in pipeline.generate(job, replace(CONFIG, noise_boundary=boundary), routing=ExpertRouting(top_k=2)):
            pass
        loads.append(pipeline.expert_load)
    assert loads[0].tokens == loads[1].tokens and loads[0].chosen != loads[1].chosen
    assert all(sum(load.chosen) == 2 * load.tokens for load in loads)


def test_keys_know_the_second_file_and_the_boundary(tiny_checkpoint, other_checkpoint, watched, job, tmp_path):
    def key(paths, config=CONFIG, loading=watched.loading):
        return clip_keys(job, config, None, Checkpoint(paths), loading)[0]

    single = {name: path for name, path in watched.checkpoint.paths.items() if name != LOW_NOISE_DIT}
    copied = watched.checkpoint.paths | {LOW_NOISE_DIT: Path(shutil.copytree(other_checkpoint, tmp_path / "copy"))}
    keys = [
        key(watched.checkpoint.paths),
        key(watched.checkpoint.paths, replace(CONFIG, noise_boundary=0.8)),
        key(watched.checkpoint.paths | {LOW_NOISE_DIT: tiny_checkpoint}),
        key(copied),
        key(single, replace(CONFIG, noise_boundary=None)),
    ]
    assert len(set(keys)) == len(keys) and key(watched.checkpoint.paths) == keys[0]


def test_a_stopped_run_goes_on(video_of, run_cli, tiny_checkpoint, other_checkpoint, tmp_path, monkeypatch):
    """After the first of two clips, and with the same pair alone."""
    pair = {"noise_expert": other_checkpoint, "audio_seconds": 2.0}
    whole = video_of(tiny_checkpoint, "whole", **pair)
    words = words_of(tiny_checkpoint, tmp_path / "cut.mkv", **pair)
    words.remove("--json")

    def stop(clip: int, clips: int, step: int) -> None:
        if (clip, step) == (2, 1):
            raise KeyboardInterrupt

    monkeypatch.setattr("wan_s2v_core.cli.show_step", stop)
    assert run_cli(*words)[0] == 130
    again = shutil.copytree(tmp_path / "cut.mkv.clips", tmp_path / "other.mkv.clips")
    steps = []
    monkeypatch.setattr("wan_s2v_core.cli.show_step", lambda *news: steps.append(news))
    assert run_cli(*words)[0] == 0 and steps == [(2, 2, 1), (2, 2, 2)]
    assert torch.equal(read_frames(tmp_path / "cut.mkv", 16, 0, 99), whole)
    pair["noise_expert"] = tiny_checkpoint
    code, _, err = run_cli(*words_of(tiny_checkpoint, tmp_path / "other.mkv", **pair))
    assert code == 2 and str(again) in err, "clips of another pair are not gone on with"


BAD = {
    "boundary of nothing": ({"noise_boundary": 0}, "noise_boundary=0.0 must lie between 0 and 1"),
    "boundary of everything": ({"noise_boundary": 1}, "noise_boundary=1.0 must lie between 0 and 1"),
    "boundary that is no number": ({"noise_boundary": "nan"}, "--noise_boundary: nan is no number"),
    "boundary alone": ({"noise_expert": None}, "noise_boundary=0.9 with noise_expert=None"),
    "missing": ({"noise_expert": "nowhere"}, "nowhere is not there"),
    "another network": ({"noise_expert": "checkpoint/Wan2.1_VAE.pth"}, "is a Wan 2.1 VAE, not a S2V DiT"),
    "another size": ({"noise_expert": "deeper"}, "differ in blocks 6 and 7. Use two"),
}


@pytest.mark.parametrize("mistake", BAD)
def test_mistakes_are_named(mistake, run_cli, tiny_checkpoint, tiny_maker, tmp_path):
    (tmp_path / "checkpoint").symlink_to(tiny_checkpoint)
    write_dit(tmp_path / "deeper", tiny_maker, replace(tiny_maker.DIT_CONFIG, blocks=7), 0)
    changes, message = BAD[mistake]
    flags = {"noise_expert": "checkpoint", "noise_boundary": 0.9} | changes
    if flags["noise_expert"]:
        flags["noise_expert"] = tmp_path / flags["noise_expert"]
    flags = {name: value for name, value in flags.items() if value is not None}
    code, out, _ = run_cli(*words_of(tmp_path / "checkpoint", tmp_path / "out.mkv", **flags))
    assert code == 2 and message in json.loads(out)["error"], out
    assert not list(tmp_path.glob("out*"))


def test_a_request_without_a_boundary_is_refused(tiny_checkpoint, tmp_path):
    from wan_s2v_core.render import RenderRequest, render

    files = (str(tiny_checkpoint), str(embedded(VOICE)), str(embedded(PORTRAIT)), str(tmp_path / "out.mkv"))
    request = RenderRequest(*files, noise_expert=str(tiny_checkpoint))
    with pytest.raises(ConfigError, match=r"noise_boundary=None with noise_expert=.*Give both, or neither"):
        render(request, VideoConfig(), SamplingConfig(steps=1))

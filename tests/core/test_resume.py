"""Runs that go on after the clips of an earlier one: the same video, bit by bit, and never from anything else."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from wan_s2v_core import runs
from wan_s2v_core.conditioning.bundle import S2VConditioning, Voice, hold_last, make_conditioning
from wan_s2v_core.config import ExpertRouting, SamplingConfig, VideoConfig
from wan_s2v_core.geometry import ClipGeometry, plan_clips
from wan_s2v_core.io.audio import Recording
from wan_s2v_core.io.clip_store import ClipStore, EarlierClips, find_earlier, stored_keys
from wan_s2v_core.io.digest import digest_of
from wan_s2v_core.io.video import VideoWriter, read_frames
from wan_s2v_core.model.checkpoint import PART_LABELS
from wan_s2v_core.model.parts import Checkpoint
from wan_s2v_core.networks import CheckpointNetworks
from wan_s2v_core.prepare import plan_loading
from wan_s2v_core.runs import clip_keys
from wan_s2v_core.sampling.clips import ClipTask

VIDEO = VideoConfig(max_area=64 * 64, clip_frames=20, motion_frames=25)
pytestmark = pytest.mark.usefixtures("pooled_vae")
QUICK = SamplingConfig(steps=2, guidance_scale=1.0, seed=5)
RATE, CLIPS, FRAMES = 16000, 4, 68
"""A recording of 4.25 s: 17 + 20 + 20 frames and a last clip of 11, cut from 20; the past spans two clips."""


@pytest.fixture(scope="module")
def networks(tiny_checkpoint) -> CheckpointNetworks:
    checkpoint = Checkpoint(dict.fromkeys(PART_LABELS, tiny_checkpoint))
    return CheckpointNetworks(checkpoint, plan_loading("auto", torch.device("cpu")))


def make_job(seconds: float = 4.25, video: VideoConfig = VIDEO, pose: Tensor | None = None, **changes):
    """The same in every call: longer ones begin as shorter ones do."""
    generator = torch.Generator().manual_seed(11)
    features = torch.randn(300, 4, 32, generator=generator).movedim(0, 1)[:, : round(30 * seconds)]
    sound = 0.1 * torch.randn(1, 10 * RATE, generator=generator)[:, : round(seconds * RATE)]
    picture = torch.randint(0, 256, (90, 70, 3), dtype=torch.uint8, generator=generator)
    texts = (torch.randn(1, tokens, 64, generator=generator) for tokens in (5, 3))
    driving = None if pose is None else lambda start, frames: pose[start : start + frames]
    job = make_conditioning(picture, Voice(Recording(sound, RATE), features), *texts, video, driving)
    return replace(job, **changes)


class StopHereError(Exception):
    pass


class Run:
    """A video into a folder, going on after what is found in `folders`; `stop` is a clip and a step, from 1."""

    def __init__(self, networks, job: S2VConditioning, folder: Path, *folders: Path, stop=None, config=QUICK):
        self.steps: list[tuple[int, int]] = []
        self.stop = stop
        run = runs.Run(networks, config)
        run.accept(job)
        self.earlier: EarlierClips | None = run.find_earlier(folders)
        run.begin(folder, self.earlier)
        self.store = run.store
        for frames in run.clips(self.tell):
            assert frames.dtype == torch.uint8

    def tell(self, task: ClipTask, step: int, _: Tensor) -> None:
        self.steps.append((task.index + 1, step))
        if self.stop == self.steps[-1]:
            raise StopHereError

    @property
    def first(self) -> int:
        """The clip that was sampled first."""
        return min(self.steps)[0]


def everything_in(folder: Path, clips: int = CLIPS) -> list[Tensor]:
    """Pictures, then latents, of clip after clip."""
    films = [read_frames(folder / f"clip_{clip:04d}.mkv", 16, 0, 99) for clip in range(clips)]
    return [*films, *(load_file(folder / f"clip_{clip:04d}.safetensors")["latents"] for clip in range(clips))]


def assert_same(folder: Path, other: Path, clips: int = CLIPS) -> None:
    for one, two in zip(everything_in(folder, clips), everything_in(other, clips), strict=True):
        assert torch.equal(one, two)


@pytest.fixture(scope="module")
def whole(networks, tmp_path_factory) -> Path:
    """The clips of a run that was not stopped."""
    folder = tmp_path_factory.mktemp("whole") / "clips"
    run = Run(networks, make_job(), folder)
    assert run.store.stored.clip_frames == (17, 20, 20, 11) and run.store.stored.frames == FRAMES
    return folder


@pytest.fixture
def earlier(whole, tmp_path) -> Path:
    """A copy of them, to be changed."""
    return Path(shutil.copytree(whole, tmp_path / "earlier"))


# --- the same video ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("has_motion", [True, False], ids=["motion", "latents alone"])
@pytest.mark.parametrize("is_in_place", [True, False], ids=["in place", "elsewhere"])
@pytest.mark.parametrize("stop", [(2, 1), (3, 2)])
def test_a_stopped_run_goes_on_to_the_same_video(stop, is_in_place, has_motion, networks, whole, tmp_path):
    first = tmp_path / "first"
    with pytest.raises(StopHereError):
        Run(networks, make_job(), first, stop=stop)
    if not has_motion:
        (first / "motion.safetensors").unlink()
    folder = first if is_in_place else tmp_path / "second"
    run = Run(networks, make_job(), folder, first)
    assert run.earlier.clips == stop[0] - 1 and run.first == stop[0]
    assert run.steps == [(clip, step) for clip in range(stop[0], CLIPS + 1) for step in (1, 2)]
    if not is_in_place:
        shutil.rmtree(first)
    assert_same(folder, whole)
    assert torch.equal(torch.cat(list(run.store.stored)), torch.cat(everything_in(whole)[:CLIPS]))
    assert torch.equal(run.store.stored.latents(CLIPS - 1), everything_in(whole)[-1])
    assert torch.equal(
        run.store.stored.motion_video(), Run(networks, make_job(), whole, whole).store.stored.motion_video()
    )


def test_stopped_twice(networks, whole, tmp_path):
    for stop in ((2, 1), (4, 1)):
        with pytest.raises(StopHereError):
            Run(networks, make_job(), tmp_path / "clips", tmp_path / "clips", stop=stop)
    assert Run(networks, make_job(), tmp_path / "clips", tmp_path / "clips").first == 4
    assert_same(tmp_path / "clips", whole)


def test_a_finished_run_is_taken_as_it_is(networks, whole, tmp_path):
    run = Run(networks, make_job(), tmp_path / "again", whole)
    assert not run.steps and run.store.stored.frames == FRAMES
    assert_same(tmp_path / "again", whole)


def test_guidance_pose_past_and_start_from_the_picture(networks, tmp_path, real_vae):
    """Everything that a clip can read, through the real VAE."""
    pose = torch.randint(0, 256, (90, 40, 50, 3), dtype=torch.uint8)
    video = replace(VIDEO, hears_past=True, starts_from_reference=True)
    config = replace(QUICK, guidance_scale=3.0, audio_guidance_scale=2.0, noise="reference", colour_match=0.5)
    job = make_job(3.0, video, pose)
    Run(networks, job, tmp_path / "whole", config=config)
    with pytest.raises(StopHereError):
        Run(networks, job, tmp_path / "cut", stop=(3, 1), config=config)
    (tmp_path / "cut" / "motion.safetensors").unlink()
    assert Run(networks, job, tmp_path / "cut", tmp_path / "cut", config=config).first == 3
    assert_same(tmp_path / "cut", tmp_path / "whole", 3)


# --- what is the same beginning ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "config"),
    [
        ({}, replace(QUICK, seed=6)),
        ({}, replace(QUICK, steps=3)),
        ({}, replace(QUICK, guidance_scale=2.0)),
        ({}, replace(QUICK, colour_match=0.5)),
        ({"text": torch.zeros(1, 5, 64)}, QUICK),
        ({"negative_text": torch.zeros(1, 3, 64)}, QUICK),
        ({"reference": torch.zeros(1, 3, 1, 64, 64)}, QUICK),
        ({"video": replace(VIDEO, hears_past=True)}, QUICK),
        ({"geometry": ClipGeometry(20, 29)}, QUICK),
    ],
)
def test_other_inputs_are_another_video(changed, config, networks, whole):
    keys = clip_keys(make_job(**changed), config, None, networks.checkpoint, networks.loading)
    assert find_earlier([whole], keys) is None


def test_other_networks_are_another_video(networks, whole, tiny_checkpoint, tmp_path):
    job, same = make_job(), networks.loading
    half = plan_loading("bfloat16", same.device)
    assert find_earlier([whole], clip_keys(job, QUICK, None, networks.checkpoint, half)) is None
    assert find_earlier([whole], clip_keys(job, QUICK, ExpertRouting(top_k=1), networks.checkpoint, same)) is None
    replaced = Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))
    paths = dict.fromkeys(PART_LABELS, replaced)
    own = clip_keys(job, QUICK, None, Checkpoint(paths), same)[0]
    assert own == clip_keys(job, QUICK, None, Checkpoint(paths), same)[0]
    os.utime(replaced / "Wan2.1_VAE.pth", ns=(1, 1))
    assert clip_keys(job, QUICK, None, Checkpoint(paths), same)[0] != own


def test_a_longer_recording_goes_on_where_the_shorter_one_was_cut(networks, whole, tmp_path):
    """Where the embeddings of the voice begin the same: the last clip was shortened and is made again."""
    job = make_job(5.5)
    run = Run(networks, job, tmp_path / "longer", whole)
    assert run.earlier.clips == run.first - 1 == 3 and run.earlier.is_all is False
    Run(networks, job, tmp_path / "alone")
    assert_same(tmp_path / "longer", tmp_path / "alone", 5)


def test_fewer_clips_are_the_beginning_of_all(networks, whole, tmp_path):
    some = make_job(video=replace(VIDEO, clips=2))
    assert not Run(networks, some, tmp_path / "two", whole).steps
    run = Run(networks, make_job(), tmp_path / "all", tmp_path / "two")
    assert run.first == 3
    assert_same(tmp_path / "all", whole)


def test_a_voice_or_pose_that_changes_later(networks, tmp_path):
    pose = torch.randint(0, 256, (90, 40, 50, 3), dtype=torch.uint8)
    first = make_job(pose=pose)
    Run(networks, first, tmp_path / "first")
    pose = pose.clone()
    pose[17 + 20 :] = 0
    posed = make_job(pose=pose)
    assert Run(networks, posed, tmp_path / "posed", tmp_path / "first").first == 3
    Run(networks, posed, tmp_path / "alone")
    assert_same(tmp_path / "posed", tmp_path / "alone")
    features = first.features.clone()
    features[:, 31:] += 1  # heard in the frame after second 1, the first of the second clip
    spoken = replace(first, features=features)
    assert Run(networks, spoken, tmp_path / "spoken", tmp_path / "first", tmp_path / "posed").first == 2


def test_the_longest_beginning_is_taken(networks, whole, tmp_path):
    for name, stop in (("a", (2, 1)), ("b", (4, 1)), ("c", (3, 1))):
        with pytest.raises(StopHereError):
            Run(networks, make_job(), tmp_path / name, stop=stop)
    (tmp_path / "empty").mkdir()
    keys = clip_keys(make_job(), QUICK, None, networks.checkpoint, networks.loading)
    found = find_earlier(sorted(tmp_path.iterdir()), keys)
    assert found.folder.name == "b" and found.clips == 3 and found.clip_frames == (17, 20, 20)
    (tmp_path / "b" / "clip_0001.mkv").unlink()
    assert find_earlier(sorted(tmp_path.iterdir()), keys).folder.name == "c"


# --- damage --------------------------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def other_film(path: Path) -> None:
    with VideoWriter(path, 64, 64, 16, None, "lossless-mkv") as writer:
        writer.write(torch.zeros(7, 64, 64, 3, dtype=torch.uint8))


@pytest.mark.parametrize("clip", [0, 2])
@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("clip_{:04d}.mkv", Path.unlink),
        ("clip_{:04d}.mkv", cut),
        ("clip_{:04d}.mkv", flip),
        ("clip_{:04d}.mkv", other_film),
        ("clip_{:04d}.safetensors", Path.unlink),
        ("clip_{:04d}.safetensors", cut),
        ("clip_{:04d}.safetensors", flip),
    ],
)
def test_a_damaged_clip_is_not_finished(clip, name, damage, networks, whole, earlier):
    damage(earlier / name.format(clip))
    keys = clip_keys(make_job(), QUICK, None, networks.checkpoint, networks.loading)
    found = find_earlier([earlier], keys)
    assert (found.clips if found else 0) == clip


@pytest.mark.parametrize("damage", [cut, flip, Path.unlink])
def test_damaged_motion_is_made_again(damage, networks, whole, earlier, tmp_path):
    with pytest.raises(StopHereError):
        Run(networks, make_job(), tmp_path / "cut", stop=(3, 1))
    damage(tmp_path / "cut" / "motion.safetensors")
    run = Run(networks, make_job(), tmp_path / "cut", tmp_path / "cut")
    assert run.first == 3
    assert_same(tmp_path / "cut", whole)


def test_a_damaged_clip_in_the_middle_is_made_again(networks, whole, earlier):
    cut(earlier / "clip_0001.mkv")
    run = Run(networks, make_job(), earlier, earlier)
    assert run.first == 2 and run.earlier.is_all
    assert_same(earlier, whole)


def test_a_film_without_latents_is_no_clip_of_another_video(networks, whole, earlier):
    """So a run ends that is killed between the two, or finds the disk full."""
    (earlier / "clip_0003.safetensors").unlink()
    keys = clip_keys(make_job(), QUICK, None, networks.checkpoint, networks.loading)
    found = find_earlier([earlier], keys)
    assert found.clips == 3 and found.is_all
    (earlier / "clip_0001.safetensors").unlink()
    found = find_earlier([earlier], keys)
    assert found.clips == 1 and found.is_all, "the third clip says that it is of this video"


def test_clips_without_keys_are_nobodys_beginning(networks, tmp_path):
    store = ClipStore(tmp_path / "old", 16.0, make_job().recording, {})
    store.add(torch.zeros(17, 64, 64, 3, dtype=torch.uint8), torch.zeros(1, 16, 5, 8, 8), torch.zeros(1, 3, 25, 64, 64))
    keys = clip_keys(make_job(), QUICK, None, networks.checkpoint, networks.loading)
    assert not stored_keys(tmp_path / "old") and find_earlier([tmp_path / "old", tmp_path / "nowhere"], keys) is None


def test_copies_where_the_disk_has_no_links(networks, whole, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    assert not Run(networks, make_job(), tmp_path / "copied", whole).steps
    assert_same(tmp_path / "copied", whole)
    assert (tmp_path / "copied" / "clip_0000.mkv").stat().st_nlink == 1


# --- parts ---------------------------------------------------------------------------------------------------------


@given(frames=st.integers(1, 400), clip_frames=st.sampled_from([20, 48, 80]), skip=st.sampled_from([0, 3]))
def test_clips_add_up_to_the_video(frames, clip_frames, skip):
    plan = plan_clips(frames, ClipGeometry(clip_frames), skip, skip)
    shown = [plan.shown(clip) for clip in range(len(plan.clip_frames))]
    assert sum(shown) == frames and min(shown) >= 1


def test_digests_tell_type_shape_and_content():
    zeros = torch.zeros(2, 3)
    others = (zeros.T, zeros.double(), zeros - 1e-9, zeros.flatten(), None, torch.zeros(0), torch.tensor(0.0))
    digests = [digest_of({"b": 1, "a": [2]}, tensor) for tensor in (zeros, *others)]
    assert len(set(digests)) == len(digests)
    assert digest_of({"a": [2], "b": 1}, torch.zeros(3, 2).T) == digests[0]


def test_frames_of_a_driving_video_are_read_once():
    calls = []
    held = hold_last(lambda start, frames: calls.append((start, frames)) or torch.zeros(frames))
    for call in ((0, 17), (0, 17), (17, 20), (17, 20), (0, 17)):
        assert len(held(*call)) == call[1]
    assert calls == [(0, 17), (17, 20), (0, 17)]

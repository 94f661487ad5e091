"""Wan S2V Talking Video: it makes what its parts make, and caching, cancel and resume are those of the parts."""

import copy

import numpy as np
import pytest

NODE, EMBEDDED = "1", "embedded demo"
SECONDS, STEPS = 0.5, 8
"""One clip of 11 frames with the preset quick look, at 256x256, which is the smallest size that the node has."""


@pytest.fixture(scope="module")
def make(write_sound, write_picture):
    """A prompt of the one node; keyword arguments change its inputs."""
    files = {"picture": write_picture("one.png"), "voice": write_sound("one.wav", SECONDS)}
    common = {"checkpoint": EMBEDDED, "prompt": "A person talks.", "preset": "quick look", "size": "auto", "seed": 0}
    saving = {"format": "lossless-mkv", "filename_prefix": "one/video"}

    def prompt(**changes) -> dict:
        return {NODE: {"class_type": "WanS2VTalkingVideo", "inputs": files | common | saving | changes}}

    return prompt


def parts_of(ended) -> set[str]:
    """The nodes that ran inside of the one node."""
    return {number.rpartition(".")[2].removeprefix("WanS2V") for number in ended.started if number != NODE}


@pytest.fixture(scope="module")
def made(make, run, new_seed_once):
    """A prompt that has run, what was told meanwhile, and the run."""
    told = []
    prompt = make(seed=new_seed_once)
    ended = run(prompt, on_event=lambda kind, data, _: told.append((kind, copy.deepcopy(data))))
    assert ended.status == "success", (ended.errors, ended.node_errors)
    return prompt, told, ended


@pytest.fixture(scope="module")
def new_seed_once(chance) -> int:
    return int(chance.integers(2**62))


@pytest.fixture(scope="module")
def uncached(start_comfy, comfy, make):
    """A server that remembers no results, with the same input files."""
    with start_comfy("--cache-none", "--input-directory", str(comfy.base / "input")) as server:
        yield server


def test_all_that_happens_is_shown_on_the_one_node(made, comfy, watch):
    _, told, ended = made
    shown = {data["display_node"] for kind, data in told if kind in ("executing", "executed")}
    states = [state for kind, data in told if kind == "progress_state" for state in data["nodes"].values()]
    assert shown == {NODE} == {state["display_node_id"] for state in states}
    assert ended.previews and max(step[2] for step in ended.progress) >= STEPS
    (video,) = comfy.videos(ended)
    film = watch(video)
    assert video.parent.name == "one" and len(film.pictures) == round(16 * SECONDS)
    assert film.pictures.shape[1] * film.pictures.shape[2] <= 256 * 256
    assert '"WanS2VTalkingVideo"' in film.tags["prompt"], "the file brings back the one node"


def test_the_same_again_runs_nothing(made, run, comfy):
    prompt, _, ended = made
    (video,) = comfy.videos(ended)
    written = video.stat().st_mtime_ns
    again = run(prompt)
    assert again.status == "success" and not again.started and again.cached == [NODE]
    assert video.stat().st_mtime_ns == written and len(list(video.parent.glob("video_*"))) == 1


def test_another_file_of_the_same_video_samples_nothing(made, make, run):
    """Newer versions of ComfyUI forget the parts of a node that has changed: then the clips are still on disk."""
    prompt, _, _ = made
    renamed = run(make(seed=prompt[NODE]["inputs"]["seed"], filename_prefix="elsewhere/again"))
    assert renamed.status == "success" and "SaveVideo" in parts_of(renamed) and len(renamed.previews) == 0
    if "EncodeText" not in parts_of(renamed):
        assert parts_of(renamed) == {"SaveVideo"}
    back = run(prompt)
    assert back.status == "success" and len(back.previews) == 0


@pytest.mark.parametrize("change", [{"format": "vp9-webm"}, {"filename_prefix": "one/renamed"}], ids=str)
def test_another_file_of_the_same_video_without_a_cache(change, make, uncached, new_seed, watch):
    """The clips of the last video that was saved stay until the next one is; they are found again from disk."""
    seed = new_seed()
    first = uncached.client.run(make(seed=seed))
    again = uncached.client.run(make(seed=seed, **change))
    assert first.status == again.status == "success", (first.errors, again.errors)
    assert len(first.previews) > 0 == len(again.previews), "nothing was sampled again"
    lengths = {len(watch(uncached.videos(ended)[-1]).pictures) for ended in (first, again)}
    assert lengths == {round(16 * SECONDS)}


def test_it_makes_what_its_parts_make(made, graph, run, comfy, watch):
    prompt, _, ended = made
    given = prompt[NODE]["inputs"]
    own = {
        "audio": ("LoadAudio", {"audio": given["voice"]}),
        "picture": ("LoadImage", {"image": given["picture"]}),
        "prompt": given["prompt"],
        "seed": given["seed"],
        "negative_prompt": default_of(comfy, "WanS2VEncodeText", "negative_prompt"),
    }
    size = {"width": 256, "height": 256, "size_rule": "picture's aspect", "clip_frames": 80}
    sampling = {"steps": STEPS, "guidance_scale": 4.5, "shift": 3.0, "solver": "unipc", "seconds": 0.0}
    again = run(graph(**own, **size, **sampling, format="lossless-mkv"))
    assert again.status == "success", (again.errors, again.node_errors)
    ours, theirs = (watch(comfy.videos(one)[-1]).pictures for one in (ended, again))
    assert np.array_equal(ours, theirs)


def default_of(comfy, node: str, name: str):
    return comfy.client.object_info()[node]["input"]["required"][name][1]["default"]


def test_a_replaced_file_is_seen(make, run, write_picture, write_sound):
    """Under the same name, so that ComfyUI must not take its cache for it. Stopped where sampling begins."""
    voice, picture = write_sound("changing.wav", SECONDS), write_picture("changing.png")
    prompt = make(voice=voice, picture=picture)
    assert run(prompt, interrupt_on_progress=1).status == "interrupted"
    write_sound("changing.wav", SECONDS)
    ended = run(prompt, interrupt_on_progress=1)
    assert ended.status == "interrupted" and "EncodeAudio" in parts_of(ended) and "EncodeText" not in parts_of(ended)


def test_cancelled_it_goes_on_with_the_next_run(make, run, comfy, new_seed):
    prompt = make(seed=new_seed())
    ended = run(prompt, interrupt_on_progress=2)
    assert ended.status == "interrupted" and not comfy.videos(ended)
    assert not comfy.client.queue()["queue_running"]
    again = run(prompt, interrupt_on_progress=2)
    assert parts_of(again) == {"Sample"}, "what was encoded before is still there"


def test_links_take_the_place_of_the_files(make, run, add_node):
    """Files that are not read need not be there."""
    prompt = make(picture="nowhere.png", voice="nowhere.wav")
    demo = add_node(prompt, "WanS2VDemoInputs")
    prompt[NODE]["inputs"] |= {"audio": [demo, 0], "image": [demo, 1]}
    ended = run(prompt, interrupt_on_progress=1)
    assert ended.status == "interrupted", (ended.errors, ended.node_errors)
    assert not {"LoadAudio", "LoadImage"} & parts_of(ended) and "Sample" in parts_of(ended)


def test_it_runs_without_any_file(make, run):
    ended = run(make(picture=EMBEDDED, voice=EMBEDDED, preset="auto"), interrupt_on_progress=1)
    assert ended.status == "interrupted" and not {"LoadAudio", "LoadImage"} & parts_of(ended)
    assert ended.step("1.0.0.WanS2VSample")[1] == 3 * 10, "auto is the preset of the embedded demo"


REFUSED = {
    "picture that is not there": ({"picture": "none.png"}, "'none.png' is no file in ComfyUI's input folder"),
    "picture outside": ({"picture": "../../outside.png"}, "'../../outside.png' is no file"),
    "voice at an absolute path": ({"voice": "/etc/hostname"}, "'/etc/hostname' is no file"),
    "voice outside of the output folder": ({"voice": "../input/one.wav [output]"}, "is no file in ComfyUI's output"),
    "picture is a folder": ({"picture": "."}, "'.' is no file"),
    "file name outside": ({"filename_prefix": "../video"}, "leads out of ComfyUI's output folder"),
}
FAILED = {
    "preset": ({"preset": "best"}, "preset='best' is not known"),
    "size": ({"size": "4k"}, "size='4k' is not known"),
    "format": ({"format": "gif"}, "format='gif' is not known"),
    "checkpoint": ({"checkpoint": "nope"}, "'nope' is not among the models"),
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_files_outside_of_comfyuis_folders_are_refused_before_anything_runs(mistake, make, run, comfy):
    (comfy.base.parent / "outside.png").unlink(missing_ok=True)
    changes, message = REFUSED[mistake]
    ended = run(make(**changes))
    assert ended.status == "rejected" and not ended.started
    assert message in ended.node_errors[NODE]["errors"][0]["details"]


@pytest.mark.parametrize("mistake", FAILED)
def test_mistakes_are_told_before_anything_is_sampled(mistake, make, run, refused_by_menu):
    changes, message = FAILED[mistake]
    ended = run(make(**changes))
    if refused_by_menu(ended):
        assert all(value in str(ended.node_errors) for value in changes.values())
        return
    assert ended.status == "error" and message in ended.errors[0]["exception_message"]
    assert ended.errors[0]["node_id"] == NODE and not parts_of(ended)


def test_links_out_of_the_input_folder_are_refused_where_comfyui_does(make, run, comfy, tmp_path, write_picture):
    """Older versions follow them, and so do we; newer ones fail in Load Image, for us only after the start."""
    (comfy.base / "input" / write_picture("moved_away.png")).rename(tmp_path / "picture.png")
    (comfy.base / "input" / "link.png").symlink_to(tmp_path / "picture.png")
    loader = {"1": {"class_type": "LoadImage", "inputs": {"image": "link.png"}}}
    core = run(loader | {"2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}}})
    ours = run(make(picture="link.png"), interrupt_on_progress=1)
    if core.status == "success":
        assert ours.status == "interrupted", (ours.errors, ours.node_errors)
    else:
        told = ours.node_errors[NODE]["errors"][0]["details"]
        assert core.status == ours.status == "rejected" and "'link.png' is a link out of ComfyUI's input folder" in told


def test_links_out_of_the_output_folder_are_refused_where_comfyui_does(make, run, comfy, tmp_path):
    (comfy.output / "elsewhere_on_disk").symlink_to(tmp_path)
    picture = {"1": {"class_type": "EmptyImage", "inputs": {"width": 8, "height": 8, "batch_size": 1, "color": 0}}}
    saved = {"images": ["1", 0], "filename_prefix": "elsewhere_on_disk/a"}
    core = run(picture | {"2": {"class_type": "SaveImage", "inputs": saved}})
    ours = run(make(filename_prefix="elsewhere_on_disk/a"), interrupt_on_progress=1)
    if core.status == "success":
        assert ours.status == "interrupted", (ours.errors, ours.node_errors)
    else:
        told = ours.node_errors[NODE]["errors"][0]["details"]
        assert ours.status == "rejected" and "goes through a link out of ComfyUI's output folder" in told


def test_a_file_that_another_node_names_is_checked_when_it_runs(make, run, add_node):
    prompt = make()
    name = add_node(prompt, "PrimitiveString", value="../../outside.png")
    prompt[NODE]["inputs"]["picture"] = [name, 0]
    ended = run(prompt)
    assert ended.status in ("rejected", "error"), "ComfyUI refuses the link, or the node refuses the file"


def test_a_preset_gives_the_sampler_its_settings(graph, film, new_seed):
    common = {"seed": new_seed(), "format": "lossless-mkv"}
    chosen = {
        name: ("WanS2VSamplingPreset", {"preset": "embedded demo"}, number)
        for number, name in enumerate(("steps", "guidance_scale", "shift", "solver"))
    }
    by_hand = {"steps": 10, "guidance_scale": 1.0, "shift": 3.0, "solver": "unipc"}
    assert np.array_equal(*(film(graph(**common, **settings)).pictures for settings in (chosen, by_hand)))


def test_colour_match_is_another_video_and_0_is_not(graph, film, new_seed):
    common = {"seed": new_seed(), "format": "lossless-mkv"}
    without, off, matched = (
        film(graph(**common, **change)).pictures for change in ({}, {"colour_match": 0.0}, {"colour_match": 1.0})
    )
    assert np.array_equal(without, off) and not np.array_equal(without, matched)

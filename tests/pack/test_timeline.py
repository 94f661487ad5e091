"""The timeline of a video: what the page is told before a run is what the run makes, and no file outside is read."""

import math
import shutil
import urllib.parse
import wave

import numpy as np
import pytest
from comfy_client import HttpError

CONDITIONING = "5"
ROUTE, MESSAGE = "/wan_s2v/timeline", "wan_s2v.timeline"
KEYS = {"seconds", "sound_seconds", "fps", "frames", "clips", "peaks_seconds", "peaks"}
MOST_PEAKS = 600


@pytest.fixture
def timeline(comfy):
    """Ask the route -> its answer."""

    def ask(**query):
        answer = comfy.client.get(f"{ROUTE}?{urllib.parse.urlencode(query)}")
        assert isinstance(answer, dict) and ("error" in answer) != (answer.keys() >= KEYS)
        return answer

    return ask


def check(plan: dict) -> None:
    """What holds for any timeline: clips follow each other without a gap, and fill the video."""
    start = 0
    for clip in plan["clips"]:
        assert clip["start_frame"] == start and clip["frames"] > 0
        assert clip["start_seconds"] == pytest.approx(start / plan["fps"], abs=0.001)
        start += clip["frames"]
    assert start == plan["frames"] == pytest.approx(plan["seconds"] * plan["fps"], abs=0.001 * plan["fps"])
    assert 1 <= len(plan["peaks"]) <= MOST_PEAKS and all(0 <= peak < math.inf for peak in plan["peaks"])
    assert 0 < plan["peaks_seconds"] <= plan["seconds"] + 0.001


def test_the_demo(timeline):
    plan = timeline(demo=1)
    check(plan)
    assert (plan["frames"], [clip["frames"] for clip in plan["clips"]]) == (188, [77, 80, 31])
    assert max(plan["peaks"]) == pytest.approx(10 ** (-1 / 20), abs=0.01)


ODD = [
    {},
    {"start_from_picture": True},
    {"timing": "reference"},
    {"clip_plan": "reference"},
    {"clip_plan": "reference", "max_clips": 1},
    {"clip_frames": 28, "fps": 23.98},
    {"max_clips": 2, "start_seconds": 0.3},
]


@pytest.mark.parametrize("settings", ODD, ids=lambda settings: "-".join(settings) or "default")
def test_it_is_what_a_run_makes(settings, timeline, run, graph, chance, write_sound):
    """The same plan and the same peaks, for random lengths and rates."""
    rate = int(chance.choice([8000, 22050, 44100, 48000]))
    name = write_sound("timeline.wav", 0.5 + 3 * chance.random(), channels=int(chance.integers(1, 3)), rate=rate)
    given = {"clip_frames": 20, "seconds": round(0.5 + 1.5 * chance.random(), 3)} | settings
    asked = {key: str(value).lower() if isinstance(value, bool) else value for key, value in given.items()}
    expected = timeline(audio=name, **asked)
    if "error" not in expected:
        check(expected)
    prompt = graph(**given, audio=("LoadAudio", {"audio": name}))
    for number in ("6", "7"):
        del prompt[number]
    prompt["9"] = {"class_type": "PreviewAny", "inputs": {"source": [CONDITIONING, 0]}}
    told = []
    ended = run(prompt, on_event=lambda kind, data, _: told.append(data) if kind == MESSAGE else None)
    if "error" in expected:
        assert expected["error"] in str(ended.errors), (expected, given)
        return
    assert ended.status == "success", ended.errors
    (message,) = told
    made = message["plan"]
    assert message["node"] == CONDITIONING and CONDITIONING not in ended.outputs
    peaks = [np.array(plan.pop("peaks")) for plan in (expected, made)]
    assert made == expected, (given, rate)
    assert abs(len(peaks[0]) - len(peaks[1])) <= 1  # the run has resampled the sound
    if not given.get("start_seconds"):  # else hundredths of a second begin elsewhere
        kept = min(map(len, peaks)) - 1 - len(peaks[0]) // 50
        np.testing.assert_allclose(peaks[0][:kept], peaks[1][:kept], atol=0.002)


def test_a_changed_file_is_read_again(timeline, write_sound):
    lengths = []
    for seconds in (1.0, 2.0):
        write_sound("changing.wav", seconds)
        lengths.append(timeline(audio="changing.wav")["sound_seconds"])
    assert lengths == [1.0, 2.0]


def test_silence_and_sound_that_is_no_number(timeline, write_sound, comfy):
    assert set(timeline(audio=write_sound("silent.wav", samples=np.zeros(48000)))["peaks"]) == {0.0}
    samples = np.full(8000, np.nan, "<f4")
    header = (
        b"RIFF\0\0\0\0WAVEfmt \x10\0\0\0\x03\0\x01\0" + np.array([8000, 32000], "<u4").tobytes() + b"\4\0\x20\0data"
    )
    data = header + np.array([samples.nbytes], "<u4").tobytes() + samples.tobytes()
    (comfy.base / "input" / "broken_floats.wav").write_bytes(data)
    assert set(timeline(audio="broken_floats.wav")["peaks"]) == {0.0}


def test_files_that_cannot_be(timeline, comfy):
    (comfy.base / "input" / "empty.wav").touch()
    (comfy.base / "input" / "text.wav").write_text("no sound at all")
    (comfy.base / "input" / "folder.wav").mkdir(exist_ok=True)
    for name in ("absent.wav", "empty.wav", "text.wav", "folder.wav"):
        error = timeline(audio=name)["error"]
        assert name in error and str(comfy.base) not in error and "\n" not in error


def test_too_long(timeline, comfy):
    with wave.open(str(comfy.base / "input" / "long.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(1)
        file.setframerate(4000)
        for _ in range(145):
            file.writeframes(b"\x80" * 100_000)
    assert "longer than 3600 s" in timeline(audio="long.wav")["error"]


OUTSIDE = ["../../etc/passwd", "/etc/passwd", "a/../../server.log", "..", ".", "", "../input", "../input2/a.wav",
           "../server.log [output]", "/etc/passwd [input]", "a\0b"]  # fmt: skip


@pytest.mark.parametrize("name", OUTSIDE)
def test_names_that_lead_outside_are_refused(name, comfy):
    with pytest.raises(HttpError) as refused:
        comfy.client.get(f"{ROUTE}?{urllib.parse.urlencode({'audio': name})}")
    assert refused.value.status == 403 and "input folder" in refused.value.answer["error"]
    assert "root:" not in refused.value.body


def test_links_are_followed_where_load_audio_follows_them(timeline, write_sound, comfy, tmp_path):
    (comfy.base / "input" / write_sound("moved_away.wav")).rename(tmp_path / "voice.wav")
    (comfy.base / "input" / "link.wav").symlink_to(tmp_path / "voice.wav")
    loader = {"1": {"class_type": "LoadAudio", "inputs": {"audio": "link.wav"}}}
    core = comfy.client.run(loader | {"2": {"class_type": "PreviewAudio", "inputs": {"audio": ["1", 0]}}})
    if core.status == "success":
        assert timeline(audio="link.wav")["frames"] == 16
    else:
        with pytest.raises(HttpError) as refused:
            timeline(audio="link.wav")
        assert core.status == "rejected" and refused.value.status == 403


def test_without_a_recording(comfy):
    with pytest.raises(HttpError) as refused:
        comfy.client.get(ROUTE)
    assert refused.value.status == 403


def test_other_folders_of_comfyui(timeline, write_sound, comfy):
    shutil.copy(comfy.base / "input" / write_sound("moved.wav"), comfy.output / "made.wav")
    assert timeline(audio="made.wav [output]")["frames"] == 16
    assert "made.wav" in timeline(audio="made.wav")["error"]
    (comfy.base / "input" / "deep").mkdir(exist_ok=True)
    shutil.copy(comfy.output / "made.wav", comfy.base / "input" / "deep" / "er.wav")
    assert timeline(audio="deep/er.wav")["frames"] == 16


WRONG = [
    {"fps": "abc"},
    {"fps": "nan"},
    {"fps": "0"},
    {"fps": "inf"},
    {"clip_frames": "81"},
    {"clip_frames": "0"},
    {"clip_frames": "1e3"},
    {"max_clips": "-1"},
    {"timing": "never"},
    {"clip_plan": "<script>"},
    {"start_seconds": "99"},
    {"start_seconds": "-1"},
    {"start_seconds": "nan"},
    {"seconds": "-inf"},
    {"seconds": "0.001"},
]


@pytest.mark.parametrize("settings", WRONG, ids=str)
def test_settings_that_cannot_be(settings, timeline):
    error = timeline(demo=1, **settings)["error"]
    assert error and "\n" not in error and "Traceback" not in error


def test_other_methods_are_not_there(comfy):
    with pytest.raises(HttpError) as refused:
        comfy.client.post(ROUTE, {})
    assert refused.value.status == 405

"""ComfyUI's own audio encoder in front of our nodes.

The embedded model's encoder is too narrow for ComfyUI's loader, so a small pack of this test hands out the layers of
ours in ComfyUI's way; the server is one of its own for that.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from comfy_server import ComfyServer

ROOT = Path(__file__).resolve().parents[2]
STAND_IN = """
import sys
sys.path.append({root!r})
import torch
from wan_s2v_core.io.audio import Recording
from wan_s2v_core.model.loading import load_audio_encoder

class StandIn:
    RETURN_TYPES, FUNCTION, CATEGORY = ("AUDIO_ENCODER_OUTPUT",), "encode", "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {{"required": {{"audio": ("AUDIO",), "kind": ("STRING", {{}})}}}}

    def encode(self, audio, kind):
        recording = Recording(audio["waveform"][0], audio["sample_rate"])
        with torch.inference_mode():
            states = load_audio_encoder({checkpoint!r}).hidden_states(recording.speech())
        layers = tuple(layer[None].repeat(2, 1, 1) for layer in states)
        made = {{
            "good": {{"encoded_audio_all_layers": layers}},
            "wide": {{"encoded_audio_all_layers": tuple(layer.repeat(1, 1, 2) for layer in layers)}},
            "few": {{"encoded_audio_all_layers": layers[:-1]}},
            "flat": {{"encoded_audio_all_layers": tuple(layer[0, 0] for layer in layers)}},
            "empty": {{"encoded_audio_all_layers": ()}},
            "no values": {{"encoded_audio_all_layers": tuple(layer.to("meta") for layer in layers)}},
            "last": {{"encoded_audio": layers[-1]}},
        }}
        return (made[kind],)

NODE_CLASS_MAPPINGS = {{"StandIn": StandIn}}
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    if not (comfyui := os.environ.get("COMFYUI_PATH")):
        pytest.skip("COMFYUI_PATH is not set. Run python3 dev/run.py test.")
    stand_in = tmp_path_factory.mktemp("stand_in")
    text = STAND_IN.format(root=str(ROOT), checkpoint=str(ROOT / "assets" / "checkpoint"))
    (stand_in / "__init__.py").write_text(text, encoding="utf-8")
    variables = {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"}
    with ComfyServer(Path(comfyui), {"wan_s2v": ROOT, "stand_in": stand_in}, environment=variables) as server:
        assert server.import_problems() == []
        yield server


def workflow(kind: str | None, seconds: float = 1.0) -> dict:
    """The demo made small; with a kind, the voice comes from the stand-in."""
    prompt = json.loads((ROOT / "workflows" / "api" / "demo.json").read_text(encoding="utf-8"))
    small = {"width": 64, "height": 64, "size_rule": "exact", "clip_frames": 20, "steps": 1, "guidance_scale": 1.0}
    for node in prompt.values():
        node["inputs"] |= {name: value for name, value in small.items() if name in node["inputs"]}
        if node["class_type"] == "WanS2VSaveVideo":
            node["inputs"]["format"] = "lossless-mkv"
    prompt["90"] = {"class_type": "TrimAudioDuration", "inputs": {"audio": ["2", 0], "start_index": 0, "duration": 1}}
    prompt["91"] = {"class_type": "TrimAudioDuration", "inputs": {**prompt["90"]["inputs"], "duration": seconds}}
    prompt["3"]["inputs"]["audio"] = ["90", 0]
    if kind:
        prompt["92"] = {"class_type": "StandIn", "inputs": {"audio": ["90", 0], "kind": kind}}
        prompt["3"]["class_type"] = "WanS2VVoiceFromEncoder"
        prompt["3"]["inputs"] = {"audio_encoder_output": ["92", 0], "audio": ["91", 0]}
    return prompt


def test_the_video_is_that_of_our_own_encoder(server, watch):
    ours, theirs = (server.client.run(workflow(kind)) for kind in (None, "good"))
    assert (ours.status, theirs.status) == ("success", "success"), (ours.errors, theirs.errors, theirs.node_errors)
    one, other = (watch(server.videos(run)[0]) for run in (ours, theirs))
    assert len(one.pictures) == 16
    assert np.array_equal(one.pictures, other.pictures) and np.array_equal(one.sound, other.sound)


@pytest.mark.parametrize(
    ("kind", "seconds", "message"),
    [
        ("good", 2.0, "was made from 0.98 s of sound, audio lasts 2.00 s"),
        ("wide", 1.0, "the audio encoder gives features of width"),
        ("few", 1.0, "the audio encoder gives layers"),
        ("flat", 1.0, "holds no layers of an audio encoder"),
        ("empty", 1.0, "holds no layers of an audio encoder"),
        ("no values", 1.0, "audio_encoder_output cannot be read"),
        ("last", 1.0, "holds no layers of an audio encoder"),
    ],
)
def test_outputs_that_do_not_fit(server, kind, seconds, message):
    ended = server.client.run(workflow(kind, seconds))
    assert ended.status == "error" and message in ended.errors[-1]["exception_message"], ended.errors

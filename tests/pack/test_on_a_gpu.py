"""Whole prompts with everything on a GPU that refuses what CUDA refuses, though it is none: see gpu_rules.py."""

from pathlib import Path

import pytest
from comfy_server import ComfyServer

WIDE = {"width": 400, "height": 64, "seconds": 2.0, "precision": "float32", "format": "lossless-mkv"}
"""Wider than the small films of finished clips, and two clips."""
OTHERWISE = {"seconds": 1.0, "offload": "always", "audio_guidance_scale": 2.0, "colour_match": 1.0}


@pytest.fixture(scope="module")
def gpu(comfy, device):
    if device != "cpu":
        pytest.skip("the CPU stands for a GPU here, and this server has one")
    packs = {**comfy.packs, "gpu_rules.py": Path(__file__).with_name("gpu_rules.py")}
    with ComfyServer(comfy.comfyui, packs, arguments=comfy.arguments, environment=comfy.environment) as server:
        assert server.import_problems() == []
        yield server


def small_films(server: ComfyServer) -> list[Path]:
    return list((server.base / "temp" / "wan_s2v_clips").rglob("*.mp4"))


@pytest.mark.parametrize("changes", [{}, OTHERWISE], ids=["two clips", "otherwise"])
def test_a_prompt_on_a_gpu(changes, gpu, graph, add_node, write_film, comfy, watch, new_seed):
    """Clips, their small films, previews, pictures and sound for other nodes, and the video."""
    name, before = write_film("driving.mp4"), len(small_films(gpu))
    gpu.client.upload(comfy.base / "input" / name)
    prompt = graph(**(WIDE | changes), seed=new_seed(), pose_video=("LoadVideo", {"file": name}))
    frames = add_node(prompt, "WanS2VDecode", clips=["6", 0])
    video = add_node(prompt, "CreateVideo", images=[frames, 0], audio=[frames, 1], fps=16.0)
    saved = add_node(prompt, "SaveVideo", video=[video, 0], filename_prefix="there", format="auto", codec="auto")
    latents = add_node(prompt, "SaveLatent", samples=["6", 1], filename_prefix="latents/last")
    ended = gpu.client.run(prompt)
    assert ended.status == "success", [(one["exception_message"], one["traceback"][-4:]) for one in ended.errors]
    assert "are not shown in the page" not in gpu.log(), "the small films could be made"
    assert len(ended.previews) == round((WIDE | changes)["seconds"]) and {saved, latents} <= ended.outputs.keys()
    for file in gpu.videos(ended):
        assert watch(file).pictures.shape[1:] == (64, 400, 3)
    assert len(small_films(gpu)) - before == round((WIDE | changes)["seconds"]), "one for each clip"

"""Pictures of steps: the colours of the video, from any VAE; from ComfyUI's tiny decoder where it is asked for."""

import io
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

STEPS = 2
TINY_DECODER = """
import sys, torch
from safetensors.torch import save_file
sys.argv[1:], folder = ["--cpu"], sys.argv[1]
import comfy.options
comfy.options.enable_args_parsing()
from comfy.taesd.taehv import TAEHV
network = TAEHV(latent_channels=16)
torch.manual_seed(0)
state = {name: torch.randn(value.shape) * 0.1 for name, value in network.state_dict().items()}
save_file(state, folder + "/lighttaew2_1.safetensors")
"""


def pictures_in(ended) -> list[np.ndarray]:
    return [np.asarray(Image.open(io.BytesIO(file)).convert("RGB")) for file in ended.previews]


def shrunk(picture: np.ndarray, side: int) -> np.ndarray:
    return np.asarray(Image.fromarray(picture).resize((side, side), Image.Resampling.BOX)).astype(float)


def test_the_last_preview_looks_like_the_video(run, watch, graph, comfy, new_seed):
    ended = run(graph(seed=new_seed(), steps=STEPS, width=128, height=128))
    previews = pictures_in(ended)
    assert ended.status == "success" and len(previews) == STEPS
    video = watch(comfy.videos(ended)[-1]).pictures
    shown, made = (shrunk(picture, 16).ravel() for picture in (previews[-1], video[len(video) // 2]))
    assert np.corrcoef(shown, made)[0, 1] > 0.8


@pytest.fixture(scope="module")
def with_tiny_decoder(start_comfy):
    with start_comfy("--preview-method", "taesd") as server:
        folder = server.base / "models" / "vae_approx"
        folder.mkdir(exist_ok=True)
        subprocess.run([sys.executable, "-c", TINY_DECODER, folder], cwd=server.comfyui, check=True)
        yield server


def test_the_tiny_decoder_is_used_where_it_is(comfy, with_tiny_decoder, graph, new_seed):
    prompt = graph(seed=new_seed(), steps=STEPS)
    (_, colours), (_, decoded) = (
        pictures_in(server.run(prompt)) for server in (comfy.client, with_tiny_decoder.client)
    )
    assert np.abs(shrunk(colours, 16) - shrunk(decoded, 16)).mean() > 40, "its weights are random"

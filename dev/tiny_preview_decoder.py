"""Write ComfyUI's tiny video decoder with random weights: python dev/tiny_preview_decoder.py FOLDER, run in ComfyUI's
folder. FOLDER is its models/vae_approx.
"""

import sys

sys.argv[1:], folder = ["--cpu"], sys.argv[1]
sys.path.insert(0, ".")  # ComfyUI's folder

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import torch  # noqa: E402
from comfy.taesd.taehv import TAEHV  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

NAMES = ("lighttaew2_1", "taew2_1")
"""What versions of ComfyUI look for."""

network = TAEHV(latent_channels=16)
torch.manual_seed(0)
state = {name: torch.randn(value.shape) * 0.1 for name, value in network.state_dict().items()}
for name in NAMES:
    save_file(state, f"{folder}/{name}.safetensors")

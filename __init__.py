"""Wan S2V for ComfyUI. ComfyUI imports this folder; everything else of it is reached from here."""

try:
    from comfyui_version import __version__ as comfyui
except ImportError:
    comfyui = None  # tools that look at packs without ComfyUI

from .wan_s2v_core.errors import BackendUnavailable
from .wan_s2v_core.libraries import library_problem

if problem := library_problem(comfyui):

    async def comfy_entrypoint():
        """Raises what is too old, which ComfyUI writes as one line where importing the nodes would fail anyhow."""
        raise BackendUnavailable(problem)
else:
    from .nodes import comfy_entrypoint

WEB_DIRECTORY = "./web"

__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]

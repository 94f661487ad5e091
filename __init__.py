"""Wan S2V for ComfyUI. ComfyUI imports this folder; everything else of it is reached from here."""

import logging

try:
    from comfyui_version import __version__ as comfyui
except ImportError:
    comfyui = None  # a ComfyUI that is older than this file of its, or a tool that looks at packs

from .wan_s2v_core.libraries import COMFYUI_FLOOR, library_problem

COMFYUI_MODULES = ("comfy", "comfy_api", "comfy_execution", "folder_paths", "latent_preview", "server")
WEB_DIRECTORY = "./web"
__all__ = ["WEB_DIRECTORY"]

if not (problem := library_problem(comfyui)):
    try:
        from .nodes import comfy_entrypoint

        __all__ += ["comfy_entrypoint"]
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in COMFYUI_MODULES:
            raise
        problem = (
            f"this ComfyUI lacks what the pack builds on ({error}); {COMFYUI_FLOOR} or newer is needed. Update ComfyUI."
        )
if problem:
    # Without an entry point ComfyUI says that the import failed; an exception would bury this line in a traceback.
    logging.getLogger(__name__).error("Wan S2V cannot be used: %s", problem)

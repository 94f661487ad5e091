"""Wan S2V for ComfyUI. ComfyUI imports this folder; everything else of it is reached from here."""

import logging

WEB_DIRECTORY = "./web"
OLDEST_COMFYUI = "0.3.64"
COMFYUI_MODULES = ("comfy", "comfy_api", "comfy_execution", "folder_paths", "latent_preview", "server")

__all__ = ["WEB_DIRECTORY"]

try:
    from .nodes import comfy_entrypoint

    __all__ += ["comfy_entrypoint"]
except ImportError as error:
    if (error.name or "").partition(".")[0] not in COMFYUI_MODULES:
        raise
    # Without an entry point ComfyUI says that the import failed; an exception would bury this in a traceback.
    logging.getLogger(__name__).error(
        "Wan S2V needs ComfyUI %s or newer; this one lacks what it builds on (%s). Update ComfyUI.",
        OLDEST_COMFYUI,
        error,
    )

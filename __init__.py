"""Wan S2V for ComfyUI. ComfyUI imports this folder; everything else of it is reached from here."""

from .nodes import comfy_entrypoint

WEB_DIRECTORY = "./web"

__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]

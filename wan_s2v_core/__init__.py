"""Wan2.2-S2V-14B: a picture, a voice recording and a prompt become a talking video."""

__version__ = "0.1.0"

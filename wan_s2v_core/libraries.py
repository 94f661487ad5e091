"""The oldest versions of other libraries that work here. Importable without any of them."""

import re
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

FLOORS = {
    "torch": "2.7",
    "diffusers": "0.35.0",
    "transformers": "4.51.0",
    "safetensors": "0.4.5",
    "accelerate": "1.0.0",
    "psutil": "5.9.4",
    "av": "14.0.0",
    "sentencepiece": "0.2.0",
    "ftfy": "6.1.0",
}
"""As pyproject.toml declares them."""
COMFYUI_FLOOR = "0.3.64"


def library_problem(comfyui: str | None = None, installed: Callable[[str], str] = version) -> str | None:
    """What is missing or too old, in one line with the cure; None if nothing is.

    Args:
        comfyui: version of ComfyUI, where it is known.
        installed: gives the version of a package, or raises PackageNotFoundError.
    """
    if comfyui and is_older(comfyui, COMFYUI_FLOOR):
        return f"ComfyUI is {comfyui}, {COMFYUI_FLOOR} or newer is needed. Update ComfyUI."
    found = {name: _version_of(name, installed) for name in FLOORS}
    old = {name: own for name, own in found.items() if own is None or is_older(own, FLOORS[name])}
    return _told(old) if old else None


def _told(old: Mapping[str, str | None]) -> str:
    facts = [
        f"{name} is {own or 'not installed'}, {FLOORS[name]} or newer is needed" for name, own in sorted(old.items())
    ]
    wanted = " ".join(f'"{name}>={FLOORS[name]}"' for name in sorted(old))
    return f"{'; '.join(facts)}. With the Python that runs this: python -m pip install --upgrade {wanted}."


def _version_of(name: str, installed: Callable[[str], str]) -> str | None:
    """The version of a package; its floor where it is there without saying one, as builds of one's own may be."""
    try:
        return installed(name) or FLOORS[name]
    except PackageNotFoundError:
        return FLOORS[name] if find_spec(name) else None


def is_older(own: str, floor: str) -> bool:
    """Compare numbers before the first letter: 2.7.0a0+git counts as 2.7.0, 2.13.0+cpu as 2.13.0."""
    numbers = [[int(part) for part in re.findall(r"\d+", re.split(r"[a-zA-Z+]", text)[0])] for text in (own, floor)]
    longest = max(map(len, numbers))
    first, second = ([*parts, *[0] * (longest - len(parts))] for parts in numbers)
    return first < second

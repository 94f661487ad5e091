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


def test_golden_tensors_stay_small():
    size = sum(file.stat().st_size for file in (ROOT / "tests" / "golden").rglob("*") if file.is_file())
    assert size <= 6_000_000

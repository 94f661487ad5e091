"""What only a GPU shows: python3 dev/run.py gpu [PART ...] [--out FOLDER]

    tests      the tests that need a GPU, and those of the nodes against a ComfyUI on it (6 minutes on an H200)
    settings   every setting of the nodes, kinds of input, formats, cancels, ComfyUI's own flags, at 512x512
    real       a random checkpoint of real size: a run, cancel and resume, float8 at 720p, float16; times and memory
    article    bench --cases article for 480p and 720p, in bfloat16 and in float8 with 8-bit attention
    small      the same checkpoint as if the GPU had 24, 12 and 8 GB
    beside     another model of 10 GB before and after ours in one graph
    table      what the JSON files in FOLDER say, as markdown

tests, settings and real by default. Each writes gpu_PART.json into FOLDER after every case, and the table of all files
there ends the run. Exit 1: a case is red.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PARTS = {
    "tests": "gpu_tests",
    "settings": "gpu_settings",
    "real": "gpu_real",
    "article": "gpu_article",
    "small": "gpu_small",
    "beside": "gpu_beside",
}
"""By the module that runs it."""
USUAL = ("tests", "settings", "real")
OK, RED, ELSEWHERE = "ok", "red", "not here"
"""Not here: this GPU, its packages or this ComfyUI do not have it, and said so in one line."""
MINUTES = 8.5
ASK_TORCH = """
import json, torch
there = torch.cuda.is_available()
facts = {"torch": torch.__version__, "cuda": torch.version.cuda, "gpu": None, "vram_gb": 0}
if there:
    one = torch.cuda.get_device_properties(0)
    facts |= {"gpu": one.name, "vram_gb": round(one.total_memory / 1e9, 1)}
print(json.dumps(facts))
"""


def text_of(*command: str | Path) -> str:
    """What a program says, or nothing where it is not there or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


@dataclass
class Ground:
    """Where it all runs."""

    comfyui: Path
    out: Path
    work: Path
    """For the checkpoint, which a later part takes again."""
    on_cpu: bool = False
    is_tiny: bool = False
    only: str = ""
    """Words with commas between them: cases whose names hold none of them are left out."""
    blocks: int = 0
    """Of the DiT of the checkpoint; 0: as many as there is room for."""
    minutes: float = MINUTES
    facts: dict[str, Any] = field(default_factory=dict)

    def wants(self, case: str) -> bool:
        words = [word for word in self.only.split(",") if word]
        return not words or any(word in case for word in words)

    @property
    def server_arguments(self) -> tuple[str, ...]:
        return ("--cpu",) if self.on_cpu else ()

    def look(self, commit: str | None, command: str) -> None:
        """Take down hardware and versions."""
        told = text_of(sys.executable, "-c", ASK_TORCH)
        version = self.comfyui / "comfyui_version.py"
        lines = version.read_text(encoding="utf-8") if version.is_file() else ""
        self.facts = {
            **(json.loads(told) if told else {}),
            "driver": text_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0],
            "cores": os.cpu_count(),
            "host_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
            "comfyui": lines.partition('__version__ = "')[2].partition('"')[0] or "unknown",
            "commit": commit or text_of("git", "rev-parse", "HEAD") or "unknown",
            "command": command,
        }


class Report:
    """The cases of one part, on disk after each of them."""

    def __init__(self, part: str, ground: Ground):
        self.part, self.ground = part, ground
        self.began = time.monotonic()
        self.cases: list[dict[str, Any]] = []
        self.save()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    @property
    def has_time(self) -> bool:
        return self.seconds < 60 * self.ground.minutes

    def add(self, case: str, status: str, seconds: float, error: str = "", **figures: Any) -> None:
        entry = {"case": case, "status": status, "seconds": round(seconds, 2), "error": error[:600], **figures}
        self.cases.append(entry)
        shown = {
            name: value for name, value in entry.items() if name not in ("case", "status") and value not in ("", None)
        }
        print(f"{self.part} {status:8} {case}  {json.dumps(shown)[:400]}", flush=True)
        self.save()

    def run(self, case: str, work: Callable[[], dict[str, Any] | None]) -> bool:
        """Do the work of one case; whatever it raises is its error. What it returns are its figures, of which `status`
        and `error` say how it went."""
        if not self.ground.wants(case):
            return True
        if not self.has_time:
            self.add(case, RED, 0, f"left out: {self.ground.minutes:g} minutes are over")
            return False
        began = time.monotonic()
        try:
            figures = {"status": OK, **(work() or {})}
        except Exception as error:  # one case never ends the others
            figures = {"status": RED, "error": f"{type(error).__name__}: {error}"}
        figures.setdefault("seconds", time.monotonic() - began)
        self.add(case, **figures)
        return figures["status"] != RED

    @property
    def is_green(self) -> bool:
        return bool(self.cases) and not any(case["status"] == RED for case in self.cases)

    def save(self) -> None:
        content = {"part": self.part, **self.ground.facts, "seconds": round(self.seconds, 1), "cases": self.cases}
        path = self.ground.out / f"gpu_{self.part}.json"
        partial = path.with_suffix(".part")
        partial.write_text(json.dumps(content, indent=1), encoding="utf-8")
        partial.replace(path)


def table(folder: Path) -> str:
    """All parts whose files are in a folder, as markdown."""
    lines = []
    for part in PARTS:
        path = folder / f"gpu_{part}.json"
        if not path.is_file():
            continue
        found = json.loads(path.read_text(encoding="utf-8"))
        cases = found["cases"]
        count = {status: sum(case["status"] == status for case in cases) for status in (OK, ELSEWHERE, RED)}
        where = f"{found.get('gpu') or 'CPU'}, driver {found.get('driver') or 'none'}, torch {found.get('torch')}"
        lines += [
            f"## {part}: {', '.join(f'{number} {status}' for status, number in count.items() if number)}",
            f"`python3 dev/run.py gpu {found.get('command', part)}`, {where}, {found.get('cores')} cores, "
            f"{found.get('host_gb')} GB, ComfyUI {found.get('comfyui')}, commit {str(found.get('commit'))[:12]}, "
            f"{found['seconds']:.0f} s.",
            "",
            "| case | | s | figures |",
            "|---|---|---|---|",
        ]
        lines += [row(case) for case in cases if part != "settings" or case["status"] != OK or len(case) > 5]
        lines.append("")
    return "\n".join(lines)


def row(case: dict[str, Any]) -> str:
    own = {name: value for name, value in case.items() if name not in ("case", "status", "seconds", "error")}
    figures = "; ".join(f"{name.replace('_', ' ')} {plain(value)}" for name, value in own.items() if value is not None)
    told = ". ".join(filter(None, (figures, case["error"].replace("\n", " ").replace("|", "/")[:300])))
    return f"| {case['case']} | {case['status']} | {case['seconds']:g} | {told} |"


def plain(value: Any) -> str:
    """A figure in a table."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {plain(inner)}" for name, inner in value.items())
    return ", ".join(map(plain, value)) if isinstance(value, list) else str(value)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python3 dev/run.py gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "parts", nargs="*", choices=[*PARTS, "table", []], metavar="PART", help="tests, settings and real by default"
    )
    parser.add_argument("--out", type=Path, default=Path("gpu"), help="folder for the JSON files (default gpu)")
    parser.add_argument("--work", type=Path, default=ROOT / ".gpu", help="folder for the checkpoint (default .gpu)")
    parser.add_argument("--blocks", type=int, default=0, help="of the checkpoint's DiT; 40 is the real one")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for each part (default %(default)s)")
    parser.add_argument("--only", default="", metavar="WORD[,WORD]", help="cases with one of these words alone")
    parser.add_argument("--commit", help="to record, where the checkout has no git history")
    parser.add_argument("--cpu", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if options.parts != ["table"]:
        ground = Ground(
            Path(os.environ["COMFYUI_PATH"]).resolve(), out, options.work.resolve(), options.cpu, options.tiny,
            options.only, options.blocks, options.minutes,
        )  # fmt: skip
        ground.work.mkdir(parents=True, exist_ok=True)
        ground.look(options.commit, " ".join(options.parts or USUAL))
        if not ground.on_cpu and not ground.facts.get("gpu"):
            print(
                f"error: torch {ground.facts.get('torch')} sees no GPU here (nvidia-smi says whether the driver does)"
            )
            return 2
        is_green = all([run_part(part, ground) for part in options.parts or USUAL])
    told = table(out)
    (out / "gpu.md").write_text(told, encoding="utf-8")
    print(told)
    return 0 if options.parts == ["table"] or is_green else 1


def run_part(part: str, ground: Ground) -> bool:
    report = Report(part, ground)
    try:
        importlib.import_module(PARTS[part]).run(ground, report)
    except Exception as error:  # the next part runs all the same
        report.add(f"{part} itself", RED, report.seconds, f"{type(error).__name__}: {error}")
    report.save()
    return report.is_green


if __name__ == "__main__":
    # The parts import this module by its name, so it must not be there twice.
    sys.exit(importlib.import_module("gpu").main(sys.argv[1:]))

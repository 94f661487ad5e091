"""Part `article`: the article's video at two sizes and in two ways, estimated from two steps of each kind of clip."""

import json
import subprocess
import sys

from gpu import OK, RED, ROOT, Ground, Report

WAYS = ("bfloat16", "float8:auto8")


def run(ground: Ground, report: Report) -> None:
    for way in WAYS if not ground.is_tiny else ("float32",):
        folder = ground.out / f"article_{way.replace(':', '_')}"
        command = [sys.executable, "-m", "wan_s2v_core", "bench", "--cases", "article", "--way", way]
        command += ["--out", str(folder), "--commit", ground.facts["commit"]]
        command += ["--measured_steps", "2"]
        command += (
            ["--model", "demo", "--frames", "40", "--clip_frames", "20", "--steps", "4"] if ground.is_tiny else []
        )
        left = max(30.0, 60 * ground.minutes - report.seconds)
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=left)
            said = done.stderr[-600:]
        except subprocess.TimeoutExpired:
            said = "out of time"
        path = folder / "bench.json"
        entries = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
        if not entries:
            report.add(way, RED, report.seconds, said)
        for entry in entries:
            add_entry(way, entry, report)


def add_entry(way: str, entry: dict, report: Report) -> None:
    size = f"{entry['width']}x{entry['height']}"
    figures = {
        "attention": entry["attention_backend"],
        "seconds_per_forward": entry["seconds_per_forward"] and round(entry["seconds_per_forward"], 3),
        "ceiling_share": entry["ceiling_share"] and round(entry["ceiling_share"], 3),
        "peak_gb": entry["peak_bytes"] and round(entry["peak_bytes"] / 1e9, 2),
        "estimated": entry["estimated"],
    }
    status, seconds = RED if entry["error"] else OK, entry["seconds_total"] or 0.0
    report.add(f"{size}, {way}", status, seconds, entry["error"] or "", **figures)

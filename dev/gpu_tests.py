"""Part `tests`: the suites that a GPU changes, side by side."""

import os
import signal
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from gpu import OK, RED, ROOT, Ground, Report

WORKERS = 6
SUITES = {
    "tests/core": ["-m", "gpu", "-n", "2"],
    "tests/pack": ["-n", str(WORKERS), "--ignore", "tests/pack/test_page.py"],
}
"""Folder -> arguments of pytest. The page has no GPU."""
KILL_SECONDS = 20
NO_TESTS_CHOSEN = 5
"""pytest's exit code."""


def run(ground: Ground, report: Report) -> None:
    variables = {
        **os.environ,
        "COMFYUI_PATH": str(ground.comfyui),
        "REQUIRE_COMFYUI": "1",
        "COMFYUI_DEVICE": "cpu" if ground.on_cpu else "gpu",
    }
    running = {}
    for suite, arguments in SUITES.items():
        name = suite.replace("/", "_")
        told = ground.out / f"{name}.xml"
        told.unlink(missing_ok=True)
        chosen = ["-k", " or ".join(ground.only.split(","))] if ground.only else []
        command = [
            sys.executable,
            "-m",
            "pytest",
            suite,
            *arguments,
            "--dist",
            "loadfile",
            f"--junitxml={told}",
            *chosen,
        ]
        log = (ground.out / f"{name}.log").open("wb")
        running[suite] = subprocess.Popen(command, cwd=ROOT, env=variables, stdout=log, stderr=subprocess.STDOUT), told
    for suite, (process, told) in running.items():
        try:
            code = process.wait(max(1.0, 60 * ground.minutes - report.seconds))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # it then tells what it has
            code = "ended: out of time"
            try:
                process.wait(KILL_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
        add_results(suite, told, 0 if code == NO_TESTS_CHOSEN and ground.only else code, report)


def add_results(suite: str, told: Path, code: int | str, report: Report) -> None:
    """The counts of a suite, and a case for each test that failed."""
    try:
        cases = list(ElementTree.parse(told).iter("testcase"))
    except (OSError, ElementTree.ParseError):
        report.add(suite, RED, report.seconds, f"pytest told nothing: {code}; see {told.with_suffix('.log').name}")
        return
    failed = [(case, wrong) for case in cases for kind in ("failure", "error") for wrong in case.iter(kind)]
    skipped = [reason.get("message", "") for case in cases for reason in case.iter("skipped")]
    slow = sorted(cases, key=lambda case: -float(case.get("time", 0)))[:5]
    report.add(
        suite,
        OK if code == 0 and not failed else RED,
        report.seconds,
        "" if code == 0 else f"exit {code}",
        passed=len(cases) - len(failed) - len(skipped),
        failed=len(failed),
        skipped=len(skipped),
        why_skipped=sorted(set(skipped)),
        slowest={case.get("name"): round(float(case.get("time", 0)), 1) for case in slow},
    )
    for case, wrong in failed:
        name = f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"
        report.add(name, RED, float(case.get("time", 0)), f"{wrong.get('message', '')}\n{(wrong.text or '')[-400:]}")

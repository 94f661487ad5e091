"""Whether two commits make the same films, bit for bit: for changes that are to change nothing.

    python benchmarks/same_bits.py --against COMMIT [--cases plain sliced] [--demo]

Runs `generate` of this checkout and of COMMIT with the embedded model on the CPU, in every way that a CPU can show, and
compares the decoded frames and samples of the lossless films. Exit 1 where they differ.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import av

ROOT = Path(__file__).resolve().parents[1]
SHORT = "--size 96*96 --infer_frames 24 --num_clip 2 --audio_seconds 2.8 --sample_steps 3 --base_seed 7"
SPARSE = "--sparse_keep 0.5 --sparse_dense_steps 1"
CASES = {
    "plain": "",
    "guided": "--sample_guide_scale 4.5 --audio_guide_scale 3 --hear_past --colour_match 0.5",
    "dpm++": "--sample_solver dpm++ --spacing karras --start_from_ref",
    "euler": "--sample_solver euler --precision bfloat16 --noise reference",
    "pose": "--pose_video plain.mkv --sample_guide_scale 3",
    "sparse": f"{SPARSE} --sample_guide_scale 2",
    "sparse near": f"{SPARSE} --sparse_by distance --sparse_dense_steps 0 --sparse_dense_blocks 0 --size 160*160",
    "float8": "--precision float8-weights --t5_precision float8-weights",
    "int8": "--precision int8",
    "sliced": "--slice_tokens 64 --sample_guide_scale 2",
    "sliced sparse": f"--slice_tokens 64 {SPARSE}",
    "swapped": "--resident_blocks 1 --weights locked",
    "swapped mapped": "--resident_blocks 0 --weights mapped --slice_tokens 128 --precision float8-weights",
    "experts": "--moe_top_k 1 --moe_expert_capacity 16 --moe_overflow drop",
    "two models": "--noise_expert CHECKPOINT --noise_boundary 0.8",
}
"""Name -> flags of `generate`. `plain` comes first, as its film drives the others."""
EARLIER = {"--spacing": "--sigmas"}
"""Flags of now -> what commits that lack them call them."""


def digest(film: Path) -> str:
    """Of all frames and samples, as decoded."""
    told = hashlib.sha256()
    with av.open(str(film)) as container:
        for frame in container.decode(video=0):
            told.update(frame.to_ndarray(format="rgb24").tobytes())
    with av.open(str(film)) as container:
        for frame in container.decode(audio=0):
            told.update(frame.to_ndarray().tobytes())
    return told.hexdigest()[:16]


def film(checkout: Path, name: str, flags: list[str], folder: Path) -> str:
    """The digest of one run's film, or what the run said."""
    save, assets = folder / f"{name.replace(' ', '_')}.mkv", ROOT / "assets"
    flags = [
        {"CHECKPOINT": str(assets / "checkpoint"), "plain.mkv": str(folder / "plain.mkv")}.get(f, f) for f in flags
    ]
    known = (checkout / "wan_s2v_core" / "cli.py").read_text(encoding="utf-8")
    flags = [EARLIER[f] if f in EARLIER and f'"{f}"' not in known else f for f in flags]
    given = ["--ckpt_dir", assets / "checkpoint", "--audio", assets / "voice.flac", "--device", "cpu"]
    command = [sys.executable, "generate.py", *given, "--save_file", save, *flags]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([str(part) for part in command], cwd=checkout, env=env, capture_output=True, text=True)
    return digest(save) if done.returncode == 0 else f"exit {done.returncode}: {done.stderr.strip()[-300:]}"


@contextmanager
def checkout_of(commit: str) -> Iterator[Path]:
    """The tree of a commit in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(["git", "archive", commit], cwd=ROOT, check=True, capture_output=True).stdout
        subprocess.run(["tar", "-x", "-C", folder], input=archive, check=True)
        yield Path(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", required=True, metavar="COMMIT")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--demo", action="store_true", help="the whole demo film as well: some minutes")
    parser.add_argument("--kept", type=Path, help="a file that keeps the digests of COMMIT for the next time")
    options = parser.parse_args()
    cases = {name: f"{SHORT} {CASES[name]}".split() for name in dict.fromkeys(["plain", *options.cases])}
    if options.demo:
        cases["demo"] = ["--preset", "embedded demo", "--size", "256*256", "--base_seed", "7"]
    kept = json.loads(options.kept.read_text()) if options.kept and options.kept.is_file() else {}
    differ = 0
    with (
        checkout_of(options.against) as other,
        tempfile.TemporaryDirectory() as new,
        tempfile.TemporaryDirectory() as old,
    ):
        for name, flags in cases.items():
            if name not in kept:
                if any("plain.mkv" in flag for flag in flags) and not (Path(old) / "plain.mkv").exists():
                    film(other, "plain", cases["plain"], Path(old))
                kept[name] = film(other, name, flags, Path(old))
            if options.kept:
                options.kept.write_text(json.dumps(kept, indent=1))
            now = film(ROOT, name, flags, Path(new))
            is_same = now == kept[name] and not now.startswith("exit")
            differ += not is_same
            print(
                f"{'same' if is_same else 'DIFFERENT'}  {name}: {now}{'' if is_same else f', {kept[name]} before'}",
                flush=True,
            )
    sys.exit(differ > 0)


if __name__ == "__main__":
    main()

"""Copy golden cases into tests/golden, without the tensors that no limit names.

    python dev/copy_golden.py SOURCE_FOLDER

SOURCE_FOLDER holds tensors measured on the reference implementation. The copy keeps one case of each kind and stays
under 6 MB; tests/golden/README.md says what they are.
"""

import json
import re
import shutil
import sys
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

TARGET = Path(__file__).resolve().parents[1] / "tests" / "golden"
DIT_TAPS = "audio_global_full|audio_local_full|tokens_in|rope_cos|rope_sin|block0_pre_audio|block0_post_audio"
KEEP = {  # case -> what is kept of it
    "dit_tiny_weights_A": r".*",
    "dit_tiny_b_motion73": rf"in\..*|output|tap\.({DIT_TAPS})",
    "scheduler_unipc": r"shift(3|5)_steps(3|8|40)\..*",
    "scheduler_dpmpp": r"shift(3|5)_steps(3|8|40)\..*",
    "audio_tiny": r"waveform|input_values|hidden_states|feat_30fps|fps16_bf80_m0\..*",
    "t5_tiny": r".*",
    "vae_tiny_weights": r".*",
    "vae_tiny": r"(encode2|decode1)\..*",
    "pipeline_tiny_pose_dpmpp": (
        r"in\.(context|context_null|audio_bucket|ref_pixels)|out\.video|clip0\.(noise|cond_states|latents)"
    ),
}
TABLES = ("thresholds.json", "manifest_s2v_14b.json", "vae_key_map.json", "t5_key_map.json")


def trim(sidecar: dict, kept: set[str]) -> dict:
    """The sidecar without statistics, and without the runs whose tensors are not kept."""
    for note in ("stats", "ablation_relative_change", "calls", "tensors"):
        sidecar.pop(note, None)
    for runs in ("runs", "combos"):
        if isinstance(sidecar.get(runs), dict):
            sidecar[runs] = {k: v for k, v in sidecar[runs].items() if any(name.startswith(f"{k}.") for name in kept)}
    return sidecar


def copy_case(source: Path, name: str, pattern: str) -> None:
    with safe_open(source / f"{name}.safetensors", framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys() if re.fullmatch(pattern, key)}  # noqa: SIM118
    sidecar = json.loads((source / f"{name}.json").read_text(encoding="utf-8"))
    if name == "vae_tiny":  # counted from 0
        tensors = {re.sub(r"(?<=code)\d", "0", key): value for key, value in tensors.items()}
    if sidecar["id"] == "pipeline":  # the first clip alone; a later one changes nothing in it
        tensors["out.video"] = tensors["out.video"][:, : sidecar["generate_kwargs"]["infer_frames"]].contiguous()
    save_file(tensors, TARGET / f"{name}.safetensors")
    write_json(TARGET / f"{name}.json", trim(sidecar, set(tensors)))


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")


def main() -> None:
    source = Path(sys.argv[1])
    TARGET.mkdir(parents=True, exist_ok=True)
    for name, pattern in KEEP.items():
        copy_case(source, name, pattern)
    for table in TABLES:
        write_json(TARGET / table, json.loads((source / table).read_text(encoding="utf-8")))
    shutil.copytree(source / "wav2vec2_tiny", TARGET / "wav2vec2_tiny", dirs_exist_ok=True)
    total = sum(file.stat().st_size for file in TARGET.rglob("*") if file.is_file())
    print(f"{total / 1e6:.2f} MB in {TARGET}")


if __name__ == "__main__":
    main()

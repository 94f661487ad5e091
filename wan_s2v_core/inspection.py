"""Says what a weights file or folder is, without loading it: for people before a long job, and for bug reports."""

from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

from .errors import shown
from .model.checkpoint import DIT, PART_LABELS, TEXT_ENCODER, TOKENIZER_TENSOR
from .model.loading import Part, find_part, find_tokenizer, there
from .model.official import DIT_STEM, OFFICIAL_FILES, TOKENIZER_FOLDER

OFFICIAL_FOLDER = "official folder"


def describe_part(part: Part) -> dict[str, Any]:
    """Format, part, sizes and how the tensors meet those of the network.

    Raises:
        CheckpointError: if they make none, or the tokenizer of a text encoder is damaged.
    """
    report = part.compare(part.build())
    if part.kind == TEXT_ENCODER and (TOKENIZER_TENSOR in part.found.entries or has_tokenizer(part)):
        find_tokenizer(part)
    config = part.config.to_dict() if is_dataclass(part.config) else dict(part.config)
    keys = {"matched": report.matched, "missing": report.missing, "unexpected": report.unexpected}
    return {
        "format": f"{part.weights.layout}, {part.found.spelling} names",
        "part": part.kind,
        "config": config,
        "dtypes": part.weights.dtypes(),
        "bytes": part.weights.bytes,
        "keys": keys | ({"wrong_shape": report.wrong_shape} if report.wrong_shape else {}),
    }


def has_tokenizer(part: Part) -> bool:
    """Whether a folder with one lies beside a text encoder."""
    return (part.weights.files[0].parent / TOKENIZER_FOLDER).exists()


def inspect_path(path: Path) -> dict[str, Any]:
    """Describe a file, the folder of one network, or an official folder with all of them.

    A whole checkpoint is described as its DiT, with the totals of all parts and each part under `parts`; files that
    it lacks count as missing.

    Raises:
        CheckpointError: if nothing here can be read.
    """
    path = there(path)
    companions = [kind for kind, names in OFFICIAL_FILES.items() if any((path / name).exists() for name in names)]
    if not path.is_dir() or not companions:
        return describe_part(find_part(path))
    kinds = [DIT, *companions] if any(path.glob(f"{DIT_STEM}*")) else companions
    parts = [describe_part(find_part(path, kind)) for kind in kinds]
    absent = [OFFICIAL_FILES[kind][0] for kind in OFFICIAL_FILES if kind not in kinds]
    absent += [] if DIT in kinds else [f"{DIT_STEM}*.safetensors"]
    absent += [] if (path / TOKENIZER_FOLDER).is_dir() else [TOKENIZER_FOLDER]
    dtypes: dict[str, int] = {}
    for part in parts:
        for name, count in part["dtypes"].items():
            dtypes[name] = dtypes.get(name, 0) + count
    return {
        "format": OFFICIAL_FOLDER,
        "part": parts[0]["part"],
        "config": parts[0]["config"],
        "dtypes": dtypes,
        "bytes": sum(part["bytes"] for part in parts),
        "keys": {
            "matched": sum(part["keys"]["matched"] for part in parts),
            "missing": absent + [name for part in parts for name in part["keys"]["missing"]],
            "unexpected": [name for part in parts for name in part["keys"]["unexpected"]],
        },
        "parts": parts,
    }


def render(report: dict[str, Any]) -> str:
    """The report as lines for people."""
    lines = []
    if (missing := report["keys"]["missing"]) and "parts" in report:
        lines.append(f"missing in this folder: {', '.join(map(shown, missing[:6]))}")
    for part in report.get("parts", [report]):
        keys = part["keys"]
        lines.append(f"{PART_LABELS[part['part']]}: {part['format']}, {part['bytes'] / 1e9:.2f} GB")
        lines.append("  types: " + ", ".join(f"{count} x {name}" for name, count in part["dtypes"].items()))
        sizes = {name: value for name, value in part["config"].items() if isinstance(value, (int, float, tuple))}
        lines.append("  sizes: " + ", ".join(f"{name}={shown(value)}" for name, value in sizes.items()))
        lines.append(f"  tensors: {keys['matched']} matched")
        for what in ("missing", "unexpected", "wrong_shape"):
            if names := keys.get(what):
                lines.append(f"  {what.replace('_', ' ')}: {len(names)}, such as {', '.join(map(shown, names[:3]))}")
    return "\n".join(lines)


def is_complete(report: dict[str, Any]) -> bool:
    """Whether every tensor that the networks need is there in its right shape."""
    return not any(p["keys"]["missing"] or p["keys"].get("wrong_shape") for p in [report, *report.get("parts", [])])

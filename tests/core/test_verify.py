"""The golden check itself: it passes on the reference's tensors and fails on everything it should."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from wan_s2v_core.verify import BOUNDS, verify


@pytest.fixture
def folder(golden, tmp_path):
    """A nested copy with one quick case and its weights."""
    inside = tmp_path / "a" / "b"
    inside.mkdir(parents=True)
    for name in ("t5_tiny", "scheduler_unipc"):
        for suffix in (".json", ".safetensors"):
            shutil.copy(golden / f"{name}{suffix}", inside)
    return tmp_path


def test_every_golden_case_passes(golden, run_cli):
    code, out, err = run_cli("verify", golden, "--json")
    report = json.loads(out)
    failed = [case for case in report["cases"] if not case["pass"]]
    assert (code, failed, err) == (0, [], "")
    assert report["passed"] == len(report["cases"]) > 50 and report["failed"] == 0
    assert report["device"] == "cpu" and report["dtype"] == "float32"
    assert {case["id"] for case in report["cases"]} == set(BOUNDS)
    assert set(report["cases"][0]) == {"case", "id", "quantity", "metric", "error", "bound", "pass"}


def test_text_ends_with_the_count(folder, run_cli):
    code, out, _ = run_cli("verify", folder)
    assert code == 0
    assert out.splitlines()[-1] == "18 passed, 0 failed"


def test_built_in_limits_are_those_of_the_golden_set(golden):
    """Where a folder has no thresholds.json, the same limits hold."""
    stored = json.loads((golden / "thresholds.json").read_text(encoding="utf-8"))
    for kind, rules in stored.items():
        if kind != "description":
            first = {name: next(iter(rule.items())) for name, rule in rules.items()}
            assert first == {name: next(iter(rule.items())) for name, rule in BOUNDS[kind].items()}


def reasons(folder) -> list[str]:
    return [result.reason for result in verify(folder) if not result.passed]


def test_own_limits_of_a_folder_count(folder):
    (folder / "thresholds.json").write_text('{"t5": {"output": {"max_abs": 1e-12}}}')
    failed = [result for result in verify(folder) if not result.passed]
    assert {result.id for result in failed} == {"t5"} and failed[0].bound == 1e-12


def test_changed_tensor_fails(folder):
    path = folder / "a/b/t5_tiny.safetensors"
    tensors = load_file(path)
    tensors["out.context0"][0, 0] += 1e-3
    save_file(tensors, path)
    assert [result.quantity for result in verify(folder) if not result.passed] == ["context0"]


def test_other_shape_fails(folder):
    path = folder / "a/b/t5_tiny.safetensors"
    tensors = load_file(path)
    tensors["out.context0"] = tensors["out.context0"][:-1].clone()
    save_file(tensors, path)
    assert "shape" in reasons(folder)[0]


def test_not_a_number_fails(folder):
    path = folder / "a/b/t5_tiny.safetensors"
    tensors = load_file(path)
    tensors["out.context0"][0, 0] = float("nan")
    save_file(tensors, path)
    assert len(reasons(folder)) == 1


def test_missing_tensor_fails(folder):
    path = folder / "a/b/t5_tiny.safetensors"
    tensors = load_file(path)
    del tensors["out.hidden_full"]
    save_file(tensors, path)
    assert "out.hidden_full" in reasons(folder)[0]


def test_gap_in_numbered_tensors_fails(golden, tmp_path):
    for name in ("vae_tiny", "vae_tiny_weights"):
        for suffix in (".json", ".safetensors"):
            shutil.copy(golden / f"{name}{suffix}", tmp_path)
    path = tmp_path / "vae_tiny.safetensors"
    tensors = load_file(path)
    tensors["encode2.latent"] = tensors.pop("encode0.latent")
    save_file(tensors, path)
    assert "encode0.latent" in reasons(tmp_path)[0]


def test_runs_without_facts_fail(folder):
    path = folder / "a/b/scheduler_unipc.json"
    sidecar = json.loads(path.read_text())
    path.write_text(json.dumps(sidecar | {"runs": {}}))
    assert "shift3_steps3" in reasons(folder)[0]


def test_every_limit_of_a_rule_counts(folder):
    (folder / "thresholds.json").write_text('{"t5": {"output": {"max_abs": 1e-3, "rel_l2": 1e-15}}}')
    failed = [result for result in verify(folder) if not result.passed]
    assert {(result.id, result.metric) for result in failed} == {("t5", "rel_l2")}


def test_unknown_limit_fails(folder):
    (folder / "thresholds.json").write_text('{"t5": {"output": {"median": 1e-3}}}')
    assert "without a known metric" in reasons(folder)[0]


def test_values_that_cannot_be_used_fail(folder):
    path = folder / "a/b/scheduler_unipc.json"
    sidecar = json.loads(path.read_text())
    sidecar["runs"]["shift3_steps3"]["shift"] = 0
    path.write_text(json.dumps(sidecar))
    assert "shift=0" in reasons(folder)[0]


def test_missing_sidecar_fails(folder):
    (folder / "a/b/t5_tiny.json").unlink()
    assert "t5_tiny.json" in reasons(folder)[0]


def test_missing_tensors_file_fails(folder):
    (folder / "a/b/t5_tiny.safetensors").unlink()
    assert "t5_tiny.safetensors is not there" in reasons(folder)[0]


def test_missing_weights_fail(golden, tmp_path):
    for suffix in (".json", ".safetensors"):
        shutil.copy(golden / f"dit_tiny_b_motion73{suffix}", tmp_path)
    assert "dit_tiny_weights_A.safetensors is not there" in reasons(tmp_path)[0]


def test_broken_sidecar_fails(folder):
    (folder / "a/b/t5_tiny.json").write_text("{")
    assert "JSON" in reasons(folder)[0]


def test_unknown_id_fails(folder):
    (folder / "a/b/t5_tiny.json").write_text('{"id": "poetry"}')
    assert "'poetry' is not known" in reasons(folder)[0]


def test_truncated_case_fails(folder):
    path = folder / "a/b/t5_tiny.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "not a complete safetensors file" in reasons(folder)[0]


def test_empty_folder_fails(tmp_path, run_cli):
    code, out, _ = run_cli("verify", tmp_path, "--json")
    assert code == 1
    assert json.loads(out)["failed"] == 1


def test_no_folder_is_a_usage_error(tmp_path, run_cli):
    code, out, err = run_cli("verify", tmp_path / "nowhere", "--json")
    assert code == 2
    assert "error" in json.loads(out) and "nowhere is not a folder" in err


def test_reference_tables_are_no_cases(folder):
    (folder / "table.json").write_text('{"rows": []}')
    assert reasons(folder) == []


def test_tensors_whose_sidecar_has_no_id_fail(folder):
    path = folder / "a/b/t5_tiny.json"
    sidecar = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in sidecar.items() if name != "id"}))
    assert "'?' is not known" in reasons(folder)[0]


def test_removed_run_fails(folder):
    path = folder / "a/b/scheduler_unipc.safetensors"
    save_file({name: value for name, value in load_file(path).items() if "shift5" not in name}, path)
    assert "shift5_steps40.timesteps" in reasons(folder)[0]


def test_removed_row_fails(folder):
    path = folder / "a/b/t5_tiny.safetensors"
    rows = {name: value[:1].clone() for name, value in load_file(path).items() if name.startswith(("in.", "out.h"))}
    save_file(load_file(path) | rows, path)
    assert reasons(folder)


def test_promised_tensor_that_is_missing_fails(folder):
    path = folder / "a/b/t5_tiny.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tensors": {"in.other": {"shape": [1]}}}))
    assert "in.other" in reasons(folder)[0]


def test_deeply_nested_json_ends_nothing(folder):
    (folder / "deep.json").write_text("[" * 100_000)
    assert reasons(folder) == []
    (folder / "a/b/t5_tiny.json").write_text("[" * 100_000)
    assert len(reasons(folder)) == 1

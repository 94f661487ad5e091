"""Encoded voices and prompts that are kept: made once, by content, and a damaged or full disk stops nobody."""

import os
import shutil
from itertools import count

import pytest
import torch
from test_generate import command, inputs, kept_pictures, media  # noqa: F401  (fixtures)

from wan_s2v_core.errors import ConfigError
from wan_s2v_core.io import encodings, records
from wan_s2v_core.io.encodings import EncodingStore
from wan_s2v_core.model.checkpoint import DIT, SPEECH_ENCODER, TEXT_ENCODER, VAE
from wan_s2v_core.networks import CheckpointNetworks

pytestmark = pytest.mark.usefixtures("pooled_vae")


@pytest.fixture
def used(monkeypatch):
    """Which networks stages have used."""
    kinds, use = set(), CheckpointNetworks.use

    def watched(self, name, *given):
        kinds.add(name)
        return use(self, name, *given)

    monkeypatch.setattr(CheckpointNetworks, "use", watched)
    return kinds


def test_a_changed_seed_loads_neither_encoder(command, inputs, run_cli, used):  # noqa: F811
    folder, names = inputs / "kept", count()

    def run(**changes):
        used.clear()
        target = inputs / f"{next(names)}.mp4"
        flags = {"cache_dir": folder, "keep_clips": True, "sample_steps": 1, "save_file": target} | changes
        code, _, err = run_cli(*command(**flags))
        assert code == 0, err
        return kept_pictures(target.with_name(f"{target.name}.clips"))

    plain = run(cache_dir=None)
    assert used == {DIT, VAE, TEXT_ENCODER, SPEECH_ENCODER}
    assert torch.equal(run(), plain) and used == {DIT, VAE, TEXT_ENCODER, SPEECH_ENCODER}
    assert sorted(file.name.partition("-")[0] for file in folder.iterdir()) == ["text", "voice"]
    assert torch.equal(run(), plain) and used == {DIT, VAE}
    assert not torch.equal(run(base_seed=4), plain) and used == {DIT, VAE}
    run(prompt="someone else")
    assert used == {DIT, VAE, TEXT_ENCODER}
    run(audio_start=0.3)
    assert used == {DIT, VAE, SPEECH_ENCODER}
    run(precision="bfloat16")
    assert used == {DIT, VAE, TEXT_ENCODER}
    for file in folder.glob("voice-*"):
        file.write_bytes(file.read_bytes()[:-100])
    assert torch.equal(run(), plain) and used == {DIT, VAE, SPEECH_ENCODER}


def test_another_encoder_in_the_same_place_is_another(command, inputs, tiny_checkpoint, run_cli, used):  # noqa: F811
    checkpoint, folder = inputs / "checkpoint", inputs / "kept"
    shutil.copytree(tiny_checkpoint, checkpoint)
    words = command(ckpt_dir=checkpoint, cache_dir=folder, sample_steps=1)
    assert run_cli(*words)[0] == 0
    (file,) = (path for path in checkpoint.rglob("*") if "t5" in path.name and path.suffix in (".safetensors", ".pth"))
    facts = file.stat()
    os.utime(file, ns=(facts.st_atime_ns, facts.st_mtime_ns + 1_000_000))
    used.clear()
    assert run_cli(*words)[0] == 0
    assert used == {DIT, VAE, TEXT_ENCODER}


def test_a_full_disk_stops_nobody(tmp_path, monkeypatch, caplog):
    store, made = EncodingStore(tmp_path / "kept"), {"prompt": torch.randn(1, 3, 4)}

    def full(file, *_):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(records, "write_safetensors", full)
    assert store.get("text", "a" * 64, lambda: made) is made
    assert "No space left" in caplog.text and not list((tmp_path / "kept").iterdir())
    monkeypatch.undo()
    store.get("text", "a" * 64, lambda: made)
    kept = store.get("text", "a" * 64, lambda: pytest.fail("made anew"))
    assert torch.equal(kept["prompt"], made["prompt"])


def test_a_failing_encoder_leaves_nothing_behind(tmp_path):
    store = EncodingStore(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        store.get("text", "b", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    assert not list(tmp_path.iterdir())


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="Give a folder that can be written"):
        encodings.EncodingStore(tmp_path / "file")

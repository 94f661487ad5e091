"""Damaged checkpoints: whatever is wrong with a file is one line of ours, at once and without filling memory."""

import random
import shutil
import time

import pytest
import torch
from weight_mutations import MUTATIONS

from wan_s2v_core.errors import LONGEST_MESSAGE, WanS2VError
from wan_s2v_core.inspection import inspect_path, render
from wan_s2v_core.model.checkpoint import PART_LABELS, TEXT_ENCODER
from wan_s2v_core.model.loading import load

LONGEST_SECONDS = 20


def outcome(work) -> str:
    """What came of it: fine, or the message, which must be one for people."""
    try:
        work()
    except WanS2VError as error:
        message = str(error)
        assert "\n" not in message and message.isprintable() and message.endswith((".", "characters)")), message
        assert len(message) < LONGEST_MESSAGE
        return message
    return "fine"


def look_at(folder) -> list[str]:
    """Inspect a folder, and load each network of it."""

    def use(kind):
        network = load(folder, kind, torch.float32)
        if kind == TEXT_ENCODER:
            network.encode("A person talks.")

    return [
        outcome(lambda: render(inspect_path(folder))),
        *(outcome(lambda kind=kind: use(kind)) for kind in PART_LABELS),
    ]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("turn", range(2))
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.__name__)
def test_damage_is_told_in_one_line(mutation, turn, tiny_checkpoint, tmp_path, fresh_seed):
    folder, began = shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"), time.monotonic()
    mutation(folder, random.Random(fresh_seed))
    print(look_at(folder))
    assert time.monotonic() - began < LONGEST_SECONDS

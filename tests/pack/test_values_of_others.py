"""AUDIO and IMAGE as other packs give them, through whole runs: a film with that sound, or one line."""

import numpy as np
import pytest

pytestmark = pytest.mark.usefixtures("server_lives")


@pytest.mark.parametrize("kind", ["mapping", "int16", "two sides", "loud"])
def test_sound_that_is_taken(kind, graph, run, comfy, watch, new_seed):
    """The tone of the test pack is in the film at its own loudness; 6 times full scale comes out at full scale."""
    ended = run(graph(audio=("OddSound", {"kind": kind}), seed=new_seed(), format="lossless-mkv"))
    assert ended.status == "success", ended.errors
    sound = watch(comfy.videos(ended)[-1]).sound
    assert np.abs(sound).max() == pytest.approx(1.0 if kind == "loud" else 0.3, abs=0.01)


@pytest.mark.parametrize(
    "kind, message", [("32-bit floats", "has a peak of"), ("no rate", "sample_rate=None"), ("many channels", "swapped")]
)
def test_sound_that_is_refused(kind, message, graph, run, message_of):
    assert message in message_of(run(graph(audio=("OddSound", {"kind": kind}))))


@pytest.mark.parametrize("kind", ["bytes", "one", "list"])
def test_pictures_that_are_taken(kind, graph, run, new_seed):
    ended = run(graph(picture=("OddPicture", {"kind": kind}), seed=new_seed()))
    assert ended.status == "success", ended.errors


@pytest.mark.parametrize("kind, message", [("no channels", "(1, 96, 64)"), ("no values", "the image input cannot be")])
def test_pictures_that_are_refused(kind, message, graph, run, message_of):
    assert message in message_of(run(graph(picture=("OddPicture", {"kind": kind}))))

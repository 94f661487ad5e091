"""Names from a workflow never lead out of the folder they belong to."""

import ntpath
import posixpath

import pytest

from wan_s2v_core.io.outside import inside

WITHIN = [
    "face.png",
    "sub/face.png",
    "./face.png",
    "sub/../face.png",
    "..face.png",
    "... /x",
    " ",
    "%date%/x",
    "é\udc80",
]
OUTSIDE = ["", ".", "./", "sub/..", "..", "../face.png", "../in2/face.png", "sub/../../face.png", "/etc/passwd", "/",
           "//server/share", "a\0b", "\0", None, 3, ["face.png"]]  # fmt: skip
ON_WINDOWS = {
    "face.png": True,
    "sub\\face.png": True,
    "sub/face.png": True,
    "\\face.png": False,
    "..\\face.png": False,
    "sub\\..\\..\\face.png": False,
    "sub/..\\..\\face.png": False,
    "C:\\other\\face.png": False,
    "C:\\Data\\IN\\face.png": True,
    "c:/data/in/face.png": True,
    "D:face.png": False,
    "D:\\data\\in\\face.png": False,
    "\\\\server\\share\\face.png": False,
    "\\\\?\\C:\\data\\face.png": False,
    "sub\\..": False,
}


@pytest.mark.parametrize("name", WITHIN)
def test_names_within(name, tmp_path):
    path = inside(tmp_path, name)
    assert path is not None and tmp_path in path.parents


@pytest.mark.parametrize("name", OUTSIDE, ids=ascii)
def test_names_that_lead_outside(name, tmp_path):
    assert inside(tmp_path, name) is None


def test_a_name_may_be_the_whole_path(tmp_path):
    assert inside(tmp_path, str(tmp_path / "face.png")) == tmp_path / "face.png"
    assert inside(tmp_path, f"{tmp_path}2/face.png") is None


def test_backslashes_are_letters_here(tmp_path):
    assert inside(tmp_path, "..\\face.png", posixpath) == tmp_path / "..\\face.png"


@pytest.mark.parametrize(("name", "is_within"), ON_WINDOWS.items(), ids=ascii)
def test_names_on_windows(name, is_within):
    assert (inside("C:\\data\\in", name, ntpath) is not None) == is_within


def test_the_root_of_a_drive():
    assert inside("/", "face.png", posixpath) is not None
    assert inside("C:\\", "face.png", ntpath) is not None
    assert inside("C:\\", "D:\\face.png", ntpath) is None


def test_links_stay_where_their_names_are(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "in" / "sub").symlink_to(tmp_path / "elsewhere")
    assert inside(tmp_path / "in", "sub/face.png") == tmp_path / "in" / "sub" / "face.png"

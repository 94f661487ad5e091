"""The tiles that the 8-bit kernel for Hopper cards reads, and its arithmetic, without a card.

Triton's kernels run as Python in interpreted_tiles.py; CUDA C++ is compiled where NVRTC is.
"""

from pathlib import Path

import pytest
from conftest import ROOT

from wan_s2v_core.acceleration import attention


@pytest.mark.parametrize("kind", ["queries", "keys", "largest", "values", "norms"])
@pytest.mark.parametrize("x", ["bf16", "fp32"])
def test_tile_kernels_compile_for_a_hopper_card(kind, x):
    """Without a card: what the compiler refuses shows here. The interpreter lets much of it pass."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget

    from wan_s2v_core.acceleration.attention import norms, tiles

    name = "_rows_kernel" if kind in ("queries", "keys") else f"_{kind}_kernel"
    per_row = kind == "queries"
    kernel = getattr(norms if kind == "norms" else tiles, name)
    types = {"x": f"*{x}", "mean": "*fp32", "scales": "*fp32", "largest": "*fp32", "norms": "*i32", "factor": "fp32"}
    types["out"] = "*i8" if name == "_rows_kernel" else "*i32"
    constants = {
        "_rows_kernel": {
            "HAS_MEAN": not per_row, "PER_ROW": per_row, "TILE": tiles.TILE, "FAINTEST": tiles.FAINTEST,
            "BYTES": tiles.TILE**2 if per_row else tiles.KEY_TILE_BYTES,
        },
        "_largest_kernel": {"TILE": tiles.TILE, "TOKENS": tiles.TOKENS_AT_ONCE},
        "_values_kernel": {"TILE": tiles.TILE},
        "_norms_kernel": {"TILE": tiles.TILE},
    }[name]  # fmt: skip
    signature = {arg: "constexpr" if arg in constants else types.get(arg, "i32") for arg in kernel.arg_names}
    source = triton.compiler.ASTSource(kernel, signature, constants)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8})
    assert ("atom.global" if kind == "norms" else "st.global") in made.asm["ptx"]


# --- CUDA C++ ------------------------------------------------------------------------------------------------------

VARIANTS = [
    ("attend8", ()),
    ("attend16", ("KEYS=128",)),
    ("attend16", ("KEYS=176",)),
    ("attend16", ("KEYS=128", "HALF")),
    ("attend16", ("KEYS=176", "HALF")),
]


def compiled(name: str, defined: tuple[str, ...]) -> bytes:
    """Machine code of a kernel as the product compiles it; skips where there is no NVRTC."""
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"NVRTC is not here: {error}")
    from wan_s2v_core.acceleration.attention.hopper import OPTIONS, compile_source

    return compile_source(name, (*OPTIONS, *(f"-D{one}" for one in defined)))


@pytest.mark.parametrize(("name", "defined"), VARIANTS)
def test_cuda_kernels_compile(name, defined):
    code = compiled(name, defined)
    assert code.startswith(b"\x7fELF") and name.encode() in code


def test_what_does_not_compile_is_told():
    from wan_s2v_core.errors import BackendUnavailable

    with pytest.raises(BackendUnavailable, match=r"hopper16.cu does not compile here: [\s\S]*Choose attention sdpa"):
        compiled("attend16", ("KEYS=banana",))


# --- files ---------------------------------------------------------------------------------------------------------


def test_the_sources_are_where_the_module_looks_and_in_the_package():
    """They are read from beside the module, in a checkout and as installed."""
    tomllib = pytest.importorskip("tomllib", reason="in the standard library since Python 3.11")
    folder = Path(attention.__path__[0])
    sources = sorted(path.name for path in folder.iterdir() if path.suffix in (".cu", ".cuh"))
    assert sources == ["hopper.cuh", "hopper16.cu", "hopper8.cu"]
    facts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = facts["tool"]["setuptools"]["package-data"]["wan_s2v_core"]
    shipped = {path.name for pattern in patterns for path in (ROOT / "wan_s2v_core").glob(pattern)}
    assert set(sources) <= shipped and "video_presets.json" in shipped


def test_the_module_reads_those_sources():
    from wan_s2v_core.acceleration.attention import hopper

    for file in (*hopper.SOURCES.values(), hopper.HEADER):
        assert (hopper.FOLDER / file).read_text(encoding="utf-8").isascii()
    assert set(hopper.SOURCES) == set(hopper.SHARED_BYTES)

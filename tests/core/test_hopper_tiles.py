"""The tiles that the 8-bit kernel for Hopper cards reads, and its arithmetic, without a card; the kernels on one.

Triton's kernels run as Python in a process of their own (interpreted_tiles.py); CUDA C++ is compiled where NVRTC is.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

from wan_s2v_core.acceleration import attention
from wan_s2v_core.acceleration.attention.reference import dense_mask
from wan_s2v_core.geometry import TILE, tiles_of
from wan_s2v_core.seams import KeysValues


def test_tiles_as_python():
    """Every kernel on the CPU, in a process in which Triton interprets them."""
    pytest.importorskip("triton")
    file = Path(__file__).with_name("interpreted_tiles.py")
    command = [sys.executable, "-m", "pytest", str(file), "-q", "-p", "no:cacheprovider"]
    command += ["-n", "0"] if importlib.util.find_spec("xdist") else []
    settings = {"TRITON_INTERPRET": "1", "PYTHONPATH": str(file.parent)}  # the path for fixtures of its neighbour
    run = subprocess.run(command, cwd=ROOT, env={**os.environ, **settings}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
    assert "skipped" not in run.stdout


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


# --- on a card -----------------------------------------------------------------------------------------------------


def error_of(out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *lists: torch.Tensor) -> float:
    """Relative L2 to attention in float64."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    mask = dense_mask(*lists, q.shape[2], k.shape[2]).unflatten(0, q.shape[:2]) if lists else None
    exact = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2)
    return float((out - exact).norm() / exact.norm())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a Hopper card")
class TestOnCard:
    """Both kernels on queries and keys of any length: where no score can leave the room above a base, and where they
    rise from tile to tile beyond what float32 holds."""

    SHAPES = ((1, 1000, 3), (2, 77, 1), (1, 128, 40), (1, 1409, 2), (1, 2000, 3))

    @staticmethod
    def random(shape, dtype, times):
        q, k, v = (torch.randn(*shape, 128, device="cuda") for _ in range(3))
        ramp = torch.linspace(0.1, 1.0, shape[1], device="cuda")[:, None, None]
        k = k * ramp * times + 3 * torch.randn(128, device="cuda")
        return [x.to(dtype) for x in (q, k, v)]

    @pytest.mark.parametrize("times", [1, 8, 40, 400])
    @pytest.mark.parametrize(("dtype", "allowed"), [(torch.bfloat16, 0.004), (torch.float16, 0.0006)])
    def test_exact(self, dtype, allowed, times, fresh_seed):
        from wan_s2v_core.acceleration.attention.hopper import prepare16

        torch.manual_seed(fresh_seed)
        allowed += 1e-5 * times  # scores of thousands are exact to float32 no better than that
        for shape in self.SHAPES:
            q, k, v = self.random(shape, dtype, times)
            attend = prepare16(KeysValues.of(k, v))
            out = attend(q)
            assert error_of(out, q, k, v) < allowed
            if shape[1] > TILE:
                assert torch.equal(attend(q[:, TILE:]), out[:, TILE:]), "slices of queries give the same bits"
            lists = random_lists(shape[0] * shape[2], shape[1], shape[1], "cuda")
            assert error_of(attend(q, *lists), q, k, v, *lists) < allowed

    @pytest.mark.parametrize("times", [1, 8, 40, 400])
    def test_in_8_bits(self, times, fresh_seed):
        from wan_s2v_core.acceleration.attention.hopper import prepare8

        torch.manual_seed(fresh_seed)
        for shape in self.SHAPES:
            q, k, v = self.random(shape, torch.bfloat16, times)
            attend = prepare8(KeysValues.of(k, v))
            out = attend(q)
            if times == 1:  # beyond it, rounding queries and keys alone decides which key wins
                assert error_of(out, q, k, v) < 0.06
            assert torch.isfinite(out).all()
            lists = random_lists(shape[0] * shape[2], shape[1], shape[1], "cuda")
            listed = attend(q, *lists)
            assert torch.isfinite(listed).all() and (times > 1 or error_of(listed, q, k, v, *lists) < 0.06)

    def test_what_is_no_number_is_not_hidden(self):
        from wan_s2v_core.acceleration.attention.hopper import prepare8, prepare16

        for prepare in (prepare16, prepare8):
            for wrong in (torch.nan, torch.inf):
                q, k, v = self.random((1, 700, 2), torch.bfloat16, 1)
                k[0, 333, 1, 5] = wrong
                finite = prepare(KeysValues.of(k, v))(q).isfinite().all(dim=-1)[0]
                assert finite[:, 0].all() and not finite[:, 1].all()


def random_lists(heads: int, queries: int, keys: int, device: str) -> list[torch.Tensor]:
    """About half of the tiles for each tile of queries, in rising order, the last of all among them."""
    tiles = tiles_of(keys)
    seen = torch.rand(heads, tiles_of(queries), tiles, device=device) < 0.5
    seen[..., -1] = True
    listed = torch.where(seen, torch.arange(tiles, device=device), tiles).sort(dim=-1).values
    return [listed.clamp(max=tiles - 1).int().contiguous(), seen.sum(dim=-1).int()]


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

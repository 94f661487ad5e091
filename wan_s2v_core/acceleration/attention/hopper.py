"""Our attention kernels for Hopper cards: exact in 16 bits, and in 8 bits.

They are CUDA C++ (hopper16.cu, hopper8.cu), compiled at first use by the NVRTC that comes with torch and kept in
Triton's cache, so that the next process does not compile them again.
"""

import hashlib
import logging
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import BackendUnavailable
from ...geometry import TILE, tiles_of
from ...seams import KeysValues
from .reference import score_factor

log = logging.getLogger(__name__)

FOLDER = Path(__file__).parent
HEADER = "hopper.cuh"
OPTIONS = ("--gpu-architecture=sm_90a", "--std=c++17", "--use_fast_math", "-default-device")
THREADS, BARRIER_BYTES, ALIGNMENT = 384, 256, 1024
DENSE_KEYS = 176
"""Keys of a tile where all are seen: fewer rounds, and all the registers there are."""
SHARED_BYTES = {
    "attend8": (2 * 4 * (TILE * TILE + 1024) + TILE * TILE) + BARRIER_BYTES + ALIGNMENT,
    "attend16": 2 * (2 * 3 * TILE + TILE) * TILE + BARRIER_BYTES + ALIGNMENT,
}
SOURCES = {"attend8": "hopper8.cu", "attend16": "hopper16.cu"}


def check(result: tuple) -> tuple:
    """What a call of CUDA returned behind its error code.

    Raises:
        BackendUnavailable: if it failed.
    """
    if result[0]:
        raise BackendUnavailable(f"CUDA answered {result[0]!r}. Choose attention sdpa, or renew driver and torch.")
    return result[1:]


def compile_source(name: str, options: tuple[str, ...]) -> bytes:
    """CUDA C++ -> machine code.

    Raises:
        BackendUnavailable: if it does not compile.
    """
    from cuda.bindings import nvrtc

    source, header = ((FOLDER / file).read_bytes() for file in (SOURCES[name], HEADER))
    (program,) = check(nvrtc.nvrtcCreateProgram(source, SOURCES[name].encode(), 1, [header], [HEADER.encode()]))
    (failure,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
    if failure:
        (size,) = check(nvrtc.nvrtcGetProgramLogSize(program))
        text = b" " * size
        check(nvrtc.nvrtcGetProgramLog(program, text))
        raise BackendUnavailable(
            f"{SOURCES[name]} does not compile here: {text.decode(errors='replace').strip()} Choose attention sdpa."
        )
    (size,) = check(nvrtc.nvrtcGetCUBINSize(program))
    code = b" " * size
    check(nvrtc.nvrtcGetCUBIN(program, code))
    return code


@cache
def machine_code(name: str, *defined: str) -> bytes:
    """Of a kernel, compiled with these names defined; from Triton's cache where it has been compiled before."""
    from triton.runtime.cache import get_cache_manager

    options = (*OPTIONS, *(f"-D{one}" for one in defined))
    sources = [(FOLDER / file).read_text(encoding="utf-8") for file in (SOURCES[name], HEADER)]
    cache = get_cache_manager(hashlib.sha256(repr((sources, options)).encode()).hexdigest())
    if found := cache.get_file(f"{name}.cubin"):
        return Path(found).read_bytes()
    began = time.monotonic()
    code = compile_source(name, options)
    log.info("%s compiled in %.1f s; the next process finds it in %s", name, time.monotonic() - began, "Triton's cache")
    cache.put(code, f"{name}.cubin", binary=True)
    return code


@cache
def kernel(device: int, name: str, *defined: str):
    """A kernel, loaded onto a card."""
    from cuda.bindings import driver

    with torch.cuda.device(device):
        torch.cuda.current_stream().synchronize()  # makes torch's context the current one
        (module,) = check(driver.cuModuleLoadData(machine_code(name, *defined)))
        (function,) = check(driver.cuModuleGetFunction(module, name.encode()))
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        check(driver.cuFuncSetAttribute(function, attribute, SHARED_BYTES[name]))
    return function


def launch(name: str, out: Tensor, arguments: Sequence[Any], *defined: str) -> None:
    """Run a kernel that makes `out`, B L N 128.

    Args:
        arguments: all but the last, which say how `out` lies: tensors or None, numbers of numpy, maps of tensors.
    """
    from cuda.bindings import driver

    batch, queries, heads, _ = out.shape
    given = [*arguments, np.int32(heads), *(np.int64(stride) for stride in out.stride()[:3])]
    held = [as_memory(one) for one in given]
    places = np.array([one if isinstance(one, int) else address(one) for one in held], dtype=np.uint64)
    grid = (tiles_of(queries), batch * heads, 1)
    function, shared = kernel(out.device.index or 0, name, *defined), SHARED_BYTES[name]
    with torch.cuda.device(out.device):  # a kernel belongs to the context of its card
        stream = torch.cuda.current_stream().cuda_stream
        check(driver.cuLaunchKernel(function, *grid, THREADS, 1, 1, shared, stream, address(places), 0))


def as_memory(argument: Any) -> np.ndarray | int:
    """An argument of a kernel as memory that holds its value; for maps of tensors, the address of it."""
    if hasattr(argument, "getPtr"):
        return int(argument.getPtr())
    if argument is None or isinstance(argument, Tensor):
        argument = np.uint64(0 if argument is None else argument.data_ptr())
    return np.array([argument])


def address(memory: np.ndarray) -> int:
    return memory.__array_interface__["data"][0]


def tensor_map(x: Tensor, tokens_at_once: int = TILE):
    """What the copy engine has to know of B L N 128 to fetch 64 channels of some tokens of a head."""
    from cuda.bindings import driver

    batch, tokens, heads, width = x.shape
    size = x.element_size()
    strides = (x.stride(2), x.stride(1), x.stride(0) if batch > 1 else x.stride(1) * tokens)
    kinds, none = driver.CUtensorMapDataType, driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE
    kind = "FLOAT16" if x.dtype == torch.float16 else "BFLOAT16"
    made = driver.cuTensorMapEncodeTiled(
        getattr(kinds, f"CU_TENSOR_MAP_DATA_TYPE_{kind}"),
        4,
        x.data_ptr(),
        [driver.cuuint64_t(side) for side in (width, heads, tokens, batch)],
        [driver.cuuint64_t(stride * size) for stride in strides],
        [driver.cuuint32_t(side) for side in (64, 1, tokens_at_once, 1)],
        [driver.cuuint32_t(1)] * 4,
        none,
        driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    return check(made)[0]


def prepare16(made: KeysValues) -> Callable[..., Tensor]:
    """Exact attention to these keys and values, B L N 128 in bfloat16 or float16.

    Returns:
        A function of q, B L N 128 of their type, of listed and counts, or none -> B L N 128.
            listed: B*N tiles(q) tiles(k), int32: the tiles of 128 keys that each tile of 128 queries sees; the last
                tile of all, which may be partly filled, comes last where it is seen.
            counts: B*N tiles(q), int32: how many of them.
    """
    from .norms import largest_norms

    k, v = (x if is_aligned(x) else x.contiguous() for x in made.both())
    with torch.cuda.device(k.device):
        norms = largest_norms(k)

    def attend(q: Tensor, listed: Tensor | None = None, counts: Tensor | None = None) -> Tensor:
        q = q if is_aligned(q) else q.contiguous()
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        keys = TILE if listed is not None else DENSE_KEYS
        maps = [tensor_map(q), tensor_map(k, keys), tensor_map(v, keys)]
        lengths = [np.int32(x.shape[1]) for x in (q, k)]
        arguments = [*maps, norms, out, listed, counts, np.float32(score_factor(TILE)), *lengths]
        launch("attend16", out, arguments, f"KEYS={keys}", *(["HALF"] if q.dtype == torch.float16 else []))
        return out

    return attend


def is_aligned(x: Tensor) -> bool:
    """Whether the copy engine can read it as it lies."""
    return x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and all(x.stride(axis) % 8 == 0 for axis in range(3))


def prepare8(made: KeysValues) -> Callable[..., Tensor]:
    """Attention in 8 bits to these keys, B L N 128 in bfloat16 or float32, of which tiles are kept and nothing else.

    Returns:
        A function of q: B L N 128, and of lists as for prepare16, or none -> B L N 128 in bfloat16.
    """
    from .tiles import key_tiles, query_tiles, value_tiles

    k = made.keys()
    keys, device = k.shape[1], k.device
    with torch.cuda.device(device):
        keys_made = key_tiles(k)
        del k  # before there are values
        tiles = (*keys_made, *value_tiles(made.values()))

    def attend(q: Tensor, listed: Tensor | None = None, counts: Tensor | None = None) -> Tensor:
        out = torch.empty(q.shape, dtype=torch.bfloat16, device=q.device)
        with torch.cuda.device(q.device):
            own_tiles = query_tiles(q)
        launch("attend8", out, [*own_tiles, *tiles, out, listed, counts, np.int32(q.shape[1]), np.int32(keys)])
        return out

    return attend

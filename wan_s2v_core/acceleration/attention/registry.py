"""Ways to compute self-attention, by name: which of them can be used here, which is fastest, and why others are not.

A backend is loaded when it is asked for and tried on a few random tokens before it is trusted, so that a package that
is missing, broken or built for another card is a reason in a message and nothing worse.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ...config import check_choice
from ...errors import BackendUnavailable
from ...geometry import tiles_of
from ...model.attention import scaled_dot_product, sdpa
from ...seams import Attend, AttendQueries, BlockContext, KeysValues, PreparedAttend
from ..trials import tried_once
from .reference import prepare_listed

log = logging.getLogger(__name__)

AttendListed = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""(q, k, v: B L N D; listed: B*N tiles(q) tiles(k); counts: B*N tiles(q)) -> B L N D; see `hopper.prepare16`.

What it makes of keys and values once for many slices of queries is a `PreparedListed`."""
MakeOfKeys = Callable[[KeysValues], Callable[..., Tensor]]
"""Keys and values -> a function of q, and of lists of tiles where not all keys are seen."""

AUTO, AUTO_8 = "auto", "auto8"
SDPA, FLASH_4, HOPPER, SAGE = "sdpa", "flash4", "hopper", "sage"
HOPPER_8, PORTABLE, PORTABLE_8 = "hopper8", "triton", "triton8"

HOPPER_CARD = (9, 0)
EXACT_ERROR, LOSSY_ERROR = 0.006, 0.08
"""Relative L2 to float32 on random values that a backend is let pass with: what rounding to bfloat16 and 8 bits make,
0.0023 and 0.040 to 0.053, and half as much again."""
TRIAL_SHAPE = (1, 300, 2)
MISSING = "a package cannot be imported"
FAILS, IS_OFF = "it fails here", "its result is off"
"""How reasons begin that are told without being asked: of what is broken, rather than missing."""


@dataclass(frozen=True)
class PreparedListed:
    """An `AttendListed` that makes something of keys and values first; as `PreparedAttend`."""

    prepare: MakeOfKeys

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, listed: Tensor, counts: Tensor) -> Tensor:
        return self.prepare(KeysValues.of(k, v))(q, listed, counts)


def listed_with_keys(attend: AttendListed, made: KeysValues) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """`attend` for queries that come slice by slice, each with their lists."""
    if isinstance(attend, PreparedListed):
        return attend.prepare(made)
    k, v = made.both()
    return lambda q, listed, counts: attend(q, k, v, listed, counts)


@dataclass(frozen=True)
class Setting:
    """Where attention is to run."""

    device: torch.device
    dtype: torch.dtype
    head_width: int

    @property
    def capability(self) -> tuple[int, int]:
        return torch.cuda.get_device_capability(self.device) if self.device.type == "cuda" else (0, 0)


@dataclass(frozen=True)
class Backend:
    """A way to compute attention.

    `load` returns the function, and the one that takes lists of tiles if there is one.
    """

    name: str
    is_exact: bool
    what: str
    load: Callable[[Setting], tuple[Attend, AttendListed | None]]


def need(is_so: bool, otherwise: str) -> None:
    """Raises BackendUnavailable with a reason unless something is so."""
    if not is_so:
        raise BackendUnavailable(otherwise)


@contextmanager
def needed(install: str) -> Iterator[None]:
    """Raises BackendUnavailable if an import within fails. `install`: what to give pip."""
    try:
        yield
    except ImportError as error:
        raise BackendUnavailable(f"{MISSING} ({error}); pip install {install}") from error


def need_card(setting: Setting) -> None:
    need(setting.device.type == "cuda", "it needs an NVIDIA card")
    need(setting.dtype in (torch.bfloat16, torch.float16), f"it computes in bfloat16 or float16, not {setting.dtype}")


def without_context(function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor, context: BlockContext) -> Tensor:
        with torch.cuda.device_of(q):  # kernels are launched on the current card
            return function(q, k, v)

    return attend


def prepared(prepare: MakeOfKeys) -> tuple[Attend, AttendListed]:
    """Both ways to call a backend that makes something of keys and values first; results are of the queries' type."""

    def prepare_both(made: KeysValues) -> Callable[..., Tensor]:
        attend = prepare(made)
        return lambda q, *lists: attend(q, *lists).to(q.dtype)

    def prepare_dense(made: KeysValues, context: BlockContext) -> AttendQueries:
        attend = prepare_both(made)
        return lambda q, start: attend(q)

    return PreparedAttend(prepare_dense), PreparedListed(prepare_both)


def load_sdpa(setting: Setting) -> tuple[Attend, AttendListed | None]:
    return sdpa, PreparedListed(prepare_listed)


def need_hopper(setting: Setting) -> None:
    need_card(setting)
    need(setting.capability == HOPPER_CARD, "it is written for Hopper cards (H100, H200) alone")
    need(setting.head_width == 128, f"it computes heads of 128 channels, these have {setting.head_width}")
    with needed("triton cuda-bindings"):
        import triton  # noqa: F401
        from cuda.bindings import driver, nvrtc  # noqa: F401


def load_hopper(setting: Setting) -> tuple[Attend, AttendListed | None]:
    need_hopper(setting)
    from .hopper import prepare16

    return prepared(prepare16)


def load_hopper8(setting: Setting) -> tuple[Attend, AttendListed | None]:
    need_hopper(setting)
    from .hopper import prepare8

    return prepared(prepare8)


def load_portable(setting: Setting) -> tuple[Attend, AttendListed | None]:
    need(setting.device.type == "cuda", "it needs a card")
    with needed("triton"):
        from .portable import attend16

    return without_context(attend16), attend16


def load_portable8(setting: Setting) -> tuple[Attend, AttendListed | None]:
    need_card(setting)
    need(setting.capability >= (8, 0), "it needs a card with fast int8 products (RTX 30, A100 or newer)")
    with needed("triton"):
        from .portable import prepare8

    return prepared(prepare8)


def load_flash4(setting: Setting) -> tuple[Attend, AttendListed | None]:
    need_card(setting)
    need(setting.capability >= HOPPER_CARD, "it needs a Hopper or Blackwell card")
    with needed('"flash-attn-4[cu13]"'):
        from flash_attn.cute import flash_attn_func

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = flash_attn_func(q, k, v)
        return out[0] if isinstance(out, tuple) else out

    return without_context(attend), None


def load_sage(setting: Setting) -> tuple[Attend, AttendListed | None]:
    need_card(setting)
    with needed("sageattention (version 1; version 2 is built from its sources)"):
        from sageattention import sageattn

    return without_context(lambda q, k, v: sageattn(q, k, v, tensor_layout="NHD", is_causal=False)), None


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend(HOPPER, True, "our own kernel for Hopper cards", load_hopper),
        Backend(FLASH_4, True, "flash-attention 4, a package for Hopper and Blackwell cards", load_flash4),
        Backend(SDPA, True, "PyTorch's own, cuDNN first", load_sdpa),
        Backend(PORTABLE, True, "our own Triton kernel for any card", load_portable),
        Backend(HOPPER_8, False, "our own kernel for Hopper cards, 8 bits", load_hopper8),
        Backend(SAGE, False, "SageAttention, a package, 8 bits", load_sage),
        Backend(PORTABLE_8, False, "our own Triton kernel, 8 bits, for RTX 30, A100 and newer", load_portable8),
    )
}
"""Fastest first, among the exact ones and among the others, see benchmarks/README.md. The exact Triton kernel is there
for lists of tiles; SDPA is faster without."""
TAKES_NO_LISTS = "it takes no lists of tiles, which sparse attention needs"
OURS = (HOPPER, HOPPER_8, PORTABLE, PORTABLE_8)
CHOICES = (AUTO, AUTO_8, *BACKENDS)


@dataclass(frozen=True)
class Chosen:
    """A backend that works here."""

    name: str
    is_exact: bool
    attend: Attend
    attend_listed: AttendListed | None


def expected_backend(name: str, setting: Setting, takes_lists: bool = False) -> Chosen | str:
    """A backend whose package is there and suits the device, untried; the reason if it cannot be used."""
    try:
        attend, listed = BACKENDS[name].load(setting)
        need(bool(listed or not takes_lists), TAKES_NO_LISTS)
    except BackendUnavailable as error:
        return str(error)
    return Chosen(name, BACKENDS[name].is_exact, attend, listed)


@tried_once(expected_backend)
def try_backend(name: str, setting: Setting, takes_lists: bool = False) -> Chosen | str:
    """A backend, loaded and tried, also on lists of tiles if it is to take them; the reason if it cannot be used."""
    backend, loaded = BACKENDS[name], False
    try:
        attend, listed = backend.load(setting)
        loaded = True
        need(bool(listed or not takes_lists), "")
        error = trial_error(listed if takes_lists else attend, setting, takes_lists)
    except torch.OutOfMemoryError:
        raise  # says nothing of the backend, and what is raised is not kept
    except Exception as error:  # a package of somebody else's: whatever it raises, it must not stop us
        if not isinstance(error, BackendUnavailable) or (loaded and str(error)):
            return f"{FAILS} with {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        return str(error) or TAKES_NO_LISTS
    bound = EXACT_ERROR if backend.is_exact else LOSSY_ERROR
    if not error <= bound:
        return f"{IS_OFF} by {error:.3f} on random values, where {bound} is allowed"
    return Chosen(name, backend.is_exact, attend, listed)


@torch.inference_mode()
def trial_error(attend: Attend | AttendListed, setting: Setting, takes_lists: bool = False) -> float:
    """Relative L2 to float32 on random values; with lists, of all tiles."""
    generator = torch.Generator(setting.device).manual_seed(0)
    batch, tokens, heads = TRIAL_SHAPE
    shape = (*TRIAL_SHAPE, setting.head_width)
    q, k, v = (torch.randn(shape, generator=generator, device=setting.device).to(setting.dtype) for _ in range(3))
    exact = scaled_dot_product(q.float(), k.float(), v.float())
    if takes_lists:
        tiles = tiles_of(tokens)
        listed = torch.arange(tiles, dtype=torch.int32, device=setting.device).repeat(batch * heads, tiles, 1)
        out = attend(q, k, v, listed, torch.full_like(listed[..., 0], tiles))
    else:
        out = attend(q, k, v, None)
    return float((out.float() - exact).norm() / exact.norm())


def choose(name: str, setting: Setting, takes_lists: bool = False) -> Chosen:
    """The backend of that name; auto is the fastest exact one, auto8 the fastest in 8 bits or else an exact one.

    Args:
        takes_lists: whether it must serve sparse attention.
    Raises:
        BackendUnavailable: if that one cannot be used here.
        ConfigError: if there is none of that name.
    """
    check_choice("attention", name, CHOICES)
    if name not in BACKENDS:
        return choose_automatically(setting, name == AUTO_8, takes_lists)
    found = try_backend(name, setting, takes_lists)
    if isinstance(found, Chosen):
        return found
    usable = [other for other in BACKENDS if isinstance(try_backend(other, setting, takes_lists), Chosen)]
    found = found.rstrip(".")
    raise BackendUnavailable(f"attention {name!r} cannot be used: {found}. Usable here: {', '.join([AUTO, *usable])}.")


def choose_automatically(setting: Setting, in_8_bits: bool, takes_lists: bool) -> Chosen:
    """The fastest backend that works here. One of ours that could be used if a package were there is warned about once,
    and so is any that is broken."""
    exact = [backend.name for backend in BACKENDS.values() if backend.is_exact]
    lossy = [backend.name for backend in BACKENDS.values() if not backend.is_exact]
    if takes_lists and setting.device.type != "cpu":
        exact.remove(SDPA)  # it has no kernel for them: hundreds of times slower than all of it
    for name in (*lossy, *exact) if in_8_bits else exact:
        found = try_backend(name, setting, takes_lists)
        if isinstance(found, Chosen):
            if in_8_bits and found.is_exact:
                warn_once("no attention in 8 bits can be used here: %s is used, which is exact", name)
            return found
        if found.startswith((FAILS, IS_OFF)) or (found.startswith(MISSING) and name in OURS):
            warn_once("attention %s is left out: %s", name, found)
    if takes_lists:
        raise BackendUnavailable(
            f"no attention can leave anything out on {setting.device}: triton is missing or does not work. Install it, "
            "or set sparse_keep to 1."
        )
    return Chosen(SDPA, True, *BACKENDS[SDPA].load(setting))  # the plain way, whatever its trial said


@lru_cache(maxsize=256)
def warn_once(message: str, *values: object) -> None:
    log.warning(message, *values)


def reasons(setting: Setting) -> dict[str, str | None]:
    """Why each backend cannot be used here; None for those that can."""
    tried = {name: try_backend(name, setting) for name in BACKENDS}
    return {name: found if isinstance(found, str) else None for name, found in tried.items()}

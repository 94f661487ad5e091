"""A GPU that is none: tensors on it compute on the CPU, and what CUDA refuses is refused.

    with pretended_cuda():
        picture = torch.zeros(8, 8, dtype=torch.uint8, device="cuda")
        picture.numpy()  # TypeError, as on a GPU

Every tensor within it says where it lies: one that was made for or sent to `cuda` says `cuda:0`, and so does all that
is computed from it. Refused are resizing, pooling, convolutions and matrix products of integers, operations that mix
devices (but for single values), arrays made of what lies on the GPU, pinning it, and random numbers from the CPU's
generator. `torch.cuda` answers as for a GPU that is too old for any kernel of ours, so that the code of torch itself
runs. Modes belong to a thread: what another thread does is not watched.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch._dynamo  # modes import it when they are first used, and it asks torch.cuda what there is
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

GPU = torch.device("cuda", 0)
CAPABILITY = (7, 5)
TOTAL_BYTES, FREE_BYTES = 24_000_000_000, 22_000_000_000

NOT_FOR_INTEGERS = frozenset((
    "upsample_linear1d", "upsample_bilinear2d", "upsample_bicubic2d", "upsample_trilinear3d",
    "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "_upsample_lanczos2d_aa", "grid_sampler_2d",
    "grid_sampler_3d", "avg_pool2d", "avg_pool3d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d",
    "adaptive_max_pool2d", "max_pool2d_with_indices", "max_pool3d_with_indices", "reflection_pad1d",
    "reflection_pad2d", "reflection_pad3d", "replication_pad1d", "replication_pad2d", "replication_pad3d",
    "convolution", "_convolution", "mm", "addmm", "bmm", "baddbmm", "addbmm", "mv", "addmv", "dot", "vdot", "lerp",
))  # fmt: skip
"""Operations of aten that CUDA has for floating point alone, and CPUs for some integers too."""
BYTES_ALONE = frozenset((
    "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "_upsample_nearest_exact1d",
    "_upsample_nearest_exact2d", "_upsample_nearest_exact3d",
))  # fmt: skip
"""Those that CUDA has for uint8 besides floating point."""
ACROSS = ("copy_", "_has_compatible_shallow_copy_type")
"""Which take tensors of both devices."""
INDEXING = ("index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index_put")
"""Whose indices may lie on the CPU."""
FACTORIES = (torch.as_tensor, torch.asarray)
NUMPY = {Tensor.numpy, Tensor.__array__, Tensor.__dlpack__}


def lies_on_gpu(tensor: Tensor) -> bool:
    """Also where a pretended GPU is no longer there."""
    return getattr(tensor.untyped_storage(), "lies_on_gpu", False)


def tensors_in(*values: Any) -> Iterator[Tensor]:
    """Those with data, in arguments and results of operations: nested lists at most."""
    for value in values:
        if isinstance(value, Tensor):
            if is_real(value):
                yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_in(*value)


def is_real(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.layout == torch.strided


def set_place(result: Any, on_gpu: bool) -> Any:
    for tensor in tensors_in(result):
        tensor.untyped_storage().lies_on_gpu = on_gpu
    return result


def is_gpu(device: Any) -> bool:
    if isinstance(device, int) and not isinstance(device, bool):
        return True
    return device is not None and torch.device(device).type == "cuda"


class Operations(TorchDispatchMode):
    """What every operation of aten may be given, and where its results lie."""

    def __init__(self):
        super().__init__()
        self.is_moving = False

    @contextlib.contextmanager
    def moving(self) -> Iterator[None]:
        """Within, data crosses from one device to the other."""
        before, self.is_moving = self.is_moving, True
        try:
            yield
        finally:
            self.is_moving = before

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        given = list(tensors_in(args, *kwargs.values()))
        if self.is_moving or not any(map(lies_on_gpu, given)):
            return func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if name in ACROSS:
            return func(*args, **kwargs)
        refuse_mixed(name, list(tensors_in(args[:1], args[2:])) if name in INDEXING else given)
        refuse_integers(name, given)
        return set_place(func(*args, **kwargs), True)


def refuse_mixed(name: str, given: list[Tensor]) -> None:
    """Single values may lie on the CPU; anything else with what lies on the GPU may not."""
    elsewhere = [tensor for tensor in given if tensor.ndim and not lies_on_gpu(tensor)]
    if elsewhere or not any(map(lies_on_gpu, given)):
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! "
            f"({name}, of shapes {[tuple(tensor.shape) for tensor in given]})"
        )


def refuse_integers(name: str, given: list[Tensor]) -> None:
    allowed = (torch.uint8,) if name in BYTES_ALONE else ()
    if name not in NOT_FOR_INTEGERS and name not in BYTES_ALONE:
        return
    for tensor in given[:1]:
        if not (tensor.is_floating_point() or tensor.is_complex()) and tensor.dtype not in allowed:
            raise RuntimeError(f'"{name}" not implemented for {tensor.dtype} on cuda:0')


class Calls(TorchFunctionMode):
    """What is asked of tensors and of torch before an operation comes of it: devices, moves, arrays."""

    def __init__(self, operations: Operations):
        super().__init__()
        self.operations = operations
        self.own: dict[Callable, Callable] = {
            Tensor.device.__get__: lambda tensor, *_: GPU if on_gpu(tensor) else self._plain_device(tensor),
            Tensor.is_cuda.__get__: lambda tensor, *_: on_gpu(tensor),
            Tensor.is_cpu.__get__: lambda tensor, *_: is_real(tensor) and not on_gpu(tensor),
            Tensor.get_device: lambda tensor: 0 if on_gpu(tensor) else -1,
            Tensor.to: self._to,
            Tensor.cpu: lambda tensor, *_, **__: self._moved(tensor, False),
            Tensor.cuda: lambda tensor, *_, **__: self._moved(tensor, True),
            Tensor.pin_memory: self._pinned,
        }

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in self.own:
            return self.own[func](*args, **kwargs)
        if func in NUMPY and on_gpu(args[0]):
            raise TypeError(
                "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory "
                "first."
            )
        if func in FACTORIES and isinstance(args[0], Tensor):
            return self._to(args[0], device=kwargs.get("device"), dtype=kwargs.get("dtype"))
        pins = kwargs.pop("pin_memory", False)
        if kwargs.get("device") is None:
            return self._placed(func, args, kwargs)
        on_gpu_now = is_gpu(kwargs["device"])
        if pins and on_gpu_now:
            raise RuntimeError("Only dense CPU tensors can be pinned")
        if on_gpu_now:
            refuse_generator(kwargs.get("generator"))
            kwargs = {**kwargs, "device": "cpu"}
        return set_place(func(*args, **kwargs), on_gpu_now)

    def _placed(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """Operations see to themselves; what copies without one (deepcopy, new storages) stays where it was."""
        result = func(*args, **kwargs)
        first = args[0] if args else None
        if func is Tensor.__deepcopy__ and on_gpu(first):
            set_place(result, True)
        return result

    @staticmethod
    def _plain_device(tensor: Tensor) -> torch.device:
        with torch._C.DisableTorchFunction():
            return tensor.device

    def _to(self, tensor: Tensor, *args: Any, copy: bool = False, **kwargs: Any) -> Tensor:
        if isinstance(args[0] if args else kwargs.get("other"), Tensor):
            other = args[0] if args else kwargs["other"]
            device, dtype, memory_format = (GPU if on_gpu(other) else other.device), other.dtype, None
        else:
            device, dtype, _, memory_format = torch._C._nn._parse_to(*args, **kwargs)
        options = {} if memory_format is None else {"memory_format": memory_format}
        if device is None or not is_real(tensor) or device.type not in ("cpu", "cuda"):
            return tensor.to(device=device, dtype=dtype, copy=copy, **options)
        return self._moved(tensor, is_gpu(device), dtype, copy, **options)

    def _moved(self, tensor: Tensor, gpu: bool, dtype: Any = None, copy: bool = False, **options: Any) -> Tensor:
        if not is_real(tensor) or on_gpu(tensor) == gpu:
            return tensor.to(dtype=dtype or tensor.dtype, copy=copy, **options)
        with self.operations.moving():
            return set_place(tensor.to(dtype=dtype or tensor.dtype, copy=True, **options), gpu)

    def _pinned(self, tensor: Tensor, *_: Any) -> Tensor:
        if on_gpu(tensor):
            raise RuntimeError(f"cannot pin 'torch.cuda.{tensor.dtype}' only dense CPU tensors can be pinned")
        return tensor.clone()


def on_gpu(tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and is_real(tensor) and lies_on_gpu(tensor)


class GpuGenerator(torch.Generator):
    """torch.Generator("cuda")."""


class AnyGenerator(torch.Generator):
    """Stands for torch.Generator, which is made by the name of a device."""

    def __new__(cls, device: Any = "cpu") -> torch.Generator:
        return GpuGenerator() if is_gpu(device) else super().__new__(cls, device)


def refuse_generator(generator: torch.Generator | None) -> None:
    if generator is not None and not isinstance(generator, GpuGenerator):
        raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")


class Moment:
    """An event or a stream: all is done as soon as it is asked for."""

    def __init__(self, *_: Any, **__: Any):
        self.cuda_stream = 0

    def record(self, *_: Any) -> None:
        """Nothing is on its way."""

    wait = wait_event = wait_stream = synchronize = record

    def record_event(self, *_: Any) -> "Moment":
        return Moment()

    def query(self) -> bool:
        return True

    def elapsed_time(self, _: Any) -> float:
        return 1.0


def answers() -> dict[str, Any]:
    """What torch.cuda says."""
    return {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_capability": lambda device=None: CAPABILITY,
        "get_device_name": lambda device=None: "pretended GPU",
        "mem_get_info": lambda device=None: (FREE_BYTES, TOTAL_BYTES),
        "get_per_process_memory_fraction": lambda device=None: 1.0,
        "memory_allocated": lambda device=None: 0,
        "memory_reserved": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: 0,
        "reset_peak_memory_stats": lambda device=None: None,
        "empty_cache": lambda: None,
        "ipc_collect": lambda: None,
        "synchronize": lambda device=None: None,
        "is_current_stream_capturing": lambda: False,
        "Event": Moment,
        "Stream": Moment,
        "current_stream": lambda device=None: Moment(),
        "default_stream": lambda device=None: Moment(),
        "stream": lambda stream: contextlib.nullcontext(),
        "device": lambda device: contextlib.nullcontext(),
        "device_of": lambda tensor: contextlib.nullcontext(),
        "cudart": lambda: mock.Mock(cudaHostRegister=lambda *_: 0, cudaHostUnregister=lambda *_: 0),
    }


@contextlib.contextmanager
def pretended_cuda() -> Iterator[torch.device]:
    """Within, this thread has a GPU -> its device. What was on it stays marked afterwards, and computes as on a CPU."""
    operations = Operations()
    patched = mock.patch.multiple(torch.cuda, **answers()), mock.patch.object(torch, "Generator", AnyGenerator)
    with patched[0], patched[1], Calls(operations), operations:
        yield GPU

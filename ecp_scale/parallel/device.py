"""Where CPU and GPU differ."""

import ctypes
import os
import resource
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from ecp_scale.errors import InputError

CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"
DRIVER = Path("/dev/nvidiactl")
"""What an NVIDIA driver that is loaded shows on Linux."""


def local_device(local_rank: int) -> torch.device:
    """This rank's device, made current: its GPU, or the CPU where there is none.

    Raises:
        InputError: if the host has fewer GPUs than ranks, or a driver that this torch cannot use.
    """
    if torch.cuda.is_available():
        # Memory that sequences of other lengths have cut into pieces is of use again.
        if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
            os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
        count = torch.cuda.device_count()
        # Slurm's --gpus-per-task=1 shows each task a GPU of its own, as number 0.
        number = 0 if count == 1 else local_rank
        if number >= count:
            raise InputError(
                f"local rank {local_rank} on host {socket.gethostname()}, which shows {count} GPUs; start one per GPU"
            )
        torch.cuda.set_device(number)
        return torch.device("cuda", number)
    _check_driver()
    return cpu()


def keep_kernels_in_order() -> str | None:
    """Let GPUs start kernels as the host asks for them, which is settled when CUDA starts; what hinders it, or None.

    Trap: with more connections a GPU may begin the products that are to hide a message before the message, which then
    finds no room beside them.
    """
    found = os.environ.get(CONNECTIONS)
    if found is None and not torch.cuda.is_initialized():
        found = os.environ[CONNECTIONS] = "1"
    if found == "1":
        return None
    reason = f"is {found}" if found else "is not set, and CUDA has started"
    return f"{CONNECTIONS} {reason}: messages of tensor parallelism may not hide behind products; set it to 1"


def gpu_identity(device: torch.device) -> str:
    """What tells a GPU from every other one; empty for a CPU, which ranks may share."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""


def check_precision(device: torch.device, precision: str) -> None:
    """Refuse a GPU without instructions for bf16, where torch would emulate them.

    Raises:
        InputError: naming the GPU.
    """
    if device.type == "cuda" and precision == "bf16" and torch.cuda.get_device_capability(device) < (8, 0):
        name, host = torch.cuda.get_device_name(device), socket.gethostname()
        raise InputError(
            f"training.precision is bf16, but {name} on host {host} has no bf16; use fp32, or a GPU from Ampere on"
        )


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host for the device, which copies it by itself while the host goes on."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def done_so_far(device: torch.device) -> Callable[[], bool]:
    """What tells, without waiting, whether the device has done all that it has been given until now."""
    if device.type != "cuda":
        return lambda: True
    event = torch.cuda.Event()
    event.record()

    def is_done() -> bool:
        # Trap: another thread stands on the first GPU, and would open a context of 0.5 GB there by asking.
        with torch.cuda.device(device):
            try:
                return event.query()
            except RuntimeError:  # a kernel has failed, which the thread that trains tells
                return False

    return is_done


class Stopwatch:
    """Seconds that a device spends in what is run under it, without waiting for the device."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._seconds = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count what is run inside, as often as it is entered."""
        if not self._on_gpu:
            began = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - began
            return
        pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        pair[0].record()
        yield
        pair[1].record()
        self._pairs.append(pair)

    @property
    def seconds(self) -> float:
        """The sum; on a GPU it is known when the device has done all of it, and zero before."""
        if not all(end.query() for _, end in self._pairs):
            return 0.0
        return self._seconds + sum(begin.elapsed_time(end) for begin, end in self._pairs) / 1000


def set_tf32(allowed: bool) -> None:
    """Say whether a GPU may round operands of fp32 products to TF32; nothing to a CPU."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed


def _check_driver() -> None:
    """Refuse to train on the CPU in silence where there is a GPU that torch is built for and cannot use."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1", "NoDevFiles")
    if torch.version.cuda is None or hidden or not DRIVER.exists():
        return
    try:
        torch.cuda.init()
        reason = "it finds no device"
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
    raise InputError(
        f"host {socket.gethostname()} has an NVIDIA driver, but torch {torch.__version__} cannot use it: {reason}; "
        "install a torch built for its CUDA, or set CUDA_VISIBLE_DEVICES= to train on the CPU"
    )


def cpu() -> torch.device:
    """The CPU, with everything set for training on it."""
    # Trap: Megatron-core allocates its gather and reduce buffers on torch.cuda.current_device(), without asking
    # where the tensors are. On a machine without a GPU the answer is the CPU.
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]
    _keep_freed_memory()
    return torch.device("cpu")


def _keep_freed_memory() -> None:
    """Let this process keep what it frees, as torch does on a GPU; nothing where the C library has no such choice.

    Trap: glibc maps every large tensor anew and gives it back when it is freed, and the kernel then fills it with zeros
    page by page at the next use. That is a fifth of a training step (docs/performance.md).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_max = -1, -4  # names and numbers of malloc.h
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, -1)


def backend(device: torch.device) -> str:
    """The torch.distributed backend of a device."""
    return "nccl" if device.type == "cuda" else "gloo"


def peak_memory_bytes(device: torch.device) -> int:
    """Largest memory so far: allocated on the GPU, or resident in this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def known_peak_teraflops(device: torch.device, precision: str, tf32: bool = False) -> float | None:
    """``datasheet_teraflops`` of a device; None if it is unknown."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return datasheet_teraflops(name, precision, tf32) if name in PEAK_TERAFLOPS else None


def datasheet_teraflops(gpu: str, precision: str, tf32: bool = False) -> float:
    """Dense matrix peak of one of ``PEAK_TERAFLOPS``, with tensor cores in bf16 and TF32."""
    in_bf16, in_fp32 = PEAK_TERAFLOPS[gpu]
    if precision == "bf16":
        return in_bf16
    return in_bf16 / 2 if tf32 else in_fp32  # half, on all of these


PEAK_TERAFLOPS = {
    "NVIDIA H200": (989.0, 67.0),
    "NVIDIA H200 NVL": (835.0, 60.0),
    "NVIDIA H100 80GB HBM3": (989.0, 67.0),
    "NVIDIA H100 PCIe": (756.0, 51.0),
    "NVIDIA H100 NVL": (835.0, 60.0),
    "NVIDIA A100-SXM4-40GB": (312.0, 19.5),
    "NVIDIA A100-SXM4-80GB": (312.0, 19.5),
    "NVIDIA A100-PCIE-40GB": (312.0, 19.5),
    "NVIDIA A100 80GB PCIe": (312.0, 19.5),
    "NVIDIA L40S": (362.0, 91.6),
    "NVIDIA B200": (2250.0, 75.0),
}
"""Dense bf16 and fp32 peaks by the makers' datasheets, by the whole name: boards of one chip differ in clock."""

"""What torch.compile makes for an H100, on a machine without a GPU: the Triton kernels, compiled to machine code.

    python -m tests.kernels.sm90        # a table of all kernels; needs the triton wheel (make test-kernels has it)

Dynamo and AOTAutograd see a function on a CPU, forward and backward. The graphs are then said to be on a GPU, Inductor
writes their kernels, and Triton and ptxas compile them; nothing runs. Who the GPU is, Inductor and Triton ask through a
few functions, which are answered here.
"""

import importlib.util
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_map_only

from ecp_scale.attention import KeyValue
from ecp_scale.attention import flex as ours
from ecp_scale.attention.calls import Pattern
from ecp_scale.attention.rotary import Rotation, rotate
from ecp_scale.models import pointwise
from ecp_scale.parallel.device import set_tf32

HOPPER = (9, 0)
H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=HOPPER[0],
    minor=HOPPER[1],
    total_memory=80 << 30,
    multi_processor_count=132,
    warp_size=32,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    regs_per_multiprocessor=65536,
    shared_memory_per_block=48 << 10,
    shared_memory_per_block_optin=227 << 10,
    shared_memory_per_multiprocessor=228 << 10,
    L2_cache_size=50 << 20,
    gcnArchName="",
    uuid="0",
)
"""What ``torch.cuda.get_device_properties`` says of one."""


class Kernel(NamedTuple):
    """One configuration of a Triton kernel as machine code."""

    name: str
    configuration: str
    registers: int
    """Of a thread; there are 255."""
    stack: int
    """Bytes of local memory of a thread, which is where registers are spilled to."""
    shared: int
    """Bytes of shared memory of a block; there are 227 KiB."""
    tensor_core: int
    """Instructions of Hopper's tensor cores (wgmma)."""
    spills: int
    """Instructions that load from, or store to, local memory."""

    @property
    def size(self) -> str:
        """Registers, shared memory and so on, in words."""
        return f"{self.registers} registers, {self.stack} bytes of stack, {self.shared / 1024:.0f} KiB shared"


def kernels_of(function: Callable[..., Any], *inputs: Any, dynamic: bool | None = None) -> list[Kernel]:
    """The kernels of a function's forward pass, and of its backward pass where inputs want gradients.

    Args:
        function: takes ``inputs``, and returns one or several tensors.
        inputs: on a CPU; what they hold is not looked at.
        dynamic: see ``torch.compile``.
    """
    graphs = _graphs(function, inputs, dynamic)
    found: list[Kernel] = []
    with _an_h100(), tempfile.TemporaryDirectory() as folder:
        for number, (graph, backward) in enumerate(graphs):
            for name, source in _sources(graph, backward):
                found += _compiled(name, source, Path(folder) / f"kernel_{number}_{name}.py")
    return found


def _graphs(function: Callable[..., Any], inputs: tuple[Any, ...], dynamic: bool | None) -> list[tuple[Any, bool]]:
    """Graphs of a function's forward and backward pass as Inductor gets them, and which is the latter."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.compile_fx import _recursive_joint_graph_passes
    from torch._inductor.decomposition import select_decomp_table

    graphs: list[tuple[Any, bool]] = []

    def keep(graph: fx.GraphModule, _: Any, backward: bool) -> Any:
        graphs.append((graph, backward))
        return make_boxed_func(graph.forward)

    def partition(graph: fx.GraphModule, joint_inputs: Any, **named: Any) -> Any:
        _recursive_joint_graph_passes(graph)
        return min_cut_rematerialization_partition(graph, joint_inputs, compiler="inductor", **named)

    backend = aot_autograd(
        fw_compiler=partial(keep, backward=False),
        bw_compiler=partial(keep, backward=True),
        partition_fn=partition,
        decompositions=select_decomp_table(),
    )
    torch._dynamo.reset()
    # Lowered at once: the backward pass need not run.
    with torch._functorch.config.patch(force_non_lazy_backward_lowering=True):
        torch.compile(function, backend=backend, dynamic=dynamic, fullgraph=True)(*inputs)
    torch._dynamo.reset()
    return graphs


def _sources(graph: fx.GraphModule, backward: bool) -> list[tuple[str, str]]:
    """The Triton kernels, by name, that Inductor writes for a graph once it is said to be on a GPU."""
    from torch._dynamo.utils import detect_fake_mode
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.compile_fx import compile_fx_inner

    mode = detect_fake_mode([node.meta.get("val") for node in graph.graph.nodes])
    device = torch.device("cuda", 0)

    def moved(x: Tensor) -> FakeTensor:
        shape = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
        return FakeTensor(mode, shape, device)

    for module in graph.modules():
        for node in module.graph.nodes if isinstance(module, fx.GraphModule) else ():
            node.meta = {key: tree_map_only(Tensor, moved, value) for key, value in node.meta.items()}
            node.kwargs = {key: device if key == "device" else value for key, value in node.kwargs.items()}
    inputs = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
    sources: list[tuple[str, str]] = []

    def keep(_: AsyncCompile, name: str, source: str, device_str: str = "cuda") -> Any:
        sources.append((name, source))
        return mock.Mock()

    with mock.patch.object(AsyncCompile, "triton", keep), torch._guards.tracing(torch._guards.TracingContext(mode)):
        compile_fx_inner(graph, inputs, is_backward=backward)
    return sources


def _compiled(name: str, source: str, path: Path) -> Iterator[Kernel]:
    """Every configuration that Inductor would choose from."""
    path.write_text(source)
    specification = importlib.util.spec_from_file_location(path.stem, path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    kernel = getattr(module, name)
    kernel.precompile(warm_cache_only=True)
    for result in kernel.compile_results:
        code = path.with_suffix(".cubin")
        code.write_bytes(result.kernel.asm["cubin"])
        used = re.search(r"REG:(\d+) STACK:(\d+)", _dump("resource-usage", code))
        assert used is not None
        instructions = _dump("sass", code)
        yield Kernel(
            name,
            str(result.config),
            *map(int, used.groups()),
            result.kernel.metadata.shared,
            len(re.findall(r"\bHGMMA\b", instructions)),
            len(re.findall(r"\b(?:STL|LDL)\b", instructions)),
        )


def _dump(what: str, code: Path) -> str:
    """What CUDA's cuobjdump, which the triton wheel holds, says of machine code."""
    import triton

    program = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return subprocess.run([program, f"--dump-{what}", code], capture_output=True, text=True, check=True).stdout


@contextmanager
def _an_h100() -> Iterator[None]:
    """Answer what Inductor and Triton ask about the GPU."""
    import triton
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor import config, scheduler
    from torch._inductor.runtime import triton_helpers
    from triton.backends.compiler import GPUTarget

    class Driver:
        utils = SimpleNamespace(
            get_device_properties=lambda *_: {"max_shared_mem": 227 << 10, "multiprocessor_count": 132, "warpSize": 32}
        )

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", 10 * HOPPER[0] + HOPPER[1], 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, *_: Any) -> int:
            return 0

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cuda", 0)

        def get_device_interface(self) -> Any:
            return torch.cuda

    def said(answer: Any) -> Any:
        return staticmethod(lambda *_, **__: answer)

    of_torch = {
        "get_device_properties": H100,
        "get_device_capability": HOPPER,
        "current_device": 0,
        "device_count": 1,
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
    }
    of_interface = {
        "is_available": True,
        "current_device": 0,
        "get_compute_capability": 90,
        "get_device_properties": H100,
        "is_bf16_supported": True,
        "is_triton_capable": True,
        "raise_if_triton_unavailable": None,
    }
    of_worker = {"get_device_properties": H100, "current_device": 0, "set_device": None}
    answers = ((torch.cuda, of_torch), (CudaInterface, of_interface), (CudaInterface.Worker, of_worker))
    with ExitStack() as stack:
        for where, named in answers:
            for name, answer in named.items():
                stack.enter_context(mock.patch.object(where, name, said(answer)))
        stack.enter_context(mock.patch.object(torch._C, "_cuda_getCurrentRawStream", said(0), create=True))
        stack.enter_context(mock.patch.object(scheduler, "has_triton", said(True)))
        stack.enter_context(mock.patch.object(triton_helpers, "set_driver_to_gpu", said(None)))
        # A copy on a GPU, even of shapes alone, wants a build of torch for GPUs.
        stack.enter_context(mock.patch.object(FakeTensor, "copy_", lambda self, *_: self, create=True))
        launcher = {"use_static_cuda_launcher": False}  # its kernels do not keep their code
        stack.enter_context(config.patch(force_disable_caches=True, compile_threads=1, **launcher))
        stack.enter_context(mock.patch.object(triton.runtime.driver, "_active", Driver()))
        yield


def cases() -> dict[str, Callable[[], list[Kernel]]]:
    """What is compiled for training, in the shapes of ``scaled-1b3``."""
    bf16 = partial(torch.empty, dtype=torch.bfloat16, requires_grad=True)
    x, weight, hidden = (8192, 1, 2048), (2048,), (8192, 1, 5632)
    heads, turned = (1, 16, 8192, 128), (8192, 64)
    of_layer = {
        "RMSNorm": (pointwise.rms_norm, lambda: (bf16(x), bf16(weight))),
        "LayerNorm": (pointwise.layer_norm, lambda: (bf16(x), bf16(weight), bf16(weight))),
        "sum and RMSNorm": (pointwise.add_rms_norm, lambda: (bf16(x), bf16(x), bf16(weight))),
        "sum and LayerNorm": (pointwise.add_layer_norm, lambda: (bf16(x), bf16(x), bf16(weight), bf16(weight))),
        "SwiGLU": (pointwise.swiglu, lambda: (bf16(hidden), bf16(hidden))),
        "rotary positions": (rotate, lambda: (bf16(heads), Rotation(torch.empty(turned), torch.empty(turned)))),
        "losses and gradients": (
            pointwise.losses_and_gradients,
            lambda: (
                torch.empty(4096, 32000, dtype=torch.bfloat16),
                torch.zeros(4096, dtype=torch.int64),
                torch.zeros(4096, dtype=torch.bool),
                1e-4,
            ),
        ),
    }
    found: dict[str, Callable[[], list[Kernel]]] = {
        name: partial(lambda function, inputs: kernels_of(function, *inputs()), function, inputs)
        for name, (function, inputs) in of_layer.items()
    }
    for name, dtype, width, tf32 in (
        ("bf16, 128", torch.bfloat16, 128, False),
        ("fp32, 64", torch.float32, 64, False),
        ("fp32, 128", torch.float32, 128, False),
        ("TF32, 64", torch.float32, 64, True),
    ):
        found[f"flex, {name}"] = partial(flex_kernels, dtype, width, tf32=tf32)
        found[f"flex with documents, {name}"] = partial(flex_kernels, dtype, width, documents=True, tf32=tf32)
    return found


def flex_kernels(dtype: torch.dtype, width: int, documents: bool = False, tf32: bool = False) -> list[Kernel]:
    """What our call of FlexAttention compiles to: segments of 512 positions, two query heads to a head of keys."""
    from torch.nn.attention import flex_attention as flex

    n, found = 2048, []
    numbers = torch.arange(n).div(700, rounding_mode="floor")[None] if documents else None
    q, k, v = (torch.empty(1, heads, n, width, dtype=dtype, requires_grad=True) for heads in (16, 8, 8))

    def compiled(*operands: Tensor, **named: Any) -> Tensor:
        found.extend(kernels_of(partial(flex.flex_attention, **named), *operands, dynamic=True))
        return torch.empty_like(operands[0])

    def accept(*_: Tensor) -> None:  # a mock cannot be compiled
        """In place of the refusal that a CPU has no backward pass of it."""

    with (
        ExitStack() as stack,
        mock.patch.object(flex, "_validate_device", accept),
        mock.patch.object(ours, "_kernel", return_value=compiled),
    ):
        stack.callback(set_tf32, torch.backends.cuda.matmul.allow_tf32)
        set_tf32(tf32)
        ours.flex_attention(q, KeyValue(k, v, numbers), Pattern(n, n, 512, 512))
    return found


def main() -> None:
    """Print the table."""
    with mock.patch.object(ours, "kernel_options", return_value=None):
        spilling = flex_kernels(torch.float32, 128)
    print("| function | kernel | registers, stack, shared memory | wgmma | spills |\n|---|---|---|---|---|")
    listed = {**cases(), "flex, fp32, 128, torch's own blocks": lambda: spilling}
    for name, compiled in listed.items():
        for kernel in compiled():
            short = re.sub(r"(?<=.{38}).+", "...", kernel.name)
            print(f"| {name} | `{short}` | {kernel.size} | {kernel.tensor_core} | {kernel.spills} |", flush=True)


if __name__ == "__main__":
    main()

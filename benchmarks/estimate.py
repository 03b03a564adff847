"""What a training step should take on GPUs, by arithmetic: python -m benchmarks.estimate [--presets scaled-1b3 ...].

An ESTIMATE, not a measurement. One micro-batch runs on torch's meta device, which holds shapes alone, with a stand-in
for FlashAttention, once as it is and once with every function that ``training.compile`` compiles counted as one kernel
per direction. Time is what the counts take at the rates that --products, --attention and --bandwidth say, in turn:
matrix products, attention, the bytes of everything else, and the optimizer's passes over weights and gradients. Waits,
launches that the device is faster than, and messages between ranks are not in it. With --gpus N it is a step of the
preset's layout on so many, with the planner's messages at --nvlink and --network, none of them hidden behind work (but
for gradients, with --overlap), and nothing computed again.
"""

import argparse
import dataclasses
import json
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.options import count, rate
from ecp_scale.attention import sdpa, segment
from ecp_scale.attention.kernels import Operands, State
from ecp_scale.command_line import load_preset
from ecp_scale.config import Config
from ecp_scale.errors import InputError, input_errors_exit
from ecp_scale.models.language_model import LanguageModel
from ecp_scale.option_parser import OptionParser
from ecp_scale.parallel.context import ParallelContext
from ecp_scale.planning.compiled import compiled_in_shapes
from ecp_scale.planning.duration import on_wire
from ecp_scale.planning.flash_shapes import ShapesOfFlash
from ecp_scale.planning.plan import GIB, TO_ALL, TO_OWNERS, plan
from ecp_scale.precision import as_on_a_gpu

ROOT = Path(__file__).resolve().parent.parent
META = torch.device("meta")
PRODUCTS = {"mm", "addmm", "bmm"}
VIEWS = {
    *("view", "permute", "transpose", "t", "expand", "slice", "select", "unsqueeze", "squeeze", "detach", "alias"),
    *("as_strided", "split", "split_with_sizes", "_unsafe_view", "unbind", "unfold", "_reshape_alias", "narrow"),
    *("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "lift_fresh"),
}
OPTIMIZER_BYTES = (2 + 4 + 4) + 4 + 4 * 7 + (4 + 2) + (2 + 2 + 4)
"""Of a parameter under ZeRO-1 in bf16: its gradient is added in fp32, and its norm taken; AdamW reads master weight,
two moments and gradient, and writes the first three; the weight is copied in bf16; and gradients are set to zero, in
bf16 and in fp32. Clipping, where the norm is above its bound, takes 8 more."""

BACKWARD_SHARE = 2 / 3
"""Of the work of a micro-batch, the backward pass."""


class Counts(TorchDispatchMode):
    """Kernels, FLOPs of products, and bytes that everything else reads and writes."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = self.products = self.moved = 0
        self.fused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.partition("::")[2]
        if self.fused or name in VIEWS:
            return out
        self.kernels += 1
        if name in PRODUCTS:
            left, right = [x for x in args if isinstance(x, Tensor)][-2:]
            self.products += 2 * left.numel() * right.shape[-1]
        else:
            self.count((args, kwargs, out))
        return out

    def count(self, tensors: Any) -> None:
        """Count what some tensors hold as moved."""
        distinct = {id(x): x for x in tree_leaves(tensors) if isinstance(x, Tensor)}
        self.moved += sum(x.numel() * x.element_size() for x in distinct.values())

    @contextmanager
    def one_kernel(self) -> Iterator[None]:
        """Count the block as one kernel, whose tensors are counted by ``count``."""
        self.kernels += 1
        self.fused = True
        try:
            yield
        finally:
            self.fused = False


class Flash(ShapesOfFlash):
    """Counts its calls; its bytes are not counted, its FLOPs are the config's."""

    def __init__(self, counts: Counts) -> None:
        super().__init__(lower_right=False)
        self.counts = counts

    def forward(self, *arguments: Any, **named: Any) -> tuple[Tensor, Tensor, State]:
        """One kernel."""
        with self.counts.one_kernel():
            return super().forward(*arguments, **named)

    def backward(self, *arguments: Any, **named: Any) -> Operands:
        """One kernel."""
        with self.counts.one_kernel():
            return super().backward(*arguments, **named)


def micro_batch(config: Config, layers: int, compiled: bool) -> Counts:
    """One micro-batch of a model with so many layers."""
    model_config = dataclasses.replace(config.model, layers=layers, allow_short_receptive_field=True, dropout=0.0)
    parallel = dataclasses.replace(ParallelContext.single(torch.bfloat16), compiled=compiled)
    with META:
        model = LanguageModel(model_config, parallel, config.attention).train()
        ids = torch.zeros(config.training.micro_batch_size, model_config.sequence_length + 1, dtype=torch.int64)
    counts = Counts()
    with ExitStack() as stack:
        stack.enter_context(as_on_a_gpu())
        for module in (segment, sdpa):
            stack.enter_context(mock.patch.object(module, "kernel_for", return_value=Flash(counts)))
        if compiled:
            stack.enter_context(compiled_in_shapes(counts))
        stack.enter_context(counts)
        model(ids[:, :-1], ids[:, 1:])[0].backward()
    return counts


def counts_of_model(config: Config, compiled: bool) -> tuple[dict[str, int], dict[str, int]]:
    """Kernels, FLOPs of products and bytes of everything else: of one layer more, and of the whole model."""
    few, more = micro_batch(config, 2, compiled), micro_batch(config, 3, compiled)
    counted = ("kernels", "products", "moved")
    layer = {name: getattr(more, name) - getattr(few, name) for name in counted}
    return layer, {name: getattr(few, name) + (config.model.layers - 2) * layer[name] for name in counted}


def attention_flops(config: Config) -> float:
    """Of a sequence. Flash computes scores again in the backward pass: 3.5 times the forward pass, of which 3 count."""
    model = config.model
    return 3.5 * 4 * model.width * model.geometry.score_pairs(0) * model.layers


def estimate(config: Config, options: argparse.Namespace, compiled: bool) -> dict[str, float]:
    """Counts of a layer, and milliseconds of a step of one micro-batch by what they go to."""
    layer, whole = counts_of_model(config, compiled)
    model, sequences = config.model, config.training.micro_batch_size
    milliseconds = {
        "products": whole["products"] / options.products / 1e9,
        "attention": attention_flops(config) * sequences / options.attention / 1e9,
        "everything else": whole["moved"] / options.bandwidth / 1e9,
        "optimizer": model.parameters * OPTIMIZER_BYTES / options.bandwidth / 1e9,
    }
    useful = model.flops_per_token * model.sequence_length * sequences
    return {
        "kernels of a layer": layer["kernels"],
        "GB of a layer beside products": layer["moved"] / 1e9,
        **summed(milliseconds, useful, options),
    }


def estimate_launch(config: Config, options: argparse.Namespace) -> dict[str, float]:
    """Milliseconds of a step of a layout, by what they go to; what ranks of a tensor group do is split evenly."""
    parallel = config.parallel
    if problems := config.problems(options.gpus):
        raise InputError("; ".join(problems))
    deepspeed = json.loads((ROOT / f"ds_configs/zero{options.zero}.json").read_text())
    if options.overlap:
        # DeepSpeed waits for the device before it sums a gradient on its owner alone, if messages are to overlap.
        deepspeed["zero_optimization"]["use_multi_rank_bucket_allreduce"] = True
    planned = plan(config, deepspeed, options.gpus)
    single = dataclasses.replace(config, training=dataclasses.replace(config.training, micro_batch_size=1))
    _, whole = counts_of_model(single, compiled=True)
    share = config.training.global_batch_size / options.gpus  # sequences per rank
    data_ranks = options.gpus // parallel.tensor
    sent: dict[str, float] = defaultdict(float)
    for name, size in planned.messages.items():
        group, _, operation = name.partition(": ")
        ranks = {"tensor": parallel.tensor, "context": parallel.context, "data": data_ranks}[group]
        sent["tensor" if group == "tensor" else operation] += size * on_wire(operation, ranks)
    gradients = sent.pop(TO_ALL, 0) + sent.pop(TO_OWNERS, 0)
    of_tensor = sent.pop("tensor", 0)
    milliseconds = {
        "products": whole["products"] * share / options.products / 1e9,
        "attention": attention_flops(config) * share / options.attention / 1e9,
        "everything else": whole["moved"] * share / options.bandwidth / 1e9,
        "optimizer": planned.trace.parameters / data_ranks * OPTIMIZER_BYTES / options.bandwidth / 1e9,
        "tensor messages": of_tensor / options.nvlink / 1e6,
        "gradient messages": gradients / options.network / 1e6,
        "other messages": sum(sent.values()) / options.network / 1e6,
    }
    if options.overlap:
        work = sum(milliseconds[name] for name in ("products", "attention", "everything else"))
        milliseconds["gradient messages"] = max(0.0, milliseconds["gradient messages"] - BACKWARD_SHARE * work)
    return {
        "GiB, planned": planned.peak_bytes / GIB,
        **summed(milliseconds, planned.flops_per_step / options.gpus, options),
    }


def summed(milliseconds: dict[str, float], useful: float, options: argparse.Namespace) -> dict[str, float]:
    """The parts, their sum, and what share of the peak ``useful`` FLOPs in that time are."""
    total = sum(milliseconds.values())
    parts = {f"ms, {name}": value for name, value in milliseconds.items()}
    return {**parts, "ms, step": total, "mfu": useful / (total * options.peak * 1e9)}


@input_errors_exit()
def main() -> None:
    """Estimate and print."""
    parser = OptionParser(description=__doc__)
    parser.add_argument("--presets", nargs="+", default=["scaled-125m", "scaled-350m", "scaled-1b3"], metavar="NAME")
    parser.add_argument("--sequences", type=count, default=1, help="of the micro-batch (default: 1)")
    parser.add_argument("--gpus", type=count, metavar="N", help="ranks of a launch, and a whole step of it")
    parser.add_argument("--zero", type=int, choices=(1, 2, 3), default=2, help="stage of the launch (default: 2)")
    parser.add_argument("--overlap", action="store_true", help="hide gradients' messages behind the backward pass")
    parser.add_argument("--products", type=rate, default=790, help="TFLOP/s of matrix products (default: 790)")
    parser.add_argument("--attention", type=rate, default=215, help="TFLOP/s of attention (default: 215)")
    parser.add_argument("--bandwidth", type=rate, default=2.8, help="TB/s of memory (default: 2.8)")
    parser.add_argument("--nvlink", type=rate, default=400, help="GB/s that a rank sends in its node (default: 400)")
    parser.add_argument("--network", type=rate, default=50, help="GB/s that a rank sends beyond it (default: 50)")
    parser.add_argument("--peak", type=rate, default=989, help="TFLOP/s that mfu is a share of (default: 989)")
    options = parser.parse_args()
    for name in options.presets:
        config = load_preset(name)
        model = dataclasses.replace(config.model, vocab_size=config.model.vocab_size or 50_304)
        config = dataclasses.replace(config, model=model)
        if options.gpus:
            show({"preset": name, "gpus": options.gpus}, estimate_launch(config, options))
            continue
        training = dataclasses.replace(config.training, micro_batch_size=options.sequences)
        config = dataclasses.replace(config, training=training)
        for compiled in (False, True):
            show({"preset": name, "compiled": compiled}, estimate(config, options, compiled))


def show(what: dict[str, Any], found: dict[str, float]) -> None:
    """Print a row."""
    print(json.dumps({**what, **{key: round(value, 3) for key, value in found.items()}}))


if __name__ == "__main__":
    main()

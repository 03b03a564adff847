"""What a training step should take on a GPU, by arithmetic: python -m benchmarks.estimate [--presets scaled-1b3 ...].

An ESTIMATE, not a measurement. One micro-batch runs on torch's meta device, which holds shapes alone, with a stand-in
for FlashAttention, once as it is and once with every function that ``training.compile`` compiles counted as one kernel
per direction. Time is what the counts take at the rates that --products, --attention and --bandwidth say, in turn:
matrix products, attention, the bytes of everything else, and the optimizer's passes over weights and gradients. Waits,
launches that the device is faster than, and messages between ranks are not in it.
"""

import argparse
import dataclasses
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ecp_scale.attention import sdpa, segment
from ecp_scale.attention.kernels import Lengths, Operands, Settings, State, Whole
from ecp_scale.command_line import load_preset
from ecp_scale.config import Config
from ecp_scale.models import blocks, loss, norms
from ecp_scale.models.language_model import LanguageModel
from ecp_scale.parallel.context import ParallelContext
from ecp_scale.precision import as_on_a_gpu

META = torch.device("meta")
PRODUCTS = {"mm", "addmm", "bmm"}
VIEWS = {
    *("view", "permute", "transpose", "t", "expand", "slice", "select", "unsqueeze", "squeeze", "detach", "alias"),
    *("as_strided", "split", "split_with_sizes", "_unsafe_view", "unbind", "unfold", "_reshape_alias", "narrow"),
    *("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "lift_fresh"),
}
OPTIMIZER_BYTES = 2 + 4 + 4 + 4 * 7
"""Of a parameter under ZeRO-1 in bf16: gradient read and added in fp32 (2 + 4 + 4), then AdamW, which reads master
weight, two moments and the gradient, and writes the first three, with the weight in bf16 beside them."""


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


class ShapesOfFlash:
    """Shapes and types of torch's FlashAttention for CUDA, with nothing in them."""

    lower_right = True

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, settings: Settings, lengths: Lengths | None = None
    ) -> tuple[Tensor, Tensor, State]:
        """One kernel."""
        *stretches, rows, heads, _ = q.shape
        normalisers = q.new_empty(*stretches, heads, rows, dtype=torch.float32)
        return torch.empty(q.shape, dtype=q.dtype, device=q.device), normalisers, ()

    def backward(
        self,
        gradient: Tensor,
        operands: Operands,
        whole: Whole,
        causal: bool,
        settings: Settings,
        state: State,
        lengths: Lengths | None = None,
    ) -> Operands:
        """One kernel."""
        of_q, of_k, of_v = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in operands)
        return of_q, of_k, of_v


class Flash(ShapesOfFlash):
    """Counts its calls; its bytes are not counted, its FLOPs are the config's."""

    def __init__(self, counts: Counts) -> None:
        self.counts = counts

    def forward(self, *arguments: Any, **named: Any) -> tuple[Tensor, Tensor, State]:
        """One kernel."""
        with self.counts.one_kernel():
            return super().forward(*arguments, **named)

    def backward(self, *arguments: Any, **named: Any) -> Operands:
        """One kernel."""
        with self.counts.one_kernel():
            return super().backward(*arguments, **named)


def fused_by(counts: Counts) -> Callable[[Callable[..., Any], bool], Callable[..., Any]]:
    """``maybe_compile`` that counts each function as a kernel forward and one backward, with what goes in and out."""

    class Fused(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, function: Callable[..., Any], *inputs: Any) -> Any:
            ctx.function, ctx.inputs = function, inputs
            with counts.one_kernel():
                out = function(*inputs)
            counts.count((inputs, out))
            return out

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Any:
            with counts.one_kernel(), torch.enable_grad():
                leaves = [
                    x.detach().requires_grad_(x.is_floating_point()) if isinstance(x, Tensor) else x for x in ctx.inputs
                ]
                outputs = tree_leaves(ctx.function(*leaves))
                wanted = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad]
                found = iter(torch.autograd.grad(outputs, wanted, gradients, allow_unused=True))
                of_inputs = [next(found) if isinstance(x, Tensor) and x.requires_grad else None for x in leaves]
            counts.count((ctx.inputs, gradients, of_inputs))
            return None, *of_inputs

    def wrap(function: Callable[..., Any], compiled: bool) -> Callable[..., Any]:
        def run(*inputs: Any) -> Any:
            if not torch.is_grad_enabled():  # inside a function that computes gradients by itself
                with counts.one_kernel():
                    out = function(*inputs)
                counts.count((inputs, out))
                return out
            # A rotation is a pair of tensors.
            flat, spec = torch.utils._pytree.tree_flatten(inputs)
            return Fused.apply(lambda *leaves: function(*torch.utils._pytree.tree_unflatten(leaves, spec)), *flat)

        return run

    return wrap


def count(config: Config, layers: int, compiled: bool) -> Counts:
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
        for module in (blocks, norms, loss) if compiled else ():
            stack.enter_context(mock.patch.object(module, "maybe_compile", fused_by(counts)))
        stack.enter_context(counts)
        model(ids[:, :-1], ids[:, 1:])[0].backward()
    return counts


def estimate(config: Config, options: argparse.Namespace, compiled: bool) -> dict[str, float]:
    """Counts of a layer, and milliseconds of a step of one micro-batch by what they go to."""
    few, more = count(config, 2, compiled), count(config, 3, compiled)
    layers, model = config.model.layers, config.model
    products = few.products + (layers - 2) * (more.products - few.products)
    moved = few.moved + (layers - 2) * (more.moved - few.moved)
    sequences = config.training.micro_batch_size
    # Flash computes scores again in the backward pass: 3.5 times the forward pass, of which 3 count as useful.
    attention = 3.5 * 4 * model.width * model.geometry.score_pairs(0) * layers * sequences
    milliseconds = {
        "products": products / options.products / 1e9,
        "attention": attention / options.attention / 1e9,
        "everything else": moved / options.bandwidth / 1e9,
        "optimizer": model.parameters * OPTIMIZER_BYTES / options.bandwidth / 1e9,
    }
    total = sum(milliseconds.values())
    useful = model.flops_per_token * model.sequence_length * sequences
    return {
        "kernels of a layer": more.kernels - few.kernels,
        "GB of a layer beside products": (more.moved - few.moved) / 1e9,
        **{f"ms, {name}": value for name, value in milliseconds.items()},
        "ms, step": total,
        "mfu": useful / (total * options.peak * 1e9),
    }


def main() -> None:
    """Estimate and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=["scaled-125m", "scaled-350m", "scaled-1b3"], metavar="NAME")
    parser.add_argument("--products", type=float, default=600, help="TFLOP/s of matrix products (default: 600)")
    parser.add_argument("--attention", type=float, default=300, help="TFLOP/s of attention (default: 300)")
    parser.add_argument("--bandwidth", type=float, default=2.8, help="TB/s of memory (default: 2.8)")
    parser.add_argument("--peak", type=float, default=989, help="TFLOP/s that mfu is a share of (default: 989)")
    options = parser.parse_args()
    for name in options.presets:
        config = load_preset(name)
        model = dataclasses.replace(config.model, vocab_size=config.model.vocab_size or 50_304)
        training = dataclasses.replace(config.training, micro_batch_size=1)
        config = dataclasses.replace(config, model=model, training=training)
        for compiled in (False, True):
            found = estimate(config, options, compiled)
            print(json.dumps({"preset": name, "compiled": compiled, **{k: round(v, 3) for k, v in found.items()}}))


if __name__ == "__main__":
    main()

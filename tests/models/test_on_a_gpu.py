"""A micro-batch on a device that stands in for a GPU: where tensors lie, what waits, how many kernels there are.

The stand-in is torch's meta device, which holds shapes alone, and a flash kernel that gives what CUDA's would. Where
ranks share the work, messages are left out, since torch.distributed knows no meta device.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import mappings
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.estimate import META, VIEWS, counts_of_model
from ecp_scale.attention import latent, sdpa, segment
from ecp_scale.attention.kernels import Operands, Whole
from ecp_scale.command_line import load_preset
from ecp_scale.config import Config, ModelConfig
from ecp_scale.config.geometry import GEOMETRIES
from ecp_scale.models.architectures import ARCHITECTURES
from ecp_scale.models.language_model import LanguageModel
from ecp_scale.parallel import branch
from ecp_scale.parallel.context import ParallelContext
from ecp_scale.parallel.groups import process_groups
from ecp_scale.planning.flash_shapes import ShapesOfFlash
from ecp_scale.planning.tracing import _fake_launch, _groups, _micro_batch
from ecp_scale.precision import as_on_a_gpu

WAITS = {"_local_scalar_dense", "nonzero", "item", "equal", "masked_select", "unique", "_unique2"}


class Watch(TorchDispatchMode):
    """Counts kernels, copies from the host and waits for the device; refuses an operation on tensors of both."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.kernels: Counter[str] = Counter()
        self.copies = 0
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.partition("::")[2]
        inputs, outputs = ([x for x in tree_leaves(part) if isinstance(x, Tensor)] for part in ((args, kwargs), out))
        devices = {x.device.type for x in [*inputs, *outputs]}
        if self.device.type not in devices:
            return out  # the host's own
        if len(devices) > 1:
            assert name in ("_to_copy", "copy_"), f"{name} of {devices}"
            self.copies += 1
        elif name in WAITS:
            self.waits.append(name)
        elif name not in VIEWS:
            self.kernels[name] += 1
        return out


class Flash(ShapesOfFlash):
    """Holds normalisers to what CUDA's wants."""

    def backward(self, gradient: Tensor, operands: Operands, whole: Whole, *rest: Any, **named: Any) -> Operands:
        """One kernel."""
        assert whole[1].is_contiguous()
        return super().backward(gradient, operands, whole, *rest, **named)


@pytest.fixture(autouse=True)
def flash(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashAttention serves wherever it would on a GPU."""
    for module in (segment, sdpa, latent):
        monkeypatch.setattr(module, "kernel_for", lambda *_: Flash())


def config_of(architecture: str, documents: bool, layers: int = 3, **changes: Any) -> Config:
    """A scaled preset of 2,048 tokens in bf16."""
    config = load_preset("scaled-125m")
    sizes: dict[str, Any] = {"sequence_length": 2048, "segment_length": 256, "vocab_size": 1000, "latents": None}
    sizes |= {"window": 512, "group_length": 512, "layers": layers, "allow_short_receptive_field": True}
    model: ModelConfig = dataclasses.replace(config.model, architecture=architecture, **sizes)
    attention = dataclasses.replace(
        config.attention, document_mask=documents, restart_positions=documents, end_of_document=0
    )
    parallel = dataclasses.replace(config.parallel, **changes)
    return dataclasses.replace(config, model=model, attention=attention, parallel=parallel)


def micro_batch(config: Config, parallel: ParallelContext, device: torch.device) -> Watch:
    """Forward and backward of two sequences that lie on the host."""
    with torch.device(device):
        model = LanguageModel(config.model, parallel, config.attention).train()
    batch = torch.arange(2 * 2049).view(2, 2049) % 100
    with as_on_a_gpu(), Watch(device) as watch:
        ids = batch.to(device)
        total, losses = model(ids[:, :-1], ids[:, 1:], on_host=batch[:, :-1])
        total.backward()
    assert (total.device.type, losses.device.type, losses.dtype) == (device.type, device.type, torch.float32)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert (parameter.grad.device.type, parameter.grad.dtype) == (device.type, parameter.dtype), name
    return watch


KINDS = {
    **dict.fromkeys(("longlora", "perceiver_ar", "double_attention", "split_attention"), 2),
    # Context and latents before and after the compression, and the document at their border.
    "compressed_double_attention": 5,
}
"""Patterns of an architecture that need the documents each in its own way; the others have one."""


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("documents", [False, True], ids=["whole", "documents"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nothing_waits_and_documents_come_in_a_copy_of_each_kind(
    architecture: str, documents: bool, recompute: Any
) -> None:
    config = config_of(architecture, documents)
    parallel = dataclasses.replace(ParallelContext.single(torch.bfloat16), recompute=recompute)
    watch = micro_batch(config, parallel, META)
    assert watch.waits == []
    assert watch.copies == 1 + documents * KINDS.get(architecture, 1)


MOST_KERNELS = 202
"""Of a layer, forward and backward, uncompiled: 21 products, attention, and pointwise operations, norms in parts."""


@pytest.mark.parametrize("documents", [False, True], ids=["whole", "documents"])
def test_a_layer_has_few_kernels(documents: bool) -> None:
    parallel = ParallelContext.single(torch.bfloat16)
    found = [micro_batch(config_of("ecp", documents, layers), parallel, META) for layers in (3, 4)]
    added = found[1].kernels - found[0].kernels
    # Queries, keys and values add up their gradients of what they take, and so do the two halves of SwiGLU.
    assert (added["mm"], added["addmm"]) == (18, 3)
    assert sum(added.values()) <= MOST_KERNELS, added


MOST_COMPILED_KERNELS = 51
"""Of a layer whose functions are compiled: 21 products, attention, and what torch.compile makes of the rest."""


def test_a_compiled_layer_has_fewer_kernels() -> None:
    preset = load_preset("scaled-125m")
    config = dataclasses.replace(preset, model=dataclasses.replace(preset.model, vocab_size=512, sequence_length=2048))
    layer, _ = counts_of_model(config, compiled=True)
    assert layer["kernels"] <= MOST_COMPILED_KERNELS
    assert layer["kernels"] < counts_of_model(config, compiled=False)[0]["kernels"] / 3


def no_message(*_: Any, async_op: bool = False, **__: Any) -> Any:
    """Stands in for a message, which has arrived."""
    return SimpleNamespace(wait=lambda: True) if async_op else None


@contextmanager
def launch(config: Config, rank: int) -> Iterator[ParallelContext]:
    """One rank of a launch whose messages go nowhere."""
    ranks = config.parallel.tensor * config.parallel.context
    with (
        _fake_launch(ranks, rank),
        process_groups(config.parallel, device=torch.device("cpu")) as groups,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(torch.cuda, "current_device", lambda: META)
        for name in ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor"):
            patch.setattr(dist, name, no_message)
        for name in ("dist_all_gather_func", "dist_reduce_scatter_func"):
            patch.setattr(mappings, name, no_message)
        patch.setattr(dist, "batch_isend_irecv", lambda messages: [no_message(async_op=True) for _ in messages])
        yield ParallelContext.of(config, groups, torch.bfloat16)


@pytest.mark.parametrize(
    ("layout", "rank"),
    [
        ({"tensor": 2}, 1),
        ({"tensor": 2, "sequence": True}, 1),
        ({"context": 4}, 0),
        ({"context": 4, "recompute": "selective"}, 2),
        ({"context": 4, "recompute": "full"}, 3),
        ({"tensor": 2, "sequence": True, "context": 2, "recompute": "selective"}, 3),
    ],
    ids=str,
)
@pytest.mark.parametrize("documents", [False, True], ids=["whole", "documents"])
def test_ranks_that_share_the_work_wait_for_nothing_but_messages(
    layout: dict[str, Any], rank: int, documents: bool
) -> None:
    config = config_of("ecp", documents, **layout)
    with launch(config, rank) as parallel:
        watch = micro_batch(config, parallel, META)
    assert watch.waits == []
    assert watch.copies <= 1 + documents * (KINDS.get(config.model.architecture, 1) + (config.parallel.context > 1))


@pytest.mark.parametrize(
    ("architecture", "sequence"),
    [(name, False) for name in ARCHITECTURES]
    + [(name, True) for name, geometry in GEOMETRIES.items() if geometry.streams],
)
@pytest.mark.parametrize("documents", [False, True], ids=["whole", "documents"])
def test_a_share_of_every_architecture_waits_for_nothing_but_messages(
    architecture: str, sequence: bool, documents: bool
) -> None:
    config = config_of(architecture, documents, tensor=2, sequence=sequence)
    with launch(config, 1) as parallel:
        watch = micro_batch(config, parallel, META)
    assert watch.waits == []
    assert watch.copies <= 1 + documents * (KINDS.get(config.model.architecture, 1) + (config.parallel.context > 1))


def test_sequence_parallelism_keeps_its_own_positions_and_gathers_the_others_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class KeptWhole:
        def __init__(self, *_: Any) -> None:
            pass

        def pack(self, saved: Tensor) -> Tensor:
            return saved

        unpack = pack

        def awaited_by(self, _: Any) -> Any:
            return nullcontext()

    config = config_of("ecp", False, tensor=2, sequence=True)
    kept, sent = [], []
    for kind in (branch._GatheredAgain, KeptWhole):
        monkeypatch.setattr(branch, "_GatheredAgain", kind)
        found = []
        for layers in (3, 4):
            with _fake_launch(2, 0), _groups(config) as groups:
                found.append(_micro_batch(config, layers, groups))
        kept.append(found[1].kept - found[0].kept)
        sent.append((found[1].sent - found[0].sent)["tensor", "allgather_base"])
    tokens = config.training.micro_batch_size * config.model.sequence_length
    share = tokens * config.model.width * torch.bfloat16.itemsize // 2
    # The inputs of two branches, of which the other rank's half is not kept; a gather more for each.
    assert kept[1] - kept[0] == 2 * share
    assert sent[0] - sent[1] == 2 * share


@pytest.mark.parametrize("layout", [{"tensor": 2}, {"tensor": 2, "sequence": True}], ids=str)
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_messages_of_a_branch_are_under_way_while_its_gradients_are_computed(
    layout: dict[str, Any], recompute: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened = []

    def told(of: Any, name: str, what: str) -> None:
        before = getattr(of, name)

        def call(*arguments: Any, **named: Any) -> Any:
            happened.append(what)
            return before(*arguments, **named)

        monkeypatch.setattr(of, name, staticmethod(call) if of is branch._Weight else call)

    told(branch._Message, "start", "start")
    told(branch._Message, "wait", "wait")
    told(branch._Weight, "backward", "weight")
    told(branch.GradientSum, "add", "term")
    arrive = branch._GatheredAgain.wait

    def ask(*arguments: Any, async_op: bool = False, **named: Any) -> Any:
        if async_op:
            happened.append("gather")
        return no_message(async_op=async_op)

    def wait(of: branch._GatheredAgain) -> None:
        if of.work is not None:
            happened.append("arrived")
        arrive(of)

    monkeypatch.setattr(branch._GatheredAgain, "wait", wait)
    config = config_of("ecp", False, layers=2, recompute=recompute, **layout)
    with launch(config, 1) as parallel, monkeypatch.context() as within:
        within.setattr(dist, "all_gather_into_tensor", ask)
        micro_batch(config, parallel, META)
    is_gathered_again = layout.get("sequence") and recompute != "full"
    asked, arrived = (["gather"], ["arrived"]) if is_gathered_again else ([], [])
    feed_forward, attention = (
        [*asked, *["term"] * linears, "start", "weight", *arrived, *["weight"] * (linears - 1), "wait"]
        for linears in (2, 3)
    )
    assert happened == [*feed_forward, *attention] * 2

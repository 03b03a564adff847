"""Run by test_sequences.py on several ranks: models whose ranks share sequences, against the model in one process.

Argument: a JSON file that lists checks. Every rank runs the whole model too, and compares. The
bytes of every message of the halo are counted where they are handed to torch.distributed.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing import assert_close

from ecp_scale.attention import rotation
from ecp_scale.config import AttentionConfig, Config, ModelConfig, ParallelConfig
from ecp_scale.models.initialization import initialize
from ecp_scale.models.language_model import LanguageModel
from ecp_scale.models.positions import Positions
from ecp_scale.parallel import halo
from ecp_scale.parallel.context import ParallelContext
from ecp_scale.parallel.groups import Groups, process_groups
from ecp_scale.parallel.megatron import parallel_state
from ecp_scale.parallel.partition import Partition
from ecp_scale.parallel.random import seed_step
from tests.models.settings import PAPER, SCALED

SETTINGS = {"paper": PAPER, "scaled": SCALED}


class Wire:
    """Bytes and messages of the halo, in both directions of one rank."""

    def __init__(self) -> None:
        self.sent: list[int] = []
        self._send = dist.batch_isend_irecv
        halo.dist.batch_isend_irecv = self.count  # type: ignore[assignment]

    def count(self, operations: list[Any]) -> Any:
        """Count what is sent, and send it."""
        self.sent += [item.tensor.numel() * item.tensor.element_size() for item in operations if item.op is dist.isend]
        return self._send(operations)


def model_of(config: ModelConfig, parallel: ParallelContext, attention: AttentionConfig) -> LanguageModel:
    """The model of a rank, ready to train."""
    model = LanguageModel(config, parallel, attention)
    initialize(model, config, parallel, seed=1)
    return model.train()


def gradients(model: LanguageModel, tokens: Tensor) -> dict[str, Tensor]:
    """Gradient of the losses of this rank's run, of which some count."""
    targets = torch.randint(29, tokens.shape, generator=torch.Generator().manual_seed(3))
    total, _ = model(tokens, targets, model.trained_targets(targets) % 5 > 0)
    total.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def check(job: dict[str, Any], wire: Wire) -> None:
    """Logits and every gradient equal those of one process; every message is one segment."""
    config = dataclasses.replace(
        SETTINGS[job["settings"]], dropout=0.0, allow_short_receptive_field=True, **job["model"]
    )
    attention = AttentionConfig(document_mask=job["masked"], end_of_document=3 if job["masked"] else None)
    parallel = ParallelConfig(**job["parallel"])
    assert config.problems() + parallel.problems(config, dist.get_world_size()) == []
    tokens = torch.randint(29, (2, config.sequence_length), generator=torch.Generator().manual_seed(7))
    with process_groups(ParallelConfig()) as groups:
        whole = model_of(config, ParallelContext(groups.tensor, torch.float64), attention)
        logits = whole.logits(tokens).detach()
        expected = gradients(whole, tokens)
    with process_groups(parallel) as groups:
        context = ParallelContext.of(Config(parallel=parallel), groups, torch.float64)
        model = model_of(config, context, attention)
        wire.sent.clear()
        with torch.no_grad():
            run = model._run(config.sequence_length)
            assert_close(model.logits(tokens), logits[:, run], rtol=1e-10, atol=1e-10)
        forward_only = len(wire.sent)
        assert forward_only == (config.layers if job["sends_right"][groups.context.rank()] else 0)
        wire.sent.clear()
        found = gradients(model, tokens)
        assert found.keys() == expected.keys()
        messages = config.layers * (job["sends_right"][groups.context.rank()] + (groups.context.rank() > 0))
        halo_positions = config.geometry.halo_positions
        width = config.key_value_width * (1 if config.tied_key_value else 2) // parallel.tensor
        assert wire.sent == [2 * halo_positions * width * 8] * messages, (wire.sent, messages)
        for name, gradient in found.items():
            dist.all_reduce(gradient, group=groups.data)
            parameter = dict(model.named_parameters())[name]
            size, rank = context.tp_size, context.tp_rank
            partition = Partition.of(parameter)
            unpadded = expected[name][: partition.vocabulary_rows] if partition.vocabulary_rows else expected[name]
            share = partition.split(unpadded, size, rank, parameter.shape[0] * size)
            assert_close(gradient, share, rtol=1e-10, atol=1e-10, msg=name)


def check_wire(job: dict[str, Any], wire: Wire) -> None:
    """Bytes on the wire of one training step do not depend on the length of the sequence."""
    for length in job["lengths"]:
        config = dataclasses.replace(
            SCALED, layers=2, width=8, heads=2, key_value_heads=1, feed_forward_width=8, vocab_size=29,
            sequence_length=length, segment_length=job["segment_length"], allow_short_receptive_field=True,
        )  # fmt: skip
        with process_groups(ParallelConfig(context=dist.get_world_size())) as groups:
            model = model_of(
                config, ParallelContext(groups.tensor, torch.float32, cp_group=groups.context), AttentionConfig()
            )
            wire.sent.clear()
            gradients(model, torch.ones(1, length, dtype=torch.int64))
            rank, size = groups.context.rank(), groups.context.size()
            one_segment = 2 * job["segment_length"] * config.key_value_width * 4  # keys and values, fp32
            assert wire.sent == [one_segment] * (config.layers * ((rank < size - 1) + (rank > 0)))


def check_two_passes(config: ModelConfig, groups: Groups, recompute: str) -> None:
    """Two forward passes before their backward passes give the gradients of one after the other."""
    parallel = ParallelContext(groups.tensor, torch.float64, recompute=cast(Any, recompute), cp_group=groups.context)
    model = model_of(config, parallel, AttentionConfig())
    batches = [
        torch.randint(29, (2, config.sequence_length), generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)
    ]
    parameters = list(model.parameters())
    expected = [torch.autograd.grad(model(tokens, tokens)[0], parameters, allow_unused=True) for tokens in batches]
    totals = [model(tokens, tokens)[0] for tokens in batches]
    for total, wanted in zip(totals, expected, strict=True):
        for gradient, other in zip(torch.autograd.grad(total, parameters, allow_unused=True), wanted, strict=True):
            assert (gradient is None) == (other is None)
            if gradient is not None:
                assert_close(gradient, other, rtol=1e-10, atol=1e-10)


def check_masks(layout: dict[str, int]) -> None:
    """Ranks with equal weights and inputs drop other elements, in attention and in the feed-forward network."""
    config = dataclasses.replace(SCALED, dropout=0.5, allow_short_receptive_field=True)
    with process_groups(ParallelConfig(**layout)) as groups:
        parallel = ParallelContext(groups.tensor, torch.float64, cp_group=groups.context)
        model = model_of(config, parallel, AttentionConfig())
        block = model.layers[0]
        width = (config.heads // parallel.tp_size) * config.head_width
        few = (config.key_value_heads or config.heads) // parallel.tp_size * config.head_width
        hidden = torch.ones(
            config.sequence_length, 2, config.feed_forward_width // parallel.tp_size, dtype=torch.float64
        )
        generator = torch.Generator().manual_seed(4)
        q, k, v = (torch.randn(16, 2, size, dtype=torch.float64, generator=generator) for size in (width, few, few))
        positions = Positions(
            rotation(torch.arange(16), config.head_width, config.rotary_theta, torch.float64), None, 0
        )
        seen: dict[str, dict[float, list[bytes]]] = {"attention": {}, "feed-forward": {}}
        for rate in (0.0, 0.5):
            seed_step(1, 3, groups)
            block.attention.config = block.feed_forward.config = dataclasses.replace(config, dropout=rate)
            with torch.no_grad():
                seen["feed-forward"][rate] = shared(block.feed_forward._hidden(hidden, hidden))
                if groups.context.size() == 1:  # else a rank would send its last segment to its neighbour
                    seen["attention"][rate] = shared(block.attention._attend(q, k, v, positions, None))
        for what, by_rate in seen.items():
            for rate, (one, other) in by_rate.items():
                assert (one == other) == (rate == 0), (what, rate, layout)


def shared(tensor: Tensor) -> list[bytes]:
    """A tensor of every rank, as bytes."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, tensor.numpy().tobytes())
    return everyone


def main() -> None:
    """Do every check of the list."""
    dist.init_process_group("gloo")
    wire = Wire()
    for job in json.loads(Path(sys.argv[-1]).read_text()):
        if "lengths" in job:
            check_wire(job, wire)
        elif "masks" in job:
            check_masks(job["masks"])
        elif "two_passes" in job:
            with process_groups(ParallelConfig(context=dist.get_world_size())) as groups:
                config = dataclasses.replace(SCALED, dropout=0.0, allow_short_receptive_field=True)
                check_two_passes(config, groups, job["two_passes"])
        else:
            context = job["parallel"].get("context", 1)
            check({**job, "sends_right": [True] * (context - 1) + [False]}, wire)
        assert not parallel_state.model_parallel_is_initialized()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

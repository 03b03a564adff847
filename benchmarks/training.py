"""Training steps: ours against a materialised implementation, other people's models, and our own transformer.

Every contender makes the same step in a process of its own: forward, backward, AdamW, on one micro-batch, without
dropout.
"""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from benchmarks.peers import HuggingFace, MaterialisedLanguageModel, PerceiverArPytorch
from benchmarks.timing import (
    KEPT,
    Contender,
    alternate,
    device,
    matrix_product,
    medians,
    ratio,
    side_by_side,
)
from ecp_scale.command_line import load_preset
from ecp_scale.config import Config, Recompute
from ecp_scale.parallel.device import known_peak_teraflops, local_device, peak_memory_bytes
from ecp_scale.parallel.groups import Groups, process_groups
from ecp_scale.precision import weight_type
from ecp_scale.training.step import optimizer_step
from ecp_scale.zero import json_config
from ecp_scale.zero.engine import build_engine

OURS = "ours"
PRODUCTS = 7
"""Matrix products in a round, of which the best is the peak."""


def preset(
    name: str,
    precision: Literal["fp32", "bf16"],
    sequences: int = 1,
    recompute: Recompute | None = None,
    **changes: Any,
) -> Config:
    """A preset without dropout and with changes of the model, so many sequences per step, all in one micro-batch."""
    config = load_preset(name)
    model = dataclasses.replace(config.model, dropout=0.0, allow_short_receptive_field=True, **changes)
    training = dataclasses.replace(
        config.training,
        micro_batch_size=sequences,
        global_batch_size=sequences,
        precision=precision,
        output_dir=None,
    )
    parallel = dataclasses.replace(config.parallel, recompute=recompute or config.parallel.recompute)
    return dataclasses.replace(config, model=model, training=training, parallel=parallel)


def tokens_of(config: Config) -> Tensor:
    """A micro-batch of random sequences with their targets (micro, n + 1)."""
    shape = (config.training.micro_batch_size, config.model.sequence_length + 1)
    return torch.randint(config.model.known_vocab_size, shape, generator=torch.Generator().manual_seed(1))


@contextmanager
def our_engine(config: Config, groups: Groups) -> Iterator[Any]:
    """A model under DeepSpeed."""
    stage = 1 if config.training.precision == "bf16" else 0
    content = {"data_types": {"grad_accum_dtype": "fp32"}, "zero_optimization": {"stage": stage}}
    engine = build_engine(config, json_config.resolve(content, config, 1), groups)
    try:
        yield engine
    finally:
        engine.destroy()


@contextmanager
def our_step(config: Config) -> Iterator[Callable[[], object]]:
    """A step of a training run, through DeepSpeed, in a launch of one process."""
    tokens = tokens_of(config)
    with process_groups(config.parallel) as groups, our_engine(config, groups) as engine:
        yield lambda: optimizer_step(engine, [tokens], groups)


@contextmanager
def plain_step(
    build: Callable[[], nn.Module], config: Config, dtype: torch.dtype, freed_memory_kept: bool
) -> Iterator[Callable[[], object]]:
    """A step of a model that gives the mean loss of tokens and targets, with or without our choice of allocation."""
    if freed_memory_kept:
        local_device(0)  # chooses how this process allocates
    model = build().to(device(), dtype)
    tokens = tokens_of(config).to(device())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> None:
        model(tokens[:, :-1], tokens[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()

    yield step


def peer(name: str, config: Config) -> Contender:
    """One of those that we compare with, in fp32 unless its name begins with bf16."""
    model = config.model
    if name == "our transformer":
        full = dataclasses.replace(model, architecture="transformer", first_segment_projection=False)
        return partial(our_step, dataclasses.replace(config, model=full))
    builds: dict[str, Callable[[], nn.Module]] = {
        "materialised n x n": partial(MaterialisedLanguageModel, model, by_segment=False),
        "materialised by segment": partial(MaterialisedLanguageModel, model, by_segment=True),
        "Hugging Face Llama": partial(HuggingFace, "llama", model),
        "Hugging Face GPT-2": partial(HuggingFace, "gpt2", model),
        "perceiver-ar-pytorch": partial(PerceiverArPytorch, model),
    }
    dtype = torch.bfloat16 if name.startswith("bf16 ") else torch.float32
    build = builds[name.removeprefix("bf16 ").removeprefix("fp32 ").removesuffix(KEPT)]
    return partial(plain_step, build, config, dtype, name.endswith(KEPT))


def compare(config: Config, peers: tuple[str, ...], rounds: int) -> dict[str, Any]:
    """Tokens per second and peak memory of a step of each, and how many times as fast as each peer ours is."""
    contenders: dict[str, Contender] = {
        OURS: partial(our_step, config),
        **{name: peer(name, config) for name in peers},
    }
    seconds, memory = side_by_side(contenders, rounds)
    tokens = config.training.micro_batch_size * config.model.sequence_length
    return {
        name: {
            "tokens_per_second": tokens / middle,
            "peak_bytes": memory[name],
            "ours_is_times_as_fast": ratio(seconds, name, OURS),
            "our_memory_share": memory[OURS] / memory[name],
        }
        for name, middle in medians(seconds).items()
    }


def utilisation(config: Config, rounds: int) -> dict[str, float]:
    """FLOPs of a step per second, as a share of what matrix products of the same round reach.

    The peak is the best of a round's products. Where others share the machine, the step, which is many times as long,
    runs at the speed of the middle one at best.
    """
    product, product_flops = matrix_product(weight_type(config))
    tokens = tokens_of(config)[:, 1:].numel()
    products = {f"product {number}": product for number in range(PRODUCTS)}
    with our_step(config) as ours:
        seconds = torch.tensor(list(alternate({OURS: ours, **products}, rounds).values()))
        memory = peak_memory_bytes(device())
    step = config.model.flops_per_token * tokens / seconds[0]
    reached = product_flops / seconds[1:]
    peak, middle = reached.amax(dim=0), reached.median(dim=0).values
    found = {
        "tokens_per_second": tokens / seconds[0],
        "teraflops": step / 1e12,
        "peak_teraflops": peak / 1e12,
        "share_of_peak": step / peak,
        "share_of_median_product": step / middle,
    }
    datasheet = known_peak_teraflops(device(), config.training.precision, config.training.tf32)
    if datasheet:
        found["share_of_datasheet"] = found["teraflops"] / datasheet
    return {"peak_bytes": memory, **{name: of_rounds.median().item() for name, of_rounds in found.items()}}


def cost_per_token(
    config: Config, lengths: tuple[int, ...], fewest_tokens: int, rounds: int
) -> dict[int, dict[str, float]]:
    """Microseconds and bytes per token of a step as the sequence grows and the segment stays.

    Short sequences come several at a time, ``fewest_tokens`` together. Each length in a process of its own: what the
    others freed and kept would leave too little for the longest.
    """
    found = {}
    for length in lengths:
        sequences = max(1, fewest_tokens // length)
        longer = dataclasses.replace(
            config,
            model=dataclasses.replace(config.model, sequence_length=length),
            training=dataclasses.replace(config.training, micro_batch_size=sequences, global_batch_size=sequences),
        )
        seconds, memory = side_by_side({OURS: partial(our_step, longer)}, rounds)
        found[length] = {
            "microseconds_per_token": medians(seconds)[OURS] / (sequences * length) * 1e6,
            "bytes_per_token": memory[OURS] / (sequences * length),
        }
    return found

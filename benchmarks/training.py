"""Training steps: ours against a materialised implementation, Hugging Face's models, and our own transformer.

Every contender makes the same step: forward, backward, AdamW, on one sequence at a time, without dropout.
"""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peers import MaterialisedLanguageModel, hugging_face
from benchmarks.timing import alternate, matmul_flops_per_second, medians, peak_bytes, ratio
from ecp_scale import deepspeed_json
from ecp_scale.command_line import load_preset
from ecp_scale.config import Config
from ecp_scale.parallel.groups import Groups, process_groups
from ecp_scale.training.engine import build_engine
from ecp_scale.training.step import optimizer_step

OURS = "ours"


def preset(name: str, **changes: Any) -> Config:
    """A preset without dropout, one sequence per step, in fp32 unless said otherwise."""
    config = load_preset(name)
    precision = changes.pop("precision", "fp32")
    model = dataclasses.replace(config.model, dropout=0.0, allow_short_reach=True, **changes)
    training = dataclasses.replace(
        config.training, micro_batch_size=1, global_batch_size=1, precision=precision, output_dir=None
    )
    return dataclasses.replace(config, model=model, training=training)


def tokens_of(config: Config) -> Tensor:
    """One random sequence with its targets (1, n + 1)."""
    shape = (1, config.model.sequence_length + 1)
    return torch.randint(config.model.known_vocab_size, shape, generator=torch.Generator().manual_seed(1))


@contextmanager
def our_step(config: Config, groups: Groups) -> Iterator[Callable[[], object]]:
    """A step of a training run, through DeepSpeed."""
    stage = 1 if config.training.precision == "bf16" else 0
    content = {"data_types": {"grad_accum_dtype": "fp32"}, "zero_optimization": {"stage": stage}}
    engine = build_engine(config, deepspeed_json.resolve(content, config, 1), groups)
    tokens = tokens_of(config)
    try:
        yield lambda: optimizer_step(engine, [tokens], groups, False)
    finally:
        engine.destroy()


def plain_step(model: nn.Module, config: Config, device: torch.device) -> Callable[[], object]:
    """A step of a model that returns its mean loss, or an output that holds it."""
    model.to(device)
    tokens = tokens_of(config).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    is_ours = isinstance(model, MaterialisedLanguageModel)

    def step() -> None:
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        loss = model(inputs, targets) if is_ours else model(input_ids=inputs, labels=inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def compare(config: Config, rounds: int, peers: tuple[str, ...]) -> dict[str, Any]:
    """Tokens per second and peak memory of a step of each, and how many times as fast as each peer ours is."""
    with ExitStack() as stack:
        groups = stack.enter_context(process_groups(config.parallel))
        contenders: dict[str, Callable[[], object]] = {OURS: stack.enter_context(our_step(config, groups))}
        if "materialised fp32" in peers:
            materialised = MaterialisedLanguageModel(config.model)
            contenders["materialised fp32"] = plain_step(materialised, config, groups.device)
        for kind in ("llama", "gpt2"):
            if kind in peers:
                model = hugging_face(kind, config.model)
                contenders[f"Hugging Face {kind}"] = plain_step(model, config, groups.device)
        if "transformer" in peers:
            full = dataclasses.replace(config.model, architecture="transformer", first_segment_projection=False)
            other = dataclasses.replace(config, model=full)
            contenders["our transformer"] = stack.enter_context(our_step(other, groups))
        seconds = alternate(contenders, rounds)
        memory = {name: peak_bytes(run) for name, run in contenders.items()}
    tokens = config.model.sequence_length
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
    """FLOPs of a step over its time, as a share of the peak of a matrix product in the same run."""
    dtype = torch.bfloat16 if config.training.precision == "bf16" else torch.float32
    with process_groups(config.parallel) as groups, our_step(config, groups) as ours:
        before = matmul_flops_per_second(dtype)
        seconds = medians(alternate({OURS: ours}, rounds))[OURS]
        peak = max(before, matmul_flops_per_second(dtype))
    reached = config.model.flops_per_token * config.model.sequence_length / seconds
    return {"teraflops": reached / 1e12, "peak_teraflops": peak / 1e12, "share_of_peak": reached / peak}


def cost_per_token(config: Config, lengths: tuple[int, ...], rounds: int) -> dict[int, dict[str, float]]:
    """Microseconds and bytes per token of a step as the sequence grows and the segment stays."""
    found = {}
    with process_groups(config.parallel) as groups:
        for length in lengths:
            longer = dataclasses.replace(config, model=dataclasses.replace(config.model, sequence_length=length))
            with our_step(longer, groups) as ours:
                seconds = medians(alternate({OURS: ours}, rounds))[OURS]
                found[length] = {
                    "microseconds_per_token": seconds / length * 1e6,
                    "bytes_per_token": peak_bytes(ours) / length,
                }
    return found

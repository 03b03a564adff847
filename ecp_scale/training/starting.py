"""What a run settles before its first step: the files that say what it is, and a resume's learning rate."""

import json
import os
import shutil
import socket
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ecp_scale.attention import Settings, put_flash, refusal
from ecp_scale.checkpoint.export import ExportedModel
from ecp_scale.checkpoint.mirror import check_owner
from ecp_scale.checkpoint.resuming import Start, check_digests, check_start, find_start, load, with_ranges
from ecp_scale.checkpoint.starting_weights import StartingWeights, check_starting_weights
from ecp_scale.cluster.signals import STOPPED
from ecp_scale.command_line import Request
from ecp_scale.config import Config, OptimizerConfig
from ecp_scale.console import say, waiting
from ecp_scale.data.blend import Blend
from ecp_scale.errors import InputError, is_first_rank
from ecp_scale.files import write_text
from ecp_scale.parallel.context import is_compiled
from ecp_scale.parallel.device import check_precision
from ecp_scale.parallel.groups import Groups, agreed, decided
from ecp_scale.precision import weight_type
from ecp_scale.training.corpora import open_data
from ecp_scale.training.probe import check_probe
from ecp_scale.zero.engine import Engine
from ecp_scale.zero.filling import fill, share_weights

FLASH_GPUS = {"FA3": ("9.0",), "FA4": ("9.0", "10.0")}
"""Capabilities of GPUs that torch gives to each."""
LARGEST_JUMP = 2.0
"""Factor between what the next step's rate would have been and what it is, beyond which a resume is refused."""


def write_settings(run: Path, deepspeed: dict[str, Any], config: str) -> None:
    """Leave the resolved config and DeepSpeed JSON in the run folder; for one rank, when nothing is refused any more.

    Raises:
        InputError: if they cannot be written.
    """
    try:
        write_text(run / "config.yaml", config)
        write_text(run / "deepspeed.json", json.dumps(deepspeed, indent=2) + "\n")
        (run / STOPPED).unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"{error.filename or run}: {error.strerror or error}") from error


def check_device(config: Config, device: torch.device) -> None:
    """Refuse what this rank's device, or its host, cannot compute, and name what has no effect on it.

    Raises:
        InputError: naming the field.
    """
    check_precision(device, config.training.precision)
    choose_flash(config, device)
    check_backend(config, device)
    check_compiler(config, device)
    if device.type == "cpu" and is_first_rank():
        for field, idle in (("tf32", False), ("flash_attention", "torch")):
            if getattr(config.training, field) != idle:
                say(f"note        training.{field} has no effect on a CPU")


def choose_flash(config: Config, device: torch.device) -> None:
    """Put the FlashAttention of ``training.flash_attention`` in the place of torch's own.

    Raises:
        InputError: saying why it cannot serve this run on this GPU.
    """
    name = config.training.flash_attention
    if name == "torch" or device.type != "cuda":
        return
    dropout, backend = config.model.dropout, config.attention.backend
    capability = "{}.{}".format(*torch.cuda.get_device_capability(device))
    served = FLASH_GPUS[name]
    reasons = {
        f"serves GPUs of capability {' and '.join(served)}, found {capability}": capability not in served,
        f"has no dropout, and model.dropout is {dropout:g}": dropout > 0,
        "takes bf16, and training.precision is fp32": config.training.precision == "fp32",
        f"is not used by attention.backend {backend}": backend not in ("auto", "flash"),
    }
    reason = next((text for text, holds in reasons.items() if holds), None)
    try:
        if reason is None:
            put_flash(name)
    except RuntimeError as error:
        reason = f"cannot be had: {error}"
    if reason is not None:
        raise InputError(f"training.flash_attention is {name}, which {reason}; use torch")


def check_backend(config: Config, device: torch.device) -> None:
    """Refuse an attention backend by name that would not compute anything here.

    Raises:
        InputError: saying what it lacks.
    """
    model, attention = config.model, config.attention
    example = torch.empty(1, 1, 1, model.head_width, dtype=weight_type(config), device=device)
    window = model.geometry.segment_length if model.architecture == "sliding_window" else None
    reason = refusal(attention.backend, example, Settings(window, model.dropout), attention.document_mask)
    if reason is not None:
        raise InputError(f"attention.backend is {attention.backend}, but {reason}; use auto, which takes what serves")


def check_compiler(config: Config, device: torch.device) -> None:
    """Refuse to compile where there is nothing to compile with: C++ for a CPU, or what starts a GPU's kernels, in C.

    Raises:
        InputError: naming the compiler that is missing.
    """
    if not is_compiled(config, device):
        return
    variable, usual = ("CC", ("gcc", "clang")) if device.type == "cuda" else ("CXX", ("g++",))
    names = (os.environ[variable],) if variable in os.environ else usual
    if not any(map(shutil.which, names)):
        raise InputError(
            f"training.compile needs a compiler, and host {socket.gethostname()} has no {' or '.join(names)}: install "
            f"one, let {variable} name one, or set training.compile to false"
        )


def check_rate(start: Start, config: Config, run_tokens: int, allow_jump: bool) -> None:
    """Say how a resume changes the learning rate of the next step; refuse a jump.

    Raises:
        InputError: if the rate would be more than ``LARGEST_JUMP`` times, or less than one such part of, what it would
            have been, unless ``allow_jump``.
    """
    record = start.record
    if record is None or not record.optimizer or not record.run_tokens or record.step >= config.training.steps:
        return
    tokens = record.tokens + config.sequences_after(record.tokens) * config.model.sequence_length
    before = OptimizerConfig(**record.optimizer).learning_rate_at(tokens, record.run_tokens)
    after = config.optimizer.learning_rate_at(tokens, run_tokens)
    if before == after:
        return
    text = f"the learning rate of step {record.step + 1:,} was to be {before:.3g} and is now {after:.3g}"
    larger, smaller = max(before, after), min(before, after)
    if larger > LARGEST_JUMP * smaller and not allow_jump:
        raise InputError(
            f"{text}, a jump by more than {LARGEST_JUMP:g}; pass --allow-rate-jump, or set optimizer.learning_rate, "
            f"{_ends_schedule(config)} to what keeps it"
        )
    say(f"rate        {text}")


def _ends_schedule(config: Config) -> str:
    """The fields that say when the rate of a schedule falls."""
    length = "training.steps" if config.training.tokens is None else "training.tokens"
    ends = {
        "cosine": "optimizer.decay_tokens",
        "wsd": "optimizer.cooldown_tokens",
        "halving": "optimizer.halving_tokens",
    }
    return f"{ends[config.optimizer.schedule]} or {length}" if config.optimizer.schedule in ends else length


def initial_weights(request: Request, start: Start, config: Config, blend: Blend) -> Path | None:
    """The folder whose weights a new run begins with; for one rank to ask."""
    if request.init_from is None:
        return None
    if start.record is not None:
        say(f"start       --init-from {request.init_from} is not read: the run goes on from its own checkpoint")
        return None
    folder = Path(request.init_from)
    exported = check_starting_weights(folder, config, blend.corpora[0])
    say(f"start       with the weights of {folder}: step {exported.step:,}, {exported.tokens:,} tokens")
    return folder


def foreseen(request: Request) -> tuple[Start, Config, Blend | None]:
    """Where a launch would begin, its config then, and its data if they are set; for a dry run, which writes nothing.

    Raises:
        InputError: for what the launch refuses before it builds anything.
    """
    config, start, blend = request.config, Start(), None
    run, mirror = config.training.output_dir, config.checkpoint.mirror
    if run is not None and mirror is not None:
        check_owner(Path(mirror), str(Path(run).resolve()))
    if run is not None:
        start = find_start(Path(run), request.resume, config)
        config = with_ranges(config, start.skip_samples)
    if config.data.is_set:
        config, blend, _ = open_data(config)
        done = start.progress
        config = config.with_length(done.step, done.tokens)
        check_start(start, config, blend)
        initial_weights(request, start, config, blend)
        check_rate(start, config, config.run_tokens(done.step, done.tokens), request.allow_rate_jump)
    elif request.init_from is not None and start.record is None:
        ExportedModel.open(Path(request.init_from))
    return start, config, blend


def load_weights(engine: Engine, config: Config, groups: Groups, start: Start, initial: Path | None) -> None:
    """Fill a new engine with a checkpoint, or with the weights of a model folder, if there are any; all take part.

    Raises:
        InputError: on all ranks, if what is read is damaged, or not what was written.
    """
    if initial is not None:
        weights = agreed(lambda: StartingWeights(initial))
        digests = decided(lambda: weights.digests)
        agreed(lambda: fill(engine, weights), takes_long=True)
        share_weights(engine)
        if digests:
            check_digests(engine, digests, str(initial))
    if start.record is not None:
        size = sum(file.size for file in start.record.files.values())
        what = f"loading     {len(start.record.files)} files, {size:,} bytes, once their hashes are checked"
        with waiting(what, dist.get_rank() == 0):
            load(engine, config, start)
        check_probe(start, config, engine, groups)

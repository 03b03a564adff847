"""A training run from its request to its last checkpoint."""

import dataclasses
import json
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import deepspeed
import torch.distributed as dist

from ecp_scale import deepspeed_json
from ecp_scale.checkpoint.folder import checkpoints_folder
from ecp_scale.checkpoint.saving import Progress, resume, save
from ecp_scale.command_line import Request, to_yaml
from ecp_scale.config import Config
from ecp_scale.data.batches import TrainingBatches, validation_batches
from ecp_scale.data.blend import Blend, check_same_tokenizer
from ecp_scale.data.corpus import Corpus
from ecp_scale.data.files import write_text
from ecp_scale.data.ledger import from_lanes
from ecp_scale.errors import InputError
from ecp_scale.parallel.device import known_peak_teraflops, peak_memory_bytes
from ecp_scale.parallel.groups import Groups, agreed, process_groups
from ecp_scale.parallel.random import seed_step
from ecp_scale.training.engine import build_engine, check_zero_section, set_learning_rate
from ecp_scale.training.metrics import MetricsLog, check_wandb
from ecp_scale.training.schedule import learning_rate
from ecp_scale.training.step import DivergedError, StepResult, mean_loss, optimizer_step, sum_over


def train(request: Request) -> None:
    """Run ``request.config`` on the ranks of this launch.

    Raises:
        InputError: on all ranks, if data, folders or checkpoint cannot be used.
        DivergedError: if loss or gradients stay non-finite.
    """
    check_zero_section(request.deepspeed)
    with process_groups(request.config.parallel) as groups:
        blend, validation = agreed(lambda: _open_data(request.config))
        config = agreed(lambda: with_vocabulary(request.config, blend.corpora[0]))
        assert config.training.output_dir is not None
        run = Path(config.training.output_dir)
        agreed(lambda: _prepare_run(config, run, request.resume))
        settings = deepspeed_json.resolve(request.deepspeed, config, request.world_size)
        engine = build_engine(config, settings, groups)
        progress = resume(engine, config, blend, run) if request.resume else Progress()
        if dist.get_rank() == 0:
            _say_epochs(config, blend)
            write_text(run / "config.yaml", to_yaml(config))
            write_text(run / "deepspeed.json", json.dumps(settings, indent=2) + "\n")
        _Run(config, groups, engine, blend, validation, run).steps(progress)
        engine.destroy()


class _Run:
    """The loop and what it holds on to."""

    def __init__(
        self,
        config: Config,
        groups: Groups,
        engine: deepspeed.DeepSpeedEngine,
        blend: Blend,
        validation: Corpus | None,
        folder: Path,
    ) -> None:
        self.config = config
        self.groups = groups
        self.engine = engine
        self.blend = blend
        self.validation = validation
        self.folder = folder
        self.saved_step = 0

    def steps(self, done: Progress) -> None:
        """Train from after what is done to the end, or until SIGTERM."""
        first_step = done.step
        config, replicas = self.config, self.groups.replicas
        batches = TrainingBatches(self.blend, config.training, replicas.size(), replicas.rank())
        self.saved_step = first_step
        skipped_in_a_row = 0
        ledger = done.ledger
        with ExitStack() as stack:
            log = stack.enter_context(MetricsLog(config, self.folder, first_step)) if dist.get_rank() == 0 else None
            terminated = stack.enter_context(_sigterm_flag())
            for step in range(first_step + 1, config.training.steps + 1):
                began = time.perf_counter()
                before = done.tokens + (step - 1 - first_step) * config.tokens_per_step
                tokens = before + config.tokens_per_step
                rate = learning_rate(
                    config.optimizer, tokens, tokens + (config.training.steps - step) * config.tokens_per_step
                )
                set_learning_rate(self.engine, rate)
                seed_step(config.training.seed, step, self.groups)
                try:
                    result = optimizer_step(
                        self.engine, batches.after(before), self.groups, bool(terminated), config.data.untrained_targets
                    )
                except DivergedError as error:
                    raise DivergedError(f"step {step}: {error}; last checkpoint: step {self.saved_step}") from None
                lanes = sum_over(batches.lanes, replicas, self.groups.device)
                ledger = (ledger + from_lanes(lanes)) % 2**64
                seconds = time.perf_counter() - began
                skipped_in_a_row = skipped_in_a_row + 1 if result.skipped else 0
                record = self._record(Progress(step, tokens, ledger), result, rate, seconds)
                if self._is_due(step, config.training.validation_every_steps) and self.validation is not None:
                    shares = validation_batches(self.validation, config.training, replicas.size(), replicas.rank())
                    record["validation_loss"] = mean_loss(
                        self.engine, shares, self.groups, config.data.untrained_targets
                    )
                if log is not None:
                    log.write(record)
                if skipped_in_a_row >= config.training.max_skipped_steps:
                    raise DivergedError(
                        f"step {step}: {skipped_in_a_row} updates in a row were skipped because gradients were not "
                        f"finite; last checkpoint: step {self.saved_step}"
                    )
                if result.stop_requested or self._is_due(step, config.checkpoint.every_steps):
                    save(self.engine, config, self.blend, self.folder, Progress(step, tokens, ledger))
                    self.saved_step = step
                if result.stop_requested:
                    break

    def _is_due(self, step: int, every: int) -> bool:
        return step % every == 0 or step == self.config.training.steps

    def _record(self, done: Progress, result: StepResult, rate: float, seconds: float) -> dict[str, Any]:
        config = self.config
        speed = config.tokens_per_step / seconds
        peak = config.logging.peak_teraflops or known_peak_teraflops(self.groups.device, config.training.precision)
        utilisation = None
        if peak is not None:
            utilisation = speed * config.model.flops_per_token / (peak * 1e12 * dist.get_world_size())
        return {
            "step": done.step,
            "tokens": done.tokens,
            "loss": result.loss,
            "grad_norm": result.gradient_norm,
            "lr": rate,
            "step_seconds": seconds,
            "tokens_per_second": speed,
            "mfu": utilisation,
            "peak_memory_bytes": peak_memory_bytes(self.groups.device),
            "skipped_steps": self.engine.skipped_steps,
            "ledger": f"{done.ledger:016x}",
        }


def _open_data(config: Config) -> tuple[Blend, Corpus | None]:
    blend = Blend(config.data.phases, config.model.sequence_length, config.training.seed)
    if config.data.validation_prefix is None:
        return blend, None
    validation = Corpus(config.data.validation_prefix, config.model.sequence_length)
    check_same_tokenizer(validation, blend.corpora[0])
    return blend, validation


MANY_EPOCHS = 4
"""Repeats of a corpus that are said: more teach little that is new (Muennighoff et al. 2023, arXiv 2305.16264)."""


def _say_epochs(config: Config, blend: Blend) -> None:
    """Say how often the run shows each corpus, where there are several or one is shown often."""
    epochs = list(blend.epochs(config.training.steps * config.tokens_per_step))
    if len(epochs) > 1 or any(times > MANY_EPOCHS for _, times in epochs):
        for corpus, times in epochs:
            often = f", more than {MANY_EPOCHS}" if times > MANY_EPOCHS else ""
            print(f"data: {corpus.prefix} is shown {times:.2f} times{often}", flush=True)


def with_vocabulary(config: Config, corpus: Corpus) -> Config:
    """The config with the vocabulary and the end of documents of the corpus, unless it names its own.

    Raises:
        InputError: if its own is too small.
    """
    entries = corpus.tokenizer.vocab_size
    untrained = set(config.data.untrained_targets)
    beyond = sorted(token for token in untrained if not 0 <= token < entries)
    if beyond or len(untrained) == entries:
        raise InputError(
            f"data.untrained_targets holds {f'the ids {beyond[:10]}' if beyond else 'every id'}, but the tokenizer of "
            f"{corpus.prefix} has the {entries} entries 0 to {entries - 1}, of which some must be trained"
        )
    if (config.attention.end_of_document or 0) >= entries:
        raise InputError(
            f"attention.end_of_document is {config.attention.end_of_document}, but the tokenizer of {corpus.prefix} "
            f"has {entries} entries"
        )
    if config.attention.end_of_document is None:
        attention = dataclasses.replace(config.attention, end_of_document=corpus.tokenizer.end_of_document)
        config = dataclasses.replace(config, attention=attention)
    if config.model.vocab_size is None:
        return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=entries))
    if config.model.vocab_size < entries:
        raise InputError(
            f"model.vocab_size is {config.model.vocab_size}, but the tokenizer of {corpus.prefix} has {entries} "
            "entries; set model.vocab_size to null to take the tokenizer's"
        )
    return config


def _prepare_run(config: Config, run: Path, resuming: bool) -> None:
    check_wandb(config)
    if not resuming and any(checkpoints_folder(run).glob("step-*")):
        raise InputError(f"training.output_dir {run} holds checkpoints; pass --resume auto or choose another folder")
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"training.output_dir {run}: {error.strerror or error}") from error


@contextmanager
def _sigterm_flag() -> Iterator[list[int]]:
    """A list that SIGTERM makes non-empty; the step in progress is finished first.

    Trap: where a rank is lost, the launcher asks the others to end within a second. After an error SIGTERM therefore
    stays without effect, so that they can say which one it was; the launcher kills whoever takes half a minute for it.
    """
    received: list[int] = []

    def remember(number: int, _frame: FrameType | None) -> None:
        received.append(number)

    previous = signal.signal(signal.SIGTERM, remember)
    yield received
    signal.signal(signal.SIGTERM, previous)

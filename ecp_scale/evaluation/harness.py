"""Tasks of EleutherAI's lm-evaluation-harness, read by a stream: a context of any length counts in full.

The harness makes the requests and the metrics; ``lm_eval --model hf`` on the same folder differs where a text is longer
than its windows alone. Needs the extra ``harness``.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_eval import evaluator
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import make_table
from torch import Tensor
from tqdm import tqdm

from ecp_scale.data.tokenizer import Tokenizer
from ecp_scale.errors import InputError
from ecp_scale.evaluation.continuation import pieces_of_text
from ecp_scale.evaluation.generation import Sampling, generate, read
from ecp_scale.evaluation.perplexity import Text, default_protocol, evaluate
from ecp_scale.models.language_model import LanguageModel

SCORES = 1 << 25
"""Scores that exist at a time."""
LONGEST_CONTINUATION = 256
"""Tokens that are made where a task does not say how many."""


def run_tasks(
    model: LanguageModel, tokenizer: Tokenizer, tasks: Sequence[str], batch_size: int, limit: int | None
) -> dict[str, Any] | None:
    """Evaluate a model on tasks; ranks that share it all take part.

    Args:
        model: in evaluation mode.
        tokenizer: of the model.
        tasks: YAML files of tasks, or names of those that the harness brings.
        batch_size: requests that are scored together.
        limit: documents of each task; None takes all.

    Returns:
        What the harness returns; None on all ranks of a host but the first.

    Raises:
        InputError: naming a task that is none.
    """
    files = [str(Path(task).resolve()) for task in tasks if Path(task).is_file()]
    manager = TaskManager(include_defaults=len(files) < len(tasks))
    names = [task for task in tasks if not Path(task).is_file()]
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        raise InputError(f"--tasks {unknown[0]}: neither a file nor a task of the harness")
    try:
        loaded = manager.load([*files, *names])
    except Exception as error:  # A task may be anything, and run code of its own.
        raise InputError(f"--tasks {', '.join(tasks)}: cannot be loaded ({type(error).__name__}: {error})") from error
    in_groups = {task.task_name for group in loaded["groups"].values() for task in group.get_all_tasks()}
    in_groups |= {group.name for group in loaded["groups"].values() for group in group.get_all_groups()}
    wanted = [group for name, group in loaded["groups"].items() if name not in in_groups]
    wanted += [task for name, task in loaded["tasks"].items() if name not in in_groups]
    harness = StreamingModel(model, tokenizer, batch_size)
    try:
        found: dict[str, Any] | None = evaluator.simple_evaluate(
            harness, tasks=wanted, task_manager=manager, limit=limit, log_samples=False, bootstrap_iters=1000
        )
    except InputError:
        raise
    except Exception as error:  # of a task's own code, or of its data
        raise InputError(f"--tasks {', '.join(tasks)}: {type(error).__name__}: {error}") from error
    return found


def table(results: dict[str, Any]) -> str:
    """The harness's own table of results."""
    text: str = make_table(results)
    return text


class StreamingModel(TemplateLM):
    """A language model as the harness asks it."""

    def __init__(self, model: LanguageModel, tokenizer: Tokenizer, batch_size: int = 8) -> None:
        super().__init__()
        self._model = model
        self._tokenizer = tokenizer
        self._batch_size = batch_size
        self._device = next(model.parameters()).device

    @property
    def eot_token_id(self) -> int:
        """What ends a document, and stands before a text that has no context."""
        return self._tokenizer.end_of_document

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
        """Ids of a text; none are added."""
        return self._tokenizer.encode(string)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, each behind the end of a document."""
        protocol = default_protocol(self._model.config)
        found = []
        for request in tqdm(requests, desc="texts", disable=disable_tqdm or None):
            ids = np.array(self._tokenizer.encode(request.args[0]), dtype=np.int64)
            text = Text(ids, bytes=1, words=1)
            found.append(-evaluate(self._model, text, self.eot_token_id, protocol).nll if len(ids) else 0.0)
        return found

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **options: Any
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation of a context, and whether it is the likeliest."""
        found: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        sizes = [len(context) + len(continuation) for _, context, continuation in requests]
        order = sorted(range(len(requests)), key=lambda number: -sizes[number])  # those of like length together
        bar = tqdm(total=len(requests), desc="continuations", disable=disable_tqdm or None)
        together = self._batch_size if self._model.config.geometry.streams else 1
        for first in range(0, len(order), together):
            numbers = [number for number in order[first : first + together] if requests[number][2]]
            # A context of white space has no tokens: its continuation begins a document.
            pairs = [(requests[number][1] or [self.eot_token_id], requests[number][2]) for number in numbers]
            for number, scored in zip(numbers, self._scored(pairs), strict=True):
                found[number] = scored
            bar.update(len(order[first : first + together]))
        bar.close()
        return found

    def _scored(self, pairs: Sequence[tuple[list[int], list[int]]]) -> Iterator[tuple[float, bool]]:
        """Contexts with their continuations, behind each of which stands padding that nothing before it sees."""
        if not pairs:
            return
        width = max(len(context) + len(continuation) for context, continuation in pairs)
        rows = [[*context, *new, *[self.eot_token_id] * (width - len(context) - len(new))] for context, new in pairs]
        first = min(len(context) for context, _ in pairs)
        losses, is_likeliest = self._targets(torch.tensor(rows, device=self._device), first)
        for row, (context, new) in enumerate(pairs):
            part = slice(len(context) - first, len(context) - first + len(new))
            yield -losses[row, part].sum().item(), bool(is_likeliest[row, part].all())

    def _targets(self, ids: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """Losses (B, T) of ids (B, N) from number ``first`` on, in float64, and whether each id is the likeliest."""
        parts = []
        for scores, targets in self._scores(ids, first):
            exact = scores.to(torch.promote_types(scores.dtype, torch.float32))
            losses = torch.nn.functional.cross_entropy(exact.mT, targets, reduction="none")
            parts.append((losses.double(), scores.argmax(-1) == targets))
        losses, is_likeliest = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
        return losses, is_likeliest

    def _scores(self, ids: Tensor, first: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Logits (B, T, V) of some positions after another, with their targets (B, T), from id number ``first`` on."""
        config, length = self._model.config, ids.shape[1]
        n, geometry = config.sequence_length, config.geometry
        if geometry.streams:
            stream, last_unscored = self._model.new_stream(), first - 1
            if last_unscored:
                read(self._model, ids[:, :last_unscored], stream)
            step = max(1, SCORES // (len(ids) * config.known_vocab_size))
            for start in range(last_unscored, length - 1, step):
                stop = min(start + step, length - 1)
                yield self._model.logits(ids[:, start:stop], stream), ids[:, start + 1 : stop + 1]
            return
        # A latent model reads n ids for any text: before a short one stand ends of documents.
        padded = torch.cat((torch.full_like(ids[:, :1], self.eot_token_id).expand(-1, n), ids), dim=1)
        for start in range(first, length, geometry.trained_positions):
            stop = min(start + geometry.trained_positions, length)
            window = padded[:, stop - 1 : n + stop - 1]
            yield self._model.logits(window, last=stop - start), ids[:, start:stop]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What follows each context, up to the first of its stop texts."""
        found = []
        for request in tqdm(requests, desc="generation", disable=disable_tqdm or None):
            context, options = request.args
            until = options.get("until") or []
            stops = [until] if isinstance(until, str) else [text for text in until if text]
            tokens = int(options.get("max_gen_toks") or options.get("max_new_tokens") or LONGEST_CONTINUATION)
            ids = self._tokenizer.encode(context) or [self.eot_token_id]
            made = generate(self._model, ids, tokens, _sampling(options), self.eot_token_id)
            found.append("".join(pieces_of_text(self._tokenizer, ids, made, stops)))
        return found


def _sampling(options: dict[str, Any]) -> Sampling:
    """As transformers read these options: nothing is sampled unless ``do_sample`` says so; None and 0 mean unset."""
    temperature = options.get("temperature") or 0.0
    if not options.get("do_sample", temperature > 0):
        return Sampling(temperature=0)
    return Sampling(
        temperature=temperature or 1.0, top_k=options.get("top_k") or None, top_p=options.get("top_p") or 1.0
    )

"""A trained model in a few lines of Python: text to tokens, logits, continuations, scores.

    from ecp_scale import load_model

    model = load_model("model")
    print(model.generate("Once upon a time"))

One process and no launcher: neither torch.distributed nor DeepSpeed is touched.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ecp_scale.checkpoint.export import ExportedModel
from ecp_scale.config import ModelConfig
from ecp_scale.data.tokenizer import Tokenizer
from ecp_scale.errors import InputError
from ecp_scale.evaluation.comparison import Protocol
from ecp_scale.evaluation.continuation import pieces_of_text
from ecp_scale.evaluation.generation import Sampling, generate
from ecp_scale.evaluation.perplexity import (
    STREAM_CHUNK_TOKENS,
    EvaluationResult,
    Text,
    default_protocol,
    evaluate,
)
from ecp_scale.evaluation.texts import measure_text
from ecp_scale.models.language_model import LanguageModel
from ecp_scale.precision import DTYPES


def load_model(folder: str | Path, *, device: str | None = None, precision: str = "fp32") -> "Model":
    """Load an exported model.

    Args:
        folder: what ``ecp-convert`` has written.
        device: such as "cpu" or "cuda:0"; None takes the GPU if there is one.
        precision: "fp32" or "bf16".

    Raises:
        InputError: if the folder is no exported model, or its weights are damaged.
    """
    if precision not in DTYPES:
        raise InputError(f"precision is {precision!r}, expected one of {', '.join(DTYPES)}")
    exported = ExportedModel.open(folder)
    return Model(exported.load(DTYPES[precision], device), exported.tokenizer)


@dataclass(frozen=True)
class Model:
    """A language model with its tokenizer."""

    network: LanguageModel
    """The torch module, in evaluation mode."""
    tokenizer: Tokenizer

    @property
    def config(self) -> ModelConfig:
        """Architecture and sizes."""
        return self.network.config

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
        return self.tokenizer.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids."""
        return self.tokenizer.decode(list(ids))

    @torch.no_grad()
    def logits(self, text: str | list[int]) -> Tensor:
        """Scores of the token that follows each position: text or ids (n) -> (n, V).

        A latent model scores its last positions alone; compressed_double_attention reads exactly its sequence length.

        Raises:
            InputError: if there are no tokens, unknown ones, or not as many as the architecture reads.
        """
        return self.network.logits(self._ids(text))[0]

    def generate(
        self,
        prompt: str,
        max_new_tokens: int = 128,
        *,
        temperature: float = 0.8,
        top_k: int | None = None,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        stop: Sequence[str] = (),
        seed: int = 1,
        inside_document: bool = False,
    ) -> str:
        """Continue a text of any length.

        Args:
            prompt: at least one token.
            max_new_tokens: how many to add at most; the end of the document ends it before.
            temperature: 0 takes the likeliest token.
            top_k: sample among the k likeliest tokens only.
            top_p: among the likeliest that together have this probability.
            min_p: among those at least so probable beside the likeliest.
            repetition_penalty: above 1 makes tokens that were there less likely.
            stop: texts that end it, and are not part of it.
            seed: of the sampling.
            inside_document: the prompt does not begin a document: no end of the one before is put before it.

        Returns:
            What follows the prompt.

        Raises:
            InputError: if the prompt has no tokens, or a number cannot be sampled with.
        """
        end = self.tokenizer.end_of_document
        ids = self._ids(prompt)[0].tolist()
        ids = ids if inside_document else [end, *ids]
        sampling = Sampling(repetition_penalty, temperature, top_k, top_p, min_p, seed)
        new = generate(self.network, ids, max_new_tokens, sampling, end)
        return "".join(pieces_of_text(self.tokenizer, ids, new, stop))

    def score(self, text: str, protocol: Protocol | None = None) -> EvaluationResult:
        """How well the model predicts a text, as ``ecp-evaluate`` prints it.

        Args:
            text: one document.
            protocol: "stream" or "sliding"; None takes the model's default.

        Raises:
            InputError: if the text is too short, or the architecture cannot follow the protocol.
        """
        measured: Text = measure_text([[text]], self.tokenizer)
        end = self.tokenizer.end_of_document
        return evaluate(self.network, measured, end, protocol or default_protocol(self.config))

    @torch.no_grad()
    def stream(self, pieces: Iterable[str | list[int]]) -> Iterator[Tensor]:
        """Read a long document piece by piece; each piece knows all that came before it.

        Memory is that of the longest piece's losses and, where ``config.geometry.bounded_cache``, of two segments per
        layer; a full transformer remembers everything.

        Args:
            pieces: consecutive ids, or texts, each of which is tokenised by itself; one without tokens has no losses.

        Yields:
            Negative log-likelihoods (t), in nats, of the t tokens of each piece; the very first token of the document
            has none.

        Raises:
            InputError: if the architecture's context is not causal.
        """
        self.config.check_predicts_tokens("pieces have no losses under")
        if not self.config.geometry.streams:
            raise InputError(f"the context of {self.config.architecture} is not causal; use score")
        stream, last = self.network.new_stream(), None
        for piece in pieces:
            ids = self.encode(piece) if isinstance(piece, str) else piece
            losses = [torch.empty(0)]
            for start in range(0, len(ids), STREAM_CHUNK_TOKENS):
                chunk = self._ids(ids[start : start + STREAM_CHUNK_TOKENS])
                logits = self.network.logits(chunk, stream)[0]
                predicted = logits[:-1] if last is None else torch.cat((last, logits[:-1]))
                targets = chunk[0, chunk.shape[1] - len(predicted) :]
                losses.append(cross_entropy(predicted.float(), targets, reduction="none").cpu())
                last = logits[-1:]
            yield torch.cat(losses)

    def _ids(self, text: str | list[int]) -> Tensor:
        ids = self.encode(text) if isinstance(text, str) else text
        if not ids:
            raise InputError(f"{text!r:.60} has no tokens, expected some text")
        entries = self.config.known_vocab_size
        if not 0 <= min(ids) <= max(ids) < entries:
            wrong = next(id for id in ids if not 0 <= id < entries)
            raise InputError(f"token id {wrong}, expected 0 to {entries - 1}, the entries of the vocabulary")
        return torch.from_numpy(np.asarray(ids, dtype=np.int64)).to(next(self.network.parameters()).device)[None]

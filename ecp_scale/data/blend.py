"""Several corpora by weight, as a function of the sample number: nothing is stored, and nothing repeats or is skipped.

The i-th sample of a corpus (see ``mixture``), counted from the beginning of the run over all changes of weights, takes
the i-th window of the corpus's own order. So the state of a run is one integer per corpus, and the sample number tells
it. Samples that the run passes over keep their numbers.
"""

from collections.abc import Iterator, Mapping, Sequence

from ecp_scale.data.corpus import Corpus
from ecp_scale.data.digest import sample_digest
from ecp_scale.data.mixture import VERSION, Mixture
from ecp_scale.data.order import SampleOrder
from ecp_scale.data.passed_over import PassedOver
from ecp_scale.data.shards import Tokens
from ecp_scale.errors import InputError

SKIPPED = "skip_samples"
"""In the history of a run: the ranges that it has passed over, as first and last sample."""


class Blend:
    """The corpora of a run and the phases of their weights."""

    def __init__(
        self,
        phases: Sequence[tuple[int, Mapping[str, float]]],
        sequence_length: int,
        seed: int,
        skip_samples: Mapping[int, int] | None = None,
    ) -> None:
        """Open the corpora.

        Args:
            phases: from how many tokens of the run on, which weight each shard prefix has; the first from 0.
            sequence_length: tokens of a window, n.
            seed: of the orders.
            skip_samples: first and last sample of ranges that are passed over.

        Raises:
            InputError: if a corpus cannot be used, or was made with another tokenizer than the first.
        """
        names = list(dict.fromkeys(name for _, weights in phases for name in weights))
        self.corpora = [Corpus(name, sequence_length) for name in names]
        first = self.corpora[0]
        for corpus in self.corpora[1:]:
            check_same_tokenizer(corpus, first)
        self.sequence_length = sequence_length
        self.from_tokens = [tokens for tokens, _ in phases]
        self.weights = [[weights.get(name, 0.0) for name in names] for _, weights in phases]
        orders = [SampleOrder(corpus.windows, seed, number) for number, corpus in enumerate(self.corpora)]
        self.mixture = Mixture([-(-tokens // sequence_length) for tokens in self.from_tokens], self.weights)
        self._orders = orders
        self.passed_over = PassedOver(skip_samples)

    def samples(self, tokens: int, sequences: int) -> Iterator[int]:
        """Numbers of the ``sequences`` samples that follow ``tokens`` tokens of the run."""
        first = tokens // self.sequence_length
        return map(self.passed_over.sample, range(first, first + sequences))

    def phase(self, sample: int) -> int:
        """Which of the sets of weights a sample is of."""
        return self.mixture.phase(sample)

    def locate(self, sample: int) -> tuple[int, int]:
        """Corpus and window of a sample of the run."""
        corpus, position = self.mixture.locate(sample)
        return corpus, self._orders[corpus].window(position)

    def read(self, corpus: int, window: int) -> Tokens:
        """The n + 1 tokens of a window, as int64."""
        return self.corpora[corpus].window(window)

    def digest(self, sample: int, corpus: int, window: int) -> int:
        """What a sample adds to the data digest of a run, see ``sample_digest``."""
        return sample_digest(sample, corpus, window, self.corpora[corpus].digest)

    def epochs(self, tokens: int) -> Iterator[tuple[Corpus, float]]:
        """How often the first ``tokens`` tokens of the run show each corpus."""
        read = tokens // self.sequence_length
        counts = self.mixture.counts(self.passed_over.reached(read))
        for first, last in self.passed_over.behind(read).items():
            counts = counts - self.mixture.counts(last + 1) + self.mixture.counts(first)
        for corpus, samples in zip(self.corpora, counts, strict=True):
            yield corpus, int(samples) / corpus.windows

    def describe(self, tokens: int) -> str:
        """The corpora, their size, and how often the first ``tokens`` tokens of the run show each."""
        return "; ".join(
            f"{corpus.prefix} ({corpus.tokens:,} tokens, shown {times:.2f} times)"
            for corpus, times in self.epochs(tokens)
        )

    def history(self, tokens: int) -> dict[str, object]:
        """What decided the samples of the first ``tokens`` tokens: weights, corpora that had any, what was skipped."""
        read = tokens // self.sequence_length
        behind = tokens + (self.passed_over.reached(read) - read) * self.sequence_length
        begun = [number for number, start in enumerate(self.from_tokens) if start < max(1, behind)]
        used = 1 + max(i for number in begun for i, weight in enumerate(self.weights[number]) if weight)
        return {
            "corpora_tokens": [corpus.tokens for corpus in self.corpora[:used]],
            "corpora_sha256": [corpus.digest for corpus in self.corpora[:used]],
            "blend": [[self.from_tokens[number], self.weights[number][:used]] for number in begun],
            **({"mixture": VERSION} if used > 1 else {}),
            SKIPPED: [list(pair) for pair in self.passed_over.behind(read).items()],
        }


def check_same_tokenizer(corpus: Corpus, first: Corpus) -> None:
    """Refuse two corpora whose ids mean different things.

    Raises:
        InputError: naming both.
    """
    one, other = corpus.manifest.tokenizer, first.manifest.tokenizer
    if one.sha256 != other.sha256:
        raise InputError(
            f"corpus {corpus.prefix} was made with tokenizer {one.sha256[:12]}..., {first.prefix} with "
            f"{other.sha256[:12]}..."
        )
    if one.end_of_document != other.end_of_document:
        raise InputError(
            f"corpus {corpus.prefix} ends documents with id {one.end_of_document}, {first.prefix} with "
            f"{other.end_of_document}"
        )

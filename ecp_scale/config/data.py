"""What a run reads."""

import re
from dataclasses import dataclass, field


@dataclass(frozen=True)
class DataConfig:
    """Which token shards are read."""

    prefix: str | None = None
    """Prefix of the training shards that ecp-preprocess wrote."""
    blend: dict[int, dict[str, float]] | None = None
    """Several corpora instead of data.prefix: from how many tokens of the run on (the first 0), the weight of each
    shard prefix, as {0: {a: 0.7, b: 0.3}}. A run may add a later entry and go on."""
    validation_prefix: str | None = None
    """Prefix of the validation shards; null trains without validation."""
    validation: dict[str, str] | None = None
    """More validation shards by name, as {books: shards/books}; metrics.jsonl tells them apart by it."""
    loss_ignore_ids: list[int] = field(default_factory=list)
    """Token ids that are read but whose prediction has no loss, such as padding or the end of documents."""

    @property
    def set_aside(self) -> dict[str, str]:
        """Prefixes of all validation shards by name; that of validation_prefix has none."""
        unnamed = {} if self.validation_prefix is None else {"": self.validation_prefix}
        return {**unnamed, **(self.validation or {})}

    @property
    def is_set(self) -> bool:
        """Whether there is data to train on."""
        return self.prefix is not None or self.blend is not None

    @property
    def phases(self) -> list[tuple[int, dict[str, float]]]:
        """Tokens from which on each set of weights holds, in order."""
        if self.blend is not None:
            return sorted(self.blend.items())
        assert self.prefix is not None
        return [(0, {self.prefix: 1.0})]

    def problems(self) -> list[str]:
        """Everything that is wrong with the choice of data."""
        wrong_names = [name for name in self.validation or {} if not re.fullmatch(r"[\w.-]+", name)]
        found = [f"data.validation names {name!r}, expected letters, digits, _, . and -" for name in wrong_names]
        if self.blend is None:
            return found
        found += ["data.prefix and data.blend are both set, expected one of them"] if self.prefix is not None else []
        if min(self.blend, default=1) != 0:
            found.append(f"data.blend begins at {min(self.blend, default=None)} tokens, expected 0")
        for tokens, weights in self.blend.items():
            wrong = {name: weight for name, weight in weights.items() if not 0 <= weight < float("inf")}
            if wrong or not any(weights.values()):
                found.append(f"data.blend from {tokens} tokens: weights {wrong or weights}, expected some above 0")
        return found

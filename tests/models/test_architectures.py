"""Every architecture: its pattern against a dense oracle, its numbers against the built model, leaks, documents."""

import dataclasses

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from ecp_scale.attention import KeyValue
from ecp_scale.config import AttentionConfig, ModelConfig
from ecp_scale.models import architectures
from ecp_scale.models.architectures import WHOLE
from ecp_scale.models.language_model import LanguageModel
from ecp_scale.models.patterns import CausalSegments, CompressingContext, LatentsAndContext, Pattern
from ecp_scale.parallel.context import ParallelContext
from ecp_scale.parallel.groups import Groups
from tests.attention.oracle import dense_attention, random_documents, same_document
from tests.models.settings import (
    ARCHITECTURES,
    BOTH,
    CAUSAL,
    LATENT,
    NAMES,
    PAPER,
    SCALED,
    build,
    random_shape,
    random_tokens,
    variant,
)
from tests.models.visibility import visible

END = 3
MASKED = AttentionConfig(document_mask=True, end_of_document=END)
RESTARTING = dataclasses.replace(MASKED, restart_positions=True)
MASKS = pytest.mark.parametrize("mask", [None, MASKED, RESTARTING], ids=["whole", "documents", "restarting"])
EVERY = pytest.mark.parametrize("architecture", ARCHITECTURES)


def tokens_with_documents(config: ModelConfig, batch: int, seed: int) -> Tensor:
    """Token ids (batch, n) among which a fifth ends a document."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, config.sequence_length)
    ids = torch.randint(config.known_vocab_size, shape, generator=generator)
    return torch.where(torch.rand(shape, generator=generator) < 0.2, END, ids)


def another(token: Tensor, config: ModelConfig) -> Tensor:
    """Another token; one that ends a document stays one, and no other becomes one."""
    changed = (token + 1) % config.known_vocab_size
    changed = torch.where(changed == END, (END + 1) % config.known_vocab_size, changed)
    return torch.where(token == END, token, changed)


@EVERY
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("masked", [False, True])
def test_first_layer_equals_the_dense_oracle(architecture: str, seed: int, masked: bool, groups: Groups) -> None:
    config = variant(SCALED, architecture, **random_shape(architecture, seed))
    n = config.sequence_length
    pattern: Pattern = architectures.ARCHITECTURES[architecture](
        config, 0, ParallelContext(groups.tensor, torch.float64)
    )
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(2, 4, pattern.query_rows(n), 6, dtype=torch.float64, generator=generator)
    k, v = torch.randn(2, 2, 2, n, 6, dtype=torch.float64, generator=generator)
    documents = random_documents(2, n, seed) if masked else None
    mask = visible(config, n)
    if documents is not None:
        mask = mask & same_document(documents)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    expected = dense_attention(*inputs, mask[..., n - q.shape[2] :, :])
    if isinstance(pattern, CompressingContext):
        pattern.requires_grad_(False)
        context = n - config.geometry.latents
        torch.nn.init.normal_(pattern.compression.weight, generator=generator)
        torch.nn.init.normal_(pattern.compression.bias, generator=generator)
        rows = expected[:, :, :context]
        if documents is not None:
            rows = rows * (documents[:, :context] == documents[:, context - 1, None])[:, None, :, None]
        compressed = torch.einsum("cn,bhne->bhce", pattern.compression.weight, rows)
        compressed = compressed + pattern.compression.bias[:, None]
        expected = torch.cat((compressed, expected[:, :, context:]), dim=2)
    got = pattern.attend(q, KeyValue(k, v, documents), 0.0)
    assert_close(got, expected, rtol=1e-12, atol=1e-12)
    weights = torch.randn(got.shape, dtype=got.dtype, generator=generator)
    gradients = (torch.autograd.grad((out * weights).sum(), inputs) for out in (got, expected))
    for ours, wanted in zip(*gradients, strict=True):
        assert_close(ours, wanted, rtol=1e-11, atol=1e-11)


@torch.no_grad()
def leaks(model: LanguageModel, tokens: Tensor) -> list[int]:
    """Positions whose token, when changed, changes a logit before it; trained positions only."""
    before = model.logits(tokens)
    first_trained = tokens.shape[1] - before.shape[1]
    found = []
    for t in range(tokens.shape[1]):
        changed = tokens.clone()
        changed[:, t] = (changed[:, t] + 1) % model.config.known_vocab_size
        after = model.logits(changed)
        if not torch.equal(after[:, : max(0, t - first_trained)], before[:, : max(0, t - first_trained)]):
            found.append(t)
        if t >= first_trained:
            assert not torch.equal(after[:, t - first_trained], before[:, t - first_trained])
    return found


@EVERY
@MASKS
@pytest.mark.parametrize("seed", range(3))
def test_a_later_token_changes_nothing_before_it_to_the_bit(
    architecture: str, mask: AttentionConfig | None, seed: int, groups: Groups
) -> None:
    settings = (SCALED, PAPER)[seed % 2]
    config = variant(settings, architecture, **random_shape(architecture, seed))
    assert leaks(build(config, groups, attention=mask), tokens_with_documents(config, 2, seed)) == []


class WrappedGroups(CausalSegments):
    """longlora as it is often written: the shifted heads rolled by half a group, under a plain causal mask."""

    def __init__(self, group_length: int) -> None:
        super().__init__(WHOLE)
        self.group_length = group_length

    def attend(self, q: Tensor, key_value: KeyValue, dropout: float) -> Tensor:
        n, half = q.shape[2], self.group_length // 2
        groups = torch.arange(n) // self.group_length
        mask = (groups[:, None] == groups[None, :]).tril()
        q, k, v = (torch.cat((x[:, :1], x[:, 1:].roll(-half, 2)), dim=1) for x in (q, *key_value[:2]))
        out = dense_attention(q, k, v, mask)
        return torch.cat((out[:, :1], out[:, 1:].roll(half, 2)), dim=1)


def test_the_leak_test_finds_the_wrapped_group(groups: Groups, monkeypatch: pytest.MonkeyPatch) -> None:
    config = variant(SCALED, "longlora", heads=2, width=12, layers=1, sequence_length=16, group_length=8)
    tokens = random_tokens(config, 16)
    assert leaks(build(config, groups), tokens) == []
    monkeypatch.setitem(architectures.ARCHITECTURES, "longlora", lambda config, layer, parallel: WrappedGroups(8))
    # The end of the sequence, positions 12 to 15, shares a group with its start and comes first there.
    assert leaks(build(config, groups), tokens) == [12, 13, 14, 15]


@EVERY
@pytest.mark.parametrize("mask", [MASKED, RESTARTING], ids=["documents", "restarting"])
@torch.no_grad()
def test_a_document_changes_no_logit_of_another_to_the_bit(
    architecture: str, mask: AttentionConfig, groups: Groups
) -> None:
    compared = 0
    for seed, settings in enumerate((SCALED, PAPER) * 3):
        config = variant(settings, architecture, **random_shape(architecture, seed))
        model = build(config, groups, attention=mask)
        tokens = tokens_with_documents(config, 1, seed)
        before = model.logits(tokens)
        documents = (tokens == END).long().cumsum(1) - (tokens == END).long()
        trained = documents[:, -before.shape[1] :]
        for document in documents.unique():
            own = documents == document
            after = model.logits(torch.where(own, another(tokens, config), tokens))
            others = trained != document
            assert torch.equal(after[others], before[others])
            compared += int(others.sum())
            free = (trained == document) & (tokens[:, -before.shape[1] :] != END)
            assert all(not torch.equal(x, y) for x, y in zip(after[free], before[free], strict=True))
    assert compared > 20


@pytest.mark.parametrize("architecture", CAUSAL)
@MASKS
def test_token_by_token_and_in_chunks_equal_the_full_forward(
    architecture: str, mask: AttentionConfig | None, groups: Groups
) -> None:
    for seed, settings in enumerate((SCALED, PAPER)):
        config = variant(settings, architecture, **random_shape(architecture, seed))
        model = build(config, groups, attention=mask)
        tokens = tokens_with_documents(dataclasses.replace(config, sequence_length=40), 2, seed)
        whole = model.logits(tokens)
        for length in (1, 7):
            stream = model.new_stream()
            parts = [model.logits(chunk, stream) for chunk in tokens.split(length, dim=1)]
            assert_close(torch.cat(parts, dim=1), whole, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("architecture", ["transformer", "sliding_window"])
def test_with_restarted_positions_a_document_is_as_if_it_were_alone(architecture: str, groups: Groups) -> None:
    # Not so for ecp and longlora, whose segments lie elsewhere in a document that begins elsewhere.
    config = variant(PAPER, architecture, sequence_length=30)
    model = build(config, groups, attention=RESTARTING)
    tokens = tokens_with_documents(config, 1, seed=4)
    whole, start = model.logits(tokens), 0
    ends = (tokens[0] == END).nonzero().flatten().tolist()
    assert len(ends) >= 3
    for end in ends:
        assert_close(model.logits(tokens[:, start : end + 1]), whole[:, start : end + 1], rtol=1e-10, atol=1e-10)
        start = end + 1


@pytest.mark.parametrize("architecture", LATENT)
def test_latent_models_do_not_stream(architecture: str, groups: Groups) -> None:
    with pytest.raises(NotImplementedError, match="does not stream"):
        build(variant(PAPER, architecture), groups).new_stream()


def test_perceiver_ar_without_context_is_a_transformer_with_tied_keys_and_values(groups: Groups) -> None:
    n = PAPER.sequence_length
    perceiver = variant(PAPER, "perceiver_ar", latents=n)
    transformer = variant(PAPER, "transformer", key_value_norm=True)
    assert perceiver.parameters == transformer.parameters
    tokens = random_tokens(PAPER, n)
    expected = build(transformer, groups).logits(tokens)
    assert_close(build(perceiver, groups).logits(tokens), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("architecture", ["ecp", "sliding_window", "longlora"])
@pytest.mark.parametrize("settings", BOTH, ids=NAMES)
@pytest.mark.parametrize("layers", [1, 2, 4])
def test_gradient_reaches_as_far_as_the_config_says(
    architecture: str, settings: ModelConfig, layers: int, groups: Groups
) -> None:
    sizes = {"sequence_length": 64, "segment_length": 8, "window": 7, "group_length": 12, "layers": layers}
    config = variant(settings, architecture, **sizes)
    model = build(config, groups)
    embedded: list[Tensor] = []
    model.embedding.register_forward_hook(lambda _m, _i, out: embedded.append(out) or out.retain_grad())
    logits = model.logits(random_tokens(config, 64, batch=1))
    reached = []
    for last in range(64):
        embedded[0].grad = None
        logits[0, last].square().sum().backward(retain_graph=True)
        gradient = embedded[0].grad
        assert gradient is not None
        touched = gradient[:, 0].abs().sum(-1).nonzero().flatten()
        assert touched.max().item() == last
        reached.append(last - touched.min().item() + 1)
    assert max(reached) == config.receptive_field_tokens < 64


@EVERY
def test_score_pairs_of_every_layer_are_those_that_its_pattern_shows(architecture: str, groups: Groups) -> None:
    for seed in range(5):
        config = variant(SCALED, architecture, key_value_heads=4, **random_shape(architecture, seed))
        for layer in range(config.layers):
            pattern = architectures.ARCHITECTURES[architecture](config, layer, ParallelContext(groups.tensor))
            keys, queries = config.geometry.key_rows(layer), config.geometry.query_rows(layer)
            assert pattern.query_rows(keys) == queries
            # Equal scores and one-hot values: what comes out of a query is not 0 where it sees.
            values = torch.eye(keys).expand(1, 4, keys, keys)
            attend = LatentsAndContext.attend if isinstance(pattern, CompressingContext) else type(pattern).attend
            seen = attend(pattern, torch.zeros(1, 4, queries, keys), KeyValue(torch.zeros_like(values), values), 0.0)
            assert config.geometry.score_pairs(layer) == seen.count_nonzero().item() / 4, (seed, layer)
        built = build(config, groups)
        assert built.logits(random_tokens(config, config.sequence_length)).shape[1] == config.geometry.trained_positions


@pytest.mark.parametrize("architecture", ["perceiver_ar", "double_attention", "split_attention"])
def test_latent_models_read_sequences_of_other_lengths(architecture: str, groups: Groups) -> None:
    config = variant(PAPER, architecture)
    model = build(config, groups)
    latents = config.geometry.latents
    for length in (1, latents, latents + 5, 2 * config.sequence_length):
        assert model.logits(random_tokens(config, length)).shape[1] == min(length, latents)


def test_a_compression_reads_what_it_was_trained_for(groups: Groups) -> None:
    config = variant(PAPER, "compressed_double_attention")
    with pytest.raises(ValueError, match="reads 32 positions, found 31"):
        build(config, groups).logits(random_tokens(config, 31))


def test_the_aligned_residual_averages_the_context_and_keeps_the_latents(groups: Groups) -> None:
    sizes = {"sequence_length": 10, "latents": 4, "compressed_context": 3}
    model = build(variant(PAPER, "compressed_double_attention", segment_length=2, **sizes), groups)
    pattern = model.layers[0].attention.pattern
    positions = model._positions(random_tokens(model.config, 10), None)
    x = torch.randn(10, 2, 4, dtype=torch.float64)
    expected = torch.cat((x[:6].unflatten(0, (3, 2)).mean(1), x[6:]))
    assert_close(pattern.residual(x, positions), expected)
    documents = torch.tensor([[0, 1, 1, 2, 2, 2, 2, 2, 3, 3]]).expand(2, -1)
    masked = pattern.residual(x, positions._replace(documents=documents))
    assert_close(masked[:3], torch.stack((torch.zeros_like(x[0]), x[3], x[4:6].mean(0))))
    after = pattern.output_positions(positions._replace(documents=documents))
    assert after.documents is not None
    assert after.documents[0].tolist() == [2, 2, 2, 2, 2, 3, 3]
    assert_close(after.rotation.cos, positions.rotation.cos[[1, 3, 5, 6, 7, 8, 9]])

"""The language model: causality, receptive field, streaming, counts, padding, initialisation."""

import dataclasses
from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from ecp_scale.attention import KeyValue, latent, sdpa, segment
from ecp_scale.config import ModelConfig
from ecp_scale.models import patterns, pointwise
from ecp_scale.models.language_model import LanguageModel
from ecp_scale.parallel.groups import Groups
from tests.models.settings import ARCHITECTURES, BOTH, NAMES, PAPER, SCALED, build, random_tokens, variant


@pytest.fixture(params=BOTH, ids=NAMES)
def config(request: pytest.FixtureRequest) -> ModelConfig:
    return request.param


def test_token_by_token_equals_the_full_forward_at_every_position(config: ModelConfig, groups: Groups) -> None:
    model = build(config, groups)
    tokens = random_tokens(config, 2 * config.sequence_length + 3)
    whole = model.logits(tokens)
    stream = model.new_stream()
    for position in range(tokens.shape[1]):
        step = model.logits(tokens[:, position : position + 1], stream)
        assert_close(step[:, 0], whole[:, position], rtol=1e-10, atol=1e-10)
        assert all(cache.positions <= 2 * config.segment_length for caches in stream.caches for cache in caches)


def test_streaming_in_chunks_equals_the_full_forward(config: ModelConfig, groups: Groups) -> None:
    model = build(config, groups)
    tokens = random_tokens(config, 75)
    stream = model.new_stream()
    parts = [model.logits(tokens[:, a:b], stream) for a, b in ((0, 24), (24, 25), (25, 64), (64, 75))]
    assert_close(torch.cat(parts, dim=1), model.logits(tokens), rtol=1e-10, atol=1e-10)


def test_the_last_logits_are_those_of_all(config: ModelConfig, groups: Groups) -> None:
    model = build(config, groups)
    tokens = random_tokens(config, 20)
    assert_close(model.logits(tokens, last=3), model.logits(tokens)[:, -3:], rtol=1e-12, atol=1e-12)


def test_compiled_pointwise_operations_compute_the_same(groups: Groups) -> None:
    config = dataclasses.replace(SCALED, layers=1, allow_short_receptive_field=True)
    plain = build(config, groups, torch.float32)
    parallel = dataclasses.replace(plain.parallel, compiled=True)
    compiled = LanguageModel(config, parallel).to(groups.device)
    compiled.load_state_dict(plain.state_dict())
    tokens = random_tokens(config, config.sequence_length + 1)
    gradients = []
    for model in (plain, compiled):
        total, losses = model.eval()(tokens[:, :-1], tokens[:, 1:])
        total.backward()
        gradients.append([losses, *(parameter.grad for parameter in model.parameters())])
    for found, expected in zip(*gradients, strict=True):
        assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_compiled_operations_are_not_compiled_again_for_other_lengths(
    groups: Groups, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One graph of the first length, and one of any; alike in training, validation and streams."""
    monkeypatch.setattr(pointwise, "_compiled", cache(lambda function: torch.compile(function, backend="aot_eager")))
    plain = build(SCALED, groups, torch.float32)
    model = LanguageModel(SCALED, dataclasses.replace(plain.parallel, compiled=True))
    model.load_state_dict(plain.state_dict())
    stats = torch._dynamo.utils.counters["stats"]

    def graphs(lengths: tuple[int, ...], run: Callable[[Tensor], object]) -> list[int]:
        found = []
        for length in lengths:
            before = stats["unique_graphs"]
            run(random_tokens(SCALED, length + 1))
            found.append(stats["unique_graphs"] - before)
        return found

    first, second, *others = graphs(
        (64, 48, 50, 33, 17, 40, 61), lambda ids: model(ids[:, :-1], ids[:, 1:])[0].backward()
    )
    assert first > 0
    assert second <= first
    assert not any(others)
    model.eval()
    stream = model.new_stream()
    with torch.no_grad():
        assert not any(graphs((64, 47, 50, 33), model.logits)[1:])
        # A single token is a graph of its own.
        assert not any(graphs((0, 17, 0, 5, 0, 30), lambda ids: model.logits(ids, stream))[2:])


def test_the_hidden_layer_of_the_feed_forward_network_is_not_kept(config: ModelConfig, groups: Groups) -> None:
    config = dataclasses.replace(config, dropout=0.0)
    model = build(config, groups).train()
    rows, width = 2 * config.sequence_length, config.feed_forward_width
    kept = 0

    def count(x: Tensor) -> Tensor:
        nonlocal kept
        kept += x.numel() == rows * width
        return x

    tokens = random_tokens(config, config.sequence_length + 1)
    with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
        model(tokens[:, :-1], tokens[:, 1:])
    inputs = 2 if config.activation == "swiglu" else 1  # what it is computed from
    assert kept == inputs * config.layers


@torch.no_grad()
def test_a_later_token_changes_nothing_before_it_to_the_bit(config: ModelConfig, groups: Groups) -> None:
    for dtype in (torch.float32, torch.float64):
        model = build(config, groups, dtype)
        tokens = random_tokens(config, config.sequence_length + 5)
        before = model.logits(tokens)
        for t in range(tokens.shape[1]):
            changed = tokens.clone()
            changed[:, t] = (changed[:, t] + 1) % config.known_vocab_size
            after = model.logits(changed)
            assert torch.equal(after[:, :t], before[:, :t])
            assert not torch.equal(after[:, t], before[:, t])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_counts_of_the_config_equal_the_built_model(config: ModelConfig, architecture: str, groups: Groups) -> None:
    config = variant(config, architecture)
    model = build(config, groups)
    padding = config.padded_vocab_size(1) - config.known_vocab_size
    assert padding > 0
    built = sum(parameter.numel() for parameter in model.parameters())
    stored_padding = padding * (2 * config.width + (1 if config.bias else 0))
    assert config.parameters == built - stored_padding


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_flops_of_the_config_equal_those_counted_by_torch(
    config: ModelConfig, architecture: str, groups: Groups, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Attention is counted apart: the dispatcher counts whole rectangles, the config the visible pairs.
    def seen(q: Tensor, key_value: KeyValue, **_: object) -> Tensor:
        return q + 0 * (key_value.keys.sum() + key_value.values.sum())

    for module in (segment, latent, patterns, sdpa):
        monkeypatch.setattr(module, "attend", seen)
    monkeypatch.setattr(segment, "flash_attention", lambda q, k, v, *_: seen(q, KeyValue(k, v)))
    config = variant(config, architecture, vocab_multiple=1)
    model = build(config, groups)
    tokens = random_tokens(config, config.sequence_length + 1, batch=1)
    with FlopCounterMode(display=False) as counter:
        model(tokens[:, :-1], tokens[:, 1:])[0].backward()
    attention = 3 * 4 * config.width * config.score_pairs
    assert counter.get_total_flops() == config.flops_per_token * config.sequence_length - attention


@torch.no_grad()
def test_vocabulary_padding_never_shows(config: ModelConfig, groups: Groups) -> None:
    tokens = random_tokens(config, 17)
    results = []
    for multiple in (1, 29 * 3):
        model = build(dataclasses.replace(config, vocab_multiple=multiple), groups)
        logits = model.logits(tokens[:, :-1])
        assert logits.shape[-1] == config.known_vocab_size
        _, losses = model(tokens[:, :-1], tokens[:, 1:])
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        assert_close(losses.flatten(), expected, rtol=1e-5, atol=1e-6)
        results.append((logits, losses))
    assert_close(results[0][0], results[1][0])
    assert_close(results[0][1], results[1][1])


def test_padding_rows_get_no_gradient(config: ModelConfig, groups: Groups) -> None:
    model = build(config, groups)
    tokens = random_tokens(config, 17)
    model(tokens[:, :-1], tokens[:, 1:])[0].backward()
    for parameter in (model.embedding.weight, *model.output.parameters()):
        assert parameter.grad[config.known_vocab_size :].abs().sum() == 0
        assert parameter.grad[: config.known_vocab_size].abs().sum() > 0


def test_pytorch_initialisation_has_the_spread_of_pytorchs_layers(groups: Groups) -> None:
    wide = dataclasses.replace(PAPER, width=192, vocab_size=500)
    model = build(wide, groups)
    reference = torch.nn.Linear(192, 500)
    assert_close(model.output.weight[:500].std(), reference.weight.std().double(), rtol=0.02, atol=0)
    assert model.output.weight.abs().max() <= 192**-0.5
    assert model.output.bias[:500].abs().max() <= 192**-0.5
    assert_close(model.embedding.weight[:500].std().item(), 1.0, rtol=0.02, atol=0)


def test_scaled_initialisation_shrinks_the_ends_of_branches_with_depth(groups: Groups) -> None:
    for layers in (2, 8):
        model = build(dataclasses.replace(SCALED, layers=layers, width=96, feed_forward_width=192), groups)
        block = model.layers[0]
        expected = 0.02 / (2 * layers) ** 0.5
        for weight, std in (
            (block.feed_forward.up.weight, 0.02),
            (block.feed_forward.down.weight, expected),
            (block.attention.output.weight, expected),
            (block.attention.query.weight, 0.02),
        ):
            assert_close(weight.std().item(), std, rtol=0.05, atol=0)


def test_dropout_is_on_in_training_alone(groups: Groups) -> None:
    from ecp_scale.parallel.random import seed_step

    model = build(PAPER, groups)
    tokens = random_tokens(PAPER, 33)
    arguments = (tokens[:, :-1], tokens[:, 1:])
    still = model(*arguments)[0]
    model.train()
    draws = []
    for step in (1, 1, 2):
        seed_step(seed=3, step=step, groups=groups)
        draws.append(model(*arguments)[0])
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0], still)

"""The modelling file for Hugging Face computes what ours computes."""

import itertools

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

from ecp_scale.config import ModelConfig
from ecp_scale.hub.configuration_ecp import EcpConfig
from ecp_scale.parallel.groups import Groups
from tests.hub.pairs import DOCUMENTS, pair, randomized
from tests.models.settings import ARCHITECTURES, BOTH, CAUSAL, LATENT, NAMES, random_tokens, variant

pytest.importorskip("transformers")
EXACT = {"rtol": 0.0, "atol": 1e-11}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("config", BOTH, ids=NAMES)
@pytest.mark.parametrize("documents", DOCUMENTS)
def test_logits_and_gradients_are_ours(architecture: str, config: ModelConfig, documents: str, groups: Groups) -> None:
    config = variant(config, architecture)
    ours, theirs = pair(config, groups, DOCUMENTS[documents])
    randomized(ours, theirs)
    lengths = [32] if architecture in LATENT else [1, 7, 8, 9, 24, 25, 32]
    if architecture in LATENT and architecture != "compressed_double_attention":
        lengths = [17, 32]
    for length in lengths:
        tokens = random_tokens(config, length) % 9
        found = theirs(tokens, attention_mask=torch.ones_like(tokens)).logits
        assert_close(found, ours.logits(tokens), **EXACT)
        assert_close(theirs(tokens, logits_to_keep=torch.tensor([0, -1])).logits, found[:, [0, -1]], **EXACT)
        if length == 1:
            continue
        theirs.zero_grad()
        ours.zero_grad()
        loss = theirs(tokens, labels=tokens).loss
        predicted = ours.logits(tokens)[:, :-1]
        expected = cross_entropy(predicted.flatten(0, 1), tokens[:, -predicted.shape[1] :].flatten())
        assert_close(loss, expected.float(), rtol=1e-6, atol=1e-6)  # transformers take it in float32
        weights = torch.randn_like(found)
        (found * weights).sum().backward()
        (ours.logits(tokens) * weights).sum().backward()
        mine = dict(ours.named_parameters())
        for name, parameter in theirs.named_parameters():
            gradient = mine[name].grad
            expected = torch.zeros_like(parameter) if gradient is None else gradient[: len(parameter)]
            got = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            assert_close(got, expected, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("architecture", CAUSAL)
@pytest.mark.parametrize("config", BOTH, ids=NAMES)
@pytest.mark.parametrize("documents", DOCUMENTS)
@torch.no_grad()
def test_padding_and_the_cache_change_nothing(
    architecture: str, config: ModelConfig, documents: str, groups: Groups
) -> None:
    config = variant(config, architecture)
    ours, theirs = pair(config, groups, DOCUMENTS[documents])
    randomized(ours, theirs)
    tokens = random_tokens(config, 30) % 9
    expected = ours.logits(tokens)
    # The first row is padded on the left, the second on the right; the padding is the end of documents.
    mask = torch.tensor([[0] * 5 + [1] * 30, [1] * 30 + [0] * 5])
    padded = torch.full((2, 35), 3)
    padded[mask.bool()] = tokens.flatten()
    assert_close(theirs(padded, attention_mask=mask).logits[mask.bool()], expected.flatten(0, 1), **EXACT)
    # In chunks, the first of which is padded.
    cache, logits, start = None, [], 0
    for count in itertools.cycle((9, 1, 1, 11, 2)):
        if start >= 35:
            break
        part = slice(start, start + count)
        out = theirs(padded[:, part], attention_mask=mask[:, : part.stop], past_key_values=cache, use_cache=True)
        cache, start = out.past_key_values, part.stop
        logits.append(out.logits)
    assert_close(torch.cat(logits, 1)[mask.bool()], expected.flatten(0, 1), **EXACT)


@pytest.mark.parametrize("architecture", ["ecp", "sliding_window", "longlora"])
@torch.no_grad()
def test_the_cache_does_not_grow(architecture: str, groups: Groups) -> None:
    config = variant(BOTH[1], architecture)
    _, theirs = pair(config, groups, DOCUMENTS["documents"])
    sizes = []
    cache = None
    for _ in range(4):
        cache = theirs(random_tokens(config, 40), past_key_values=cache).past_key_values
        assert cache is not None
        tensors = [*cache.tensors.values(), *(x for layer in cache.layers for x in (layer.keys, layer.values))]
        sizes.append(sum(tensor.untyped_storage().nbytes() for tensor in tensors))
    assert len(set(sizes)) == 1
    held = {"ecp": 16, "sliding_window": 12, "longlora": 24}[architecture]
    assert cache is not None
    assert cache.layers[0].keys.shape == (2, 2, held, 6)
    assert cache.get_seq_length() == 160


def test_what_would_be_read_wrongly_is_refused(groups: Groups) -> None:
    with pytest.raises(ValueError, match="tie_word_embeddings is true"):
        EcpConfig(tie_word_embeddings=True)
    _, ecp = pair(variant(BOTH[1], "ecp"), groups, DOCUMENTS["documents"])
    tokens = random_tokens(BOTH[1], 8)
    for message, arguments in (
        ("positions follow from attention_mask", {"input_ids": tokens, "position_ids": tokens}),
        ("either input_ids or inputs_embeds", {}),
        ("do not tell documents apart", {"inputs_embeds": torch.zeros(2, 8, 24)}),
        ("has 4 dimensions", {"input_ids": tokens, "attention_mask": torch.ones(2, 1, 8, 8)}),
        ("at least one token", {"input_ids": tokens[:, :0]}),
        ("past_key_values is a list", {"input_ids": tokens, "past_key_values": []}),
    ):
        with pytest.raises(ValueError, match=message):
            ecp(**arguments)
    _, latent = pair(variant(BOTH[1], "double_attention"), groups)
    with pytest.raises(ValueError, match="cannot be padded"):
        latent(tokens, attention_mask=torch.zeros(2, 8))
    _, compressed = pair(variant(BOTH[1], "compressed_double_attention"), groups)
    with pytest.raises(ValueError, match="reads exactly 32 tokens, found 8"):
        compressed(tokens)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_hidden_states_and_tuples_are_returned_where_they_are_asked_for(architecture: str, groups: Groups) -> None:
    config = variant(BOTH[1], architecture)
    _, theirs = pair(config, groups)
    tokens = random_tokens(config, 32)
    plain = theirs(tokens)
    assert plain.hidden_states is None
    full = theirs(tokens, output_hidden_states=True)
    assert len(full.hidden_states) == config.layers + 1
    assert_close(full.hidden_states[0], theirs.embedding(tokens))
    assert_close(theirs.output(full.hidden_states[-1]), plain.logits, **EXACT)
    logits, *_ = theirs(tokens, return_dict=False)
    assert_close(logits, plain.logits, **EXACT)
    if architecture in CAUSAL:
        mask = torch.ones_like(tokens)
        mask[0, :5] = 0
        padded = theirs(tokens, attention_mask=mask, output_hidden_states=True)
        assert_close(theirs.output(padded.hidden_states[-1]), padded.logits, **EXACT)
        assert_close(padded.hidden_states[0], theirs.embedding(tokens))
    with pytest.raises(ValueError, match="attention weights are never formed"):
        theirs(tokens, output_attentions=True)


def test_a_step_of_decoding_is_compiled_once(groups: Groups) -> None:
    from torch._dynamo.testing import CompileCounter

    config = variant(BOTH[0], "ecp")
    _, theirs = pair(config, groups, DOCUMENTS["restarted"])
    counter = CompileCounter()
    step = torch.compile(theirs, backend=counter)
    with torch.no_grad():
        out = theirs(random_tokens(config, 12))
        for _ in range(40):
            out = step(out.logits[:, -1:].argmax(-1), past_key_values=out.past_key_values, use_cache=True)
    assert counter.frame_count == 1


def test_dropout_and_recomputation_train(groups: Groups) -> None:
    config = variant(BOTH[0], "ecp", dropout=0.5)
    _, theirs = pair(config, groups)
    theirs.train()
    tokens = random_tokens(config, 32)
    losses = []
    for recompute in (False, True):
        if recompute:
            theirs.gradient_checkpointing_enable()
        theirs.zero_grad()
        torch.manual_seed(3)
        out = theirs(tokens, labels=tokens)
        out.loss.backward()
        assert out.past_key_values is None
        losses.append((out.loss.item(), theirs.embedding.weight.grad.clone()))
    assert losses[0][0] == losses[1][0]
    assert_close(losses[0][1], losses[1][1])
    assert losses[0][0] != theirs.eval()(tokens, labels=tokens).loss.item()


def test_adapters_of_peft_train_and_merge(groups: Groups) -> None:
    peft = pytest.importorskip("peft")
    config = BOTH[1]
    _, theirs = pair(config, groups)
    tokens = random_tokens(config, 40) % 3
    adapted = peft.get_peft_model(
        theirs, peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=4, init_lora_weights=True)
    )
    before = {name: parameter.clone() for name, parameter in theirs.named_parameters() if "lora" not in name}
    optimizer = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], lr=3e-2)
    losses = []
    for _ in range(20):
        loss = adapted(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]
    assert all(torch.equal(dict(theirs.named_parameters())[name], value) for name, value in before.items())
    expected = adapted(tokens).logits
    generated = adapted.generate(input_ids=tokens[:, :9], max_new_tokens=5, do_sample=False)
    merged = adapted.merge_and_unload()
    assert_close(merged(tokens).logits, expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(merged.generate(tokens[:, :9], max_new_tokens=5, do_sample=False), generated)

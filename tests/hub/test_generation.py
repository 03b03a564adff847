"""``generate()`` of Hugging Face's transformers."""

import pytest
import torch

from ecp_scale.config import ModelConfig
from ecp_scale.evaluation.generation import Sampling, generate
from ecp_scale.parallel.groups import Groups
from tests.hub.pairs import DOCUMENTS, pair, randomized
from tests.models.settings import BOTH, CAUSAL, random_tokens, variant

pytest.importorskip("transformers")
PLAIN = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.mark.parametrize("architecture", CAUSAL)
@pytest.mark.parametrize("config", BOTH, ids=["paper", "scaled"])
def test_a_batch_of_unequal_prompts_goes_on_as_each_does_alone(
    architecture: str, config: ModelConfig, groups: Groups
) -> None:
    config = variant(config, architecture)
    ours, theirs = pair(config, groups, DOCUMENTS["documents"])
    randomized(ours, theirs)
    prompts = [random_tokens(config, length, 1)[0].tolist() for length in (5, 17, 1, 30)]
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    found = theirs.generate(ids, attention_mask=mask, max_new_tokens=40, **PLAIN)
    assert found[:, longest:].tolist() == [
        list(generate(ours, prompt, 40, Sampling(temperature=0))) for prompt in prompts
    ]
    # Beams move the sequences of the cache around; without one nothing is remembered.
    beams = [
        theirs.generate(ids, attention_mask=mask, max_new_tokens=12, num_beams=3, use_cache=cached, **PLAIN)
        for cached in (True, False)
    ]
    assert torch.equal(*beams)


def test_a_conversation_goes_on_with_its_cache(groups: Groups) -> None:
    config = variant(BOTH[0], "ecp")
    ours, theirs = pair(config, groups)
    randomized(ours, theirs)
    first = theirs.generate(random_tokens(config, 6, 1), max_new_tokens=9, return_dict_in_generate=True, **PLAIN)
    ids = torch.cat((first.sequences, random_tokens(config, 4, 1)), dim=1)
    mask = torch.ones_like(ids)
    again = theirs.generate(ids, attention_mask=mask, max_new_tokens=9, **PLAIN)
    cache = first.past_key_values
    assert torch.equal(
        again, theirs.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=9, **PLAIN)
    )


def test_several_samples_of_a_prompt_differ(groups: Groups) -> None:
    config = variant(BOTH[1], "ecp")
    _, theirs = pair(config, groups)
    torch.manual_seed(1)
    arguments = {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 20, "pad_token_id": 0}
    found = theirs.generate(random_tokens(config, 6, 1), eos_token_id=None, **arguments)
    assert len({tuple(row) for row in found.tolist()}) == 3


def test_what_cannot_be_generated_is_refused_with_the_reason(groups: Groups) -> None:
    _, ecp = pair(variant(BOTH[1], "ecp"), groups)
    tokens = random_tokens(BOTH[1], 8)
    with pytest.raises(ValueError, match="not supported with stateful models"):
        ecp.generate(tokens, prompt_lookup_num_tokens=3, max_new_tokens=4, pad_token_id=0)
    _, latent = pair(variant(BOTH[1], "perceiver_ar"), groups)
    with pytest.raises(ValueError, match=r"context, and that of perceiver_ar is not.*launch/generate\.py"):
        latent.generate(tokens, max_new_tokens=4, pad_token_id=0)
    cache = ecp(tokens).past_key_values
    with pytest.raises(NotImplementedError, match="cannot go back"):
        cache.crop(1)

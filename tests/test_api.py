"""The way in for Python: what load_model gives equals what the programs and the network itself compute."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.testing import assert_close
from torch.utils.data import DataLoader

import ecp_scale
from ecp_scale import InputError, LanguageModel, Model, ParallelContext, TokenDataset, load_model
from ecp_scale.checkpoint.export import export
from ecp_scale.checkpoint.folder import find_checkpoint
from ecp_scale.data.corpus import Corpus
from ecp_scale.evaluation.perplexity import evaluate
from ecp_scale.evaluation.texts import read_text
from ecp_scale.models.initialization import initialize
from tests.corpus import ShardedText
from tests.launching import environment
from tests.models.settings import SCALED
from tests.parallel.layouts import Layout, trained

TEXT = "def main() -> None:\n    parser = ArgumentParser()\n    return parser.parse_args(names)\n" * 3


@pytest.fixture(scope="module")
def folder(sharded_text: ShardedText, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("api") / "model"
    export(find_checkpoint(trained(Layout(), sharded_text)), output)
    return output


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return load_model(folder)


def test_every_name_is_there_and_importing_the_package_imports_no_torch() -> None:
    for name in ecp_scale.__all__:
        assert getattr(ecp_scale, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = ecp_scale.nothing
    code = "import sys, ecp_scale; assert not {'torch', 'numpy', 'deepspeed'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], env=environment(), check=True)


def test_a_model_needs_neither_deepspeed_nor_process_groups(folder: Path) -> None:
    code = (
        "import sys; sys.modules['deepspeed'] = None\n"
        "from ecp_scale import load_model\n"
        f"model = load_model({str(folder)!r})\n"
        "print(tuple(model.logits([1, 2, 3]).shape), model.generate('def', 3, temperature=0) != '')\n"
        "import torch; assert not torch.distributed.is_initialized()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "(3, 400) True"


def test_logits_and_continuations_are_those_of_the_network(model: Model) -> None:
    ids = model.encode(TEXT)[:40]
    expected = model.network.logits(torch.tensor([ids]))[0]
    assert torch.equal(model.logits(ids), expected)
    prompt = "def main"
    ids = model.encode(prompt)
    for _ in range(5):
        ids.append(int(model.logits(ids)[-1].argmax()))
    assert prompt + model.generate(prompt, 5, temperature=0, inside_document=True) == model.decode(ids)
    begun = model.generate("\n" + prompt, 5, temperature=0)
    end = model.tokenizer.end_of_document
    assert begun == _greedy(model, [end, *model.encode("\n" + prompt)], 5)


def _greedy(model: Model, ids: list[int], count: int) -> str:
    before = model.decode(ids)
    for _ in range(count):
        ids.append(int(model.logits(ids)[-1].argmax()))
    return model.decode(ids)[len(before) :]


def test_a_score_is_that_of_the_program(model: Model, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    text = read_text(str(tmp_path / "text.txt"), model.tokenizer)
    expected = evaluate(model.network, text, model.tokenizer.end_of_document, "stream")
    assert model.score(TEXT, "stream") == expected
    assert model.score(TEXT).bits_per_byte > 0


def test_a_streamed_document_has_the_losses_of_the_whole(model: Model) -> None:
    ids = model.encode(TEXT)
    pieces = [ids[:1], ids[1:70], ids[70:71], ids[71:]]
    losses = list(model.stream([*pieces[:2], [], *pieces[2:]]))
    assert len(losses.pop(2)) == 0
    assert [len(part) for part in losses] == [0, *(len(piece) for piece in pieces[1:])]
    expected = cross_entropy(model.logits(ids)[:-1], torch.tensor(ids[1:]), reduction="none")
    assert_close(torch.cat(losses), expected, rtol=1e-4, atol=1e-4)


def test_a_model_of_ones_own_trains_with_dropout_without_process_groups() -> None:
    config = dataclasses.replace(SCALED, dropout=0.1, allow_short_receptive_field=True)
    for recompute in ("none", "selective", "full"):
        parallel = dataclasses.replace(ParallelContext.single(), recompute=recompute)
        network = LanguageModel(config, parallel).train()
        initialize(network, config, parallel, seed=1)
        tokens = torch.randint(29, (2, config.sequence_length + 1))
        network(tokens[:, :-1], tokens[:, 1:])[0].backward()
        assert all(parameter.grad is not None for parameter in network.parameters())


def test_what_cannot_be_is_said(model: Model, folder: Path) -> None:
    for wrong in (
        {"temperature": -1.0},
        {"top_k": 0},
        {"max_new_tokens": 0},
        {"seed": -1},
        {"top_p": 0.0},
        {"min_p": 2},
    ):
        with pytest.raises(InputError, match=f"{next(iter(wrong))} is|top_k 0"):
            model.generate("def", **wrong)
    with pytest.raises(InputError, match="protocol is 'nothing', expected one of stream"):
        model.score(TEXT, "nothing")
    with pytest.raises(InputError, match="has no tokens"):
        model.generate("")
    with pytest.raises(InputError, match="precision is 'fp8', expected one of fp32, bf16"):
        load_model(folder, precision="fp8")
    with pytest.raises(InputError, match="nowhere"):
        load_model(folder / "nowhere")


def test_shards_are_a_dataset_of_torch(sharded_text: ShardedText) -> None:
    data = TokenDataset(sharded_text.prefix, 64)
    corpus = Corpus(sharded_text.prefix, 64)
    assert len(data) == corpus.windows
    batch = next(iter(DataLoader(data, batch_size=3)))
    assert batch.shape == (3, 65)
    assert batch[2].tolist() == corpus.window(2).tolist()
    with pytest.raises(IndexError, match="expected 0 to"):
        _ = data[len(data)]


def test_unknown_tokens_are_refused(model: Model) -> None:
    for ids in ([1, 400], [-1]):
        with pytest.raises(InputError, match=rf"token id {ids[-1]}, expected 0 to 399"):
            model.logits(ids)

"""The lm-evaluation-harness: through transformers, and through our own reader of streams, which agree."""

import json
import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ecp_scale.checkpoint.export import export
from ecp_scale.checkpoint.folder import find_checkpoint
from ecp_scale.errors import InputError
from ecp_scale.models.language_model import LanguageModel
from ecp_scale.parallel.groups import Groups
from tests.corpus import ShardedText
from tests.launching import environment, run_successfully
from tests.models.settings import ARCHITECTURES, LATENT, SCALED, build, variant
from tests.parallel.layouts import Layout, trained

harness = pytest.importorskip("ecp_scale.evaluation.harness")
END = 1
KINDS: dict[str, dict[str, object]] = {
    "pages": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{page}}",
        "metric_list": [{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
    },
    "choices": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": name} for name in ("acc", "acc_norm")],
    },
    "words": {
        "output_type": "generate_until",
        "doc_to_text": "{{context}}",
        "doc_to_target": "{{next}}",
        "generation_kwargs": {"until": ["\n", ")"], "max_gen_toks": 8, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}


def write_tasks(folder: Path, text: ShardedText) -> list[Path]:
    """A task of each kind of request, from lines of real text."""
    lines = [line for document in text.documents for line in document.splitlines() if 40 < len(line) < 120][:24]
    rows = {
        "pages": [{"page": "\n".join(lines[start : start + 6])} for start in range(0, 24, 6)],
        "choices": [
            {"context": line[:25], "choices": [line[25:], other[25:], " "], "answer": 0}
            for line, other in pairwise(lines)
        ],
        "words": [{"context": line[:25], "next": line[25:]} for line in lines[:6]],
    }
    files = []
    for kind, config in KINDS.items():
        data = folder / f"{kind}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows[kind]))
        source = {"task": f"local_{kind}", "dataset_path": "json", "test_split": "test"}
        more = {"dataset_kwargs": {"data_files": {"test": str(data)}}, "metadata": {"version": 1}}
        files.append(folder / f"{kind}.yaml")
        files[-1].write_text(json.dumps({**source, **more, **config}))
    return files


def test_tasks_have_the_figures_of_the_harness_through_transformers(
    sharded_text: ShardedText, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, results = tmp_path / "model", tmp_path / "results.json"
    export(find_checkpoint(trained(Layout(), sharded_text)), folder)
    files = write_tasks(tmp_path, sharded_text)
    for name, value in {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}.items():
        monkeypatch.setenv(name, value)
    out = run_successfully("launch/evaluate.py", "--model", folder, "--tasks", *files, "--json", results)
    assert "|local_choices|" in out
    found = json.loads(results.read_text())["results"]
    words = [Path(sys.executable).with_name("lm_eval"), "--model", "hf", "--include_path", tmp_path, "--device", "cpu"]
    words += [
        "--model_args",
        f"pretrained={folder},trust_remote_code=True,max_length=4096",
        "--output_path",
        tmp_path / "theirs.json",
    ]
    words += ["--tasks", ",".join(f"local_{kind}" for kind in KINDS), "--batch_size", "3"]
    done = subprocess.run(
        [str(word) for word in words], env=environment(), capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-4000:]
    (path,) = tmp_path.glob("theirs*.json")
    theirs = json.loads(path.read_text())["results"]
    compared = 0
    for task, metrics in theirs.items():
        for name, value in metrics.items():
            if name.endswith(",none") and isinstance(value, float):
                compared += 1
                assert found[task][name] == pytest.approx(value, rel=1e-5), f"{task} {name}"
    assert compared >= 8


class Requests:
    """Contexts with continuations of random ids, as the harness gives them."""

    def __init__(self, model: LanguageModel, sizes: Sequence[tuple[int, int]]) -> None:
        self.model = model
        draw = torch.Generator().manual_seed(1)
        draws = [torch.randint(2, 29, (sum(size),), generator=draw).tolist() for size in sizes]
        self.pairs = [(ids[:context], ids[context:]) for ids, (context, _) in zip(draws, sizes, strict=True)]

    @classmethod
    def of(cls, model: LanguageModel, pairs: list[tuple[list[int], list[int]]]) -> "Requests":
        """Those that are given."""
        requests = cls(model, [])
        requests.pairs = pairs
        return requests

    def scored(self, batch_size: int) -> list[tuple[float, bool]]:
        """By our reader."""
        tokenizer = SimpleNamespace(end_of_document=END)
        return harness.StreamingModel(self.model, tokenizer, batch_size)._loglikelihood_tokens(
            [("", *pair) for pair in self.pairs], disable_tqdm=True
        )

    def expected(self) -> list[tuple[float, bool]]:
        """By one forward for each new id, over all that came before, or the last window."""
        found = []
        for context, new in self.pairs:
            total, greedy = 0.0, True
            for number, token in enumerate(new):
                scores = self.next_scores([*context, *new[:number]])
                total += scores.log_softmax(-1)[token].item()
                greedy &= int(scores.argmax()) == token
            found.append((total, greedy))
        return found

    def next_scores(self, ids: list[int]) -> torch.Tensor:
        """Of the id that follows these."""
        geometry = self.model.config.geometry
        if not geometry.streams:
            ids = ([END] * geometry.sequence_length + ids)[-geometry.sequence_length :]
        return self.model.logits(torch.tensor([ids]), last=1)[0, -1].double()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_continuations_of_any_context_are_scored_as_one_forward_does(architecture: str, groups: Groups) -> None:
    model = build(variant(SCALED, architecture), groups)
    sizes = [(1, 1), (3, 5), (31, 2), (32, 4), (70, 9), (100, 1), (5, 80), (9, 0), (40, 33)]
    if architecture in LATENT:  # where a new id is scored by the window that ends with it, if it is the only one
        sizes = [(context, 1) for context, _ in sizes]
    requests = Requests(model, sizes)
    # What the model finds the likeliest.
    context, new = requests.pairs[4]
    for number in range(len(new)):
        new[number] = int(requests.next_scores([*context, *new[:number]]).argmax())
    expected = requests.expected()
    assert expected[4][1]
    requests.pairs.append(([], requests.pairs[1][1]))
    expected += Requests.of(model, [([END], requests.pairs[1][1])]).expected()
    for batch_size in (1, 4):
        for (found, likeliest), (total, greedy) in zip(requests.scored(batch_size), expected, strict=True):
            assert found == pytest.approx(total, rel=1e-9)
            assert likeliest == greedy


def test_what_is_no_task_is_refused(groups: Groups, tmp_path: Path) -> None:
    model, tokenizer = build(SCALED, groups), SimpleNamespace(end_of_document=END)
    (tmp_path / "bad.yaml").write_text("task: [1\n")
    (tmp_path / "none.yaml").write_text("colour: red\n")
    (tmp_path / "lacking.yaml").write_text('{"task": "lacking", "dataset_path": "json", "output_type": "nothing"}')
    for name, message in {
        "nowhere.yaml": "neither a file nor a task of the harness",
        "bad.yaml": "cannot be loaded",
        "none.yaml": "cannot be loaded",
        "lacking.yaml": "cannot be loaded",
    }.items():
        with pytest.raises(InputError, match=rf"--tasks .*{name}: {message}"):
            harness.run_tasks(model, tokenizer, [str(tmp_path / name)], 1, None)


def test_a_harness_that_is_not_there_is_named(tmp_path: Path) -> None:
    script = "import sys; sys.modules['lm_eval'] = None; from ecp_scale.commands.evaluate import main; main()"
    words = [sys.executable, "-c", script, "--model", "nowhere", "--tasks", "x.yaml"]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "error: --tasks needs lm-eval: pip install 'ecp-scale[harness]'\n"

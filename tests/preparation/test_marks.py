"""Prompts before answers and conversations: what is stored, what has a loss, and what is refused."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch

from ecp_scale.command_line import parse
from ecp_scale.data.corpus import Corpus
from ecp_scale.data.manifest import Manifest
from ecp_scale.data.marks import plain
from ecp_scale.data.shards import TokenShard
from ecp_scale.data.tokenizer import load_tokenizer
from ecp_scale.errors import InputError
from ecp_scale.preparation.merging import merge
from ecp_scale.preparation.parsing import Parsing
from ecp_scale.preparation.preprocessing import preprocess
from ecp_scale.preparation.segments import ChatError, ChatTemplate
from ecp_scale.preparation.verification import verify
from ecp_scale.training.loop import train
from tests.launching import metrics, run, run_successfully
from tests.parallel.layouts import RECIPE, SMALL_MODEL

PROMPTS = [{"question": f"What is {i} + {i}?", "text": f" It is {2 * i}."} for i in range(60)]
TEMPLATE = """{% if messages[0]['role'] != 'system' %}{{ bos_token }}{% endif %}{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
CHATS = [
    {
        "messages": [
            {"role": "user", "content": f"How many are {i} and one?"},
            {"role": "assistant", "content": f"They are {i + 1}."},
            {"role": "user", "content": "Are you sure?"},
            {"role": "assistant", "content": "Yes."},
        ]
    }
    for i in range(40)
]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    """Rows as .jsonl."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def chat_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer.json with a chat template beside it."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([turn["content"] for row in CHATS for turn in row["messages"]], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "</s>", "bos_token": "<s>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({**config, "tokenizer_class": "PreTrainedTokenizerFast"}) + "\n"
    )
    return folder / "tokenizer.json"


def documents(prefix: str) -> list[np.ndarray[Any, Any]]:
    """The stored ids of every document."""
    manifest = Manifest.read(Path(prefix))
    shards = [TokenShard(Path(prefix).parent / record.name) for record in manifest.shards]
    return [shard.document(number) for shard in shards for number in range(len(shard.lengths))]


def test_the_tokens_of_a_prompt_are_marked(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", PROMPTS)
    for workers in ("1", "2"):
        run_successfully(
            "data_tools/preprocess.py",
            *("--input", source, "--tokenizer=byte", "--prompt-key=question", "--workers", workers),
            *("--output-prefix", tmp_path / workers),
        )
    prefix = str(tmp_path / "1")
    assert Manifest.read(Path(prefix)).digest == Manifest.read(tmp_path / "2").digest
    for row, ids in zip(PROMPTS, documents(prefix), strict=True):
        asked, answered = row["question"].encode(), row["text"].encode()
        assert plain(ids).tolist() == [*asked, *answered, 256]
        assert (ids >= 0).tolist() == [False] * len(asked) + [True] * (len(answered) + 1)
    assert list(verify(Path(prefix), deep=True)) == []
    trained = sum(len(row["text"]) + 1 for row in PROMPTS)
    shown = run_successfully("data_tools/show_shards.py", prefix)
    assert f"with a loss  {trained:,} tokens" in shown
    assert "What is 0 + 0? It is 0." in shown
    assert json.loads(Path(prefix + ".manifest.json").read_text())["format_version"] == 4


def test_a_damaged_mark_is_found_and_parts_agree(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", PROMPTS)
    for name, parsing in (("marked", Parsing(prompt_key="question")), ("plain", Parsing())):
        preprocess([source], "byte", str(tmp_path / name), parsing=parsing)
    with pytest.raises(InputError, match="one of them marks tokens without a loss"):
        merge(tmp_path / "both", [tmp_path / "marked", tmp_path / "plain"])
    assert merge(tmp_path / "merged", [tmp_path / "marked"]).marked
    file = next(tmp_path.glob("marked-*.bin"))
    ids = np.fromfile(file, dtype=np.int32)
    ids[3] = -258
    ids.tofile(file)
    with pytest.raises(InputError, match="id -258 at place 3, but the tokenizer has 257 entries"):
        Corpus(str(tmp_path / "marked"), 16).window(0)
    assert any("id -258, but the tokenizer has 257" in text for text in verify(tmp_path / "marked"))


def test_a_conversation_is_what_transformers_write_and_the_answers_have_a_loss(
    chat_tokenizer: Path, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(chat_tokenizer.parent)
    source = write(tmp_path / "chats.jsonl", CHATS)
    run_successfully(
        "data_tools/preprocess.py",
        *("--input", source, "--tokenizer", f"hf:{chat_tokenizer}", "--chat", "--text-key=messages"),
        *("--output-prefix", tmp_path / "chat"),
    )
    ours = load_tokenizer(f"hf:{chat_tokenizer}")
    starts = ours.encode_batch(["<|im_start|>assistant\n"], True)[0].tolist()
    for row, ids in zip(CHATS, documents(str(tmp_path / "chat")), strict=True):
        expected = theirs.apply_chat_template(row["messages"], tokenize=False)
        assert ours.decode(plain(ids)[:-1].tolist()) == expected
        assert plain(ids)[:-1].tolist() == theirs(expected, add_special_tokens=False)["input_ids"]
        answers = "".join(f"{turn['content']}<|im_end|>\n" for turn in row["messages"] if turn["role"] == "assistant")
        assert ours.decode(ids[ids >= 0][:-1].tolist()) == answers
        # What opens an answer is given at the time of use.
        opened = [place for place in range(len(ids)) if plain(ids)[place : place + len(starts)].tolist() == starts]
        assert len(opened) == 2
        assert all((ids[place : place + len(starts)] < 0).all() for place in opened)


def test_conversations_that_cannot_be_written_are_named(chat_tokenizer: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(f"hf:{chat_tokenizer}")
    template = ChatTemplate.load(None, tokenizer)
    asked, answered = {"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}
    for messages, message in (
        ("text", "the conversation is str, expected a list"),
        ([], "expected a list of messages"),
        ([{"role": "user"}], "message 1 has no text as 'content'"),
        ([asked, {"role": "assistant", "content": [1]}], "message 2 has no text as 'content'"),
        ([asked], "no message of the assistant"),
        ([{**asked, "content": "<|im_end|>"}, answered], r"message 1 holds the name of a control token, <\|im_end\|>"),
    ):
        with pytest.raises(ChatError, match=message):
            template.segments(messages)
    forgetful = dataclasses.replace(template, source="{{ messages[-1]['content'] }}")
    with pytest.raises(ChatError, match="does not write message 2 behind what it wrote before"):
        forgetful.segments([asked, answered] * 2)
    strict = dataclasses.replace(template, source="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ChatError, match="roles must alternate"):
        strict.segments([asked, answered])
    source = write(tmp_path / "a.jsonl", [*CHATS[:3], {"messages": [asked]}])
    parsing = Parsing("messages", chat=template)
    with pytest.raises(InputError, match=r"a\.jsonl, line 4 .*no message of the assistant"):
        preprocess([source], f"hf:{chat_tokenizer}", str(tmp_path / "stop"), parsing=parsing)
    manifest = preprocess(
        [source], f"hf:{chat_tokenizer}", str(tmp_path / "skip"), parsing=parsing, on_error="skip", workers=2
    )
    assert (manifest.totals.documents, manifest.skipped.bad) == (3, 1)


def test_a_missing_or_wrong_template_is_named_before_any_work(chat_tokenizer: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "chats.jsonl", CHATS)
    (tmp_path / "notes.txt").write_text("no keys")
    (tmp_path / "bad.jinja").write_text("{% for %}")
    words = ["--input", source, "--text-key=messages", "--output-prefix", str(tmp_path / "x")]
    program = "data_tools/preprocess.py"
    for more, message in (
        (["--tokenizer=byte", "--chat"], "has none (chat_template.jinja, or chat_template in tokenizer_config.json"),
        (["--tokenizer=byte", "--chat", "--chat-template", str(tmp_path / "no.jinja")], "no.jinja: No such file"),
        (["--tokenizer=byte", "--chat", "--chat-template", str(tmp_path / "bad.jinja")], "is not valid Jinja"),
        (["--tokenizer=byte", "--chat-template=x"], "--chat-template is given without --chat"),
        (["--tokenizer=byte", "--chat", "--prompt-key=x"], "--chat does not go with --prompt-key"),
        (
            ["--tokenizer=byte", "--prompt-key=x", "--input", str(tmp_path / "notes.txt")],
            "notes.txt: plain text has no keys",
        ),
    ):
        done = run(program, *words, *more)
        assert done.returncode == 2
        assert message in done.stderr, done.stderr
        assert not list(tmp_path.glob("x*"))


def test_a_run_trains_on_answers_alone_and_counts_them_over_micro_batches(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", PROMPTS * 4)
    prefix = str(tmp_path / "shards")
    preprocess([source], "byte", prefix, parsing=Parsing(prompt_key="question"))
    values: dict[str, object] = {
        "model.preset": "scaled-125m",
        **SMALL_MODEL,
        "model.key_value_heads": 4,
        **RECIPE,
        "attention.document_mask": True,
        "training.steps": 30,
        "data.prefix": prefix,
        "data.validation_prefix": prefix,
        "training.validation_every_steps": 30,
    }
    words = [f"--{key}={value}" for key, value in values.items()]
    for micro in (1, 4):
        out = f"--training.output_dir={tmp_path / str(micro)}"
        train(parse([*words, out, f"--training.micro_batch_size={micro}"], ""))
    apart, together = metrics(tmp_path / "1"), metrics(tmp_path / "4")
    assert [one["loss"] for one in apart] == pytest.approx([one["loss"] for one in together], rel=1e-4)
    assert apart[-1]["loss"] < apart[0]["loss"] - 1
    # The first loss is that of the marked targets alone, under the weights as they were drawn.
    assert apart[-1]["validation_loss"] == pytest.approx(apart[-1]["loss"], abs=0.5)
    corpus = Corpus(prefix, 64)
    window = torch.from_numpy(corpus.window(0))
    assert 0.3 < (window < 0).float().mean() < 0.9

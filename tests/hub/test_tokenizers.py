"""AutoTokenizer of an exported folder gives the ids that the model was trained with."""

import json
import shutil
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from ecp_scale.checkpoint.hugging_face import write_code, write_tokenizer
from ecp_scale.data.tokenizer import load_tokenizer
from ecp_scale.data.tokenizer_json import control_in_text
from tests.corpus import ShardedText
from tests.preparation.writing import byte_level

pytest.importorskip("transformers")
TEXTS = [
    "",
    "a ▁b </s> <|endoftext|> [SEP] <unk>  x\n\n\t é 漢字 🙂 \u2028 \x00 <end> ",
    "import os\nfor name in os.listdir():\n    print(name)\n",
]


def folder_of(spec: str, folder: Path, end_token: str | None = None) -> object:
    """Write a folder as an export does, and read it as a user does."""
    from transformers import AutoTokenizer

    folder.mkdir()
    tokenizer = load_tokenizer(spec, end_token)
    if tokenizer.kind == "sentencepiece":
        assert tokenizer.path is not None
        shutil.copy(tokenizer.path, folder / "tokenizer.model")
    write_tokenizer(folder, tokenizer)
    write_code(folder)
    config = {"model_type": "ecp", "auto_map": {"AutoConfig": "configuration_ecp.EcpConfig"}}
    (folder / "config.json").write_text(json.dumps(config))
    theirs = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=True)
    assert theirs.eos_token_id == theirs.pad_token_id == tokenizer.end_of_document
    for text in [*TEXTS, *(text.replace(" ", "  ") for text in TEXTS)]:
        ids = theirs(text).input_ids
        assert ids == tokenizer.encode(text), text
        if tokenizer.kind != "wordpiece":  # whose [UNK] is left out
            assert theirs.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids)
    return theirs


@pytest.fixture(autouse=True)
def own_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code of a folder is copied to a cache, which must not be that of another test."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))


def test_bytes(tmp_path: Path) -> None:
    folder_of("byte", tmp_path / "model")


def test_a_sentencepiece_model(sharded_text: ShardedText, tmp_path: Path) -> None:
    folder_of(f"sentencepiece:{sharded_text.tokenizer}", tmp_path / "model")


def test_a_sentencepiece_model_whose_end_is_a_piece_that_text_can_become(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("some words of a text, and others\n" * 50)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"),
        model_prefix=str(tmp_path / "pieces"),
        vocab_size=400,
        hard_vocab_limit=False,
        user_defined_symbols=["<end>"],
        byte_fallback=True,
        minloglevel=2,
    )
    folder_of(f"sentencepiece:{tmp_path / 'pieces.model'}", tmp_path / "model", "<end>")


def test_a_tokenizer_json(tmp_path: Path) -> None:
    path = byte_level(tmp_path / "tokenizer.json", ["<|endoftext|>", "<other>"])
    folder_of(f"hf:{path}", tmp_path / "model")


def test_word_pieces(tmp_path: Path) -> None:
    letters = [*"abcdefghijklmnopqrstuvwxyzI", *(f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz")]
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "(", ")", *letters]))
    folder_of(f"wordpiece:{tmp_path / 'vocab.txt'}", tmp_path / "model")


def test_a_control_token_that_text_can_become_is_named(tmp_path: Path) -> None:
    vocabulary = [("<unk>", 0.0), ("</s>", -1.0), *((letter, -2.0) for letter in "abc</>s")]
    unigram = Tokenizer(models.Unigram(vocabulary, unk_id=0))
    unigram.pre_tokenizer, unigram.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    unigram.add_special_tokens(["</s>"])
    unigram.save(str(tmp_path / "tokenizer.json"))
    assert control_in_text(load_tokenizer(f"hf:{tmp_path / 'tokenizer.json'}")) == "</s>"
    assert control_in_text(load_tokenizer("byte")) is None

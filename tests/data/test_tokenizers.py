"""Tokens mean what they say: text is text, the end is the end, and what a tokenizer loses is counted."""

import json
import random
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ecp_scale.data.manifest import Manifest
from ecp_scale.data.tokenizer import Tokenizer, gives_texts_back, load_tokenizer
from ecp_scale.errors import InputError
from ecp_scale.preparation.cutting import Cutter
from ecp_scale.preparation.parsing import Parsing
from ecp_scale.preparation.preprocessing import preprocess
from ecp_scale.preparation.tokenizer_training import MAX_LINE_BYTES, train_tokenizer
from ecp_scale.preparation.verification import verify
from tests.corpus import ShardedText
from tests.launching import run, run_successfully
from tests.preparation.writing import byte_level, stored

PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "\u2028", "b", "\x85", "c", "##d", "the"]


@pytest.fixture(scope="module")
def wordpiece(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vocabulary with separators of lines that are none in a vocabulary."""
    path = tmp_path_factory.mktemp("wordpiece") / "vocab.txt"
    path.write_bytes("".join(f"{piece}\n" for piece in PIECES).encode())
    return path


def test_a_vocabulary_has_a_piece_per_line_feed(wordpiece: Path) -> None:
    tokenizer = load_tokenizer(f"wordpiece:{wordpiece}")
    assert tokenizer.vocab_size == 11
    assert tokenizer.encode("a b c the cd") == [4, 6, 8, 10, 8, 9]
    assert [tokenizer.decode([number]) for number in (4, 5, 7, 10)] == ["a", "\u2028", "\x85", "the"]


def test_the_end_is_declared_named_or_refused(tmp_path: Path) -> None:
    gemma = byte_level(tmp_path / "gemma.json", ["<pad>", "<eos>", "<bos>", "<unk>"], ["<s>", "</s>", "<b>", "</b>"])
    tokenizer = load_tokenizer(f"hf:{gemma}")
    assert (tokenizer.end_of_document, tokenizer.end_reason) == (1, "<eos>, by its name")
    names = ["<\uff5cbegin\u2581of\u2581sentence\uff5c>", "<\uff5cend\u2581of\u2581sentence\uff5c>"]
    (tmp_path / "deepseek").mkdir()
    deepseek = byte_level(tmp_path / "deepseek" / "tokenizer.json", names)
    with pytest.raises(InputError, match=re.escape(f"with --end-token (special tokens: {', '.join(names)})")):
        load_tokenizer(f"hf:{deepseek}")
    assert load_tokenizer(f"hf:{deepseek}", names[1]).end_of_document == 1
    with pytest.raises(InputError, match=r"has no entry '<end>' \(special tokens"):
        load_tokenizer(f"hf:{deepseek}", "<end>")
    for name, declared in (("special_tokens_map.json", {"content": names[1]}), ("tokenizer_config.json", names[0])):
        (tmp_path / "deepseek" / name).write_text(json.dumps({"eos_token": declared}))
        tokenizer = load_tokenizer(f"hf:{deepseek}")
        assert tokenizer.end_reason.endswith(f"the eos_token of {name}")
    assert tokenizer.end_of_document == 0, "tokenizer_config.json comes before the map"
    nothing = byte_level(tmp_path / "nothing.json", [])
    with pytest.raises(InputError, match=r"\(it has no special tokens\)"):
        load_tokenizer(f"hf:{nothing}")
    assert (
        load_tokenizer(f"hf:{nothing}", "!").end_of_document == load_tokenizer(f"hf:{gemma}", "!").end_of_document - 4
    )


def test_shards_remember_the_end_that_they_were_made_with(tmp_path: Path) -> None:
    spec = f"hf:{byte_level(tmp_path / 'tokenizer.json', ['<a>', '<b>'])}"
    (tmp_path / "a.txt").write_text("some text")
    flags = ("--input", tmp_path / "a.txt", "--tokenizer", spec, "--end-token", "<b>")
    out = run_successfully("data_tools/preprocess.py", *flags, "--output-prefix", tmp_path / "x")
    assert "documents end with id 1: <b>, by --end-token" in out
    assert Manifest.read(tmp_path / "x").load_tokenizer(tmp_path / "x").end_of_document == 1
    assert stored(tmp_path / "x")[0][-1] == 1
    with pytest.raises(InputError, match="end_of_document was 1 and is now 0"):
        preprocess([str(tmp_path / "a.txt")], spec, str(tmp_path / "x"), end_token="<a>")


CONTROL = "a <|endoftext|> b </s> c [SEP] d [UNK] e <eos> f"


def of_kind(kind: str, folder: Path, sharded_text: ShardedText, wordpiece: Path) -> Tokenizer:
    """A tokenizer of each kind of model."""
    import tokenizers

    if kind == "sentencepiece":
        return load_tokenizer(f"sentencepiece:{sharded_text.tokenizer}")
    if kind == "wordpiece":
        return load_tokenizer(f"wordpiece:{wordpiece}")
    special = ["<unk>", "<|endoftext|>", "</s>", "[SEP]", "<eos>"]
    if kind == "bytes":
        return load_tokenizer(f"hf:{byte_level(folder / 'a.json', special)}")
    characters = sorted(set(CONTROL) - {" "})
    if kind == "unigram":
        entries = [(piece, 0.0) for piece in special] + [(character, -5.0) for character in characters]
        tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram(entries, 0, False))
    else:
        vocabulary = {piece: number for number, piece in enumerate([*special, *characters])}
        tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "<unk>"))
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(folder / "a.json"))
    return load_tokenizer(f"hf:{folder / 'a.json'}")


@pytest.mark.parametrize("kind", ["sentencepiece", "bytes", "unigram", "words", "wordpiece"])
def test_text_never_encodes_to_a_control_token(
    kind: str, tmp_path: Path, sharded_text: ShardedText, wordpiece: Path
) -> None:
    tokenizer = of_kind(kind, tmp_path, sharded_text, wordpiece)
    ids = tokenizer.encode(CONTROL)
    assert tokenizer.end_of_document not in ids
    names = [tokenizer.decode([number]) for number in ids if number != tokenizer.unknown]
    assert not {"<|endoftext|>", "</s>", "[SEP]", "<eos>"} & set(names)
    if gives_texts_back(tokenizer):
        assert tokenizer.decode(ids) == CONTROL


def test_only_the_release_recipe_writes_control_tokens(wordpiece: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" a the \n\n b <unk> c \n")
    spec = f"wordpiece:{wordpiece}"
    release = preprocess(
        [str(tmp_path / "a.txt")], spec, str(tmp_path / "r"), parsing=Parsing(preparation="wikitext-release")
    )
    assert stored(tmp_path / "r") == [[4, 10, 3, 3, 6, 1, 8, 3]], "an end per line, and none more at the end"
    assert (release.totals.words, release.totals.lines, release.totals.bytes) == (5, 3, 21)
    assert release.totals.unknown == 0, "an <unk> of the text itself is no loss"
    plain = preprocess([str(tmp_path / "a.txt")], spec, str(tmp_path / "p"))
    assert 3 not in stored(tmp_path / "p")[0][:-1]
    assert (plain.totals.words, plain.totals.lines, plain.totals.bytes) == (5, 3, 21)


def test_what_a_tokenizer_loses_is_counted_and_said(tmp_path: Path) -> None:
    import tokenizers

    lower = tokenizers.normalizers.Sequence([tokenizers.normalizers.NFKC(), tokenizers.normalizers.Lowercase()])
    spec = f"hf:{byte_level(tmp_path / 'lower.json', ['<|endoftext|>'], normalizer=lower)}"
    (tmp_path / "a.txt").write_text("To be, or not: Caf\u00e9 \ufb01ne HELLO")
    flags = ("--input", tmp_path / "a.txt", "--tokenizer", spec, "--output-prefix", tmp_path / "x")
    assert "does not give texts back" in run_successfully("data_tools/preprocess.py", *flags)
    assert Manifest.read(tmp_path / "x").tokenizer.gives_texts_back is False
    assert list(verify(tmp_path / "x", deep=True)) == []
    out = run_successfully("data_tools/verify_shards.py", tmp_path / "x", "--deep")
    assert "this tokenizer does not give texts back" in out
    assert "all well" in out


def test_unknown_tokens_are_counted(wordpiece: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a zebra b lion")
    flags = ("--input", tmp_path / "a.txt", "--tokenizer", f"wordpiece:{wordpiece}", "--output-prefix", tmp_path / "x")
    assert "unknown tokens: 2, 40.000% of all" in run_successfully("data_tools/preprocess.py", *flags)
    totals = Manifest.read(tmp_path / "x").totals
    assert (totals.unknown, totals.tokens) == (2, 5)


def test_own_models_keep_the_symbol_of_a_space(sharded_text: ShardedText) -> None:
    tokenizer = load_tokenizer(f"sentencepiece:{sharded_text.tokenizer}")
    for text in ("a word\u2581here", "\u2581", " \u2581 \u2581\u2581x", "\u2581\n\u2581", "no symbol"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert gives_texts_back(tokenizer)


def sentencepiece_of(folder: Path, text: str, **options: object) -> Tokenizer:
    """A sentencepiece model as others train them."""
    import sentencepiece

    (folder / "a.txt").write_text(text)
    flags = {"vocab_size": 300, "hard_vocab_limit": False, "minloglevel": 2, **options}
    sentencepiece.SentencePieceTrainer.train(input=str(folder / "a.txt"), model_prefix=str(folder / "a"), **flags)
    return load_tokenizer(f"sentencepiece:{folder / 'a.model'}")


def trained_hf(folder: Path, text: str, kind: str) -> Tokenizer:
    """A BPE of bytes, or one whose spaces are symbols and which splits nothing before it merges, as Gemma's."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    if kind == "byte level":
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
    elif kind == "joins words":
        tokenizer.normalizer = tokenizers.normalizers.Replace(" ", "\u2581")
        tokenizer.decoder = tokenizers.decoders.Replace("\u2581", " ")
    else:
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
        tokenizer.decoder = tokenizers.decoders.Metaspace()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=500, special_tokens=["</s>"], show_progress=False)
    tokenizer.train_from_iterator([text], trainer)
    tokenizer.save(str(folder / "a.json"))
    return load_tokenizer(f"hf:{folder / 'a.json'}")


KINDS = (
    *("own", "unigram", "BPE with a dummy prefix", "keeps blanks"),
    *("byte level", "metaspace", "joins words", "wordpiece", "byte"),
)


@pytest.fixture(scope="module", params=KINDS)
def any_tokenizer(
    request: pytest.FixtureRequest, sharded_text: ShardedText, wordpiece: Path, tmp_path_factory: pytest.TempPathFactory
) -> Tokenizer:
    """Tokenizers of all kinds, trained on the same text."""
    folder, text = tmp_path_factory.mktemp("tokenizer"), "\n".join(sharded_text.documents)[:60_000]
    kind = request.param
    if kind == "own":
        return load_tokenizer(f"sentencepiece:{sharded_text.tokenizer}")
    if kind == "unigram":
        return sentencepiece_of(folder, text, model_type="unigram")
    if kind == "BPE with a dummy prefix":
        options = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "byte_fallback": True}
        return sentencepiece_of(folder, text, model_type="bpe", vocab_size=600, **options)
    if kind == "keeps blanks":
        options = {"normalization_rule_name": "nfkc", "add_dummy_prefix": False, "remove_extra_whitespaces": False}
        return sentencepiece_of(folder, text, model_type="bpe", **options)
    if kind in ("wordpiece", "byte"):
        return load_tokenizer(f"wordpiece:{wordpiece}" if kind == "wordpiece" else "byte")
    return trained_hf(folder, text, kind)


WORDS = st.one_of(
    st.sampled_from(
        ["the", "def", "self", "return", "x", "a", "the.", "cd", "\n", "  ", "\t", "\u2581", "</s>", "1234"]
    ),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=6),
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(words=st.lists(WORDS, min_size=1, max_size=400), glue=st.sampled_from([" ", "  ", ""]), seed=st.integers(0, 99))
def test_pieces_of_a_text_have_the_ids_of_the_whole(
    any_tokenizer: Tokenizer, words: list[str], glue: str, seed: int
) -> None:
    text = glue.join(words)
    rng = random.Random(seed)
    cuts = sorted(rng.randint(0, len(text)) for _ in range(5))
    parts = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    pieces = list(Cutter(any_tokenizer, characters=100).pieces(parts))
    assert "".join(piece.text for piece in pieces) == text
    assert [id for piece in pieces for id in any_tokenizer.encode(piece.encoded)] == any_tokenizer.encode(text)


def test_real_text_is_cut(any_tokenizer: Tokenizer, sharded_text: ShardedText) -> None:
    text = sharded_text.documents[0][:50_000]
    pieces = list(Cutter(any_tokenizer, characters=1000).pieces([text]))
    assert len(pieces) > 30 or any(re.search(r"\S ", entry) for entry in any_tokenizer.entries())
    assert [id for piece in pieces for id in any_tokenizer.encode(piece.encoded)] == any_tokenizer.encode(text)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("\n".join(f"word{number}" for number in range(20_000)), id="a word per line"),
        pytest.param("\t".join(f"word{number}" for number in range(20_000)), id="tabs"),
        pytest.param("\u6f22\u5b57\u306e\u6587\u3002\u6b21\u306e\u6587\uff0c" * 10_000, id="Chinese"),
    ],
)
def test_texts_without_spaces_are_cut_too(text: str, sharded_text: ShardedText) -> None:
    tokenizer = load_tokenizer(f"sentencepiece:{sharded_text.tokenizer}")
    pieces = list(Cutter(tokenizer, characters=1000).pieces([text]))
    assert len(pieces) > len(text) / 1500
    assert [id for piece in pieces for id in tokenizer.encode(piece.encoded)] == tokenizer.encode(text)


@pytest.mark.parametrize("form", ["txt", "jsonl"])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_long_document_has_the_ids_of_the_whole(
    form: str, workers: int, sharded_text: ShardedText, tmp_path: Path
) -> None:
    text = "\n".join(sharded_text.documents) * 12
    assert len(text) > 3 << 20
    path = tmp_path / f"a.{form}"
    path.write_text(text if form == "txt" else json.dumps({"text": text}) + "\n")
    spec = f"sentencepiece:{sharded_text.tokenizer}"
    manifest = preprocess([str(path)], spec, str(tmp_path / "x"), workers=workers)
    (ids,) = stored(tmp_path / "x")
    tokenizer = load_tokenizer(spec)
    assert ids == [*tokenizer.encode(text), tokenizer.end_of_document]
    totals = manifest.totals
    assert (totals.bytes, totals.words, totals.lines) == (len(text.encode()), len(text.split()), text.count("\n"))
    assert list(verify(tmp_path / "x", deep=True)) == []
    limits = Parsing(max_characters=len(text) - 1)
    with pytest.raises(InputError, match=r"1 records dropped \(1 by --max-characters\)"):
        preprocess([str(path)], spec, str(tmp_path / "y"), parsing=limits)
    with pytest.raises(InputError, match=r"tokens, more than the 9999 of a shard; raise --shard-tokens"):
        preprocess([str(path)], spec, str(tmp_path / "z"), shard_tokens=9999)


def test_a_long_text_that_breaks_is_named(tmp_path: Path) -> None:
    content = bytearray(b"some words \xc3\xa4 " * 300_000)
    content[4_000_000] = 0xFF
    (tmp_path / "a.txt").write_bytes(content)
    (tmp_path / "b.txt").write_text("x")
    arguments = ([str(tmp_path / "a.txt"), str(tmp_path / "b.txt")], "byte", str(tmp_path / "x"))
    with pytest.raises(InputError, match=r"a\.txt: not valid UTF-8 at byte (3999999|4000000)"):
        preprocess(*arguments)
    manifest = preprocess(*arguments, on_error="skip")
    assert (manifest.totals.documents, manifest.skipped.bad) == (1, 1)


def test_long_lines_are_trained_on_and_the_share_is_told(sharded_text: ShardedText, tmp_path: Path) -> None:
    text = " ".join(" ".join(sharded_text.documents).split())
    assert len(text) > 50 * MAX_LINE_BYTES
    (tmp_path / "a.txt").write_text(text)
    used = train_tokenizer([str(tmp_path / "a.txt")], str(tmp_path / "a.model"), 500)
    assert used.used == used.text >= len(text.encode()) - text.count(" ")
    for seed in range(5):
        used = train_tokenizer(
            [str(tmp_path / "a.txt")], str(tmp_path / "b.model"), 400, sample_bytes=100_000, seed=seed
        )
        assert 100_000 - MAX_LINE_BYTES <= used.used <= 100_000
    (tmp_path / "symbols.txt").write_text("\n".join(f"a line {number} with \u2585 inside" for number in range(3000)))
    used = train_tokenizer([str(tmp_path / "symbols.txt")], str(tmp_path / "d.model"), 300)
    assert used.used == used.text > 3000 * 15
    flags = ("--input", tmp_path / "a.txt", "--output", tmp_path / "c.model", "--vocab-size", 400)
    assert "bytes of text (100.0%)" in run_successfully("data_tools/train_tokenizer.py", *flags)


def test_training_of_a_tokenizer_notices_what_it_cannot_do_first(tmp_path: Path) -> None:
    (tmp_path / "blank.txt").write_text("\n\n")
    (tmp_path / "a.txt").write_text("text " * 10)
    (tmp_path / "bad.jsonl").write_bytes(b'{"text": "x"}\n{"text": \n')
    cases = {
        ("bad.jsonl", str(tmp_path / "z.model")): "bad.jsonl, line 2 (byte 14): not valid JSON",
        ("a.txt", "/proc/nowhere/a.model"): "/proc/nowhere",
        ("a.txt", str(tmp_path)): "is a folder",
        ("blank.txt", str(tmp_path / "x.model")): "the corpus is empty: no text in",
        ("a.txt", str(tmp_path / "y.model")): "cannot train a vocabulary of 400",
    }
    for (name, output), reason in cases.items():
        flags = ("--input", tmp_path / name, "--output", output, "--vocab-size", 400)
        done = run("data_tools/train_tokenizer.py", *flags)
        assert (done.returncode, done.stderr.count("error: ")) == (2, 1), done.stderr
        assert reason in done.stderr
        assert "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "bad.jsonl", "blank.txt"]

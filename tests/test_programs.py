"""Every program from outside: one clear error and exit code 2 for bad input, help in about no time."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ecp_scale.checkpoint.mirror import OWNER
from ecp_scale.command_line import parse
from ecp_scale.data.corpus import Corpus
from ecp_scale.errors import InputError
from ecp_scale.preparation.preprocessing import preprocess
from ecp_scale.training.loop import train
from tests.corpus import ShardedText, write_sharded_text
from tests.launching import PLAYED, ROOT, command, environment, play, run, run_successfully
from tests.parallel.layouts import Layout, trained

PROGRAMS = sorted(
    str(path.relative_to(ROOT)) for folder in ("launch", "data_tools") for path in (ROOT / folder).glob("*.py")
)


def refused(script: str, *options: object, ranks: int = 1) -> str:
    """The one error of a program that must refuse its input."""
    # A launch would meet the groups of these tests in their process.
    launches = ranks > 1 or ("pretrain" in script and "--dry-run" not in options)
    done = run(script, *options, ranks=ranks) if launches else play(script, *options)
    assert done.returncode == 2, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    assert done.stderr.count("error: ") == 1
    return done.stderr[done.stderr.index("error: ") :]


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_needs_no_torch(program: str) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", ROOT / program, "--help"],
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0
    assert "usage:" in done.stdout
    imported = {line.rsplit("|", 1)[1].strip() for line in done.stderr.splitlines() if "|" in line}
    assert not imported & {"torch", "megatron.core", "deepspeed", "wandb", "matplotlib", "transformers"}


@pytest.mark.parametrize("program", PROGRAMS)
def test_options_have_their_whole_names(program: str) -> None:
    done = play(program, "--hel")
    assert (done.returncode, done.stdout) == (2, "")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("launch/generate.py", "--modle", "m"), "--modle is no option, did you mean --model?"),
        (("launch/plan.py", "--gpus", "8", "--config=demo", "--gpu-memry", "80GiB"), "did you mean 'gpu-memory'?"),
        (("launch/plan.py", "--gpus", "8", "--config=demo", "--proppose"), "did you mean 'propose'?"),
        (("launch/plan.py", "--gpus", "x", "--training.tokens", "1e9"), "argument --gpus: invalid int value: 'x'\n"),
        (("launch/demo.py", "--rank", "2"), "did you mean 'ranks'?"),
    ],
)
def test_a_mistyped_option_is_told_the_nearest_and_a_right_one_is_not_blamed(words: tuple[str, ...], said: str) -> None:
    done = play(*words)
    assert (done.returncode, said in done.stderr) == (2, True), done.stderr


@pytest.fixture(scope="module")
def model(sharded_text: ShardedText, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted model."""
    output = tmp_path_factory.mktemp("model")
    run_successfully(
        "launch/convert_checkpoint.py", "--checkpoint", trained(Layout(), sharded_text), "--output", output
    )
    return output


def test_programs_that_tests_run_in_their_process_work_in_their_own(
    sharded_text: ShardedText, model: Path, tmp_path: Path
) -> None:
    run_folder = trained(Layout(), sharded_text)
    probes = ("--task", "copy", "--length", 32, "--distances", 14, "--count", 10)
    done = {
        "data_tools/make_probe.py": (*probes, "--output-prefix", tmp_path / "probe" / "x"),
        "data_tools/merge_shards.py": (tmp_path / "part1", tmp_path / "part2", "--output-prefix", tmp_path / "both"),
        "data_tools/preprocess.py": (
            *("--input", sharded_text.text),
            *("--tokenizer", "byte", "--output-prefix", tmp_path / "y"),
        ),
        "data_tools/show_shards.py": (sharded_text.prefix,),
        "data_tools/train_tokenizer.py": (
            *("--input", sharded_text.text, "--vocab-size", 400),
            *("--output", tmp_path / "t.model"),
        ),
        "data_tools/verify_shards.py": (sharded_text.prefix, "--deep"),
        "launch/audit_data.py": (run_folder,),
        "launch/checkpoint.py": ("list", run_folder),
        "launch/convert_checkpoint.py": ("--checkpoint", run_folder, "--output", tmp_path / "model"),
        "launch/generate.py": ("--model", model, "--prompt", "def ", "--max-new-tokens", 2),
        "launch/plan.py": ("--config=demo", "--gpus", 1, "--model.vocab_size=300"),
        "launch/report.py": (run_folder, "--output", tmp_path / "page.html"),
    }
    assert done.keys() == PLAYED
    texts = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for text in texts:
        text.write_text("some words\n" * 9)
    for part in (1, 2):
        preprocess(list(map(str, texts)), "byte", str(tmp_path / f"part{part}"), part=(part, 2))

    def start(script: str) -> "subprocess.CompletedProcess[str]":
        words = command(script, 1, done[script])
        return subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=120)

    with ThreadPoolExecutor(2) as pool:
        for script, ended in zip(done, pool.map(start, done), strict=True):
            assert (ended.returncode, ended.stdout != "") == (0, True), (script, ended.stderr[-3000:])


def test_dry_run_prints_config_and_counts() -> None:
    out = play("launch/pretrain_ecp.py", "--config", "paper-12l", "--dry-run").stdout
    for part in (
        "segment_length: 256",
        "129,604,420",
        "639,737,856",
        "(layers + 1) * segment_length = (12 + 1) * 256 = 3328",
        "32,768",
    ):
        assert part in out


def test_a_dry_run_reads_the_shards_and_the_run_folder(sharded_text: ShardedText, tmp_path: Path) -> None:
    words = ("--config", "demo", "--data.prefix", sharded_text.prefix, "--dry-run")
    out = play("launch/pretrain_ecp.py", *words).stdout
    assert f"{Corpus(str(sharded_text.prefix), 512).tokens:,} tokens, shown" in out
    assert "vocab_size: 400" in out
    message = refused("launch/pretrain_ecp.py", "--config", "demo", "--data.prefix", tmp_path / "x", "--dry-run")
    assert "x.manifest.json: No such file" in message
    run_folder = trained(Layout(), sharded_text)
    message = refused("launch/pretrain_ecp.py", *words, "--training.output_dir", run_folder)
    assert "holds checkpoints; pass --resume auto" in message
    again = (*Layout().options(sharded_text, run_folder), "--dry-run", "--resume=auto")
    out = play("launch/pretrain_ecp.py", *again, "--optimizer.beta2=0.9").stdout
    assert ", goes on from step-" in out
    assert "note: optimizer.beta2 was 0.95 and is now 0.9" in out
    assert "training.seed was 1 and is now 2" in refused("launch/pretrain_ecp.py", *again, "--training.seed=2")


def test_a_dry_run_looks_where_the_run_would_write_and_begin(
    sharded_text: ShardedText, model: Path, tmp_path: Path
) -> None:
    file, run_folder = tmp_path / "file", tmp_path / "run"
    file.touch()
    words = (*Layout().options(sharded_text, run_folder), "--dry-run")
    for options, said in (
        ((f"--training.output_dir={file}/run",), f"training.output_dir {file}/run: {file} is no folder"),
        ((f"--checkpoint.mirror={file}",), f"checkpoint.mirror {file}: {file} is no folder"),
        ((f"--checkpoint.mirror={run_folder}",), f"checkpoint.mirror {run_folder} is the run folder itself or in it"),
        (("--init-from", tmp_path / "no"), f"{tmp_path / 'no' / 'config.json'}: No such file"),
        (("--init-from", model, "--model.layers=5"), "model.layers is 5, that of the weights 2"),
        (("--init-from", model, "--model.width=64"), "the run:\n  - model.width is 64, that of the weights 48\n"),
    ):
        assert said in refused("launch/pretrain_ecp.py", *words, *options)
    assert play("launch/pretrain_ecp.py", *words, "--init-from", model).returncode == 0
    assert not run_folder.exists()
    assert "File name too long" in refused("launch/pretrain_ecp.py", *words, f"--training.output_dir={'x' * 300}")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    message = refused("launch/pretrain_ecp.py", *words, f"--training.output_dir={tmp_path / 'dangling' / 'run'}")
    assert "dangling is no folder" in message


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--optimizer.learning_rate=1",), "a jump by more than 2"),
        (("--training.seed=2",), "training.seed was 1 and is now 2"),
        (("--checkpoint.mirror={other}",), "has the checkpoints of /another/run, expected those of"),
        (("--resume=never",), "holds checkpoints; pass --resume auto"),
        (("--training.output_dir={gone}", "--checkpoint.mirror={mirror}", "--resume=never"), "checkpoint.mirror"),
        (("--init-from=nowhere",), None),
    ],
)
def test_a_dry_run_refuses_what_a_launch_refuses(
    options: tuple[str, ...], said: str | None, sharded_text: ShardedText, tmp_path: Path
) -> None:
    run_folder, places = tmp_path / "run", {name: tmp_path / name for name in ("other", "gone", "mirror")}
    shutil.copytree(trained(Layout(), sharded_text), run_folder)
    for name, owner in (("other", "/another/run"), ("mirror", str(places["gone"]))):
        shutil.copytree(run_folder / "checkpoints", places[name] / "checkpoints")
        (places[name] / OWNER).write_text(f"{owner}\n")
    words = [*Layout().options(sharded_text, run_folder), "--training.steps=13", "--resume=auto"]
    words += [option.format(**places) for option in options]
    dry = play("launch/pretrain_ecp.py", *words, "--dry-run")
    before = sorted(path for path in tmp_path.rglob("*") if path.suffix == ".pt")
    if said is None:
        assert dry.returncode == 0, dry.stderr
        train(parse(words, ""))
        return
    assert (dry.returncode, said in dry.stderr) == (2, True), dry.stderr
    with pytest.raises(InputError, match=re.escape(said)):
        train(parse(words, ""))
    assert sorted(path for path in tmp_path.rglob("*") if path.suffix == ".pt") == before


def test_a_backend_that_cannot_serve_is_refused(sharded_text: ShardedText, tmp_path: Path) -> None:
    words = ("--config", "demo", "--data.prefix", sharded_text.prefix, "--training.output_dir", tmp_path / "run")
    message = refused("launch/pretrain_ecp.py", *words, "--attention.backend=flex")
    assert "attention.backend is flex, but FlexAttention has no backward pass on a CPU; use auto" in message


def test_a_wrong_prefix_is_found_before_libraries_load(sharded_text: ShardedText, tmp_path: Path) -> None:
    words = ("--config", "demo", "--training.output_dir", tmp_path / "run")
    for options in (
        ("--data.prefix", tmp_path / "x"),
        ("--data.prefix", sharded_text.prefix, "--data.validation_prefix", tmp_path / "x"),
    ):
        done = run("launch/pretrain_ecp.py", *words, *options)
        assert done.returncode == 2
        assert "x.manifest.json: No such file" in done.stderr
        assert "loading libraries" not in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("tool", ["data_tools/preprocess.py", "data_tools/train_tokenizer.py"])
def test_missing_and_empty_corpora(tool: str, sharded_text: ShardedText, tmp_path: Path) -> None:
    rest: tuple[object, ...] = ("--output", tmp_path / "t.model", "--vocab-size", 400)
    if "preprocess" in tool:
        rest = ("--tokenizer", f"sentencepiece:{sharded_text.tokenizer}", "--output-prefix", tmp_path / "out")
    assert "nowhere.txt: no such file" in refused(tool, "--input", tmp_path / "nowhere.txt", *rest)
    (tmp_path / "empty.txt").touch()
    assert "the corpus is empty" in refused(tool, "--input", tmp_path / "empty.txt", *rest)
    (tmp_path / "blank.txt").write_text("\n \n")
    message = refused(tool, "--input", tmp_path / "blank.txt", *rest)
    assert "blank.txt" in message


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": \n{"text": "x"}\n', "a.jsonl, line 1 (byte 0): not valid JSON"),
        ("a.jsonl", b'{"body": "x"}\n', "a.jsonl, line 1 (byte 0): no key 'text'"),
        ("a.jsonl", b'{"text": 5}\n', "'text' is int, expected text"),
        ("a.txt", b"abc \xff\xfe", "a.txt: not valid UTF-8 at byte 4"),
        ("a.pdf", b"abc", "a.pdf: its ending is none of those that are read (.txt, .tokens"),
    ],
)
def test_files_that_are_no_text(
    name: str, content: bytes, message: str, sharded_text: ShardedText, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    options = ("--tokenizer", f"sentencepiece:{sharded_text.tokenizer}", "--output-prefix", tmp_path / "out")
    assert message in refused("data_tools/preprocess.py", "--input", tmp_path / name, *options)
    assert not list(tmp_path.glob("out*")), "something was left behind"


def test_tokenizers_that_are_none(sharded_text: ShardedText, tmp_path: Path) -> None:
    options = ("--input", sharded_text.text, "--output-prefix", tmp_path / "out", "--tokenizer")
    assert "expected sentencepiece:FILE" in refused("data_tools/preprocess.py", *options, "bert")
    assert "not a sentencepiece model" in refused(
        "data_tools/preprocess.py", *options, f"sentencepiece:{sharded_text.text}"
    )


@pytest.fixture
def training(tmp_path: Path) -> Callable[..., list[str]]:
    """Options of a training run on a text."""

    def options(text: ShardedText) -> list[str]:
        return Layout().options(text, tmp_path / "run")

    return options


def test_training_refuses_shards_that_are_damaged(tmp_path: Path, training: Callable[..., list[str]]) -> None:
    text = write_sharded_text(tmp_path / "text")
    data = next(Path(text.prefix).parent.glob("*00000-of-*.bin"))
    data.write_bytes(data.read_bytes()[:-2])
    message = refused("launch/pretrain_ecp.py", *training(text), ranks=2)
    assert f"{data.name}: {data.stat().st_size} bytes, expected {data.stat().st_size + 2}" in message
    (Path(text.prefix).parent / "train.tokenizer.model").write_bytes(b"another")
    assert "were made with" in refused("launch/pretrain_ecp.py", *training(text))


def test_training_refuses_ranks_that_tensor_parallelism_does_not_divide(
    sharded_text: ShardedText, training: Callable[..., list[str]]
) -> None:
    message = refused("launch/pretrain_ecp.py", *training(sharded_text), "--parallel.tensor=2", ranks=3)
    assert "the launch has 3 ranks, not a multiple of parallel.tensor * parallel.context = 2 * 1" in message


def test_training_refuses_a_vocabulary_smaller_than_the_tokenizers(
    sharded_text: ShardedText, training: Callable[..., list[str]]
) -> None:
    message = refused("launch/pretrain_ecp.py", *training(sharded_text), "--model.vocab_size=300")
    assert "model.vocab_size is 300, but the tokenizer of" in message


def test_training_refuses_a_folder_that_cannot_be_written(
    sharded_text: ShardedText, training: Callable[..., list[str]], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    folder = f"--training.output_dir={tmp_path / 'file' / 'run'}"
    assert "Not a directory" in refused("launch/pretrain_ecp.py", *training(sharded_text), folder)


def test_conversion_refuses_a_folder_without_a_complete_checkpoint(tmp_path: Path) -> None:
    message = refused("launch/convert_checkpoint.py", "--checkpoint", tmp_path, "--output", tmp_path / "model")
    assert "expected a complete checkpoint" in message


def test_generation(model: Path) -> None:
    out = run_successfully("launch/generate.py", "--model", model, "--prompt", "def main(", "--max-new-tokens", 12)
    assert out.startswith("def main(")
    assert len(out) > len("def main(") + 5
    assert "--prompt is empty" in refused("launch/generate.py", "--model", model, "--prompt", "")
    assert "nowhere" in refused("launch/generate.py", "--model", model / "nowhere", "--prompt", "x")


def test_generation_from_files_in_samples_as_json(model: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    lines = [{"question": "def main("}, {"question": "import "}]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines) + "\n")
    how = ("--top-p", 0.9, "--min-p", 0.01, "--top-k", 20, "--repetition-penalty", 1.2, "--seed", 5)
    words = ("--model", model, "--prompt-file", prompts, "--text-key", "question", "--max-new-tokens", 12)
    out = run_successfully("launch/generate.py", *words, "--num-samples", 2, "--json", "--stop", "e", *how)
    found = [json.loads(line) for line in out.splitlines()]
    assert [(entry["prompt"], entry["seed"]) for entry in found] == [
        (line["question"], seed) for line in lines for seed in (5, 6)
    ]
    assert all("e" not in entry["text"] and entry["tokens"] <= 12 for entry in found)
    assert len({entry["text"] for entry in found}) > 1
    prompts.write_text('{"question": 5}\n')
    for text, message in {
        '{"question": 5}': "prompts.jsonl, line 1: 'question' is int, expected text",
        '{"text": "x"}': "line 1: expected a JSON object with 'question'",
        "{": "line 1: expected a JSON object",
        "\n": "holds no prompts",
    }.items():
        prompts.write_text(text)
        assert message in refused("launch/generate.py", *words)


def test_a_prompt_of_a_megabyte_is_read_and_repeated(model: Path, sharded_text: ShardedText) -> None:
    prompt = ("\n".join(sharded_text.documents) * 4)[:1_000_000] + "  caf\u00e9\t"
    assert len(prompt) > 1_000_000
    words = [sys.executable, ROOT / "launch" / "generate.py", "--model", model, "--prompt-file", "-"]
    done = subprocess.run(
        [*map(str, words), "--max-new-tokens", "8"], input=prompt.encode(), env=environment(), capture_output=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith(prompt.encode())
    assert b" tokens in " in done.stderr


def test_evaluation_of_text_and_of_its_shards_agree(model: Path, sharded_text: ShardedText, tmp_path: Path) -> None:
    results = []
    for number, data in enumerate((sharded_text.text, sharded_text.prefix)):
        output = tmp_path / f"{number}.json"
        options = ("--model", model, "--data", data, "--json", output, "--unigram", sharded_text.prefix)
        out = run_successfully("launch/evaluate.py", *options)
        assert "bits_per_byte" in out
        results.append(json.loads(output.read_text()))
        assert f"{results[-1]['word_perplexity']:.4f}" in out
        assert "WikiText in the literature (Transformer-XL, Perceiver AR): compare word_and_line_end_perplexity" in out
        assert "NOT COMPARABLE" not in out
    assert results[0]["line_ends"] == sum(text.count("\n") for text in sharded_text.documents)
    assert {**results[0], "data": ""} == {**results[1], "data": ""}
    assert results[0]["protocol"] == "stream"


def test_evaluation_refuses_shards_of_another_tokenizer(model: Path, tmp_path: Path) -> None:
    other = write_sharded_text(tmp_path / "other", vocab_size=500)
    assert "were made with tokenizer" in refused("launch/evaluate.py", "--model", model, "--data", other.prefix)

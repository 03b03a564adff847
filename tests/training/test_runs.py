"""Runs that are killed, resumed, stopped, extended and refused."""

import dataclasses
import json
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest

from ecp_scale.checkpoint.folder import RECORD, CheckpointRecord, complete_checkpoints, find_checkpoint
from ecp_scale.checkpoint.identity import check_continues
from ecp_scale.command_line import parse
from ecp_scale.data.blend import Blend
from ecp_scale.data.corpus import Corpus
from ecp_scale.data.digest import sample_digest
from ecp_scale.data.manifest import TokenizerRecord
from ecp_scale.errors import InputError
from ecp_scale.preparation.preprocessing import preprocess
from ecp_scale.training.corpora import with_vocabulary
from tests.corpus import ShardedText
from tests.launching import command, environment, metrics, run, run_successfully
from tests.parallel.layouts import Layout, trained

SCRIPT = "launch/pretrain_ecp.py"
LAYOUT = Layout(data=2, zero=1, settings="paper")
KILLED_AT = 7


def options(text: ShardedText, output: Path) -> list[str]:
    """A run with dropout, accumulation and a checkpoint every 4 steps of 12."""
    return [
        *LAYOUT.options(text, output),
        *("--model.dropout=0.1", "--checkpoint.every_steps=4", "--training.steps=12", "--resume=auto"),
    ]


def losses(folder: Path) -> list[tuple[int, float, float]]:
    """Step, loss and gradient norm of every record."""
    return [(record["step"], record["loss"], record["grad_norm"]) for record in metrics(folder)]


def start_until(words: list[str], reached: Callable[[], bool]) -> subprocess.Popen[str]:
    """Start a launch and return when ``reached`` says so."""
    process = subprocess.Popen(words, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 240
    while not reached():
        assert process.poll() is None, "the launch ended too early"
        assert time.monotonic() < deadline, "the launch did not get there"
        time.sleep(0.02)
    return process


def kill(process: "subprocess.Popen[str]") -> None:
    """SIGKILL to a launch and all of its ranks."""
    for victim in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
        with suppress(psutil.NoSuchProcess):
            victim.kill()
    process.wait()


def rank_of(process: "subprocess.Popen[str]", number: int) -> psutil.Process:
    """A rank of a launch."""
    children = psutil.Process(process.pid).children(recursive=True)
    (rank,) = [child for child in children if child.environ().get("RANK") == str(number)]
    return rank


def has_done(folder: Path, steps: int) -> bool:
    """Whether a run is at least so far."""
    return steps_done(folder) >= steps


def steps_done(folder: Path) -> int:
    """Records in the metrics of a run that may not have begun."""
    file = folder / "metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


@pytest.fixture(scope="module")
def uninterrupted(sharded_text: ShardedText, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is never killed."""
    output = tmp_path_factory.mktemp("uninterrupted") / "run"
    run_successfully(SCRIPT, *options(sharded_text, output), ranks=2)
    return output


@pytest.fixture(scope="module")
def killed(sharded_text: ShardedText, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, of which a rank was killed at step 7, left with a half-written newer checkpoint."""
    output = tmp_path_factory.mktemp("killed") / "run"
    words = command(SCRIPT, 2, options(sharded_text, output))
    process = start_until(words, lambda: steps_done(output) >= KILLED_AT)
    first, second = (rank_of(process, number) for number in range(2))
    second.kill()
    # At some moment of the next second the launcher asks the other to end; here at every moment.
    with suppress(psutil.NoSuchProcess):
        while first.status() != psutil.STATUS_ZOMBIE:
            first.terminate()
            time.sleep(0.001)
    _, errors = process.communicate(timeout=60)
    assert f"stopped: rank 1 of 2 on host {socket.gethostname()} (process " in errors
    done = steps_done(output)
    assert KILLED_AT <= done < 12
    newest = find_checkpoint(output)
    torn = newest.with_name("step-00000099")
    shutil.copytree(newest, torn)
    (torn / RECORD).unlink()
    return output


def test_a_killed_and_resumed_run_repeats_the_uninterrupted_one_to_the_bit(
    uninterrupted: Path, killed: Path, sharded_text: ShardedText
) -> None:
    expected = losses(uninterrupted)
    before = losses(killed)
    assert before == expected[: len(before)]
    assert run(SCRIPT, *options(sharded_text, killed), ranks=2).returncode == 0
    assert losses(killed) == expected
    assert len(expected) == 12


def test_a_folder_with_checkpoints_is_not_overwritten_without_resume(
    uninterrupted: Path, sharded_text: ShardedText
) -> None:
    done = run(SCRIPT, *options(sharded_text, uninterrupted), "--resume=never", ranks=2)
    assert done.returncode == 2
    assert done.stderr.count("error:") == 1
    assert "holds checkpoints; pass --resume auto" in done.stderr


def test_a_run_killed_three_times_and_resumed_on_other_ranks_reads_and_learns_the_same(
    sharded_text: ShardedText, tmp_path: Path
) -> None:
    """Numbers of ranks and accumulation steps, ZeRO stages, tensor parallelism and offload come and go."""
    output = tmp_path / "run"
    expected = metrics(trained(Layout(), sharded_text))
    lives = (Layout(data=2, zero=1), Layout(zero=0), Layout(tensor=2, zero=3), Layout(data=2, zero=2, offload=True))
    for number, layout in enumerate(lives, start=1):
        often = [*layout.options(sharded_text, output), "--checkpoint.every_steps=2", "--resume=auto"]
        words = command(SCRIPT, layout.ranks, often, "torchrun")
        if number == len(lives):
            assert subprocess.run(words, env=environment(), capture_output=True).returncode == 0
        else:
            kill(start_until(words, partial(has_done, output, 3 * number)))
            assert 3 * number <= steps_done(output) < len(expected)
    records = metrics(output)
    assert [record["data_digest"] for record in records] == [record["data_digest"] for record in expected]
    for key in ("loss", "grad_norm"):
        assert [record[key] for record in records] == pytest.approx([record[key] for record in expected], abs=1e-5), key
    audit = run_successfully("launch/audit_data.py", output)
    assert f"agrees up to step {len(expected)}" in audit


def test_a_resume_with_another_model_names_what_differs(uninterrupted: Path, sharded_text: ShardedText) -> None:
    changed = ("--model.heads=4", "--training.seed=9")
    done = run(SCRIPT, *options(sharded_text, uninterrupted), *changed)
    assert done.returncode == 2
    for part in ("model.heads was 8 and is now 4", "training.seed was 1 and is now 9"):
        assert part in done.stderr


def test_a_run_continues_with_another_geometry(sharded_text: ShardedText, tmp_path: Path) -> None:
    words = Layout(zero=1).options(sharded_text, tmp_path / "run")
    changed = ("--model.sequence_length=96", "--model.segment_length=24", "--model.allow_short_receptive_field=true")
    runs = [
        [*words, "--training.steps=12"],
        [*words, "--training.steps=16", "--resume=auto", "--allow-rate-jump", *changed],
    ]
    jobs = tmp_path / "jobs.json"
    jobs.write_text(json.dumps([{"options": words, "probed": False} for words in runs]))
    run_successfully("tests/parallel/train_layouts.py", jobs)
    records = metrics(tmp_path / "run")
    batch = 4
    assert [record["tokens"] for record in records] == [
        *(step * batch * 64 for step in range(1, 13)),
        *(12 * batch * 64 + step * batch * 96 for step in range(1, 5)),
    ]
    assert max(record["loss"] for record in records[12:]) < records[0]["loss"] - 0.3
    assert find_checkpoint(tmp_path / "run").name == "step-00000016"


def test_a_blend_may_change_in_mid_run_and_the_audit_agrees(sharded_text: ShardedText, tmp_path: Path) -> None:
    other = str(tmp_path / "other")
    preprocess([str(sharded_text.text)], f"sentencepiece:{sharded_text.tokenizer}", other, shard_tokens=100_000)
    words = [word for word in Layout(zero=1).options(sharded_text, tmp_path / "run") if "data.prefix" not in word]
    tokens_per_step = 4 * 64
    first = {0: {sharded_text.prefix: 0.5, other: 0.5}}
    second = {**first, 5 * tokens_per_step: {sharded_text.prefix: 0.1, other: 0.9}}
    runs = [
        [*words, f"--data.blend={json.dumps(blend)}", f"--training.steps={steps}", "--resume=auto", "--allow-rate-jump"]
        for blend, steps in ((first, 5), (second, 9))
    ]
    jobs = tmp_path / "jobs.json"
    jobs.write_text(json.dumps([{"options": words, "probed": False} for words in runs]))
    run_successfully("tests/parallel/train_layouts.py", jobs)
    records = metrics(tmp_path / "run")
    assert len({record["data_digest"] for record in records}) == 9
    agreed = run_successfully("launch/audit_data.py", tmp_path / "run")
    assert f"agrees up to step 9 ({9 * tokens_per_step:,} tokens, data digest {records[-1]['data_digest']})" in agreed

    changed = {0: {sharded_text.prefix: 0.9, other: 0.1}}
    refused = run(SCRIPT, *words, f"--data.blend={json.dumps(changed)}", "--training.steps=12", "--resume=auto")
    assert refused.returncode == 2
    assert "data.blend was" in refused.stderr
    records[6]["data_digest"] = records[5]["data_digest"]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    audit = run("launch/audit_data.py", tmp_path / "run")
    assert audit.returncode == 1
    assert "agrees up to step 6, then not: step 7 says" in audit.stdout


def test_another_text_of_equal_size_is_not_continued_and_the_audit_disagrees(
    sharded_text: ShardedText, tmp_path: Path
) -> None:
    # With a tokenizer of bytes, one letter for another leaves every size as it is.
    prefix, source = tmp_path / "shards" / "x", tmp_path / "a.txt"
    source.write_text(sharded_text.documents[0])
    preprocess([str(source)], "byte", str(prefix))
    words = [word for word in Layout(zero=1).options(sharded_text, tmp_path / "run") if "--data." not in word]
    words = [*words, f"--data.prefix={prefix}", "--resume=auto"]
    run_successfully(SCRIPT, *words, "--training.steps=2")
    assert "agrees up to step 2" in run_successfully("launch/audit_data.py", tmp_path / "run")
    shutil.rmtree(prefix.parent)
    source.write_text(sharded_text.documents[0].replace("e", "a", 1))
    preprocess([str(source)], "byte", str(prefix))
    done = run(SCRIPT, *words, "--training.steps=4")
    assert done.returncode == 2
    assert "data.prefix or data.blend: the hash of the shards was" in done.stderr
    assert "the number of tokens was" not in done.stderr
    audit = run("launch/audit_data.py", tmp_path / "run")
    assert audit.returncode == 1
    assert "agrees up to step 0, then not" in audit.stdout


def test_a_run_of_an_earlier_version_goes_on_and_is_audited_by_number(
    sharded_text: ShardedText, tmp_path: Path
) -> None:
    words = [*Layout(zero=1).options(sharded_text, tmp_path / "run"), "--resume=auto"]
    run_successfully(SCRIPT, *words, "--training.steps=2")
    # Written over as an earlier version would have: other names, and neither digest nor record with hashes.
    config = parse(["--config", str(tmp_path / "run" / "config.yaml"), "--dry-run"], "").config
    blend = Blend(config.data.phases, config.model.sequence_length, config.training.seed)
    records, digest = metrics(tmp_path / "run"), 0
    for record in records:
        last = record["tokens"] // config.model.sequence_length
        for sample in range(last - config.training.global_batch_size, last):
            digest = (digest + sample_digest(sample, *blend.locate(sample))) % 2**64
        del record["data_digest"]
        record["ledger"] = f"{digest:016x}"
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    path = find_checkpoint(tmp_path / "run") / RECORD
    content = json.loads(path.read_text())
    del content["data"]["corpora_sha256"], content["data_digest"]
    content |= {"format_version": 3, "ledger": f"{digest:016x}", "layouts": content.pop("partitions")}
    content["model"]["allow_short_reach"] = content["model"].pop("allow_short_receptive_field")
    content["optimizer"]["minimum_ratio"] = content["optimizer"].pop("min_lr_ratio")
    path.write_text(json.dumps(content))
    run_successfully(SCRIPT, *words, "--training.steps=4")
    audit = run_successfully("launch/audit_data.py", tmp_path / "run")
    assert "up to step 2 the digest knows the windows by number" in audit
    assert "agrees up to step 4" in audit


def test_a_damaged_token_ends_the_run_by_name_whichever_rank_reads_it(
    sharded_text: ShardedText, tmp_path: Path
) -> None:
    shutil.copytree(Path(sharded_text.prefix).parent, tmp_path / "shards")
    prefix = tmp_path / "shards" / Path(sharded_text.prefix).name
    data = sorted(tmp_path.glob("shards/*.bin"))[0]
    ids = np.fromfile(data, dtype=np.uint16)
    ids[200:] = 60_000
    ids.tofile(data)
    words = [
        word for word in Layout(data=2, zero=1).options(sharded_text, tmp_path / "run") if "data.prefix" not in word
    ]
    done = run(SCRIPT, *words, f"--data.prefix={prefix}", ranks=2)
    assert done.returncode != 0
    assert f"{data}: id 60000 at place" in done.stderr
    assert "but the tokenizer has 400 entries" in done.stderr


@pytest.mark.parametrize("targets", [[400], [-1, 3], list(range(400))])
def test_untrained_targets_that_are_none_or_all_are_refused(
    targets: list[int], sharded_text: ShardedText, tmp_path: Path
) -> None:
    words = [*Layout().options(sharded_text, tmp_path / "run"), f"--data.loss_ignore_ids={json.dumps(targets)}"]
    config = parse([*map(str, words), "--dry-run"], "").config
    held = "every id" if len(targets) == 400 else r"the ids \["
    with pytest.raises(InputError, match=rf"data\.loss_ignore_ids holds {held}.* has the 400 entries 0 to 399"):
        with_vocabulary(config, Corpus(sharded_text.prefix, 64))


def test_a_compression_does_not_continue_with_other_sizes(sharded_text: ShardedText, tmp_path: Path) -> None:
    # The record alone decides: no weights are read.
    config = parse(
        ["--config", "demo", "--model.architecture=compressed_double_attention", "--model.vocab_size=400"], ""
    ).config
    record = CheckpointRecord(
        step=3,
        tokens=10,
        data_digest="0" * 16,
        skipped_steps=0,
        world_size=1,
        tensor_parallel=1,
        zero_stage=1,
        precision="fp32",
        model=dataclasses.asdict(config.model),
        attention=dataclasses.asdict(config.attention),
        data={},
        tokenizer=TokenizerRecord("sentencepiece", "tokenizer.model", "0" * 64, 400, 2),
        tokenizer_file="tokenizer.model",
        partitions={},
        files={},
    )
    longer = dataclasses.replace(config.model, sequence_length=1024)
    kept = dataclasses.replace(longer, latents=768, segment_length=64)
    now = {"model": dataclasses.asdict(longer), "attention": record.attention}
    with pytest.raises(InputError, match="a context of 256 tokens to 128 rows and cannot compress 512 to 256"):
        check_continues(record, tmp_path, now)
    check_continues(record, tmp_path, {**now, "model": dataclasses.asdict(kept)})


def test_the_run_folder_repeats_the_run(uninterrupted: Path, sharded_text: ShardedText, tmp_path: Path) -> None:
    again = ("--config", uninterrupted / "config.yaml", "--training.output_dir", tmp_path / "again")
    resolved = json.loads((uninterrupted / "deepspeed.json").read_text())
    assert resolved["train_batch_size"] == 4
    run_successfully(SCRIPT, *again, "--deepspeed_config", uninterrupted / "deepspeed.json", ranks=2)
    assert losses(tmp_path / "again") == losses(uninterrupted)


def test_sigterm_to_one_rank_saves_and_ends_all_cleanly_and_the_run_can_be_extended(
    sharded_text: ShardedText, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    unlimited = [word for word in options(sharded_text, output) if "training.steps" not in word]
    process = start_until(command(SCRIPT, 2, [*unlimited, "--training.steps=2000"]), lambda: steps_done(output) >= 5)
    rank_of(process, 1).send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0
    done = steps_done(output)
    assert done < 2000
    assert find_checkpoint(output).name == f"step-{done:08d}"
    run_successfully(SCRIPT, *unlimited, f"--training.steps={done + 2}", "--allow-rate-jump", ranks=2)
    assert steps_done(output) == done + 2


def test_old_checkpoints_are_removed_when_asked(sharded_text: ShardedText, tmp_path: Path) -> None:
    output = tmp_path / "run"
    more = ("--checkpoint.every_steps=2", "--training.steps=7", "--checkpoint.keep_last=2", "--logging.wandb=offline")
    peak = ("--logging.peak_teraflops=0.5",)
    run_successfully(SCRIPT, *options(sharded_text, output), *more, *peak)
    assert [folder.name for folder in complete_checkpoints(output)] == ["step-00000006", "step-00000007"]
    assert list((output / "wandb").glob("offline-run-*")), "no offline wandb run"
    keys = {"step", "tokens", "loss", "grad_norm", "lr", "step_seconds", "tokens_per_second", "mfu"}
    keys |= {"peak_memory_bytes", "skipped_steps"}
    assert all(keys <= record.keys() for record in metrics(output))
    flops_per_token = parse(["--config", str(output / "config.yaml")], "").config.model.flops_per_token
    for record in metrics(output):
        assert record["mfu"] == pytest.approx(record["tokens_per_second"] * flops_per_token / 0.5e12)


def test_a_run_that_diverges_says_so_in_one_message(sharded_text: ShardedText, tmp_path: Path) -> None:
    wild = ("--optimizer.name=sgd", "--optimizer.learning_rate=1e18", "--optimizer.gradient_clipping=0")
    done = run(SCRIPT, *options(sharded_text, tmp_path / "run"), *wild)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "stopped: step 2: the loss is nan; the weights have not been updated with it; last checkpoint: none" in (
        done.stderr
    )

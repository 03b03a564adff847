"""Spikes of the loss: found, gone back from, their samples passed over, and all of it in the record of the run."""

import dataclasses
import errno
import json
import math
import random
import shutil
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from ecp_scale.checkpoint import folder, mirror, resuming
from ecp_scale.checkpoint.folder import CheckpointRecord, checkpoints_folder, find_checkpoint
from ecp_scale.checkpoint.resuming import find_start
from ecp_scale.command_line import parse
from ecp_scale.config import CheckpointConfig, Config, TrainingConfig
from ecp_scale.data.blend import Blend
from ecp_scale.data.corpus import Corpus
from ecp_scale.data.passed_over import PassedOver, union
from ecp_scale.training import checkpoints, rolling_back
from ecp_scale.training.events import read_events
from ecp_scale.training.loop import train
from ecp_scale.training.spikes import LEAST, WINDOW, SpikeWatch
from tests.corpus import ShardedText
from tests.launching import metrics, run_successfully
from tests.parallel.layouts import Layout

SPIKE, STEPS = 26, 34
"""The step whose samples are corrupted, and the length of the runs."""
SEQUENCES, N = 4, 64
SLOW = pytest.mark.exhaustive


@pytest.mark.parametrize("seed", range(20))
def test_samples_are_those_outside_of_the_ranges(seed: int) -> None:
    drawn = random.Random(seed)
    ranges: dict[int, int] = {}
    for _ in range(drawn.randint(0, 5)):
        first = drawn.randint(0, 60)
        ranges = union(ranges, {first: first + drawn.randint(0, 9)})
    assert TrainingConfig(skip_samples=ranges).problems() == []
    left = [number for number in range(400) if not any(first <= number <= last for first, last in ranges.items())]
    passed = PassedOver(ranges)
    assert [passed.sample(position) for position in range(200)] == left[:200]
    for read in range(100):
        assert passed.reached(read) == (left[read - 1] + 1 if read else 0)
        assert passed.behind(read) == {a: b for a, b in ranges.items() if read and a < left[read - 1]}


def test_ranges_that_are_none_are_refused_by_field() -> None:
    for ranges, said in (
        ({5: 3}, "training.skip_samples from 5 to 3, expected"),
        ({-1: 3}, "training.skip_samples from -1 to 3, expected"),
        ({1: 5, 5: 9}, "training.skip_samples: 1 to 5 and 5 to 9 have samples in common"),
    ):
        assert said in " ".join(TrainingConfig(skip_samples=ranges).problems())
    for field in ("spike_score", "spike_skip_steps"):
        assert TrainingConfig(**{field: 0}).problems() == [f"training.{field} is 0, expected more than 0"]


def test_a_blend_counts_what_it_has_shown_without_what_it_passed_over(sharded_text: ShardedText) -> None:
    phases = [(0, {sharded_text.prefix: 1.0})]
    ranges = {3: 5, 10: 10}
    blend = Blend(phases, N, 1, ranges)
    samples = list(blend.samples(0, 12))
    assert samples == [0, 1, 2, 6, 7, 8, 9, 11, 12, 13, 14, 15]
    assert [list(blend.samples(at * N, 2)) for at in (1, 2, 6)] == [[1, 2], [2, 6], [9, 11]]
    plain = Blend(phases, N, 1)
    assert [blend.locate(sample) for sample in samples] == [plain.locate(sample) for sample in samples]
    ((corpus, times),) = blend.epochs(12 * N)
    assert times == pytest.approx(12 / corpus.windows)
    skipped = [blend.history(read * N)["skip_samples"] for read in (0, 3, 4, 7, 8)]
    assert skipped == [[], [], [[3, 5]], [[3, 5]], [[3, 5], [10, 10]]]


def test_the_watch_finds_what_is_far_above_and_nothing_else() -> None:
    drawn = random.Random(1)
    for noise in (0.0, 0.001, 0.05, 0.3):
        watch = SpikeWatch(10.0)
        for step in range(400):
            loss = 2.5 + 4 * math.exp(-step / 40) + drawn.gauss(0, noise)
            assert watch.look(step, loss, math.exp(drawn.gauss(0, 0.3))) == [], (noise, step)
        (spike,) = watch.look(400, 2.7 + 14 * noise, 1.0)
        assert (spike.step, spike.what) == (400, "loss")
        assert spike.usual == pytest.approx(2.5, abs=4 * noise + 0.01)
        (spike,) = watch.look(401, 2.5, 1000.0)
        assert (spike.what, spike.value) == ("gradient norm", 1000.0)
        assert watch.look(402, 1.0, math.inf) == watch.look(403, 1.0, 0.0) == []


def test_the_watch_begins_anew_where_the_numbers_mean_something_else() -> None:
    watch = SpikeWatch(10.0)
    for step in range(LEAST):
        assert watch.look(step, 2.0 + step % 2 / 100, 1.0, "text") == []
    assert watch.look(LEAST, 9.0, 1.0, "code") == []
    for step in range(WINDOW):
        assert watch.look(step, 9.0, 1.0, "code") == []
    assert [spike.what for spike in watch.look(99, 12.0, 9.0, "code")] == ["loss", "gradient norm"]


def corrupted(text: ShardedText, folder: Path) -> str:
    """The shards with noise for the text of the samples of one step; their prefix."""
    source = Path(text.prefix)
    shutil.copytree(source.parent, folder)
    prefix = folder / source.name
    blend = Blend([(0, {str(prefix): 1.0})], N, 1)
    corpus = blend.corpora[0]
    drawn = np.random.default_rng(1)
    borders = corpus._borders
    for sample in range((SPIKE - 1) * SEQUENCES, SPIKE * SEQUENCES):
        _, window = blend.locate(sample)
        shard = max(number for number, border in enumerate(borders[:-1]) if border <= window * N)
        ids = np.memmap(folder / f"{corpus.manifest.shards[shard].name}.bin", dtype=corpus.manifest.dtype, mode="r+")
        at = window * N - borders[shard]
        ids[at : at + N] = drawn.integers(259, 400, len(ids[at : at + N]))
        ids.flush()
    assert Corpus(str(prefix), N).digest == corpus.digest  # which is of the manifest: the damage is not seen
    return str(prefix)


def words(text: ShardedText, prefix: str, run: Path, *more: str, zero: int = 1) -> list[str]:
    layout = [*map(str, Layout(zero=zero).options(text, run))]
    return [
        *layout,
        f"--data.prefix={prefix}",
        "--optimizer.schedule=constant",
        "--optimizer.warmup_tokens=0",
        "--training.seed=1",
        "--checkpoint.every_steps=5",
        "--training.spike_skip_steps=2",
        "--training.spike_score=4",  # so early a run is noisy
        f"--training.steps={STEPS}",
        *more,
    ]


ROLLED = ("--training.on_spike=roll_back", "--resume=auto")
PASSED = {(SPIKE - 2) * SEQUENCES: (SPIKE + 1) * SEQUENCES - 1}
"""Samples of the step before the spike, the spike, and the one after, whose message told of it."""


def weights(run: Path) -> dict[str, str]:
    """Digests of all parameters in the newest checkpoint."""
    found: dict[str, str] = json.loads((find_checkpoint(run) / "checkpoint.json").read_text())["digests"]
    return found


def steps(run: Path) -> list[dict[str, Any]]:
    names = ("step", "tokens", "loss", "grad_norm", "lr", "data_digest")
    return [{name: record[name] for name in names} for record in metrics(run)]


@pytest.fixture(scope="module")
def prefix(sharded_text: ShardedText, tmp_path_factory: pytest.TempPathFactory) -> str:
    return corrupted(sharded_text, tmp_path_factory.mktemp("corrupted") / "shards")


@pytest.mark.parametrize(
    ("zero", "more"),
    [
        (1, ()),
        (3, ("--checkpoint.asynchronous=true",)),
        (2, ("--optimizer.name=muon", "--optimizer.average_decay=0.9", "--training.micro_batch_size=4")),
    ],
    ids=["zero1", "zero3-asynchronous", "zero2-muon-average"],
)
def test_a_run_goes_back_from_a_spike_and_equals_one_that_never_read_it(
    sharded_text: ShardedText, prefix: str, tmp_path: Path, zero: int, more: tuple[str, ...]
) -> None:
    rolled, known = tmp_path / "rolled", tmp_path / "known"
    train(parse(words(sharded_text, prefix, rolled, *ROLLED, *more, zero=zero), ""))
    events = read_events(rolled)
    (spike,) = [event for event in events if event["event"] == "spike" and event["what"] == "loss"]
    (back,) = [event for event in events if event["event"] == "rolled back"]
    assert spike["step"] == SPIKE
    assert spike["value"] > spike["usual"] + 0.5
    assert (back["step"], back["from_step"]) == (20, SPIKE + 1)
    assert {back["samples"][0]: back["samples"][1]} == PASSED
    assert yaml.safe_load((rolled / "config.yaml").read_text())["training"]["skip_samples"] == PASSED

    train(parse(words(sharded_text, prefix, known, f"--training.skip_samples={PASSED}", *more, zero=zero), ""))
    assert not [event for event in read_events(known) if event.get("what") == "loss"]
    assert steps(rolled) == steps(known)
    assert weights(rolled) == weights(known)

    names = sorted(path.name for path in checkpoints_folder(rolled).iterdir())
    assert names == [*(f"step-{n:08}" for n in (5, 10, 15, 20, 25)), "step-00000025.rolled-back-1"] + [
        f"step-{n:08}" for n in (30, STEPS)
    ]
    assert CheckpointRecord.read(find_checkpoint(rolled)).data["skip_samples"] == [
        list(pair) for pair in PASSED.items()
    ]
    assert f"agrees up to step {STEPS}" in run_successfully("launch/audit_data.py", rolled)


def test_several_ranks_go_back_together(sharded_text: ShardedText, prefix: str, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    train(parse(words(sharded_text, prefix, one, *ROLLED), ""))
    run_successfully("launch/pretrain_ecp.py", *words(sharded_text, prefix, two, *ROLLED), ranks=2)
    assert [record["loss"] for record in steps(two)] == pytest.approx([record["loss"] for record in steps(one)], 1e-5)
    assert [record["data_digest"] for record in steps(two)] == [record["data_digest"] for record in steps(one)]
    assert Counter(event["event"] for event in read_events(two))["rolled back"] == 1


def test_what_a_run_has_chosen_to_pass_over_stays_when_it_is_started_again(
    sharded_text: ShardedText, prefix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    train(parse(words(sharded_text, prefix, run, *ROLLED), ""))
    again = words(sharded_text, prefix, run, *ROLLED)
    shutil.rmtree(checkpoints_folder(run) / f"step-{STEPS:08}")  # as if it had been killed on its way
    shutil.rmtree(checkpoints_folder(run) / "step-00000030")
    whole = steps(run)
    train(parse(again, ""))
    assert steps(run) == whole
    (run / "config.yaml").write_text("lost")  # the checkpoints know as well, once they are behind it
    train(parse([*again, f"--training.steps={STEPS + 2}"], ""))
    assert steps(run)[:STEPS] == whole
    assert "agrees up to step 36" in run_successfully("launch/audit_data.py", run)
    later = [*again, f"--training.steps={STEPS + 4}", "--training.skip_samples={200: 203}"]
    train(parse(later, ""))
    assert "agrees up to step 38" in run_successfully("launch/audit_data.py", run)
    capsys.readouterr()
    # By hand: a range that has been read already sends the run back to the checkpoint before it.
    by_hand = [*again, f"--training.steps={STEPS + 4}", "--training.skip_samples={60: 63}"]
    train(parse(by_hand, ""))
    said = capsys.readouterr().err
    assert "has read samples from 60 to 63, which training.skip_samples passes over" in said
    assert "resumed from" in said
    assert "step-00000015: step 15" in said
    assert "agrees up to step 38" in run_successfully("launch/audit_data.py", run)


def test_a_run_without_an_older_checkpoint_says_so_and_goes_on(
    sharded_text: ShardedText, prefix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    train(parse(words(sharded_text, prefix, run, *ROLLED, "--checkpoint.every_steps=100"), ""))
    said = capsys.readouterr().err
    assert f"step {SPIKE:,}  the loss is" in said
    assert (
        f"step {SPIKE + 1:,}  cannot go back, and goes on: no checkpoint from before step {SPIKE - 1:,} is left" in said
    )
    assert said.count("cannot go back") == 1
    assert len(metrics(run)) == STEPS


def test_a_spike_is_said_and_changes_nothing_unless_asked(
    sharded_text: ShardedText, prefix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [tmp_path / name for name in ("watched", "unwatched")]
    train(parse(words(sharded_text, prefix, runs[0]), ""))
    assert f"step {SPIKE:,}  the loss is" in capsys.readouterr().err
    train(parse(words(sharded_text, prefix, runs[1], "--training.spike_score=1e9"), ""))
    assert "  the loss is" not in capsys.readouterr().err
    assert steps(runs[0]) == steps(runs[1])
    assert weights(runs[0]) == weights(runs[1])


class Killed(BaseException):
    """As if the process had been killed there."""


@pytest.mark.parametrize("at", ["set_aside", *(pytest.param(at, marks=SLOW) for at in ("load", "leave_behind"))])
def test_a_run_that_is_killed_while_it_goes_back_does_so_when_it_is_started_again(
    sharded_text: ShardedText, prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    rolled, known = tmp_path / "rolled", tmp_path / "known"
    more = ("--checkpoint.every_steps=2", "--training.spike_skip_steps=6", f"--checkpoint.mirror={tmp_path / 'mirror'}")
    asked = words(sharded_text, prefix, rolled, *ROLLED, *more)
    module = resuming if at == "set_aside" else rolling_back
    real, calls = getattr(module, at), []

    def killed(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == (2 if at == "set_aside" else 1):  # of the renamed ones the second
            raise Killed
        return real(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(module, at, killed)
        with pytest.raises(Killed):
            train(parse(asked, ""))
    train(parse(asked, ""))
    ranges = yaml.safe_load((rolled / "config.yaml").read_text())["training"]["skip_samples"]
    assert ranges == {(SPIKE - 6) * SEQUENCES: (SPIKE + 1) * SEQUENCES - 1}
    train(parse(words(sharded_text, prefix, known, f"--training.skip_samples={ranges}"), ""))
    assert steps(rolled) == steps(known)
    assert weights(rolled) == weights(known)
    assert f"agrees up to step {STEPS}" in run_successfully("launch/audit_data.py", rolled)


@pytest.mark.parametrize("stopped_at", [SPIKE - 1, pytest.param(SPIKE - 2, marks=SLOW)])
def test_an_interrupted_run_goes_back_as_if_it_had_not_been(
    sharded_text: ShardedText, prefix: str, tmp_path: Path, stopped_at: int
) -> None:
    # A step's samples are passed over from the beginning, so what spikes is read a step earlier.
    rolled, known = tmp_path / "rolled", tmp_path / "known"
    asked = words(sharded_text, prefix, rolled, *ROLLED, "--training.skip_samples={8: 11}")
    shorter = [word for word in asked if not word.startswith("--training.steps")]
    train(parse([*shorter, f"--training.steps={stopped_at}", "--training.on_spike=warn"], ""))
    train(parse(asked, ""))
    ranges = {8: 11, **PASSED}
    assert yaml.safe_load((rolled / "config.yaml").read_text())["training"]["skip_samples"] == ranges
    train(parse(asked, ""))  # what it has chosen is not in the way of what was asked for
    train(parse(words(sharded_text, prefix, known, f"--training.skip_samples={ranges}"), ""))
    assert steps(rolled) == steps(known)
    assert weights(rolled) == weights(known)


def test_a_spike_of_the_last_step_is_gone_back_from(sharded_text: ShardedText, prefix: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(parse([*words(sharded_text, prefix, run, *ROLLED), f"--training.steps={SPIKE}"], ""))
    assert len(steps(run)) == SPIKE
    assert steps(run)[-1]["loss"] < 5
    ranges = yaml.safe_load((run / "config.yaml").read_text())["training"]["skip_samples"]
    assert ranges == {(SPIKE - 2) * SEQUENCES: SPIKE * SEQUENCES - 1}
    assert f"agrees up to step {SPIKE}" in run_successfully("launch/audit_data.py", run)


@pytest.mark.parametrize(("before", "after"), [(2, 1), *(pytest.param(*pair, marks=SLOW) for pair in ((3, 1), (1, 3)))])
def test_a_run_goes_back_to_a_checkpoint_of_another_layout(
    sharded_text: ShardedText, prefix: str, tmp_path: Path, before: int, after: int
) -> None:
    rolled, known = tmp_path / "rolled", tmp_path / "known"
    for run, more in ((rolled, ROLLED), (known, ("--resume=auto", f"--training.skip_samples={PASSED}"))):
        asked = [word for word in words(sharded_text, prefix, run, *more, zero=before) if "steps=" not in word]
        train(parse([*asked, "--checkpoint.every_steps=20", "--training.steps=20"], ""))
        train(parse([*words(sharded_text, prefix, run, *more, zero=after), "--checkpoint.every_steps=20"], ""))
    assert steps(rolled) == steps(known)
    assert weights(rolled) == weights(known)


def test_a_run_that_goes_back_to_before_a_change_of_its_batch_has_all_of_its_tokens(
    sharded_text: ShardedText, prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, tokens, batch = tmp_path / "run", STEPS * SEQUENCES * N, SEQUENCES - 1
    asked = [word for word in words(sharded_text, prefix, run, *ROLLED) if "training.steps=" not in word]
    train(parse([*asked, f"--training.tokens={10 * SEQUENCES * N}"], ""))

    def find(*arguments: Any) -> Any:
        shutil.rmtree(checkpoints_folder(run) / "step-00000010")
        return find_start(*arguments)

    monkeypatch.setattr(rolling_back, "find_start", find)
    more = [f"--training.global_batch_size={batch}", f"--training.tokens={tokens}", "--checkpoint.every_steps=100"]
    more += ["--optimizer.schedule=cosine", "--allow-rate-jump"]
    request = parse([*asked, *more], "")
    train(request)
    (back,) = [event for event in read_events(run) if event["event"] == "rolled back"]
    assert back["step"] == 5
    # The last step goes beyond the tokens that are asked for, from every place by another number of them.
    left = -(-(tokens // N - 5 * SEQUENCES) // batch)
    whole = (5 * SEQUENCES + left * batch) * N
    known = metrics(run)
    assert (known[-1]["step"], known[-1]["tokens"]) == (5 + left, whole)
    assert len({whole, request.config.run_tokens(), request.config.run_tokens(10, 10 * SEQUENCES * N)}) == 3
    rates = [request.config.optimizer.learning_rate_at(record["tokens"], whole) for record in known[5:]]
    assert [record["lr"] for record in known[5:]] == rates
    record = CheckpointRecord.read(find_checkpoint(run))
    assert (record.step, record.run_tokens) == (5 + left, whole)


def test_a_mirror_that_hangs_does_not_keep_a_run_from_going_back_and_has_the_new_checkpoints_then(
    sharded_text: ShardedText,
    prefix: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, place, last = tmp_path / "run", tmp_path / "mirror", "step-00000025"
    hangs, answers = threading.Event(), threading.Event()
    copy, listed, fill = mirror.copy_hashed, folder.saved_folders, rolling_back.load

    def copied(source: Path, target: Path) -> Any:
        if source.parent.name == last and target.is_relative_to(place) and not answers.is_set():
            hangs.set()
            assert answers.wait(60)
        return copy(source, target)

    def saved(of: Path) -> list[Path]:
        if of == place and hangs.is_set():
            assert answers.wait(60)
        return listed(of)

    def load(*arguments: Any) -> Any:
        answers.set()  # when the run has gone back without it
        return fill(*arguments)

    monkeypatch.setattr(checkpoints, "MIRROR_SECONDS", 0.1)
    monkeypatch.setattr(rolling_back, "load", load)
    monkeypatch.setattr(mirror, "copy_hashed", copied)
    for module in (folder, resuming):
        monkeypatch.setattr(module, "saved_folders", saved)
    train(parse(words(sharded_text, prefix, run, *ROLLED, f"--checkpoint.mirror={place}"), ""))
    assert "mirror      has got no file for 0 s, and is not waited for" in capsys.readouterr().err
    (back,) = [event for event in read_events(run) if event["event"] == "rolled back"]
    assert (back["step"], metrics(run)[-1]["step"]) == (20, STEPS)
    for name in (last, f"step-{STEPS:08}"):
        records = [CheckpointRecord.read(checkpoints_folder(of) / name) for of in (run, place)]
        assert records[0] == records[1]
        assert records[0].data["skip_samples"] == [list(pair) for pair in PASSED.items()]


def test_a_mirror_that_cannot_be_listed_is_done_without(
    sharded_text: ShardedText, prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, place, listed, goes_back = tmp_path / "run", tmp_path / "mirror", folder.saved_folders, threading.Event()

    def find(*arguments: Any) -> Any:
        goes_back.set()
        return find_start(*arguments)

    def saved(of: Path) -> list[Path]:
        if of == place and goes_back.is_set():
            raise OSError(errno.EIO, "Input/output error", str(of))
        return listed(of)

    monkeypatch.setattr(rolling_back, "find_start", find)
    for module in (folder, resuming):
        monkeypatch.setattr(module, "saved_folders", saved)
    train(parse(words(sharded_text, prefix, run, *ROLLED, f"--checkpoint.mirror={place}"), ""))
    (back,) = [event for event in read_events(run) if event["event"] == "rolled back"]
    assert (back["step"], metrics(run)[-1]["step"]) == (20, STEPS)


def test_samples_of_another_order_are_not_passed_over(sharded_text: ShardedText, prefix: str, tmp_path: Path) -> None:
    run, config = tmp_path / "run", Config()
    train(parse(words(sharded_text, prefix, run, *ROLLED), ""))
    of_run = parse(words(sharded_text, prefix, run), "").config
    longer = dataclasses.replace(of_run, model=dataclasses.replace(of_run.model, sequence_length=128))
    assert find_start(run, True, of_run).skip_samples == PASSED
    assert find_start(run, True, longer).skip_samples is None
    shutil.rmtree(checkpoints_folder(run))
    assert find_start(run, True, of_run).skip_samples is None  # it begins anew
    assert find_start(tmp_path / "nowhere", True, config).skip_samples is None


def test_ranges_that_touch_are_one() -> None:
    assert PassedOver({8: 11, 12: 15}).ranges == PassedOver({8: 15}).ranges == union({12: 15}, {8: 11}) == {8: 15}


def test_a_run_that_keeps_too_few_checkpoints_to_go_back_is_told_so() -> None:
    training = TrainingConfig(on_spike="roll_back", spike_skip_steps=10)
    for kept, every, told in ((1, 1000, True), (2, 10, True), (2, 11, False), (None, 5, False)):
        checkpoint = CheckpointConfig(keep_last=kept, every_steps=every)
        remarks = Config(training=training, checkpoint=checkpoint).remarks()
        assert any("roll_back goes back 10 steps and more" in remark for remark in remarks) == told

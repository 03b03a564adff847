"""launch/compare.py: its statistics, its table, and that it does no work twice."""

import dataclasses
import json
import math
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest

from ecp_scale.commands import cells, compare
from ecp_scale.commands.cells import TRIAL_STEPS, Launch, Plan, Watch, budgeted
from ecp_scale.commands.compare import read_command_line
from ecp_scale.commands.comparison_folder import Comparison
from ecp_scale.commands.side_by_side import gpu_of_thread
from ecp_scale.errors import InputError
from ecp_scale.evaluation.comparison import Cell, Summary, accuracy_table, plot, plot_accuracy, summaries, table
from ecp_scale.evaluation.ladder import fit, law_table, laws, plot_ladder
from tests.corpus import ShardedText
from tests.launching import ROOT, environment, run, run_successfully
from tests.parallel.layouts import RECIPE, SMALL_MODEL

SCRIPT = "launch/compare.py"


def cell(architecture: str, seed: int, bits: float, parameters: int = 1000) -> Cell:
    """A cell whose figures are easy to add up."""
    return Cell(
        architecture=architecture,
        seed=seed,
        protocol="sliding",
        token_perplexity=10 * bits,
        word_perplexity=100 * bits,
        bits_per_byte=bits,
        parameters=parameters,
        flops_per_token=2e6,
        trained_positions=64 if architecture == "ecp" else 32,
        tokens=500,
        tokens_per_second=1000.0,
        peak_memory_bytes=2**20 * seed,
        curve=[[100, 5.0], [500, 4.0 + seed]],
    )


CELLS = [cell("ecp", 1, 2.0), cell("ecp", 2, 2.4), cell("longlora", 1, 2.1, 1010), cell("longlora", 2, 2.5, 1010)]


def test_figures_are_means_and_sample_deviations_and_differences_are_paired() -> None:
    ecp, longlora = summaries(CELLS)
    assert ecp["bits_per_byte"] == Summary(pytest.approx(2.2), pytest.approx(0.2828, abs=1e-4))
    assert longlora["bits_per_byte_difference"] == Summary(pytest.approx(0.1), pytest.approx(0, abs=1e-12))
    assert longlora["parameters_difference"] == pytest.approx(0.01)
    rows = [" | ".join(words(line)) for line in table([ecp, longlora]).splitlines()]
    assert "ecp | 2.2000 ± 0.2828 |  | 22.00 ± 2.83" in rows[2]
    assert "longlora | 2.3000 ± 0.2828 | +0.1000 ± 0.0000" in rows[3]
    assert "1,010 (+1.00%) | 2.00 | 500 | 0.001 | 1,000 ± 0 | 2 ± 1" in rows[3]
    short = table([ecp, longlora], short=True).splitlines()
    assert max(map(len, short)) <= 100
    assert len({len(line) for line in short}) == 1


def test_points_are_compared_with_the_first_architecture_at_the_same_point() -> None:
    found = [
        dataclasses.replace(cell(name, 1, bits), point=point)
        for name, point, bits in (
            ("ecp", "2x8", 2.0),
            ("longlora", "2x8", 2.25),
            ("ecp", "4x8", 1.0),
            ("longlora", "4x8", 1.5),
        )
    ]
    records = summaries(found)
    assert [record["compared_with"] for record in records] == [None, "ecp 2x8", None, "ecp 4x8"]
    lines = [words(line) for line in table(records, short=True).splitlines()]
    assert lines[0][2] == "minus ecp there, paired"
    assert [line[2] for line in lines[2:]] == ["", "+0.2500", "", "+0.5000"]
    without = [one for one in found if one.label != "ecp 2x8"]  # it failed
    assert [record["compared_with"] for record in summaries(without, ("ecp", "2x8"))] == [None, None, "ecp 4x8"]
    assert "| minus ecp 4x8, paired |" in table(summaries(without, ("ecp", "2x8")))
    fewer = [*found, dataclasses.replace(found[0], seed=2)]
    assert words(table(summaries(fewer)).splitlines()[3])[0] == "longlora 2x8 (seeds: 1)"
    alone = table(summaries([one for one in found if one.architecture == "ecp"]), short=True).splitlines()
    assert [words(line)[2] for line in alone[2:]] == ["", "-1.0000"]


def words(line: str) -> list[str]:
    """Cells of a row of a table."""
    return [word.strip() for word in line.strip("| ").split("|")]


def test_probes_of_several_seeds_are_told_without_figures_of_a_text(tmp_path: Path) -> None:
    nothing = dict.fromkeys(("bits_per_byte", "token_perplexity", "word_perplexity"), math.nan)
    found = [dataclasses.replace(one, accuracy=[[8, one.seed / 4]], curve=[], **nothing) for one in CELLS]
    assert table(summaries(found)).count("nan") >= 4
    assert "0.375 ± 0.177" in accuracy_table(found)
    plot(found, tmp_path / "plot.svg")


@pytest.mark.parametrize("steps", [0, 1, 2, 300])
def test_a_run_that_was_stopped_is_no_finished_cell(
    steps: int, sharded_text: ShardedText, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (plan, _) = (one.in_folder(tmp_path, 300) for one in plans_of(sharded_text).plans)
    run_folder = tmp_path / plan.name
    lines = "".join(
        json.dumps({"step": step, "tokens": step, "data_digest": "0"}) + "\n" for step in range(1, steps + 1)
    )

    def stopped(words: list[str], **options: Any) -> subprocess.Popen[bytes]:
        (run_folder / "metrics.jsonl").write_text(lines)
        return popen([sys.executable, "-c", ""])

    popen = subprocess.Popen
    monkeypatch.setattr(cells.subprocess, "Popen", stopped)
    if steps == 300:
        cells.train(plan, Launch(1, 1, None))
        return
    with pytest.raises(InputError, match="was stopped before its end"):
        cells.train(plan, Launch(1, 1, None))
    assert plan.share_done == steps / 300


def test_an_interrupt_stops_the_cells_that_train(sharded_text: ShardedText, tmp_path: Path) -> None:
    words = [*options(sharded_text, tmp_path / "out"), "--architectures=ecp", "--training.steps=100000"]
    command = [sys.executable, str(ROOT / SCRIPT), *words]
    process = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True, start_new_session=True)
    record = tmp_path / "out" / "runs" / "ecp-seed1" / "metrics.jsonl"
    while not (record.exists() and record.read_text().count("\n") > 1):
        assert process.poll() is None, process.communicate()
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)  # to the comparison alone, as a scheduler may
    process.communicate(timeout=120)
    assert process.returncode != 0
    assert not list((tmp_path / "out" / "cells").iterdir())
    assert (record.parent / "stopped.json").exists()


def test_one_seed_has_no_deviation() -> None:
    assert "±" not in table(summaries(CELLS[:1]))


def test_the_plot_has_a_line_for_every_architecture(tmp_path: Path) -> None:
    plot(CELLS, tmp_path / "plot.svg")
    text = (tmp_path / "plot.svg").read_text()
    assert "ecp" in text
    assert "longlora (latents only)" in text


def ladder_of(name: str, exponent: float, noise: Sequence[float]) -> list[Cell]:
    """Cells of some sizes whose losses follow a power law, each off by a factor."""
    return [
        dataclasses.replace(
            cell(name, 1, 2.0 * (1000 * 4**size / 4000) ** -exponent * factor),
            parameters=100 * 2**size,
            flops_per_token=2.0**size,
            tokens=1000 * 2**size,
            point=f"learning_rate=1e-3-{size + 1}x{2**size}",
        )
        for size, factor in enumerate(noise)
    ]


def test_a_power_law_is_found_with_its_uncertainty(tmp_path: Path) -> None:
    exact, noisy = ladder_of("ecp", 0.1, [1] * 5), ladder_of("transformer", 0.2, [1.01, 0.99, 1.02, 0.98, 1.0])
    found = laws([*exact, *noisy, cell("longlora", 1, 3.0)])
    assert list(found) == ["ecp learning_rate=1e-3", "transformer learning_rate=1e-3"]  # one size has no law
    found = {name.split()[0]: law for name, law in found.items()}
    assert found["ecp"].exponent == pytest.approx(0.1)
    assert found["ecp"].exponent_interval == pytest.approx((0.1, 0.1))
    assert found["ecp"].at(4000) == pytest.approx(2.0)
    low, high = found["transformer"].exponent_interval
    assert low < 0.2 < high
    assert 0.001 < high - low < 0.1
    # The closed form of three points with one off in the middle: slope as without, t = 12.706 with one degree.
    law = fit([1, math.e, math.e**2], [1, math.e**0.3, 1])
    assert law.exponent == pytest.approx(0)
    assert law.exponent_interval[1] == pytest.approx(12.706 * math.sqrt(0.3**2 * 2 / 3 / 2))
    assert law.scale == pytest.approx(math.exp(0.1))
    assert "0.1000 (0.1000 to 0.1000)" in law_table(found)
    plot_ladder([*exact, *noisy], tmp_path / "ladder.svg")
    assert "transformer learning_rate=1e-3: exponent 0." in (tmp_path / "ladder.svg").read_text()


def test_accuracy_is_shown_by_distance_with_the_receptive_field(tmp_path: Path) -> None:
    found = [
        dataclasses.replace(one, accuracy=[[8, one.seed / 2], [64, 0.1]], receptive_field=48, protocol="passkey")
        for one in CELLS
    ]
    rows = [words(line) for line in accuracy_table(found).splitlines()]
    assert rows[0] == ["architecture", "field", "8", "64"]
    assert rows[2] == ["ecp", "48", "0.750 ± 0.354", "0.100 ± 0.000"]
    plot_accuracy(found, 0.1, tmp_path / "accuracy.svg")
    text = (tmp_path / "accuracy.svg").read_text()
    assert "chance" in text
    assert "longlora" in text


def test_a_cell_that_fails_is_told_and_the_others_are_in_the_table(sharded_text: ShardedText, tmp_path: Path) -> None:
    words_of = [word for word in options(sharded_text, tmp_path / "out") if "learning_rate" not in word]
    wild = ("--grid=optimizer.learning_rate=1e18,1e-3", "--optimizer.name=sgd", "--optimizer.gradient_clipping=0")
    done = run(SCRIPT, *words_of, "--architectures=ecp", "--seeds=1", *wild, "--training.steps=3")
    assert done.returncode == 2
    assert "1 of 2 cells failed, and are not in the table:" in done.stderr
    assert "ecp-learning_rate=1e18-seed1: DivergedError: step 2: the loss is nan" in done.stderr
    assert "Traceback" not in done.stderr
    report = (tmp_path / "out" / "comparison.md").read_text()
    assert "| ecp learning_rate=1e-3 |" in report
    assert "Without ecp-learning_rate=1e18-seed1, which failed: DivergedError: step 2" in report
    content = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert list(content["failed"]) == ["ecp-learning_rate=1e18-seed1"]
    assert [one["point"] for one in content["cells"]] == ["learning_rate=1e-3"]


def test_a_dry_run_reads_the_shards_that_it_is_given(sharded_text: ShardedText) -> None:
    plan = plans_of(sharded_text, "--dry-run").plans[0]
    assert plan.vocabulary == 400
    with pytest.raises(InputError, match=r"/no/such\.manifest\.json: No such file"):
        plans_of(sharded_text, "--dry-run", "--data.prefix=/no/such")


def plans_of(text: ShardedText, *more: str) -> Comparison:
    """What a command line would train."""
    names = () if any("--architectures" in word for word in more) else ("--architectures=ecp,transformer",)
    set_otherwise = [word.partition("=")[0] for word in more]
    by_parameters = any(word.startswith("--tokens-per-parameter") for word in more[:3])
    known = [
        word
        for word in options(text, Path("/nowhere/x"))
        if word.partition("=")[0] not in set_otherwise and not (by_parameters and word.startswith("--training.steps"))
    ]
    return read_command_line([*known, *names, *more])


def test_a_grid_and_sizes_make_a_cell_of_every_combination(sharded_text: ShardedText) -> None:
    grid = ("--grid=optimizer.learning_rate=1e-3,3e-3", "--sizes=2x48,3x96")
    plans = plans_of(sharded_text, "--tokens-per-parameter=2", *grid, "--seeds=1,2").plans
    assert len(plans) == len({plan.name for plan in plans}) == 16
    plan = next(plan for plan in plans if plan.name == "transformer-learning_rate=3e-3-3x96-seed2")
    model, training = plan.config.model, plan.config.training
    assert (model.layers, model.width, model.heads, model.key_value_heads) == (3, 96, 16, 4)
    assert (model.feed_forward_width, plan.config.optimizer.learning_rate, training.seed) == (192, 3e-3, 2)
    counted = dataclasses.replace(model, vocab_size=400).parameters
    assert training.tokens == 2 * counted
    assert plan.config.tokens_after(training.steps - 1) < 2 * counted <= plan.config.tokens_after(training.steps)
    for wrong, message in (
        ("--grid=optimizer.learning_rate", "expected section.field=VALUE,VALUE"),
        ("--grid=optimizer.lr=1,2", "unknown key 'optimizer.lr'"),
        ("--sizes=4by128", "names '4by128', expected layers x width"),
        ("--sizes=2x50", "heads keep their width, and 50 is no multiple of 6"),
        ("--grid=optimizer.beta1=0.9,0.90", "two values are the same"),
        ("--grid=model.window=8,16", "model.window has no effect with model.architecture ecp"),
        ("--jobs=0", "--jobs is 0"),
        ("--ranks=0", "--ranks is 0"),
        ("--grid=training.seed=1,2", "--grid names training.seed"),
        ("--grid=data.prefix=a/b,c", "cannot have a slash"),
        ("--sizes=2x48,2x48", "make 2x48 twice"),
        ("--tokens-per-parameter=nan", "--tokens-per-parameter is nan"),
        ("--test=/no/such", "--test /no/such: no such shards"),
        ("--task=/no/such", "/no/such: No such file"),
        ("--data.prefix=/no/such", "/no/such.manifest.json: No such file"),
    ):
        with pytest.raises(InputError, match=re.escape(message)):
            plans_of(sharded_text, wrong)
    plans_of(sharded_text, "--grid=optimizer.name=adamw,muon", "--grid=optimizer.momentum=0.9,0.95")
    with pytest.raises(InputError, match=r"--training\.steps or \.tokens are given"):
        plans_of(sharded_text, "--tokens-per-parameter=1", "--training.steps=3")


def test_a_budget_of_flops_gives_cheaper_architectures_more_steps(sharded_text: ShardedText, tmp_path: Path) -> None:
    growing = "--training.batch_schedule={6400: 16}"
    names = "--architectures=ecp,perceiver_ar"
    comparison = plans_of(sharded_text, names, "--training.steps=100", "--sizes=2x48,3x96", growing)
    plans = budgeted(comparison.plans, "flops", comparison.launch, tmp_path)
    for point in ("2x48", "3x96"):
        ours, theirs = (plan for plan in plans if plan.point == point)
        assert ours.config.training.steps == 100 < theirs.config.training.steps
        assert theirs.flops == pytest.approx(ours.flops, rel=0.01)
    assert budgeted(comparison.plans, "tokens", comparison.launch, tmp_path) == list(comparison.plans)


def test_a_budget_of_seconds_is_measured_once(
    sharded_text: ShardedText, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule = ("--optimizer.schedule=wsd", "--optimizer.warmup_tokens=6400")
    comparison = plans_of(sharded_text, "--training.steps=100", "--seeds=1,2", *schedule)
    trained = []

    def recorded(plan: Plan, launch: Launch) -> None:
        trained.append(plan.name)
        assert plan.config.problems(1) == []
        run = Path(str(plan.config.training.output_dir))
        run.mkdir(parents=True)
        seconds = {"ecp": 0.2, "transformer": 0.4}[plan.architecture]
        records = [
            {"step": step, "tokens": step, "data_digest": "0", "step_seconds": 9.0 if step < 4 else seconds}
            for step in range(1, TRIAL_STEPS + 1)
        ]
        (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))

    monkeypatch.setattr(cells, "train", recorded)
    for _ in range(2):
        plans = budgeted(comparison.plans, "seconds", comparison.launch, tmp_path)
        steps = {plan.name: plan.config.training.steps for plan in plans}
        assert steps == {"ecp-seed1": 100, "ecp-seed2": 100, "transformer-seed1": 50, "transformer-seed2": 50}
    assert trained == ["ecp-seed1", "transformer-seed1"]


def test_lines_say_how_far_a_cell_is_and_when_all_are_done(
    sharded_text: ShardedText, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plans = plans_of(sharded_text, "--training.steps=100").plans
    clock = iter([0.0, 10.0, 30.0])
    monkeypatch.setattr(cells, "monotonic", lambda: next(clock))
    watch = Watch(plans[1:], total=2)
    watch.tell(plans[1], {"step": 50, "loss": 2.0})
    watch.tell(plans[1], {"step": 75, "loss": 1.5})
    watch.finished(plans[1], "1.5 bits")
    shown = capsys.readouterr()
    assert "[2/2] transformer-seed1: step 50 of 100, loss 2.000; all cells done in about 10 s" in shown.err
    assert "step 75 of 100, loss 1.500; all cells done in about 10 s" in shown.err
    assert "[2/2] transformer-seed1: 1.5 bits" in shown.out


def test_probes_are_trained_and_told_by_distance(tmp_path: Path) -> None:
    make = ("data_tools/make_probe.py", "--task=passkey", "--length=64", "--distances=8,40")
    run_successfully(*make, "--count=64", "--output-prefix", tmp_path / "train")
    run_successfully(*make, "--count=8", "--seed=2", "--output-prefix", tmp_path / "test")
    words = [word for word in options(ShardedText(tmp_path, ()), tmp_path / "out") if "data." not in word]
    words += [f"--data.prefix={tmp_path / 'train'}", f"--data.validation_prefix={tmp_path / 'train'}"]
    task = f"--task={tmp_path / 'test.jsonl'}"
    wrong = run(SCRIPT, "--architectures=ecp", *words, task, "--model.sequence_length=128")
    assert wrong.returncode == 2
    assert "a probe has 64 tokens with its end, but model.sequence_length is 128" in wrong.stderr
    assert not (tmp_path / "out").exists()
    out = run_successfully(SCRIPT, "--architectures=ecp,perceiver_ar", *words, task, "--jobs=2")
    assert "[2/2]" in out
    report = (tmp_path / "out" / "comparison.md").read_text()
    assert "a guess gets 0.100" in report
    assert "One seed: nothing is known of the noise" in report
    assert "± " not in report
    content = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert [distance for distance, _ in content["cells"][0]["accuracy"]] == [8, 40]
    assert content["cells"][0]["bits_per_byte"] is None
    assert (tmp_path / "out" / "accuracy.svg").stat().st_size > 1000


def options(text: ShardedText, output: Path) -> list[str]:
    """A comparison of very small runs."""
    values: dict[str, object] = {
        "model.preset": "scaled-125m",
        **SMALL_MODEL,
        "model.key_value_heads": 2,
        **RECIPE,
        "training.steps": 3,
        "training.validation_every_steps": 3,
        "data.prefix": text.prefix,
        "data.validation_prefix": text.prefix,
    }
    return ["--output", str(output), "--seeds=1", *(f"--{key}={value}" for key, value in values.items())]


def test_cells_that_train_together_are_evaluated_one_at_a_time(
    sharded_text: ShardedText, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    running, most = [], []

    def evaluate(plan: Plan, *_: object) -> Cell:
        running.append(plan)
        time.sleep(0.2)
        most.append(len(running))
        running.pop()
        return cell(plan.architecture, plan.seed, 2.0)

    monkeypatch.setattr(compare, "train", lambda *_: None)
    monkeypatch.setattr(compare, "evaluate", evaluate)
    words = (SCRIPT, *options(sharded_text, tmp_path / "out"), "--architectures=ecp", "--seeds=1,2,3", "--jobs=3")
    monkeypatch.setattr(sys, "argv", list(words))
    compare.main()
    assert most == [1, 1, 1]


def test_cells_of_one_rank_may_share_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    compare._check_devices(Launch(ranks=1, jobs=4, deepspeed_path=None), "tokens")
    compare._check_devices(Launch(ranks=2, jobs=1, deepspeed_path=None), "seconds")
    with pytest.raises(InputError, match=r"--jobs is 4: .* leave it out with --ranks 2"):
        compare._check_devices(Launch(ranks=2, jobs=4, deepspeed_path=None), "tokens")
    with pytest.raises(InputError, match="leave it out with --budget seconds"):
        compare._check_devices(Launch(ranks=1, jobs=4, deepspeed_path=None), "seconds")


def test_finished_cells_are_not_done_again(sharded_text: ShardedText, tmp_path: Path) -> None:
    words = options(sharded_text, tmp_path)
    assert "ecp-seed1: " in run_successfully(SCRIPT, "--architectures=ecp", *words)
    figures = tmp_path / "cells" / "ecp-seed1.json"
    before = figures.read_bytes()
    out = run_successfully(SCRIPT, "--architectures=ecp,perceiver_ar", *words)
    assert "ecp-seed1: done already" in out
    assert figures.read_bytes() == before
    content = json.loads((tmp_path / "comparison.json").read_text())
    ecp, perceiver = content["cells"]
    assert (ecp["tokens"], perceiver["tokens"]) == (768, 768)
    assert (ecp["trained_positions"], perceiver["trained_positions"]) == (64, 32)
    assert ecp["parameters"] == perceiver["parameters"]
    assert ecp["flops_per_token"] > perceiver["flops_per_token"]
    assert ecp["bits_per_byte"] != perceiver["bits_per_byte"]
    report = (tmp_path / "comparison.md").read_text()
    for name, found in (("ecp", ecp), ("perceiver_ar", perceiver)):
        assert re.search(rf"\| {name} +\| +{found['bits_per_byte']:.4f} \|", report)
    assert (tmp_path / "comparison.svg").stat().st_size > 1000

    refused = run(SCRIPT, "--architectures=ecp", *words, "--optimizer.learning_rate=1")
    assert refused.returncode == 2
    assert "optimizer.learning_rate was 0.002 and is now 1.0" in refused.stderr


def test_a_dry_run_counts(sharded_text: ShardedText, tmp_path: Path) -> None:
    names = "ecp,compressed_double_attention"
    out = run_successfully(SCRIPT, f"--architectures={names}", *options(sharded_text, tmp_path / "x"), "--dry-run")
    assert "+0.00%" in out
    assert "compressed_double_attention" in out
    assert not (tmp_path / "x").exists()


def test_everything_wrong_is_said_before_any_work(sharded_text: ShardedText, tmp_path: Path) -> None:
    words = options(sharded_text, tmp_path / "x")
    message = run(SCRIPT, "--architectures=ecp,mamba,ecp", *words, "--seeds=1,two").stderr
    for part in ("names 'mamba', expected some of ecp", "--seeds is '1,two'", "names something twice: ecp,mamba,ecp"):
        assert part in message, part
    message = run(SCRIPT, "--architectures=ecp,longlora", *words, "--model.key_value_heads=1").stderr
    assert "with model.architecture longlora: longlora shifts half of the key/value heads" in message
    assert not (tmp_path / "x").exists()


def test_launches_side_by_side_have_a_gpu_each(monkeypatch: pytest.MonkeyPatch) -> None:
    def seen(ranks: int, jobs: int) -> set[str]:
        with ThreadPoolExecutor(3) as pool:
            barrier = Barrier(3)

            def one(_: int) -> str:
                barrier.wait()  # every thread has one
                return gpu_of_thread(ranks, jobs).get("CUDA_VISIBLE_DEVICES", "all")

            return set(pool.map(one, range(3)))

    assert seen(1, 3) == {"all"}
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert seen(1, 3) == {"0", "1", "2"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-7")
    assert seen(1, 3) == {"5", "GPU-7"}
    assert seen(2, 3) == seen(1, 1) == {"all"}
    assert gpu_of_thread(1, 3) == {}  # of no pool

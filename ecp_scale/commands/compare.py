"""Train architectures under one data order, budget, optimizer and evaluation, and put them into one table.

    ecp-compare --config BASE --architectures ecp,transformer,longlora --seeds 1,2,3 --output DIR \\
        --data.prefix shards/train --data.validation_prefix shards/validation [--test shards/test] \\
        [--ranks 2] [--section.key value ...] [--deepspeed_config FILE] [--dry-run]

Every cell (architecture, point of --grid and --sizes, seed) is a run of ecp-pretrain in DIR/runs, exported to
DIR/models and evaluated with the `sliding` protocol, whose windows are the same for every architecture, or with the
probes of --task. Finished cells are not done again, an unfinished one resumes from its checkpoint. It writes
DIR/comparison.md, .json and .svg. The first architecture named is the one that the others are compared with, and whose
training is the --budget of all. A dry run prints parameters, FLOPs and receptive field of each.
"""

import dataclasses
import json
import os
import signal
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import get_args

from ecp_scale.command_line import parse
from ecp_scale.commands.cells import Budget, FailedCellError, Launch, Plan, Watch, budgeted, evaluate, train
from ecp_scale.commands.comparison_folder import Comparison, check_folder, write_report
from ecp_scale.commands.grid import check_effect, points_of
from ecp_scale.config import Config
from ecp_scale.config.geometry import GEOMETRIES
from ecp_scale.data.manifest import Manifest, manifest_path
from ecp_scale.errors import InputError, input_errors_exit
from ecp_scale.files import write_text
from ecp_scale.option_parser import OptionParser


@input_errors_exit()
def main() -> None:
    """Read the command line, train and evaluate what is missing, write the report."""
    comparison = read_command_line(sys.argv[1:])
    if comparison.dry_run:
        describe(comparison.plans)
        return
    check_folder(comparison)
    _check_devices(comparison.launch, comparison.budget)
    plans = budgeted(comparison.plans, comparison.budget, comparison.launch, comparison.folder)
    # Seeds outside: what the machine does over time then falls on all architectures alike.
    plans.sort(key=lambda plan: [other.seed for other in comparison.plans].index(plan.seed))
    missing = [plan for plan in plans if not comparison.cell_file(plan).exists()]
    for plan in plans:
        if plan not in missing:
            print(f"{plan.name}: done already", flush=True)
    watch, stop = Watch(missing, len(plans)), threading.Event()
    failed: dict[str, str] = {}
    evaluating = threading.Lock()  # torch's compiler serves one thread of a process at a time

    def work(plan: Plan) -> None:
        try:
            train(plan, comparison.launch, lambda record: watch.tell(plan, record), stop)
        except FailedCellError as error:
            failed[plan.name] = error.why
            watch.finished(plan, f"FAILED: {failed[plan.name]}")
            return
        with evaluating:
            cell = evaluate(plan, comparison.folder, comparison.test, comparison.task)
        write_text(comparison.cell_file(plan), json.dumps(dataclasses.asdict(cell)) + "\n")
        shares = [share for _, share in cell.accuracy] or [cell.label_accuracy]
        right = sum(shares) / len(shares)
        watch.finished(plan, f"{cell.bits_per_byte:.4f} bits per byte" if right != right else f"accuracy {right:.4f}")

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with ThreadPoolExecutor(comparison.launch.jobs) as jobs:
        try:
            done, _ = wait([jobs.submit(work, plan) for plan in missing], return_when=FIRST_EXCEPTION)
            for one in done:
                one.result()
        except BaseException as error:
            stop.set()  # the other cells save
            jobs.shutdown(cancel_futures=True)
            if isinstance(error, KeyboardInterrupt):
                raise KeyboardInterrupt("the same command goes on with the cells that are not done") from None
            raise
    if any(comparison.finished()):
        write_report(comparison, failed)
    if failed:
        texts = "\n".join(f"  - {name}: {text}" for name, text in failed.items())
        raise InputError(f"{len(failed)} of {len(plans)} cells failed, and are not in the table:\n{texts}")


def _check_devices(launch: Launch, budget: Budget) -> None:
    """Let cells of one rank share a GPU, which small ones leave idle, unless it is their speed that counts.

    Raises:
        InputError: if there is a GPU, and cells of several ranks or with a budget of seconds would share it.
    """
    if launch.jobs > 1 and (launch.ranks > 1 or budget == "seconds"):
        import torch

        if torch.cuda.is_available():
            why = f"--ranks {launch.ranks}" if launch.ranks > 1 else "--budget seconds"
            raise InputError(f"--jobs is {launch.jobs}: cells would share this machine's GPUs; leave it out with {why}")


def read_command_line(argv: list[str]) -> Comparison:
    """Parse and check everything, for every architecture, before any work.

    Raises:
        InputError: listing what is wrong.
    """
    parser = _parser()
    options, rest = parser.parse_and_pass_on(argv)
    problems = []
    architectures = tuple(options.architectures.split(","))
    for name in architectures:
        if name not in GEOMETRIES:
            problems.append(f"--architectures names {name!r}, expected some of {', '.join(GEOMETRIES)}")
    seeds = tuple(options.seeds.split(","))
    if not all(seed.isdecimal() for seed in seeds):
        problems.append(f"--seeds is {options.seeds!r}, expected numbers separated by commas")
    for what, values in (("--architectures", architectures), ("--seeds", seeds)):
        if len(set(values)) < len(values):
            problems.append(f"{what} names something twice: {','.join(values)}")
    for name in ("jobs", "ranks"):
        if getattr(options, name) < 1:
            problems.append(f"--{name} is {getattr(options, name)}, expected at least 1")
    ratio = options.tokens_per_parameter
    if ratio is not None and not 0 < ratio < float("inf"):
        problems.append(f"--tokens-per-parameter is {ratio}, expected a number above 0")
    if ratio is not None and any(word.startswith(("--training.steps", "--training.tokens")) for word in rest):
        problems.append("--tokens-per-parameter and --training.steps or .tokens are given, expected one of them")
    if options.test is not None and options.task is not None:
        problems.append("--test and --task are given, expected one of them")
    if problems:
        raise InputError("\n".join(problems))
    required = ("data.prefix|data.blend", "data.validation_prefix")
    request = parse(rest, "", required, options.ranks, parser.names)
    points = {
        point: parse([*rest, *words], "", required, world_size=options.ranks).config
        for point, words in points_of(options.grid, options.sizes, request).items()
    }
    vocabulary = request.config.model.vocab_size
    for base in points.values() if not request.dry_run or request.config.data.is_set else ():
        vocabulary = _check_paths(base, options.test, options.task)
    plans = []
    for point, base in points.items():
        for name in architectures:
            for seed in map(int, seeds):
                config = _cell_config(base, name, seed, _tokens(base, architectures[0], vocabulary, ratio))
                if seed == int(seeds[0]):
                    where = " ".join(filter(None, (f"with model.architecture {name}", point)))
                    problems += [f"{where}: {problem}" for problem in config.problems(options.ranks)]
                plans.append(Plan(name, point, seed, config, vocabulary or 257))
    if problems:
        raise InputError("the base config does not fit every architecture:\n" + "\n".join(f"  - {x}" for x in problems))
    check_effect(options.grid, [plan.config for plan in plans])
    folder = Path(options.output).resolve()
    return Comparison(
        base=request.config,
        launch=Launch(options.ranks, options.jobs, request.deepspeed_path),
        plans=tuple(plan.in_folder(folder / "runs") for plan in plans),
        test=options.test or str(request.config.data.validation_prefix),
        task=options.task,
        budget=options.budget,
        tokens_per_parameter=options.tokens_per_parameter,
        folder=folder,
        dry_run=request.dry_run,
    )


def _parser() -> OptionParser:
    parser = OptionParser(
        description=__doc__, epilog="All other options are those of ecp-pretrain and hold for every cell."
    )
    home = os.path.expanduser
    parser.add_argument("--architectures", required=True, metavar="A,B,...", help=", ".join(GEOMETRIES))
    parser.add_argument("--seeds", default="1,2,3", metavar="N,N,...", help="default: 1,2,3")
    parser.add_argument("--output", required=True, type=home, metavar="DIR", help="folder to write")
    parser.add_argument("--test", type=home, metavar="PREFIX", help="shards (default: for validation)")
    parser.add_argument("--task", type=home, metavar="FILE", help="probes of ecp-make-probe, in place of --test")
    parser.add_argument(
        "--budget",
        choices=get_args(Budget),
        default="tokens",
        help="what every architecture gets as much of as the first one; seconds are measured (default: tokens)",
    )
    parser.add_argument(
        "--grid",
        action="append",
        default=[],
        metavar="FIELD=V,V,...",
        help="values of a field that are tried, as optimizer.learning_rate=1e-3,3e-3; may be given several times",
    )
    parser.add_argument(
        "--sizes",
        metavar="LxD,...",
        help="layers x width, as 4x128,6x192; heads keep their width, the feed-forward network grows alike",
    )
    parser.add_argument(
        "--tokens-per-parameter", type=float, metavar="N", help="length of each run (default: training.steps)"
    )
    parser.add_argument("--ranks", type=int, default=1, metavar="N", help="ranks of each training run (default: 1)")
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        metavar="N",
        help="cells that train at a time, on a GPU of one rank each (default: 1)",
    )
    return parser


def _check_paths(config: Config, test: str | None, task: str | None) -> int:
    """Refuse what cannot be read, before anything is written; the size of the vocabulary.

    Raises:
        InputError: naming the path.
    """
    from ecp_scale.training.corpora import check_prefixes

    check_prefixes(config)
    if test and not any(path.exists() for path in (Path(test), manifest_path(Path(test)))):
        raise InputError(f"--test {test}: no such shards, file or folder")
    scored = Path(test or str(config.data.validation_prefix))
    if task is None and manifest_path(scored).exists() and Manifest.read(scored).marked:
        raise InputError(f"{scored} marks tokens without a loss; name a text with --test, or probes with --task")
    prefix = Path(next(iter(config.data.phases[0][1])))
    manifest = Manifest.read(prefix)
    if task is not None:
        from ecp_scale.evaluation.probing import check_length, read_probes

        check_length(Path(task), read_probes(Path(task)), manifest.load_tokenizer(prefix), config.model.sequence_length)
    return config.model.vocab_size or manifest.tokenizer.vocab_size


def _tokens(base: Config, first: str, vocabulary: int | None, ratio: float | None) -> int | None:
    """Length of the runs by the parameters of the first architecture, where a ratio is given."""
    if ratio is None:
        return base.training.tokens
    model = dataclasses.replace(base.model, architecture=first, vocab_size=vocabulary or 257)  # type: ignore[arg-type]
    return max(1, round(ratio * model.parameters))


def _cell_config(base: Config, name: str, seed: int, tokens: int | None) -> Config:
    """The base with one word and the seed changed, and its length set."""
    model = dataclasses.replace(base.model, architecture=name)  # type: ignore[arg-type]
    training = dataclasses.replace(base.training, seed=seed, tokens=tokens)
    return dataclasses.replace(base, model=model, training=training).with_length()


def describe(plans: Sequence[Plan]) -> None:
    """Print what the architectures count, next to the first one."""
    print(f"{'cell':36}{'heads':>6}{'parameters':>13}{'':9}{'MFLOPs/token':>13}{'tokens':>15}{'field':>8}")
    first = None
    for plan in plans:
        if plan.seed != plans[0].seed:
            continue
        model = dataclasses.replace(plan.config.model, vocab_size=plan.config.model.vocab_size or plan.vocabulary)
        first = first or model
        share = model.parameters / first.parameters - 1
        counts = f"{model.parameters:13,}{share:+9.2%}{model.flops_per_token / 1e6:13,.2f}"
        tokens = plan.config.tokens_after(plan.config.training.steps)
        print(f"{plan.name.rpartition('-')[0]:36}{model.heads:6}{counts}{tokens:15,}{model.receptive_field_tokens:8}")
    if plans[0].config.model.vocab_size is None:
        of = "of the shards" if plans[0].config.data.is_set else "for want of shards"
        print(f"with a vocabulary of {plans[0].vocabulary}, {of}: model.vocab_size is null")

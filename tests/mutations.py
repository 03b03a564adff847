"""Planted bugs, each of which some test must find: python -m tests.mutations [--only PART].

A bug is planted in a copy of the repository, and the tests that should find it are run there; one that survives is a
hole in the tests. The tests pass without a bug, which is tried first.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from tests.launching import ROOT, environment

ATTENTION = "tests/attention/test_segment.py tests/attention/test_sdpa.py tests/attention/test_rotary.py"
KERNELS = "tests/attention/test_kernels.py"
SEQUENCES = "tests/parallel/test_sequences.py -k 2"
RANDOMNESS = "tests/models/test_randomness.py"
MUON = "tests/zero/test_muon.py"
AVERAGE = "tests/zero/test_averaging.py"
STEP = "tests/training/test_step.py"
SPIKES = "tests/training/test_spikes.py"
RESUME = "tests/training/test_resume_table.py"
ORDER = "tests/data/test_order.py tests/data/test_blend.py"


class Bug(NamedTuple):
    """One line that is wrong, and the tests that should find it."""

    file: str
    right: str
    wrong: str
    tests: str


BUGS = (
    Bug("attention/sdpa.py", "seen.tril(behind)", "seen.tril(behind + 1)", ATTENTION),
    Bug("attention/sdpa.py", "triu(behind - window + 1)", "triu(behind - window)", ATTENTION),
    Bug("attention/sdpa.py", "documents[:, behind:, None] ==", "documents[:, behind:, None] >=", ATTENTION),
    Bug("attention/sdpa.py", "if number and look_back", "if number > 1 and look_back", ATTENTION),
    Bug("attention/sdpa.py", "segments[number - 1], segments[number])", "segments[0], segments[number])", ATTENTION),
    Bug("attention/calls.py", "left, place = before * pattern.look_back", "left, place = before", KERNELS),
    Bug("attention/flash.py", "torch.logaddexp(of_rows, of_part, out=of_rows)", "of_rows.copy_(of_part)", ATTENTION),
    Bug("attention/flash.py", "(of_part - of_rows).exp_()", "(of_rows - of_part).exp_()", ATTENTION),
    Bug("attention/flash.py", "x_NHE.storage_offset() + first * row", "first * row", ATTENTION),
    Bug("attention/flash.py", "self._x.narrow(0, 0, first).zero_()", "pass", KERNELS),
    Bug("attention/pieces.py", "np.maximum(document_begin[begins], reach[begins])", "reach[begins]", KERNELS),
    Bug(
        "attention/pieces.py",
        "rows_k = np.repeat(np.concatenate(begins_k), counts_k) + offsets * batch",
        "rows_k = np.repeat(np.concatenate(begins_k), counts_k) + offsets",
        KERNELS,
    ),
    Bug("attention/flex.py", "near & nearest", "near | nearest", KERNELS),
    Bug("attention/flex.py", "whole & far &", "far &", KERNELS),
    Bug("attention/rotary.py", "theta**-exponents", "theta**-(exponents / 2)", ATTENTION),
    Bug("attention/rotary.py", "even * sin + odd * cos", "even * sin - odd * cos", ATTENTION),
    Bug("attention/cache.py", "border - self.segment_length, border)", "border - 1, border)", ATTENTION),
    Bug(
        "models/loss.py",
        "one.mul_(factor).to(ctx.dtype)",
        "one.mul_(factor.bfloat16()).to(ctx.dtype)",
        "tests/models/test_loss.py",
    ),
    Bug("models/loss.py", "scores *= 1 + 2 * z_loss", "scores *= 1 + z_loss", "tests/models/test_loss.py"),
    Bug("models/loss.py", "scores *= counts[:, None]", "pass", "tests/models/test_loss.py"),
    Bug("models/loss.py", "scores[..., rows:] = -torch.inf", "pass", "tests/models/test_loss.py"),
    Bug(
        "models/blocks.py",
        "        if self.config.dropout and self.training:\n            with TENSOR_PARALLEL.drawing(self.parallel.tp_size):",
        "        if self.config.dropout and self.training:\n            with nullcontext():",
        RANDOMNESS,
    ),
    Bug(
        "models/blocks.py",
        "with TENSOR_PARALLEL.drawing(self.parallel.tp_size) if rate",
        "with nullcontext() if rate",
        RANDOMNESS,
    ),
    Bug(
        "models/blocks.py",
        "recomputed(self._attend, q, k, v, positions, cache, random=self.config.dropout > 0)",
        "recomputed(self._attend, q, k, v, positions, cache, random=False)",
        RANDOMNESS,
    ),
    Bug("models/language_model.py", "random=self.config.dropout > 0", "random=False", RANDOMNESS),
    Bug(
        "parallel/linear.py",
        "if group is None or group.size() == 1:\n        return parameter",
        "if True:\n        return parameter",
        SEQUENCES,
    ),
    Bug(
        "parallel/linear.py",
        "return copy_to_tensor_model_parallel_region(x, group=parallel.tp_group)",
        "return x",
        "tests/parallel/test_parity.py",
    ),
    Bug(
        "parallel/branch.py",
        "dist.all_reduce(gradient, group=group, async_op=True)",
        "dist.all_reduce(gradient.clone(), group=group, async_op=True)",
        "tests/parallel/test_parity.py",
    ),
    Bug(
        "parallel/branch.py",
        "len(gradient) // group.size(), *gradient.shape[1:])\n        self.work = dist.reduce_scatter_tensor(part, gradient,",
        "len(gradient) // group.size(), *gradient.shape[1:])\n        self.work = dist.reduce_scatter_tensor(part.clone(), gradient,",
        SEQUENCES,
    ),
    Bug(
        "parallel/branch.py",
        "            ctx.operands.again.wait()\n",
        "            pass\n",
        "tests/parallel/test_branch.py",
    ),
    Bug(
        "parallel/gradient_sum.py",
        "if (this := backward_pass()) != self._pass:",
        "if (this := backward_pass()) > 0 > self._pass:",
        "tests/parallel/test_branch.py",
    ),
    Bug(
        "parallel/branch.py",
        "        if not is_awaited:\n",
        "        if True:\n",
        "tests/models/test_on_a_gpu.py -k under_way",
    ),
    Bug("parallel/random.py", "* 65_536 + groups.data_rank", "* 65_536", RANDOMNESS),
    Bug("parallel/random.py", "replica * 65_536 + groups.tensor_rank + 1", "replica * 65_536 + 1", RANDOMNESS),
    Bug("parallel/recompute.py", "        TENSOR_PARALLEL.state = state\n", "        pass\n", RANDOMNESS),
    Bug("parallel/recompute.py", 'Pass("again", received)', 'Pass("again", deque(reversed(received)))', SEQUENCES),
    Bug(
        "parallel/halo.py",
        "ctx.transfer.start(gradient, halo.left, halo.right)",
        "ctx.transfer.start(gradient * 0.5, halo.left, halo.right)",
        SEQUENCES,
    ),
    Bug(
        "training/step.py",
        "scale = len(micro_batches) * groups.data.size() / max(1, count)",
        "scale = groups.data.size() / max(1, count)",
        STEP,
    ),
    Bug("training/step.py", "if not math.isfinite(loss_value):", "if False:", STEP),
    Bug("models/parameter_groups.py", "not in chosen}, decays=False)", "not in chosen}, decays=True)", STEP),
    Bug(
        "zero/engine.py",
        'group["weight_decay"] = config.weight_decay if of_ours.decays else 0.0',
        "pass",
        RESUME,
    ),
    Bug("zero/muon.py", "for other in range(group.size())]\n    shared[rank] = []", "for other in []]", MUON),
    Bug("zero/muon.py", "return orthogonal(whole).mul_", "return orthogonal(share).mul_", MUON),
    Bug("training/loop.py", "is not None and not result.skipped:", "is not None:", AVERAGE),
    Bug("zero/engine.py", "engine.optimizer.clip_grad = config.gradient_clipping", "pass", RESUME),
    Bug(
        "training/loop.py",
        "set_batch(self.engine, sequences * config.parallel.context)",
        "pass",
        "tests/training/test_batch_schedule.py",
    ),
    Bug(
        "config/optimizer.py",
        "tokens / self.warmup_tokens",
        "(tokens + 1) / self.warmup_tokens",
        "tests/test_learning_rate.py",
    ),
    Bug("data/order.py", "while index >= self.size:", "while index > self.size:", ORDER),
    Bug(
        "data/batches.py",
        "range(self.rank * self.micro, sequences, stride)",
        "range(self.rank * self.micro, sequences - 1, stride)",
        ORDER,
    ),
    Bug(
        "data/blend.py",
        "self.corpora[corpus].digest)",
        '"")',
        "tests/data/test_blend.py tests/data/test_order.py tests/training/test_runs.py::test_another_text_of_equal_size_is_not_continued_and_the_audit_disagrees",
    ),
    Bug("data/digest.py", "(digest >> (16 * part)) & 0xFFFF", "(digest >> (8 * part)) & 0xFFFF", ORDER),
    Bug("zero/state_files.py", "if self.xxh3 and (found", "if False and (found", "tests/checkpoint/test_damage.py"),
    Bug("zero/state_files.py", "self._hash.update(part)", "self._hash.update(b'')", "tests/checkpoint/test_damage.py"),
    Bug(
        "zero/saved_states.py",
        "piece.offset + low - piece.start",
        "piece.offset + low - source",
        "tests/zero/test_saved_states.py",
    ),
    Bug("parallel/partition.py", "if whole_start < self.whole:", "if True:", "tests/zero/test_making.py"),
    Bug(
        "models/initialization.py",
        "self._philox.advance(block - self._block)",
        "self._philox.advance(0)",
        "tests/zero/test_making.py",
    ),
    Bug(
        "zero/checkpoint_engine.py",
        "buffer.untyped_storage().copy_(storage, non_blocking=True)",
        "buffer = torch.empty(0, dtype=torch.uint8).set_(storage)",
        "tests/training/test_asynchronous_saves.py",
    ),
    Bug("training/rolling_back.py", "done.tokens // n - 1)", "done.tokens // n - 2)", SPIKES),
    Bug("training/rolling_back.py", "= new, PassedOver(new.training.skip_samples)", "= new, PassedOver()", SPIKES),
    Bug("checkpoint/resuming.py", "first < reached and", "first <= reached and", SPIKES),
    Bug("data/blend.py", "+ self.mixture.counts(first)", "", SPIKES),
    Bug("training/rank_times.py", "values.index(most)", "0", "tests/training/test_rank_times.py"),
    Bug(
        "training/loop.py",
        "self.checkpoints.finish(is_last=True)",
        "pass",
        "tests/training/test_asynchronous_saves.py",
    ),
    Bug(
        "parallel/digests.py",
        "numbers += rows.mul_(share.stride - share.width) + share.first",
        "numbers += share.first",
        "tests/parallel/test_digests.py",
    ),
    Bug(
        "parallel/digests.py",
        "mixed += _wrapped(first * OF_NUMBER)",
        "mixed += _wrapped((first - start) * OF_NUMBER)",
        "tests/parallel/test_digests.py",
    ),
    Bug(
        "evaluation/perplexity.py",
        "first - geometry.receptive_field_tokens)",
        "first - 1)",
        "tests/evaluation/test_perplexity.py -k parts",
    ),
    Bug(
        "evaluation/texts.py", "words -= goes_on and", "words -= False and", "tests/evaluation/test_texts.py -k pieces"
    ),
    Bug(
        "evaluation/harness.py",
        "stream, last_unscored = self._model.new_stream(), first - 1",
        "stream, last_unscored = self._model.new_stream(), first",
        "tests/evaluation/test_harness.py -k scored",
    ),
)
"""Files are of ``ecp_scale``."""


def copy_of_repository(folder: Path) -> Path:
    """The files that are under version control, as they are now."""
    names = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    ).stdout
    for name in names.splitlines():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_file():
            shutil.copyfile(ROOT / name, target)
    return folder


def passes(copy: Path, tests: Iterable[str]) -> bool:
    """Whether tests pass in the copy."""
    words = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    variables = {**environment(), "PYTHONPATH": str(copy)}
    return subprocess.run(words, cwd=copy, env=variables, capture_output=True).returncode == 0


def main() -> int:
    """Plant every bug in turn; say which survive."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="PART", help="bugs in files whose name begins so")
    options = parser.parse_args()
    bugs = [bug for bug in BUGS if bug.file.startswith(options.only)]
    survivors = 0
    with tempfile.TemporaryDirectory() as name:
        copy = copy_of_repository(Path(name))
        for tests in sorted({bug.tests for bug in bugs}):
            if not passes(copy, tests.split()):
                print(f"{tests}: fail without a bug")
                return 2
        for bug in bugs:
            path = copy / "ecp_scale" / bug.file
            content = path.read_text()
            assert content.count(bug.right) == 1, f"{bug.file}: {bug.right!r} is there {content.count(bug.right)} times"
            path.write_text(content.replace(bug.right, bug.wrong))
            began = time.monotonic()
            survived = passes(copy, bug.tests.split())
            survivors += survived
            verdict = "SURVIVED" if survived else "found"
            print(
                f"{verdict:9}{time.monotonic() - began:5.0f} s  {bug.file}: {bug.right!r} -> {bug.wrong!r}", flush=True
            )
            path.write_text(content)
    print(f"{len(bugs)} bugs, {survivors} survived")
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main())

"""Say up to which step a run has read what its config says: recompute the data digest of its metrics.

    ecp-audit runs/first

The digest of a step stands for every (sample, corpus, window) up to it, whatever the number of ranks, micro-batches and
resumes. It is recomputed from config.yaml and the sizes and hashes in the manifests; no token is read. Exits 1 at the
first step that disagrees.
"""

import os
from pathlib import Path

from ecp_scale.command_line import parse
from ecp_scale.errors import InputError, input_errors_exit
from ecp_scale.option_parser import OptionParser


@input_errors_exit()
def main() -> int:
    """Read the command line, recompute, and say where the two part."""
    parser = OptionParser(description=__doc__)
    parser.add_argument("run", type=os.path.expanduser, metavar="RUN", help="run folder")
    options = parser.parse_args()
    run = Path(options.run)
    config = parse(["--config", str(run / "config.yaml"), "--dry-run"], "").config

    from ecp_scale.data.blend import Blend
    from ecp_scale.data.digest import sample_digest
    from ecp_scale.training.metrics import digest_of, read_metrics, unreadable_metrics

    records = read_metrics(run)
    if not records:
        raise InputError(f"{run}: expected metrics.jsonl with the record of each step, found none that can be read")
    unreadable = unreadable_metrics(run)
    if unreadable:
        print(f"{run}: {unreadable} lines of metrics.jsonl cannot be read; the steps after them are held to all before")
    n = config.model.sequence_length
    blend = Blend(config.data.phases, n, config.training.seed, config.training.skip_samples)
    digest = unhashed = done = 0
    for record in records:
        samples = blend.samples(done, (record["tokens"] - done) // n)
        windows = [(sample, *blend.locate(sample)) for sample in samples]
        done = record["tokens"]
        before, digest = digest, (digest + sum(blend.digest(*window) for window in windows)) % 2**64
        # Runs of earlier versions hold windows to their numbers alone, up to the step where this version went on.
        older = (before + sum(sample_digest(*window) for window in windows)) % 2**64
        if f"{older:016x}" == digest_of(record):
            digest, unhashed = older, record["step"]
        if f"{digest:016x}" != digest_of(record):
            agreed = f"agrees up to step {record['step'] - 1}, then not"
            print(f"{run}: {agreed}: step {record['step']} says {digest_of(record)}, its config {digest:016x}")
            return 1
    if unhashed:
        print(f"{run}: up to step {unhashed} the digest knows the windows by number, not by their tokens")
    print(
        f"{run}: agrees up to step {records[-1]['step']} ({records[-1]['tokens']:,} tokens, data digest {digest:016x})"
    )
    return 0

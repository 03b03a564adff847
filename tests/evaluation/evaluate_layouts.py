"""Run by ``test_ranks``: score a text, and continue it, on the ranks of one launch that share a model in several ways.

Arguments: a model folder, a text, and a JSON file for the results.
"""

import json
import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from ecp_scale.checkpoint.export import ExportedModel
from ecp_scale.evaluation.generation import Sampling, generate
from ecp_scale.evaluation.perplexity import evaluate
from ecp_scale.evaluation.ranks import from_first_rank, launched
from ecp_scale.evaluation.texts import read_text
from ecp_scale.parallel.context import ParallelContext

PROTOCOLS = ("stream", "sliding", "release")


def main() -> None:
    """Write the figures of every layout and protocol, and what follows the beginning of the text."""
    model_folder, text_file, output = sys.argv[-3:]
    dist.init_process_group("gloo")
    exported = ExportedModel.open(model_folder)
    found = {}
    for tensor in (1, 2, 4):
        with launched(exported.config, tensor) as groups:
            # The other ranks have no such file.
            data = text_file if dist.get_rank() == 0 else "nowhere"
            text = from_first_rank(partial(read_text, data, exported.tokenizer), groups)
            model = exported.load(parallel=ParallelContext(groups.tensor), device="cpu")
            end = exported.tokenizer.end_of_document
            figures = {}
            for protocol in PROTOCOLS:
                result = evaluate(model, text, end, protocol, replicas=groups.replicas)
                figures[protocol] = [result.nll, result.tokens_scored, result.words, result.bytes]
            new = list(generate(model, text.ids[:50].tolist(), 40, Sampling(seed=3)))
            everywhere = [None] * dist.get_world_size()
            dist.all_gather_object(everywhere, (figures, new))
            assert all(other == everywhere[0] for other in everywhere)
            bytes_held = sum(x.numel() * x.element_size() for x in model.parameters())
            found[tensor] = {"figures": figures, "new": new, "bytes": bytes_held}
    if dist.get_rank() == 0:
        Path(output).write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()

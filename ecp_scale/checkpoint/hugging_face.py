"""What makes the folder of an exported model one that Hugging Face's transformers read, without needing them here."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import ecp_scale.hub
from ecp_scale.config import AttentionConfig, ModelConfig
from ecp_scale.console import say
from ecp_scale.data.tokenizer import Tokenizer
from ecp_scale.data.tokenizer_json import control_in_text, name_of_end, tokenizer_json
from ecp_scale.files import write_text
from ecp_scale.zero.state_files import FileRecord

CODE = (
    "attention_ecp.py",
    "cache_ecp.py",
    "configuration_ecp.py",
    "modeling_ecp.py",
    "tokenization_ecp.py",
)
"""Files of ``ecp_scale.hub`` that travel with the weights."""
NOT_THEIRS = ("preset", "vocab_multiple", "initialization", "allow_short_receptive_field")
"""Fields of the model's config that say nothing about what it computes."""
ATTENTION = ("document_mask", "restart_positions", "end_of_document")
"""Fields of the attention's config that do."""
CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [ecp, causal-lm]
---

# {title}

A language model of the architecture `{architecture}` with {parameters:,} parameters, after {step:,} steps and
{tokens:,} tokens of training. {reach}

    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained("{folder}", trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained("{folder}", trust_remote_code=True)

The model is computed by the files `*_ecp.py` beside the weights, which need torch and transformers alone
(`tokenization_ecp.py`, where it is used, also sentencepiece); `trust_remote_code=True` lets them run. {use}

In training every document began behind the end of the one before. A prompt that begins a document is
`[tokenizer.eos_token_id, *tokenizer(text).input_ids]` (id {end}). {control}

| | |
|---|---|
| layers, width, heads | {layers}, {width}, {heads} |
| training window | {window:,} tokens |
| farthest token that any token depends on | {field:,} |
| vocabulary | {vocabulary:,} |

What it was trained on, and what it must not be used for, its authors have to say: this page was written by the export.
"""


def config_fields(model: ModelConfig, attention: AttentionConfig, dtype: str) -> dict[str, Any]:
    """``config.json`` as transformers read it."""
    fields = {name: value for name, value in dataclasses.asdict(model).items() if name not in NOT_THEIRS}
    fields |= {name: getattr(attention, name) for name in ATTENTION}
    return {
        "model_type": "ecp",
        "architectures": ["EcpForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_ecp.EcpConfig",
            "AutoModelForCausalLM": "modeling_ecp.EcpForCausalLM",
        },
        "dtype": dtype,
        "torch_dtype": dtype,  # its name before transformers 5
        **fields,
    }


def write_code(folder: Path) -> None:
    """Copy the modelling files."""
    for name in CODE:
        shutil.copyfile(Path(ecp_scale.hub.__file__).parent / name, folder / name)


def hashes_of_read_files(folder: Path) -> dict[str, str]:
    """XXH3 of the files that transformers compute with, besides config.json and the weights."""
    names = [*CODE, "tokenizer.json", "tokenizer_config.json"]
    return {name: FileRecord.of(folder / name).xxh3 for name in names if (folder / name).is_file()}


def write_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """Write what ``AutoTokenizer`` reads, which gives the ids that the model was trained with."""
    content, end = tokenizer_json(tokenizer), name_of_end(tokenizer)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": end,
        "pad_token": end,
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**30,
        "model_input_names": ["input_ids", "attention_mask"],
        "padding_side": "left",
    }
    if content is None:
        config["tokenizer_class"] = "EcpTokenizer"
        config["auto_map"] = {"AutoTokenizer": ["tokenization_ecp.EcpTokenizer", None]}
    else:
        write_text(folder / "tokenizer.json", json.dumps(content, ensure_ascii=False) + "\n")
    write_text(folder / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")


def write_card(folder: Path, name: str, model: ModelConfig, tokenizer: Tokenizer, step: int, tokens: int) -> None:
    """Write README.md, and how ``generate()`` begins and ends."""
    field = model.receptive_field_tokens
    reach = f"A token depends on {field:,} tokens at most, its own included."
    if model.geometry.bounded_cache:
        reach += " Generation remembers a fixed number of positions per layer, however long the context."
    use = "`generate()` works with batches, padding on the left, sampling and beam search."
    if not model.geometry.streams:
        use = (
            f"Scores are those of the last {model.geometry.trained_positions:,} of {model.sequence_length:,} tokens; "
            "`generate()` is refused, as the context is not causal."
        )
    end, found = tokenizer.end_of_document, control_in_text(tokenizer)
    control = "The names of control tokens in a text are text."
    if found is not None:
        control = f"Trap: the text {found!r} becomes a control token, as it does not in training."
        say(f"AutoTokenizer of {name}: the text {found!r} becomes a control token there, and not in our programs")
    text = CARD.format(
        title=name,
        architecture=model.architecture,
        parameters=model.parameters,
        step=step,
        tokens=tokens,
        reach=reach,
        use=use,
        folder=name,
        end=end,
        control=control,
        layers=model.layers,
        width=model.width,
        heads=model.heads,
        window=model.sequence_length,
        field=field,
        vocabulary=model.known_vocab_size,
    )
    write_text(folder / "README.md", text)
    generation = {"eos_token_id": end, "pad_token_id": end}
    write_text(folder / "generation_config.json", json.dumps(generation, indent=2) + "\n")

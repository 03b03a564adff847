"""The exported model: whole tensors in the safetensors format, config.json, and the tokenizer."""

import dataclasses
import json
import math
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from ecp_scale.checkpoint.config_json import FORMAT_VERSION, OURS, sections
from ecp_scale.checkpoint.folder import RECORD, CheckpointRecord
from ecp_scale.checkpoint.hugging_face import (
    NOT_THEIRS,
    config_fields,
    hashes_of_read_files,
    write_card,
    write_code,
    write_tokenizer,
)
from ecp_scale.checkpoint.weights_file import PLAIN, TYPE_NAMES, SavedWeights, WriteOptions, write_weights
from ecp_scale.config import AttentionConfig, ModelConfig
from ecp_scale.config.model import GEOMETRY_FIELDS
from ecp_scale.config.renames import renamed_fields
from ecp_scale.data.manifest import TokenizerRecord
from ecp_scale.data.tokenizer import Tokenizer
from ecp_scale.errors import InputError
from ecp_scale.files import sync_folder, write_text
from ecp_scale.models.language_model import LanguageModel
from ecp_scale.models.parameter_groups import optimizer_order
from ecp_scale.parallel.context import ParallelContext
from ecp_scale.parallel.partition import load_full
from ecp_scale.precision import DTYPES
from ecp_scale.zero.averaging import AVERAGE
from ecp_scale.zero.saved_states import SavedStates
from ecp_scale.zero.state_files import FileRecord, damages, write_error

TYPES = {str(dtype).removeprefix("torch."): dtype for dtype in TYPE_NAMES}
"""Of the weights, by their names in config.json."""
UNFINISHED = "unfinished.json"
"""What an unfinished folder is to become."""
WRITTEN = re.compile(
    r"(config|generation_config|tokenizer_config|tokenizer)\.json|README\.md|\w+_ecp\.py|(ecp_)?tokenizer(\.\w+)?"
    r"|model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?"
)
"""Names of the files of an exported model."""


@dataclass(frozen=True)
class ExportedModel:
    """A model folder: what is in config.json and the tokenizer."""

    folder: Path
    config: ModelConfig
    attention: AttentionConfig
    tokenizer: Tokenizer
    step: int
    tokens: int
    dtype: torch.dtype = torch.float32
    """Of the weights in the files."""
    precision: str = "fp32"
    """Of the training."""
    probe_loss: float | None = None
    """That the training had, see ``ecp_scale.models.probe``."""
    average: bool = False
    """Whether the weights are a moving average of those of the training."""
    files: Mapping[str, str] = field(default_factory=dict)
    """Hashes of the files that transformers compute with, as they were written."""

    @classmethod
    def open(cls, folder: str | Path) -> "ExportedModel":
        """Read config.json and the tokenizer.

        Raises:
            InputError: if the folder is not an exported model, or its tokenizer is another one.
        """
        folder = Path(folder)
        path = folder / "config.json"
        try:
            content = sections(json.loads(path.read_text()), path)
            config = ModelConfig(**renamed_fields("model", content["model"]))
            attention = AttentionConfig(**renamed_fields("attention", content["attention"]))
            record = TokenizerRecord(**content["tokenizer"])
            step, tokens = int(content["step"]), int(content["tokens"])
            dtype = TYPES[content.get("dtype", "float32")]
            precision, probe_loss = content.get("precision", "fp32"), content.get("probe_loss")
            average = bool(content.get("average", False))
            files = {str(name): str(text) for name, text in content.get("files", {}).items()}
            if precision not in DTYPES or not isinstance(probe_loss, float | None):
                raise ValueError(f"precision {precision!r}, probe_loss {probe_loss!r}")
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}; expected a folder of ecp-convert") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{path}: not an exported model ({type(error).__name__}: {error})") from error
        if record.file and not (folder / record.file).exists():
            raise InputError(
                f"{folder / record.file} is missing; where transformers have saved the model, copy it from the folder "
                "that they read"
            )
        return cls(
            folder,
            config,
            attention,
            record.load(folder, "the model was trained with"),
            step,
            tokens,
            dtype,
            precision,
            probe_loss,
            average,
            files,
        )

    def with_geometry(self, **changes: Any) -> "ExportedModel":
        """The model with another sequence length, segment length, latents, window or group length.

        Raises:
            InputError: if the weights do not allow it, or the numbers do not fit together.
        """
        ignored = [name for name in changes if name in self.config.ignored()]
        if ignored:
            reads = ", ".join(name for name in GEOMETRY_FIELDS if name not in self.config.ignored())
            raise InputError(f"{self.config.architecture} has no {' and no '.join(ignored)}; it has {reads}")
        config = dataclasses.replace(self.config, **changes, allow_short_receptive_field=True)
        problems = config.problems() + config.weights_problems(self.config)
        if problems:
            raise InputError(f"{self.folder}: the model cannot be used so:\n" + "\n".join(f"  - {x}" for x in problems))
        return dataclasses.replace(self, config=config)

    def load(
        self,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        parallel: ParallelContext | None = None,
    ) -> LanguageModel:
        """Build the model, in evaluation mode.

        Args:
            dtype: type of its weights.
            device: where it goes; None takes the GPU if there is one.
            parallel: of ranks that share the model; None means that this process holds all of it.

        Raises:
            InputError: if the weights are missing, damaged or do not fit config.json.
        """
        weights = SavedWeights(self.folder)
        parallel = parallel or ParallelContext.single(dtype)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        model = LanguageModel(self.config, parallel, self.attention)
        load_full(model, parallel, weights, str(weights.path))
        return model.to(device).eval()


def export(checkpoint: Path, output: Path, options: WriteOptions = PLAIN) -> CheckpointRecord:
    """Merge a complete checkpoint into a model folder, which appears whole or not at all.

    It is a folder of Hugging Face's transformers, and ours. What is cut short leaves ``.NAME.partial`` beside it, from
    which the next conversion of the same checkpoint goes on.

    The weights are compared with the digests that were saved with them, and other files of the checkpoint are not read;
    where an earlier version has saved it, and for the average, every file is compared with its hash first.

    Raises:
        InputError: if the checkpoint is incomplete, damaged or inconsistent, or ``output`` holds anything but an
            earlier export of the same checkpoint.
    """
    output = output.resolve()
    record = CheckpointRecord.read(checkpoint)
    states = "_states.pt" if record.digests and not options.average else ()
    found = damages(checkpoint, {name: file for name, file in record.files.items() if not name.endswith(states)})
    if found:
        raise InputError("\n".join(found))
    _check_output(output, record, options)
    unfinished = output.with_name(f".{output.name}.partial")
    try:
        unfinished.mkdir(parents=True, exist_ok=True)
        with FileLock(unfinished.with_name(unfinished.name + ".lock"), timeout=0):
            hashed = FileRecord.of(checkpoint / RECORD).xxh3
            what = {"dtype": str(options.dtype), "file_bytes": options.file_bytes, "average": options.average}
            _begin(unfinished, {"checkpoint": hashed, **what})
            _write_model(checkpoint, record, unfinished, options, output.name)
            (unfinished / UNFINISHED).unlink()
            if output.exists():
                shutil.rmtree(output)
            unfinished.replace(output)
            sync_folder(output.parent)
    except Timeout:
        raise InputError(f"--output {output}: another conversion is writing it") from None
    except OSError as error:
        raise InputError(write_error(output, error)) from error
    unfinished.with_name(unfinished.name + ".lock").unlink(missing_ok=True)
    return record


def _begin(unfinished: Path, what: dict[str, Any]) -> None:
    """Keep the files of weights that a conversion of the same kind has finished, and nothing else."""
    path = unfinished / UNFINISHED
    try:
        is_same = json.loads(path.read_text()) == what
    except (OSError, ValueError):
        is_same = False
    for file in unfinished.iterdir():
        if not (is_same and file.suffix == ".safetensors"):
            file.unlink()
    write_text(path, json.dumps(what) + "\n")


def _check_output(output: Path, record: CheckpointRecord, options: WriteOptions) -> None:
    """Refuse to write where something else is."""
    if not output.exists():
        return
    if not output.is_dir():
        raise InputError(f"--output {output}: is a file, expected a new folder")
    found = sorted(path.name for path in output.iterdir())
    if not found:
        return
    try:
        path = output / "config.json"
        content = json.loads(path.read_text())
        earlier = sections(content, path)
        # transformers have saved it, and may have changed it.
        is_ours = "transformers_version" not in content and all(WRITTEN.fullmatch(name) for name in found)
        step, tokens, averaged = earlier["step"], earlier["tokens"], earlier.get("average", False)
        model = ModelConfig(**renamed_fields("model", earlier["model"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        is_ours = False
    if not is_ours:
        raise InputError(f"--output {output}: holds {', '.join(found[:4])}; choose a new folder")
    average, dtype = options.average, str(options.dtype).removeprefix("torch.")
    wanted = (ModelConfig(**record.model).geometry, record.step, record.tokens, average)
    if (model.geometry, step, tokens, averaged) != wanted:
        kind = "an average of weights" if averaged and not average else "another model"
        raise InputError(f"--output {output}: holds {kind} (step {step}, {tokens} tokens); choose a new folder")
    if content.get("dtype", dtype) != dtype:
        raise InputError(f"--output {output}: holds this model in {content['dtype']}, not {dtype}; choose a new folder")


def _optimizer_order(record: CheckpointRecord) -> list[str]:
    with torch.device("meta"):
        return optimizer_order(LanguageModel(ModelConfig(**record.model), ParallelContext.single(torch.float32)))


def _write_model(checkpoint: Path, record: CheckpointRecord, folder: Path, options: WriteOptions, name: str) -> None:
    order = _optimizer_order(record) if options.average else None
    saved = SavedStates(checkpoint, record.files, record.partitions, record.tensor_parallel, order)
    shapes = {name: saved.shape(name) for name in record.partitions}
    if options.average and AVERAGE not in saved.keys(next(iter(shapes))):
        raise InputError(f"{checkpoint}: holds no average of the weights; it is kept with optimizer.average_decay")
    read = partial(saved.values, key=AVERAGE) if options.average else saved.weight
    try:
        write_weights(folder, shapes, read, options, {} if options.average else record.digests)
    except InputError as error:
        why = damages(checkpoint, record.files)  # not looked at before where there are digests
        raise InputError("\n".join([f"{checkpoint}: {error}", *why])) from error
    tokenizer_file = ""
    if record.tokenizer_file:
        # sentencepiece reads the file itself; others have a tokenizer.json of their own, which may be another one.
        own = "tokenizer" if record.tokenizer.kind == "sentencepiece" else "ecp_tokenizer"
        tokenizer_file = f"{own}{Path(record.tokenizer_file).suffix}"
        shutil.copyfile(checkpoint / record.tokenizer_file, folder / tokenizer_file)
    kept = dataclasses.replace(record.tokenizer, file=tokenizer_file)
    model, attention = ModelConfig(**record.model), AttentionConfig(**record.attention)
    tokenizer = kept.load(folder, "the model was trained with")
    end = tokenizer.end_of_document
    write_tokenizer(folder, tokenizer)
    write_card(folder, name, model, tokenizer, record.step, record.tokens)
    write_code(folder)
    content = {
        **config_fields(model, attention, str(options.dtype).removeprefix("torch.")),
        "eos_token_id": end,
        "pad_token_id": end,
        OURS: {
            "format_version": FORMAT_VERSION,
            "model": {name: record.model[name] for name in NOT_THEIRS if name in record.model},
            "tokenizer": dataclasses.asdict(kept),
            "step": record.step,
            "tokens": record.tokens,
            "average": options.average,
            "precision": record.precision,
            # Not a number is no number of JSON; of an average none is known.
            "probe_loss": None if options.average or not math.isfinite(record.probe_loss or 0.0) else record.probe_loss,
            "files": hashes_of_read_files(folder),
        },
    }
    write_text(folder / "config.json", json.dumps(content, indent=2) + "\n")

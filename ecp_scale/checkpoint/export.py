"""The exported model: whole tensors in the safetensors format, config.json, and the tokenizer."""

import dataclasses
import json
import os
import re
import shutil
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ecp_scale.checkpoint.folder import CheckpointRecord
from ecp_scale.checkpoint.weights_file import SavedWeights, write_weights
from ecp_scale.config import AttentionConfig, ModelConfig
from ecp_scale.config.model import GEOMETRY_FIELDS
from ecp_scale.config.renames import renamed_fields
from ecp_scale.data.manifest import TokenizerRecord
from ecp_scale.data.tokenizer import Tokenizer
from ecp_scale.errors import InputError
from ecp_scale.files import sync_folder, write_text
from ecp_scale.models.language_model import LanguageModel
from ecp_scale.parallel.context import ParallelContext
from ecp_scale.parallel.partition import load_full
from ecp_scale.zero.saved_states import SavedStates
from ecp_scale.zero.state_files import damages, write_error

FORMAT = "ecp-scale"
FORMAT_VERSION = 3
READABLE = (2, 3)
"""Version 2 has former names of some fields (``ecp_scale.config.renames``)."""
OURS = re.compile(r"config\.json|model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?|tokenizer(\.\w+)?")
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

    @classmethod
    def open(cls, folder: str | Path) -> "ExportedModel":
        """Read config.json and the tokenizer.

        Raises:
            InputError: if the folder is not an exported model, or its tokenizer is another one.
        """
        folder = Path(folder)
        path = folder / "config.json"
        try:
            content = json.loads(path.read_text())
            if content["format"] != FORMAT or content["format_version"] not in READABLE:
                found = f"{content['format']} {content['format_version']}"
                raise InputError(f"{path}: format {found}, expected {FORMAT} {FORMAT_VERSION}")
            config = ModelConfig(**renamed_fields("model", content["model"]))
            attention = AttentionConfig(**renamed_fields("attention", content["attention"]))
            record = TokenizerRecord(**content["tokenizer"])
            step, tokens = int(content["step"]), int(content["tokens"])
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}; expected a folder of ecp-convert") from error
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{path}: not an exported model ({type(error).__name__}: {error})") from error
        return cls(folder, config, attention, record.load(folder, "the model was trained with"), step, tokens)

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


def export(checkpoint: Path, output: Path, dtype: torch.dtype = torch.float32) -> CheckpointRecord:
    """Merge a complete checkpoint into a model folder, which appears whole or not at all.

    Every file of the checkpoint is compared with its hash first.

    Raises:
        InputError: if the checkpoint is incomplete, damaged or inconsistent, or ``output`` holds anything but an
            earlier export of the same checkpoint.
    """
    output = output.absolute()
    record = CheckpointRecord.read(checkpoint)
    found = damages(checkpoint, record.files)
    if found:
        raise InputError("\n".join(found))
    _check_output(output, record)
    temporary = output.with_name(f".{output.name}.{socket.gethostname()}-{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        _write_model(checkpoint, record, temporary, dtype)
        if output.exists():
            shutil.rmtree(output)
        temporary.replace(output)
        sync_folder(output.parent)
    except OSError as error:
        raise InputError(write_error(output, error)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return record


def _check_output(output: Path, record: CheckpointRecord) -> None:
    """Refuse to write where something else is."""
    if not output.exists():
        return
    if not output.is_dir():
        raise InputError(f"--output {output}: is a file, expected a new folder")
    found = sorted(path.name for path in output.iterdir())
    if not found:
        return
    try:
        earlier = json.loads((output / "config.json").read_text())
        is_ours = earlier["format"] == FORMAT and all(OURS.fullmatch(name) for name in found)
        step, tokens, model = earlier["step"], earlier["tokens"], renamed_fields("model", earlier["model"])
    except (OSError, ValueError, KeyError, TypeError):
        is_ours = False
    if not is_ours:
        raise InputError(f"--output {output}: holds {', '.join(found[:4])}; choose a new folder")
    if (model, step, tokens) != (record.model, record.step, record.tokens):
        raise InputError(f"--output {output}: holds another model (step {step}, {tokens} tokens); choose a new folder")


def _write_model(checkpoint: Path, record: CheckpointRecord, folder: Path, dtype: torch.dtype) -> None:
    saved = SavedStates(checkpoint, record.partitions, record.tensor_parallel)
    shapes = {name: saved.shape(name) for name in record.partitions}
    write_weights(folder, shapes, dtype, lambda name, start, stop: saved.weight(name, start, stop))
    tokenizer_file = ""
    if record.tokenizer_file:
        tokenizer_file = f"tokenizer{Path(record.tokenizer_file).suffix}"
        shutil.copyfile(checkpoint / record.tokenizer_file, folder / tokenizer_file)
    content = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "model": record.model,
        "attention": record.attention,
        "tokenizer": dataclasses.asdict(dataclasses.replace(record.tokenizer, file=tokenizer_file)),
        "step": record.step,
        "tokens": record.tokens,
    }
    write_text(folder / "config.json", json.dumps(content, indent=2) + "\n")

"""What a DeepSpeed JSON may say, and what the run config decides for it.

A knob has one owner. The JSON holds ZeRO, precision, offload and communication; where the run config decides, the
JSON says "auto" or nothing. A number that contradicts the run config is reported with both places.
"""

import json
from pathlib import Path
from typing import Any

from ecp_scale.config import Config
from ecp_scale.errors import InputError

MOST_BUCKET_ELEMENTS = 500_000_000
OWNED_BY_RUN_CONFIG = {
    "optimizer": "optimizer.*",
    "scheduler": "optimizer.schedule",
    "wandb": "logging.wandb",
    "tensor_parallel": "parallel.tensor",
    "sequence_parallel_size": "parallel.context",
}
"""Sections of DeepSpeed that have no place in our JSON, and who decides instead."""
REFUSED_IN_ZERO = {
    # Tried: training goes right, and the weights of a converted checkpoint are wrong.
    "round_robin_gradients": "checkpoints do not tell the order of its partitions, so they could not be read",
    "zero_quantized_weights": "it rounds weights on their way, so the curve would not be that of one process",
    "zero_quantized_nontrainable_weights": "it rounds weights on their way",
    "zero_quantized_gradients": "it rounds gradients on their way, so the curve would not be that of one process",
    "mics_shard_size": "DeepSpeed has removed MiCS",
    "zenflow": "it updates some weights later, so the curve would not be that of one process",
}
"""What ZeRO offers and we do not, with the reason."""
OFFLOADED = {"offload_optimizer": (2, 3), "offload_param": (3,)}
"""What ZeRO can keep in CPU memory, and at which stages."""


def read(path: str | None) -> dict[str, Any]:
    """Read the JSON; no path means that of ds_configs/zero1.json.

    Raises:
        InputError: if the file is missing or is not a JSON object.
    """
    if path is None:
        return {"data_types": {"grad_accum_dtype": "fp32"}, "zero_optimization": {"stage": 1, "overlap_comm": False}}
    try:
        content = json.loads(Path(path).read_text())
    except OSError as error:
        raise InputError(f"DeepSpeed JSON {path}: {error.strerror or error}") from error
    except json.JSONDecodeError as error:
        raise InputError(f"DeepSpeed JSON {path}: not valid JSON, {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"DeepSpeed JSON {path}: found a {type(content).__name__}, expected an object")
    return content


def _decided(config: Config, world_size: int) -> dict[str, tuple[Any, str]]:
    """JSON key (dotted) -> (value, the field of the run config that decides it)."""
    training = config.training
    accumulation = config.accumulation_steps(world_size)
    bf16 = training.precision == "bf16"
    return {
        "train_batch_size": (training.global_batch_size, "training.global_batch_size"),
        "train_micro_batch_size_per_gpu": (training.micro_batch_size, "training.micro_batch_size"),
        "gradient_accumulation_steps": (accumulation, "training.global_batch_size / micro_batch_size / ranks"),
        "gradient_clipping": (config.optimizer.gradient_clipping, "optimizer.gradient_clipping"),
        "bf16.enabled": (bf16, "training.precision"),
        "fp16.enabled": (False, "training.precision"),
    }


def problems(content: dict[str, Any], path: str | None, config: Config, world_size: int) -> list[str]:
    """Every contradiction between the JSON and the run config."""
    where = f"DeepSpeed JSON {path}"
    found = [
        f"{where}: section {key!r} belongs to {owner} of the run config; remove it"
        for key, owner in OWNED_BY_RUN_CONFIG.items()
        if key in content
    ]
    for key, (value, owner) in _decided(config, world_size).items():
        given = _get(content, key)
        if given not in (None, "auto", value):
            found.append(f'{where}: {key} is {given!r} but {owner} says {value!r}; write "auto" there')
    found += [f"{where}: zero_optimization{text}" for text in _zero_problems(content.get("zero_optimization"))]
    stage = _get(content, "zero_optimization.stage")
    bf16 = config.training.precision == "bf16"
    if bf16 and stage in (None, 0):
        found.append(
            f"{where}: ZeRO-0 with training.precision bf16 strays from the fp32 curve and exports no fp32 weights; "
            "use stage 1 to 3"
        )
    return found


def _zero_problems(section: Any) -> list[str]:
    """What is wrong with the section about ZeRO by itself."""
    if not isinstance(section, dict):
        return [] if section is None else [f" is {section!r}, expected an object"]
    stage = section.get("stage", 0)
    if stage not in (0, 1, 2, 3):
        return [f".stage is {stage!r}, expected 0, 1, 2 or 3"]
    found = [f".{key} is {section[key]!r}: {why}" for key, why in REFUSED_IN_ZERO.items() if section.get(key)]
    for key, stages in OFFLOADED.items():
        device = _get(section, f"{key}.device")
        if device not in (None, "none", "cpu"):
            found.append(f".{key}.device is {device!r}, expected cpu or none: checkpoints of others could not be read")
        elif device == "cpu" and stage not in stages:
            found.append(f".{key} needs stage {' or '.join(map(str, stages))}, found {stage}")
    return found


def resolve(content: dict[str, Any], config: Config, world_size: int) -> dict[str, Any]:
    """The JSON with every "auto" filled in, as ``deepspeed.initialize`` takes it."""
    resolved: dict[str, Any] = json.loads(json.dumps(content))
    for key, (value, _) in _decided(config, world_size).items():
        *parents, last = key.split(".")
        section = resolved
        for parent in parents:
            section = section.setdefault(parent, {})
        section[last] = value
    # DeepSpeed counts every rank that holds the same parameters as a reader of other samples; those of a context group
    # read the same ones.
    resolved["train_batch_size"] *= config.parallel.context
    if "stage" in resolved.get("zero_optimization", {}) and config.model.vocab_size is not None:
        # DeepSpeed's own size is 500 M elements, which ZeRO-1 and -3 allocate for models of any size.
        bucket = min(MOST_BUCKET_ELEMENTS, config.model.parameters // config.parallel.tensor)
        resolved["zero_optimization"].setdefault("reduce_bucket_size", bucket)
    # The optimizer is ours (ecp_scale.training.engine), and DeepSpeed warns of any but its own.
    resolved.setdefault("zero_allow_untested_optimizer", True)
    # Offloaded states are updated by the same optimizer, whose fused form runs on a CPU.
    resolved.setdefault("zero_force_ds_cpu_optimizer", False)
    resolved.setdefault("steps_per_print", None)
    return resolved


def zero_stage(content: dict[str, Any]) -> int:
    """ZeRO stage of the JSON."""
    return int(_get(content, "zero_optimization.stage") or 0)


def _get(content: dict[str, Any], dotted: str) -> Any:
    value: Any = content
    for key in dotted.split("."):
        if not isinstance(value, dict):
            return None
        value = value.get(key)
    return value

"""What a DeepSpeed JSON may say, and what the run config decides for it.

A knob has one owner. The JSON holds ZeRO, precision, offload and communication; where the run config decides, the
JSON says "auto" or nothing. A number that contradicts the run config is reported with both places, and so is every key
that is not in the list of what is known to work: DeepSpeed ignores what it does not know.
"""

import difflib
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ecp_scale.config import Config
from ecp_scale.errors import InputError
from ecp_scale.files import read_object

MOST_BUCKET_ELEMENTS = 500_000_000
OWNED_BY_RUN_CONFIG = {
    "optimizer": "optimizer.*",
    "scheduler": "optimizer.schedule",
    "wandb": "logging.wandb",
    "tensorboard": "logging.tensorboard",
    "tensor_parallel": "parallel.tensor",
    "sequence_parallel_size": "parallel.context",
    "activation_checkpointing": "parallel.recompute",
}
"""Sections of DeepSpeed that have no place in our JSON, and who decides instead."""
Choice = tuple[Any, ...]
FLAG: Choice = (True, False)
SIZE: Choice = ("an even number from 2 to 10^12",)
OFFLOAD_DEVICE: Choice = ("cpu", "none")
FP32: Choice = ("fp32", "auto", None)
DECIDED: Choice = ()
"""Values of a key: one of some, a size, or what the run config says (or "auto")."""
KNOWN: dict[str, Choice] = {
    "train_batch_size": DECIDED,
    "train_micro_batch_size_per_gpu": DECIDED,
    "gradient_accumulation_steps": DECIDED,
    "gradient_clipping": DECIDED,
    "bf16.enabled": DECIDED,
    "fp16.enabled": DECIDED,
    # Gradients are added up in fp32 over micro-batches; the planner counts on it.
    "data_types.grad_accum_dtype": FP32,
    # The type in which gradients travel: fp32, or None for that of the weights.
    "communication_data_type": ("fp32", None),
    "steps_per_print": (None,),  # what is said of a step is logging.every_steps'
    "wall_clock_breakdown": FLAG,
    "memory_breakdown": FLAG,
    "zero_allow_untested_optimizer": (True,),  # the optimizer is ours
    "zero_force_ds_cpu_optimizer": (False,),
    "zero_optimization.stage": (0, 1, 2, 3),
    "zero_optimization.overlap_comm": FLAG,
    "zero_optimization.contiguous_gradients": FLAG,
    "zero_optimization.reduce_scatter": FLAG,
    "zero_optimization.use_multi_rank_bucket_allreduce": FLAG,
    "zero_optimization.allgather_partitions": FLAG,
    "zero_optimization.allgather_bucket_size": SIZE,
    "zero_optimization.reduce_bucket_size": SIZE,
    "zero_optimization.sub_group_size": SIZE,
    "zero_optimization.stage3_prefetch_bucket_size": SIZE,
    "zero_optimization.stage3_param_persistence_threshold": SIZE,
    "zero_optimization.stage3_max_live_parameters": SIZE,
    "zero_optimization.stage3_max_reuse_distance": SIZE,
    "zero_optimization.offload_optimizer.device": OFFLOAD_DEVICE,
    "zero_optimization.offload_optimizer.pin_memory": FLAG,
    "zero_optimization.offload_param.device": OFFLOAD_DEVICE,
    "zero_optimization.offload_param.pin_memory": FLAG,
}
"""Every key, and what it may say."""
REFUSED = {
    # Tried: training goes right, and the weights of a converted checkpoint are wrong.
    "zero_optimization.round_robin_gradients": "checkpoints do not tell the order of its partitions",
    "zero_optimization.zero_quantized_weights": "it rounds weights on their way",
    "zero_optimization.zero_quantized_nontrainable_weights": "it rounds weights on their way",
    "zero_optimization.zero_quantized_gradients": "it rounds gradients on their way",
    "zero_optimization.mics_shard_size": "DeepSpeed has removed MiCS",
    "zero_optimization.zenflow": "it updates some weights later",
    "zero_optimization.elastic_checkpoint": "its checkpoints can be neither converted nor resumed here",
    "checkpoint.load_universal": "a resume reads checkpoints of any layout as they are",
    "compute_grad_norm": "the norm is in metrics.jsonl and is needed for clipping",
}
"""Keys that users may expect to work, and why they do not; where they are false or null they are taken."""
OFFLOADED = {"offload_optimizer": (2, 3), "offload_param": (3,)}
"""What ZeRO can keep in CPU memory, and at which stages."""


def ready_made() -> dict[str, Path]:
    """The files of ds_configs/ by name: of the checkout, or where a wheel puts them."""
    checkout = Path(__file__).resolve().parents[2] / "ds_configs"
    installed = Path(sysconfig.get_path("data")) / "share" / "ecp-scale" / "ds_configs"
    return {path.stem: path for folder in (installed, checkout) for path in sorted(folder.glob("*.json"))}


def default(config: Config, world_size: int) -> dict[str, Any]:
    """What holds without a JSON: ``zero1`` of ds_configs/, or ``zero0`` where there is nothing to partition.

    Copies and buckets of ZeRO are wasted on a rank that shares its parameters with no other. In bf16 it is ZeRO that
    keeps the fp32 weights.
    """
    alone = world_size == config.parallel.tensor and config.training.precision == "fp32"
    section = {"stage": 0 if alone else 1, "overlap_comm": False}
    return {"zero_optimization": section, **({} if alone else {"data_types": {"grad_accum_dtype": "fp32"}})}


def read(path: str) -> dict[str, Any]:
    """Read the JSON, which may be named as one of ds_configs/.

    Raises:
        InputError: if the file is missing or is not a JSON object.
    """
    file = Path(path)
    if not file.exists() and "/" not in path and not file.suffix:
        if path not in ready_made():
            raise InputError(f"DeepSpeed JSON {path}: no such file, and none of {', '.join(ready_made())}")
        file = ready_made()[path]
    return read_object(file, f"DeepSpeed JSON {path}")


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
    """Everything in the JSON that is not known, or contradicts the run config."""
    where = f"DeepSpeed JSON {path}"
    found = [
        f"{where}: section {key!r} belongs to {owner} of the run config; remove it"
        for key, owner in OWNED_BY_RUN_CONFIG.items()
        if key in content
    ]
    rest = {key: value for key, value in content.items() if key not in OWNED_BY_RUN_CONFIG}
    found += [f"{where}: {text}" for key, value in _flat(rest) if (text := _key_problem(key, value))]
    for key, (value, owner) in _decided(config, world_size).items():
        given = _get(content, key)
        # What ``resolve`` has written is taken again.
        values = (value, value * config.parallel.context) if key == "train_batch_size" else (value,)
        if given not in (None, "auto", *values):
            if key == "fp16.enabled":
                found.append(f"{where}: {key} is {given!r}, but there is no fp16: training.precision is fp32 or bf16")
                continue
            found.append(f'{where}: {key} is {given!r} but {owner} says {value!r}; write "auto" there')
    zero = content.get("zero_optimization")
    stage = zero.get("stage", 0) if isinstance(zero, dict) else 0
    for key, stages in OFFLOADED.items():
        if _get(content, f"zero_optimization.{key}.device") == "cpu" and stage not in stages:
            needed = " or ".join(map(str, stages))
            found.append(f"{where}: zero_optimization.{key} needs stage {needed}, found {stage}")
    if config.optimizer.name == "muon":
        if stage == 3:
            found.append(f"{where}: optimizer.name muon needs whole matrices, which stage 3 cuts; use stage 0 to 2")
        if _get(content, "zero_optimization.offload_optimizer.device") == "cpu":
            found.append(f"{where}: optimizer.name muon has its states on the ranks' device; remove offload_optimizer")
    if config.training.precision == "bf16" and stage in (None, 0):
        found.append(
            f"{where}: ZeRO-0 with training.precision bf16 strays from the fp32 curve and exports no fp32 weights; "
            "use stage 1 to 3"
        )
    return found


def _flat(content: dict[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Keys (dotted) and values; an empty object is a value."""
    for name, value in content.items():
        key = before + (f"{name!r}" if "." in name else name)  # in quotes it is none of those that are known
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{key}.")
        else:
            yield key, value


def _key_problem(key: str, value: Any) -> str | None:
    """Why a key or its value cannot be taken."""
    sections = {known.rpartition(".")[0] for known in KNOWN}
    if key in REFUSED:
        taken = (None, False) if key != "compute_grad_norm" else (None, True)
        return None if value in taken else f"{key} is {value!r}: {REFUSED[key]}"
    if key not in KNOWN:
        if key in sections:
            return None if value == {} else f"{key} is {value!r}, expected an object"
        close = difflib.get_close_matches(key, [*KNOWN, *sections], n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        return f"{key} is not among the keys that are known to work (docs/training.md){hint}"
    choice = KNOWN[key]
    if choice == DECIDED:
        return None  # compared with the run config
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if choice == SIZE and is_number and 2 <= value <= 10**12 and value % 2 == 0:
        return None
    if any(value is option or (type(value) is type(option) and value == option) for option in choice):
        return None
    expected = " or ".join(option if option in SIZE else json.dumps(option) for option in choice)
    return f"{key} is {value!r}, expected {expected}"


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
    if "zero_optimization" in resolved:
        # Trap: DeepSpeed's own default is true under ZeRO-3.
        resolved["zero_optimization"].setdefault("overlap_comm", False)
    resolved.setdefault("data_types", {})["grad_accum_dtype"] = "fp32"
    # The optimizer is ours (ecp_scale.zero.engine), and DeepSpeed warns of any but its own.
    resolved.setdefault("zero_allow_untested_optimizer", True)
    # Offloaded states are updated by the same optimizer, whose fused form runs on a CPU.
    resolved.setdefault("zero_force_ds_cpu_optimizer", False)
    resolved.setdefault("steps_per_print", None)
    return resolved


def zero_stage(content: dict[str, Any]) -> int:
    """ZeRO stage of the JSON."""
    return int(_get(content, "zero_optimization.stage") or 0)


def sent_bytes(content: dict[str, Any], config: Config) -> int:
    """Bytes of an element of a gradient on its way to other ranks."""
    in_fp32 = config.training.precision == "fp32" or _get(content, "communication_data_type") == "fp32"
    return 4 if in_fp32 else 2


def _get(content: dict[str, Any], dotted: str) -> Any:
    value: Any = content
    for key in dotted.split("."):
        if not isinstance(value, dict):
            return None
        value = value.get(key)
    return value

"""Every check of the config, presets, and the command line that reports them all at once."""

import dataclasses
import json
from pathlib import Path

import pytest
import yaml

from ecp_scale.command_line import load_preset, parse, preset_names, to_yaml
from ecp_scale.config import Config, ModelConfig, options
from ecp_scale.config.geometry import GEOMETRIES
from ecp_scale.errors import InputError
from ecp_scale.zero import json_config
from tests.launching import ROOT

DS_CONFIGS = sorted((ROOT / "ds_configs").glob("*.json"))


def refused(*argv: str) -> str:
    """The message of a command line that must be refused."""
    with pytest.raises(InputError) as error:
        parse(argv, "")
    return str(error.value)


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_is_valid_and_survives_yaml(name: str, tmp_path: Path) -> None:
    config = load_preset(name)
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config))
    ranks = config.parallel.tensor * config.parallel.context
    assert parse(["--config", str(file)], "", world_size=ranks).config == config


def test_presets_have_the_size_of_their_names() -> None:
    assert round(load_preset("paper-12l").model.parameters / 1e6, 1) == 129.6
    assert abs(load_preset("scaled-125m").model.parameters / 125e6 - 1) < 0.03


@pytest.mark.parametrize("path", DS_CONFIGS, ids=[path.stem for path in DS_CONFIGS])
def test_every_deepspeed_json_fits_every_preset(path: Path) -> None:
    content = json_config.read(str(path))
    for name in preset_names():
        config = load_preset(name)
        if path.stem == "zero0":
            config = dataclasses.replace(config, training=dataclasses.replace(config.training, precision="fp32"))
        assert json_config.problems(content, str(path), config, 1) == []
        resolved = json_config.resolve(content, config, 1)
        assert "auto" not in json.dumps(resolved)
        assert resolved["bf16"]["enabled"] == (config.training.precision == "bf16")
        assert resolved["gradient_accumulation_steps"] == config.accumulation_steps(1)
        assert json_config.zero_stage(resolved) == int(path.stem.removeprefix("zero")[0])
        assert ("offload_optimizer" in resolved["zero_optimization"]) == path.stem.endswith("offload")


def test_a_folder_with_the_name_of_a_preset_does_not_hide_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    assert parse(["--config", "demo"], "").config == dataclasses.replace(load_preset("demo"), model=_without_preset())


def _without_preset() -> ModelConfig:
    return dataclasses.replace(load_preset("demo").model, preset=None)


@pytest.mark.parametrize("prefix", ["/tmp/ä ö/x", "a: b", '"quoted"', "5", "null file"])
def test_text_in_a_file_stays_as_it_is(prefix: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({"data": {"prefix": prefix, "validation_prefix": None}}))
    config = parse(["--config", str(file)], "").config
    assert (config.data.prefix, config.data.validation_prefix) == (prefix, None)


def test_later_sources_win(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model:\n  preset: demo\n  layers: 6\noptimizer: {learning_rate: 1.0e-3}\n")
    config = parse(["--config", str(file), "--model.layers", "8", "--training.seed=7"], "").config
    assert config.model.layers == 8
    assert config.optimizer.learning_rate == 1e-3
    assert config.training.seed == 7
    assert config.model.width == load_preset("demo").model.width


def test_all_problems_are_reported_at_once_with_their_numbers(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model:\n  layer: 3\n  segment_length: 100\ntrainig: {}\n")
    message = refused(
        *("--config", str(file), "--model.layers=2", "--model.width=390", "--model.heads=6", "--parallel.tensor=4"),
        *("--training.global_batch_size=10", "--training.micro_batch_size=4", "--optimizer.beta1=2", "--what=1"),
        "--optimizer.lr=1",
        *("--training.steps=many", "--data.prefix"),
    )
    for part in (
        "unknown key 'model.layer'; did you mean 'model.layers'",
        "unknown key 'optimizer.lr'; did you mean 'optimizer.learning_rate'",
        "unknown section 'trainig'; did you mean 'training'",
        "unknown key 'what'",
        "training.steps is 'many', expected whole number",
        "--data.prefix needs a value",
        "model.sequence_length 2048 is not a multiple of model.segment_length 100",
        "(2 + 1) * 100 = 300 is shorter than model.sequence_length 2048",
        "model.heads 6 is not divisible by parallel.tensor 4",
        "training.global_batch_size 10 is not a multiple of training.micro_batch_size * data-parallel ranks = 4 * 1",
        "optimizer.beta1 is 2.0",
    ):
        assert part in message, part
    assert "head width" in message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 100, "heads": 3}, "model.width 100 is not divisible by model.heads 3"),
        ({"heads": 6, "key_value_heads": 4}, "model.heads 6 is not divisible by model.key_value_heads 4"),
        ({"layers": 0}, "model.layers is 0, expected more than 0"),
        ({"dropout": 1.0}, "model.dropout is 1.0"),
        ({"segment_length": 2048, "first_segment_projection": True}, "untrained"),
    ],
)
def test_model_problems(options: dict[str, object], message: str) -> None:
    assert any(message in problem for problem in dataclasses.replace(ModelConfig(), **options).problems())


def test_everything_wrong_with_a_pattern_is_reported_together() -> None:
    message = refused(
        *("--config", "paper-12l-compressed", "--model.architecture=split_attention", "--attention.document_mask=true"),
        *("--model.segment_length=100", "--model.window=5000", "--model.group_length=4097"),
        *("--model.compressed_context=1025", "--attention.restart_positions=false"),
    )
    for part in (
        "model.window 5000 is larger than model.sequence_length 2048",
        "model.group_length 4097 is larger than model.sequence_length 2048",
        "model.compressed_context 1025 is larger than the context, model.sequence_length 2048 - model.latents 1024 =",
        "2048 - 1024 = 1024, is not a multiple of model.segment_length 100",
        "attention.document_mask is true without document ids: attention.end_of_document is null",
    ):
        assert part in message, part
    assert message.startswith("5 problems")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"architecture": "perceiver_ar", "latents": 2049},
            "model.latents 2049 is larger than model.sequence_length 2048",
        ),
        ({"architecture": "double_attention", "latents": 2048}, "model.latents 2048 equals model.sequence_length"),
        (
            {"architecture": "compressed_double_attention", "layers": 1},
            "model.layers is 1; compressed_double_attention",
        ),
        ({"architecture": "longlora", "group_length": 511}, "model.group_length 511 is odd"),
        ({"architecture": "longlora", "heads": 3}, "longlora shifts half of the key/value heads, and 3 of them"),
        ({"architecture": "longlora", "group_length": 128}, "(12 + 1) * 128 / 2 = 832 is shorter than"),
        ({"architecture": "sliding_window", "window": 100}, "12 * (100 - 1) + 1 = 1189 is shorter than"),
        ({"latents": 0}, "model.latents is 0, expected more than 0"),
        ({"key_value_norm": True}, "model.tied_key_value is false"),
    ],
)
def test_pattern_problems(options: dict[str, object], message: str) -> None:
    problems = dataclasses.replace(ModelConfig(), **options).problems()
    assert len(problems) == 1
    assert message in problems[0]


def test_the_largest_sizes_that_fit_are_accepted() -> None:
    model = ModelConfig(architecture="perceiver_ar", latents=2048, window=2048, group_length=2048)
    assert model.problems() == []
    assert dataclasses.replace(model, latents=1024, compressed_context=1024).problems() == []


def test_problems_of_the_document_mask() -> None:
    options = ("--config", "demo", "--attention.document_mask=true")
    assert "expected an id from 0 to 28" in refused(*options, "--attention.end_of_document=29", "--model.vocab_size=29")
    assert "attention.document_mask is false" in refused("--config", "demo", "--attention.restart_positions=true")
    released = ("--model.architecture=compressed_double_attention", "--model.compression_residual=release")
    assert "adds the rows of other documents" in refused(*options, *released, "--attention.end_of_document=2")
    assert parse([*options, "--data.prefix=shards/train"], "").config.attention.document_mask
    assert parse([*options, "--attention.end_of_document=2"], "").config.attention.end_of_document == 2


def test_problems_of_the_length_and_the_cool_down() -> None:
    message = refused(
        "--config", "demo", "--training.tokens=0", "--training.z_loss=-1", "--optimizer.cooldown_tokens=0"
    )
    assert "training.tokens is 0, expected more than 0" in message
    assert "training.z_loss is -1.0, expected at least 0" in message
    assert "optimizer.cooldown_tokens is 0, expected more than 0" in message
    wsd = ["--config", "demo", "--optimizer.schedule=wsd", "--training.tokens=737280"]
    message = refused(*wsd, "--optimizer.warmup_tokens=500000", "--optimizer.cooldown_tokens=300000")
    assert "warmup_tokens 500000 and a cool-down of 300000 tokens (optimizer.cooldown_tokens) do not fit" in message
    assert "into a run of 737280 tokens" in message
    assert parse([*wsd, "--optimizer.cooldown_tokens=300000"], "").config.training.steps == 360


def test_problems_of_blends() -> None:
    blend = json.dumps({0: {"a": 0.7, "b": 0.3}, 4096: {"a": 0.1, "b": 0.9}})
    config = parse(["--config", "demo", "--data.blend", blend], "").config
    assert config.data.phases == [(0, {"a": 0.7, "b": 0.3}), (4096, {"a": 0.1, "b": 0.9})]
    assert "both set" in refused("--config", "demo", "--data.blend", blend, "--data.prefix=a")
    assert "data.blend begins at 5 tokens, expected 0" in refused("--data.blend", '{"5": {"a": 1}}')
    assert "weights {'a': -1.0}" in refused("--data.blend", '{"0": {"a": -1, "b": 2}}')
    assert "expected some above 0" in refused("--data.blend", '{"0": {"a": 0}}')
    with pytest.raises(InputError, match=r"data\.prefix or data\.blend is not set"):
        parse(["--config", "demo"], "", required=("data.prefix|data.blend",))


def test_one_word_changes_the_architecture() -> None:
    for preset in ("paper-12l", "scaled-125m", "demo"):
        for architecture in GEOMETRIES:
            config = parse(["--config", preset, f"--model.architecture={architecture}"], "").config
            assert config.model.architecture == architecture


def test_presets_of_the_papers_five_have_one_budget() -> None:
    budget = load_preset("paper-12l").model.parameters
    names = [name for name in preset_names() if name.startswith("paper-12l")]
    assert {load_preset(name).model.architecture for name in names} == {
        "ecp",
        "perceiver_ar",
        "double_attention",
        "compressed_double_attention",
        "split_attention",
    }
    for name in names:
        assert abs(load_preset(name).model.parameters / budget - 1) < 0.005, name


def test_the_documentation_tells_the_presets_true_counts() -> None:
    text = (ROOT / "docs" / "architectures.md").read_text()
    budget = load_preset("paper-12l").model.parameters
    for name in preset_names():
        if name.startswith("paper-12l"):
            model = load_preset(name).model
            share = "" if name == "paper-12l" else f"{model.parameters / budget - 1:+.2%}"
            cells = (name, f"{model.parameters:,}", share, f"{model.flops_per_token / 1e9:.3f}")
            assert "| " + " | ".join(cells).replace("|  |", "| |") + " |" in text, name


def test_a_preset_may_stand_on_another() -> None:
    config = load_preset("paper-12l-double")
    assert config.optimizer == load_preset("paper-12l").optimizer
    assert (config.model.preset, config.model.rotary, config.model.norm) == (
        "paper-12l-double",
        "every_layer",
        "layernorm",
    )


def test_weights_of_a_compression_keep_its_sizes() -> None:
    trained = ModelConfig(architecture="compressed_double_attention", sequence_length=2048, latents=1024)
    moved = dataclasses.replace(trained, sequence_length=2304, latents=1280)
    assert moved.weights_problems(trained) == []
    (problem,) = dataclasses.replace(trained, sequence_length=4096).weights_problems(trained)
    assert "a context of 1024 tokens to 512 rows and cannot compress 3072 to 1536" in problem
    assert dataclasses.replace(trained, architecture="ecp", sequence_length=4096).weights_problems(trained) == []


def test_a_short_reach_can_be_accepted() -> None:
    config = ModelConfig(layers=2, segment_length=128, allow_short_receptive_field=True)
    assert config.problems() == []


def test_ranks_are_checked_when_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    message = refused("--config", "demo", "--parallel.tensor=2")
    assert "the launch has 3 ranks, not a multiple of parallel.tensor * parallel.context = 2 * 1" in message


def test_a_run_without_a_launcher_is_one_rank_and_a_dry_run_is_any() -> None:
    assert "the launch has 1 ranks, not a multiple" in refused("--config", "demo", "--parallel.tensor=2")
    assert parse(["--config", "demo", "--parallel.tensor=2", "--dry-run"], "").config.parallel.tensor == 2


def test_contradictions_with_the_deepspeed_json_name_both_places(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    content = {
        "train_batch_size": 99,
        "gradient_clipping": 0.5,
        "bf16": {"enabled": True},
        "optimizer": {"type": "Adam"},
        "zero_optimization": {"stage": 7},
    }
    file.write_text(json.dumps(content))
    message = refused("--config", "demo", "--deepspeed_config", str(file), "--model.layers=0", "--parallel.tensor=0")
    for part in (
        "model.layers is 0",
        "parallel.tensor is 0",
        "train_batch_size is 99 but training.global_batch_size says 4",
        "gradient_clipping is 0.5 but optimizer.gradient_clipping says 1.0",
        "bf16.enabled is True but training.precision says False",
        "section 'optimizer' belongs to optimizer.*",
        "zero_optimization.stage is 7",
    ):
        assert part in message, part


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"stage": 2, "round_robin_gradients": True}, "round_robin_gradients is True: checkpoints do not tell"),
        ({"stage": 3, "zero_quantized_weights": True}, "zero_quantized_weights is True: it rounds weights"),
        ({"stage": 3, "mics_shard_size": 2}, "DeepSpeed has removed MiCS"),
        ({"stage": 1, "offload_optimizer": {"device": "cpu"}}, "offload_optimizer needs stage 2 or 3, found 1"),
        ({"stage": 2, "offload_param": {"device": "cpu"}}, "offload_param needs stage 3, found 2"),
        ({"stage": 3, "offload_optimizer": {"device": "nvme"}}, "offload_optimizer.device is 'nvme', expected \"cpu\""),
        (3, "zero_optimization is 3, expected an object"),
    ],
)
def test_what_zero_offers_and_is_refused(section: object, message: str, tmp_path: Path) -> None:
    file = tmp_path / "deepspeed.json"
    file.write_text(json.dumps({"zero_optimization": section}))
    assert message in refused("--config", "demo", "--deepspeed_config", str(file))


def test_bf16_without_master_weights_is_refused() -> None:
    zero0 = str(ROOT / "ds_configs" / "zero0.json")
    assert "use stage 1 to 3" in refused("--config", "scaled-125m", "--deepspeed_config", zero0)


def test_a_json_of_the_project_is_known_by_its_name() -> None:
    words = ["--config", "demo", "--deepspeed_config"]
    assert parse([*words, "zero3"], "").deepspeed == json.loads((ROOT / "ds_configs" / "zero3.json").read_text())
    message = refused(*words, "zero4")
    assert "no such file, and none of zero0, zero1, zero2, zero2_offload, zero3, zero3_offload" in message
    assert "x/zero1" in refused(*words, "x/zero1")


@pytest.mark.parametrize(
    ("ranks", "more", "expected"),
    [
        (1, ["--training.precision=fp32", "--parallel.tensor=1"], "zero0"),
        (2, ["--training.precision=fp32", "--parallel.tensor=2"], "zero0"),
        (2, ["--training.precision=fp32", "--parallel.tensor=1", "--training.micro_batch_size=2"], "zero1"),
        (1, ["--training.precision=bf16", "--parallel.tensor=1"], "zero1"),
    ],
)
def test_without_a_json_a_run_partitions_where_there_is_something_to_partition(
    ranks: int, more: list[str], expected: str
) -> None:
    words = ["--config", "demo", *more]
    chosen = parse(words, "", world_size=ranks)
    written = parse([*words, "--deepspeed_config", expected], "", world_size=ranks)
    assert json_config.resolve(chosen.deepspeed, chosen.config, ranks) == json_config.resolve(
        written.deepspeed, written.config, ranks
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("model: [", "not valid YAML"),
        ("- 1", "expected sections"),
        ("model: 3", "holds 3, expected keys"),
        ("# nothing yet\n", "run.yaml: is empty, expected sections model, "),
        ("model: {layers: 3}\ntraining: {steps: 5}\nmodel: {width: 64}\n", "model is given twice"),
        ("training:\n  steps: 5\n  steps: 7\n", "steps is given twice"),
    ],
)
def test_files_that_are_no_configs(content: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(content)
    assert message in refused("--config", str(file))


def test_a_section_may_be_empty(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model:\n  preset: demo\ntraining:\n  # steps: 5\n")
    assert parse(["--config", str(file)], "").config == load_preset("demo")


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("--training.steps=many", "whole number"),
        ("--optimizer.learning_rate=fast", "number"),
        ("--training.compile=2", "true or false or auto"),
        ("--training.precision=fp16", "one of fp32, bf16"),
        ("--optimizer.average_decay=much", "number or null"),
        ("--training.batch_schedule=4", "{whole number: whole number} or null"),
        ("--logging.profile_steps=4", "[whole number, whole number] or null"),
    ],
)
def test_what_a_field_expects_is_said_as_it_is_written(option: str, expected: str) -> None:
    assert refused("--config", "demo", option).endswith(f", expected {expected}")


def test_what_the_command_line_takes_beside_fields_is_suggested() -> None:
    for wrong, right in (("--resum=auto", "resume"), ("--dry-rum", "dry-run"), ("--init_from=x", "init-from")):
        assert f"did you mean {right!r}?" in refused("--config", "demo", wrong)


def test_missing_files_are_named(tmp_path: Path) -> None:
    assert "--config nowhere: no such file, and no preset of that name: demo, " in refused("--config", "nowhere")
    assert "not/here.yaml: No such file" in refused("--config", "not/here.yaml")
    assert "nowhere.json: No such file" in refused("--config", "demo", "--deepspeed_config", "nowhere.json")
    assert "expected one of demo" in refused("--model.preset=nothing")


def test_required_fields_are_asked_for_unless_it_is_a_dry_run() -> None:
    with pytest.raises(InputError, match=r"data\.prefix is not set"):
        parse(["--config", "demo"], "", required=("data.prefix",))
    assert parse(["--config", "demo", "--dry-run"], "", required=("data.prefix",)).dry_run


def test_the_saved_config_has_every_section() -> None:
    assert set(yaml.safe_load(to_yaml(Config()))) == set(options.SECTIONS)


def test_a_preset_sits_under_a_file_that_names_it(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: {preset: paper-12l, dropout: 0.0}\n")
    config = parse(["--config", str(file)], "").config
    assert (config.model.dropout, config.model.norm) == (0.0, "layernorm")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"zero_optimisation": {"stage": 3}}, "did you mean 'zero_optimization.stage'"),
        ({"gradient_cliping": 1.0}, "did you mean 'gradient_clipping'"),
        ({"zero_optimization.stage": 3}, "'zero_optimization.stage' is not among the keys that are known to work"),
        ({"zero_optimization": {"stage": 1, "elastic_checkpoint": True}}, "neither converted nor resumed"),
        ({"checkpoint": {"load_universal": True}}, "checkpoint.load_universal is True"),
        ({"elasticity": {"enabled": True}}, "elasticity.enabled is not among the keys"),
        ({"amp": {"enabled": True}}, "amp.enabled is not among the keys"),
        ({"curriculum_learning": {"enabled": True}}, "curriculum_learning.enabled is not among the keys"),
        ({"torch_autocast": {"enabled": True}}, "torch_autocast.enabled is not among the keys"),
        ({"tensorboard": {"enabled": True}}, "section 'tensorboard' belongs to logging.tensorboard"),
        ({"fp16": {"enabled": True}}, "fp16.enabled is True, but there is no fp16: training.precision is fp32 or bf16"),
        ({"communication_data_type": "fp16"}, "communication_data_type is 'fp16', expected \"fp32\" or null"),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, "data_types.grad_accum_dtype is 'bf16'"),
        ({"bf16": {"bf16_master_weights_and_grads": True}}, "bf16.bf16_master_weights_and_grads is not among"),
        ({"compute_grad_norm": False}, "compute_grad_norm is False"),
        ({"zero_optimization": {"stage": True}}, "zero_optimization.stage is True, expected 0"),
        ({"zero_optimization": {"stage": 1, "reduce_bucket_size": 0}}, "expected an even number from 2"),
        ({"zero_optimization": None}, "zero_optimization is None, expected an object"),
        ({"bf16": None, "data_types": None}, "data_types is None, expected an object"),
        ({"steps_per_print": 0}, "steps_per_print is 0, expected null"),
    ],
)
def test_a_json_says_what_is_known_to_work_or_is_refused_by_name(
    content: dict[str, object], message: str, tmp_path: Path
) -> None:
    file = tmp_path / "deepspeed.json"
    file.write_text(json.dumps(content))
    assert message in refused("--config", "demo", "--deepspeed_config", str(file))


def test_without_data_types_gradients_are_added_up_in_fp32() -> None:
    config = parse(["--config", "demo"], "").config
    assert json_config.resolve({}, config, 1)["data_types"] == {"grad_accum_dtype": "fp32"}


@pytest.mark.parametrize(
    "text",
    [
        b"data:\n  blend: {2020-01-01: {a: 1}}\n",
        b"logging:\n  run_name: 2024-13-45\n",
        b"training:\n  steps: " + b"1" * 5000 + b"\n",
        b"training: " + b"[" * 5000,
        b"data:\n  prefix: \xff\n",
        b'data:\n  prefix: "a\\0b"\n',
        b"model: &a\n  preset: demo\n  window: *a\n",
    ],
    ids=["date as key", "no date", "long number", "deep", "no UTF-8", "NUL", "holds itself"],
)
def test_a_file_that_yaml_or_the_system_cannot_take_is_refused(text: bytes, tmp_path: Path) -> None:
    file = tmp_path / "odd.yaml"
    file.write_bytes(text)
    assert refused("--config", str(file))


def test_the_home_folder_may_be_written_as_a_tilde(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somewhere")
    words = ["--config=demo", "--data.blend={0: {~/a: 1.0}}", "--training.output_dir=~/run", "--dry-run"]
    config = parse(words, "").config
    assert config.data.blend == {0: {"/somewhere/a": 1.0}}
    assert config.training.output_dir == "/somewhere/run"


def test_former_names_are_answered_with_the_new_ones(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("data: {untrained_targets: [1]}\n")
    message = refused("--config", str(file), "--optimizer.minimum_ratio=0.5", "--model.allow_short_reach=true")
    assert f"{file}: data.untrained_targets is now data.loss_ignore_ids" in message
    assert "command line: optimizer.minimum_ratio is now optimizer.min_lr_ratio" in message
    assert "command line: model.allow_short_reach is now model.allow_short_receptive_field" in message
    assert "'merged', expected 'flash', its present name" in refused("--config", "demo", "--attention.backend=merged")


def test_options_without_effect_are_noted() -> None:
    words = ["--config", "demo", "--model.window=192", "--model.latents=64", "--model.segment_length=256"]
    idle = "has no effect with model.architecture"
    assert parse(words, "").notes == (f"--model.window {idle} ecp", f"--model.latents {idle} ecp")
    other = [*words, "--model.architecture=sliding_window", "--optimizer.name=sgd", "--optimizer.beta1=0.5"]
    assert parse([*other, "--optimizer.halving_tokens=9"], "").notes == (
        f"--model.latents {idle} sliding_window",
        f"--model.segment_length {idle} sliding_window",
        "--optimizer.beta1 has no effect with optimizer.name sgd",
        "--optimizer.halving_tokens has no effect with optimizer.schedule cosine",
    )
    derived = ["--config", "demo", "--model.architecture=sliding_window", "--model.segment_length=128"]
    assert parse(derived, "").notes == ()  # the window is made of it
    assert parse(["--config", "demo"], "").notes == ()
    assert parse(["--config", "demo", "--training.steps=3"], "").notes == (
        "optimizer.warmup_tokens 100,000 is beyond the 6,144 tokens of the run: the rate stays low",
    )


def test_the_config_of_a_run_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    config = yaml.safe_load(to_yaml(parse(["--config", "demo"], "").config))
    config["model"]["allow_short_reach"] = config["model"].pop("allow_short_receptive_field")
    config["optimizer"]["minimum_ratio"] = config["optimizer"].pop("min_lr_ratio")
    config["data"]["untrained_targets"] = [3]
    del config["data"]["loss_ignore_ids"]
    config["attention"]["backend"] = "segments"
    config["training"]["output_dir"] = str(tmp_path)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert "is now data.loss_ignore_ids" in refused("--config", str(tmp_path / "config.yaml"))
    (tmp_path / "metrics.jsonl").write_text("")  # which makes it the folder of a run
    read = parse(["--config", str(tmp_path / "config.yaml")], "").config
    assert (read.data.loss_ignore_ids, read.attention.backend) == ([3], "sdpa")

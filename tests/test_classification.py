"""Classification of images as sequences: shards with labels, training in every layout, conversion, accuracy."""

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from ecp_scale.checkpoint.export import ExportedModel, export
from ecp_scale.checkpoint.folder import CheckpointRecord, find_checkpoint
from ecp_scale.checkpoint.identity import NEWER_FIELDS, check_continues
from ecp_scale.command_line import parse
from ecp_scale.data.corpus import Corpus
from ecp_scale.errors import InputError
from ecp_scale.evaluation.classification import Classification, classify
from ecp_scale.evaluation.generation import generate
from ecp_scale.hub.modeling_ecp import EcpForCausalLM
from ecp_scale.preparation.images import LABELS, write_images
from ecp_scale.preparation.verification import verify
from ecp_scale.training.loop import train
from tests.launching import metrics, run, run_successfully
from tests.parallel.layouts import RECIPE

NAMES = [f"shade{number}" for number in range(4)]


def image_of(shade: int, rng: np.random.Generator) -> np.ndarray[Any, Any]:
    """An image whose brightness tells its label, of NAMES."""
    return (40 + 50 * shade + rng.integers(0, 30, (32, 32, 3))).astype(np.uint8)


def png(pixels: np.ndarray[Any, Any], mode: str = "RGB") -> bytes:
    """The bytes of an image."""
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, "PNG")
    return file.getvalue()


def write_parquet(path: Path, images: list[bytes], labels: list[Any], names: list[str] | None = NAMES) -> str:
    """A file as the hub has it, with the names of its labels."""
    table = pyarrow.table({"img": [{"bytes": image, "path": None} for image in images], "label": labels})
    if names is not None:
        described = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(described)})
    pyarrow.parquet.write_table(table, path)
    return str(path)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Prefix of 48 images."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(1)
    labels = [number % 4 for number in range(48)]
    source = write_parquet(folder / "a.parquet", [png(image_of(label, rng)) for label in labels], labels)
    out = run_successfully(
        *("data_tools/preprocess.py", "--recipe", "scifar10", "--input", source),
        *("--output-prefix", folder / "train"),
    )
    assert "48 images of 1,024 values, 4 labels: shade0, shade1, shade2, shade3" in out
    return str(folder / "train")


def words(shards: str, run: Path, *more: str) -> list[str]:
    """A short training of a small classifier."""
    values: dict[str, object] = {
        "model.preset": "scifar10",
        "model.layers": 2,
        "model.width": 32,
        "model.heads": 2,
        "model.feed_forward_width": 64,
        "model.dropout": 0.0,
        "model.vocab_multiple": 11,
        **RECIPE,
        "model.allow_short_receptive_field": True,
        "training.steps": 6,
        "training.validation_every_steps": 6,
        "training.validation_windows": 10,
        "data.prefix": shards,
        "data.validation_prefix": shards,
        "training.output_dir": run,
    }
    return [*(f"--{key}={value}" for key, value in values.items()), *more]


def test_a_document_is_the_pixels_of_an_image_and_its_label(shards: str) -> None:
    corpus, rng = Corpus(shards, 1024), np.random.default_rng(1)
    assert (corpus.windows, corpus.manifest.labels) == (48, tuple(NAMES))
    for number in range(corpus.windows):
        pixels = image_of(number % 4, rng).astype(float)
        grey = pixels @ np.array([0.299, 0.587, 0.114])
        window = corpus.window(number)
        assert np.abs(window[:-1] - grey.reshape(-1)).max() <= 1
        assert window[-1] == number % 4
    assert list(verify(Path(shards), deep=True)) == []
    with pytest.raises(InputError, match=r"documents of 1025 tokens with their labels, expected .* = 513"):
        Corpus(shards, 512)


def test_colours_are_three_values_of_each_pixel_and_labels_may_have_no_names(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    pixels = rng.integers(0, 256, (32, 32, 3)).astype(np.uint8)
    source = write_parquet(tmp_path / "a.parquet", [png(pixels)], [9], names=None)
    manifest = write_images([source], tmp_path / "rgb", "rgb")
    assert manifest.labels == LABELS
    window = Corpus(str(tmp_path / "rgb"), 3072).window(0)
    assert np.array_equal(window[:-1], pixels.reshape(-1))
    assert window[-1] == 9


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        ([png(np.zeros((16, 32, 3), dtype=np.uint8))], [0], "row 0: 32 x 16 pixels of mode RGB, expected 32 x 32"),
        ([png(np.zeros((32, 32, 3), dtype=np.uint8), "RGBA")], [0], "row 0: 32 x 32 pixels of mode RGBA"),
        ([png(np.zeros((32, 32, 3), dtype=np.uint8))], [4], "row 0: label 4, expected 0 to 3"),
        ([png(np.zeros((32, 32, 3), dtype=np.uint8))], [None], "row 0: label None, expected 0 to 3"),
        ([b"no image"], [0], "row 0: not an image that can be read"),
    ],
)
def test_what_is_no_image_is_named(images: list[bytes], labels: list[Any], message: str, tmp_path: Path) -> None:
    source = write_parquet(tmp_path / "a.parquet", images, pyarrow.array(labels, pyarrow.int64()))
    with pytest.raises(InputError, match=message):
        write_images([source], tmp_path / "x", "grey")
    assert not (tmp_path / "x.manifest.json").exists()


def test_other_files_and_flags_are_refused(shards: str, tmp_path: Path) -> None:
    (tmp_path / "text.parquet").write_text("none")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"]}), tmp_path / "other.parquet")
    program = ("data_tools/preprocess.py", "--recipe", "scifar10", "--output-prefix", tmp_path / "x", "--input")
    for more, message in (
        ([tmp_path / "text.parquet"], "text.parquet: not a parquet file"),
        ([tmp_path / "other.parquet"], "columns text, expected img and label"),
        ([tmp_path / "no.parquet"], "no.parquet"),
        ([tmp_path / "other.parquet", "--tokenizer", "byte"], "--tokenizer does nothing with --recipe scifar10"),
    ):
        done = run(*program, *more)
        assert done.returncode == 2
        assert message in done.stderr
        assert "Traceback" not in done.stderr
    done = run("data_tools/preprocess.py", "--input", tmp_path, "--output-prefix", tmp_path / "x")
    assert "--tokenizer is not set" in done.stderr


@pytest.fixture(scope="module")
def alone(shards: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    train(parse(words(shards, folder), ""))
    return folder


@pytest.mark.parametrize(
    "layout",
    [
        ("--parallel.tensor=2", "--parallel.sequence=true"),
        ("--training.micro_batch_size=2", "--deepspeed_config=zero2"),
    ],
)
def test_every_layout_has_the_curve_of_one_process(
    layout: tuple[str, ...], alone: Path, shards: str, tmp_path: Path
) -> None:
    run_successfully("launch/pretrain_ecp.py", *words(shards, tmp_path / "run", *layout), ranks=2)
    expected, found = metrics(alone), metrics(tmp_path / "run")
    for one, other in zip(expected, found, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], abs=1e-5)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)
    assert found[-1]["validation_accuracy"] == expected[-1]["validation_accuracy"]
    assert found[-1]["validation_loss"] == pytest.approx(expected[-1]["validation_loss"], abs=1e-5)
    assert "validation_bits_per_byte" not in found[-1]


LINEAR = ("--model.inputs=values", "--model.learnt_positions=true", "--model.rotary=none")
"""Values through a linear map with learnt positions, in place of tokens with rotations."""


@pytest.fixture(scope="module")
def linear(shards: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process on values."""
    folder = tmp_path_factory.mktemp("linear") / "run"
    train(parse(words(shards, folder, *LINEAR), ""))
    return folder


@pytest.mark.parametrize(
    "layout",
    [
        ("--parallel.tensor=2", "--parallel.sequence=true"),
        ("--parallel.tensor=2",),
        ("--training.micro_batch_size=2", "--deepspeed_config=zero3"),
    ],
)
def test_values_have_the_curve_of_one_process_in_every_layout(
    layout: tuple[str, ...], linear: Path, shards: str, tmp_path: Path
) -> None:
    run_successfully("launch/pretrain_ecp.py", *words(shards, tmp_path / "run", *LINEAR, *layout), ranks=2)
    for one, other in zip(metrics(linear), metrics(tmp_path / "run"), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], abs=1e-5)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)
    export(find_checkpoint(tmp_path / "run"), tmp_path / "model")
    export(find_checkpoint(linear), tmp_path / "alone")
    ours, theirs = (ExportedModel.open(tmp_path / name).load().state_dict() for name in ("model", "alone"))
    for name in ("embedding.weight", "position_embedding.weight"):
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-4)


def test_values_enter_by_a_linear_map_with_a_vector_for_each_position(
    linear: Path, shards: str, tmp_path: Path
) -> None:
    export(find_checkpoint(linear), tmp_path / "model")
    exported = ExportedModel.open(tmp_path / "model")
    model, rows = exported.load(), torch.from_numpy(Corpus(shards, 1024).window(3))[None]
    assert sum(value.numel() for value in model.parameters()) == exported.config.parameters + 7 * 32  # 264 for 257
    told = []
    model.layers[0].register_forward_pre_hook(lambda module, inputs: told.append(inputs[0]))
    with torch.no_grad():
        logits = model.logits(rows[:, :-1])
    constant, slope = model.state_dict()["embedding.weight"].double()
    places = model.state_dict()["position_embedding.weight"].double()
    expected = torch.stack(
        [constant + (v / 127.5 - 1) * slope + places[i] for i, v in enumerate(rows[0, :-1].tolist())]
    )
    torch.testing.assert_close(told[0][:, 0].double(), expected, rtol=0, atol=1e-6)
    assert not any(block.attention.rotated for block in model.layers)

    hub = EcpForCausalLM.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        torch.testing.assert_close(hub(rows[:, :-1]).logits, logits, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="1024 positions were learnt, found 1000"):
        hub(rows[:, :1000])
    with pytest.raises(ValueError, match="a constant and a slope, which have no other size"):
        hub.resize_token_embeddings(300)
    with pytest.raises(InputError, match=r"model\.sequence_length is 512, but 1024 positions were learnt"):
        exported.with_geometry(sequence_length=512)


def test_a_checkpoint_of_before_these_fields_has_their_defaults(alone: Path, shards: str) -> None:
    checkpoint = find_checkpoint(alone)
    record = CheckpointRecord.read(checkpoint)
    older = {name: value for name, value in record.model.items() if name not in NEWER_FIELDS}
    record = dataclasses.replace(record, model={**older, "task": "classification"})
    now = {name: getattr(record, name) for name in ("attention", "optimizer", "data")}
    model = dataclasses.asdict(parse(words(shards, alone), "").config.model) | {
        "vocab_size": record.model["vocab_size"]
    }
    check_continues(record, checkpoint, {**now, "model": model})
    for field, value, before in (("inputs", "values", "'tokens'"), ("learnt_positions", True, "False")):
        with pytest.raises(InputError, match=rf"model\.{field} was {before} and is now {value!r}"):
            check_continues(record, checkpoint, {**now, "model": {**model, field: value}})


def test_text_takes_no_values_and_no_learnt_positions() -> None:
    for word, message in (
        ("--model.inputs=values", r"model\.inputs is values, which only a classifier takes .*: use tokens"),
        ("--model.learnt_positions=true", r"model\.learnt_positions is true, which only a classifier takes"),
    ):
        with pytest.raises(InputError, match=message):
            parse(["--config", "demo", word], "")
    notes = parse(["--config", "demo", "--model.rotary=none", "--model.rotary_theta=500"], "").notes
    assert notes == ("--model.rotary_theta has no effect with model.rotary none",)
    odd = ["--config", "demo", "--model.width=35", "--model.heads=5", "--model.key_value_heads=5"]
    parse([*odd, "--model.rotary=none"], "")
    with pytest.raises(InputError, match="rotary positions need an even head width"):
        parse(odd, "")


@pytest.mark.parametrize(
    ("architecture", "pooling"), [("ecp", "mean"), ("transformer", "last"), ("perceiver_ar", "mean")]
)
def test_the_loss_is_that_of_the_label_from_the_pooled_positions(
    architecture: str, pooling: str, shards: str, tmp_path: Path
) -> None:
    more = (f"--model.architecture={architecture}", f"--model.pooling={pooling}", "--training.steps=1")
    train(parse(words(shards, tmp_path / "run", *more), ""))
    export(find_checkpoint(tmp_path / "run"), tmp_path / "model")
    exported = ExportedModel.open(tmp_path / "model")
    model, corpus = exported.load(), Corpus(shards, 1024)
    rows = torch.stack([torch.from_numpy(corpus.window(number)) for number in range(4)])
    told = []
    model.norm.register_forward_hook(lambda module, inputs, output: told.append(output))
    with torch.no_grad():
        total, losses = model(rows[:, :-1], rows[:, 1:])
        states = told[0]
        pooled = states.mean(0) if pooling == "mean" else states[-1]
        scores = torch.nn.functional.linear(pooled, model.output.weight)[:, :257]
        expected = torch.nn.functional.cross_entropy(scores, rows[:, -1], reduction="none")
        logits = model.logits(rows[:, :-1])
    assert losses.shape == (4, 1)
    torch.testing.assert_close(losses[:, 0], expected, rtol=1e-4, atol=1e-5)
    assert total.item() == pytest.approx(expected.sum().item(), rel=1e-5)
    torch.testing.assert_close(logits[:, 0], scores, rtol=1e-4, atol=1e-4)

    theirs = EcpForCausalLM.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        found = theirs(rows[:, :-1]).logits
    torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="a classifier has one prediction for a window"):
        theirs(rows[:, :-1], labels=rows[:, :-1])


def test_it_learns_and_is_as_right_after_conversion(shards: str, tmp_path: Path) -> None:
    more = ["--training.steps=60", "--training.validation_every_steps=60", "--training.validation_windows=48"]
    more += ["--training.micro_batch_size=4", "--optimizer.learning_rate=1e-2", "--optimizer.warmup_tokens=0"]
    train(parse(words(shards, tmp_path / "run", *more), ""))
    last = metrics(tmp_path / "run")[-1]
    assert last["validation_accuracy"] > 0.9
    model = tmp_path / "model"
    run_successfully("launch/convert_checkpoint.py", "--checkpoint", tmp_path / "run", "--output", model)
    options = ("launch/evaluate.py", "--model", model, "--data", shards)
    out = run_successfully(*options, "--json", tmp_path / "x.json", "--plot", tmp_path / "x.png")
    content = json.loads((tmp_path / "x.json").read_text())
    assert content["accuracy"] == last["validation_accuracy"]
    assert content["nll"] == pytest.approx(last["validation_loss"], rel=1e-4)
    assert sum(map(sum, content["confusion"])) == content["windows"] == 48
    assert f"accuracy                     {content['accuracy']:.4f}" in out
    assert (tmp_path / "x.png").stat().st_size > 10_000
    assert "are what was written" in run_successfully("launch/evaluate.py", "--model", model, "--verify")

    refused: list[tuple[tuple[Any, ...], str]] = [
        ((*options, "--protocol", "stream"), "--protocol does nothing with a classifier"),
        (("launch/generate.py", "--model", model, "--prompt", "x"), "a classifier, which names the label of a window"),
    ]
    for words_of, message in refused:
        done = run(*words_of)
        assert done.returncode == 2
        assert message in done.stderr
        assert "Traceback" not in done.stderr
    with pytest.raises(InputError, match="nothing follows under a classifier"):
        next(generate(ExportedModel.open(model).load(), [1], 3))


def test_architectures_are_compared_by_their_accuracy(shards: str, tmp_path: Path) -> None:
    more = [word for word in words(shards, tmp_path) if not word.startswith("--training.output_dir")]
    out = run_successfully(
        *("launch/compare.py", "--architectures=ecp,perceiver_ar", "--seeds=1", "--output", tmp_path / "out", *more),
        "--training.steps=2",
    )
    cells = json.loads((tmp_path / "out" / "comparison.json").read_text())["cells"]
    ours, theirs = (cell["label_accuracy"] for cell in cells)
    assert f"ecp-seed1: accuracy {ours:.4f}" in out
    report = (tmp_path / "out" / "comparison.md").read_text()
    assert "label accuracy | minus ecp, paired |" in report
    assert f"{theirs - ours:+.4f}" in report
    assert "protocol classification on" in report
    assert "ppl" not in report


def test_a_task_fits_its_shards(shards: str, sharded_text: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"model\.task is language, but .* holds documents with labels"):
        train(parse(words(shards, tmp_path / "run", "--model.task=language"), ""))
    text = (f"--data.prefix={sharded_text.prefix}", f"--data.validation_prefix={sharded_text.prefix}")
    with pytest.raises(InputError, match=r"model\.task is classification, but .* holds text without labels"):
        train(parse(words(shards, tmp_path / "run", *text), ""))
    with pytest.raises(InputError, match=r"parallel\.context is 2, but model\.task classification pools"):
        parse(words(shards, tmp_path / "run", "--parallel.context=2"), "", world_size=2)
    notes = parse(["--config", "demo", "--model.pooling=last"], "").notes
    assert notes == ("--model.pooling has no effect with model.task language",)


def test_the_interval_is_wilsons() -> None:
    half = Classification(("a", "b"), ((30, 20, 0), (25, 20, 5)), 1.0)
    assert (half.windows, half.accuracy) == (100, 0.5)
    assert half.interval == pytest.approx((0.4038, 0.5962), abs=1e-4)
    whole = dataclasses.replace(half, confusion=((10, 0, 0), (0, 0, 0)))
    assert whole.interval == pytest.approx((0.7225, 1.0), abs=1e-4)


def test_what_is_no_label_is_counted_apart(shards: str, tmp_path: Path, alone: Path) -> None:
    export(find_checkpoint(alone), tmp_path / "model")
    model, corpus = ExportedModel.open(tmp_path / "model").load(), Corpus(shards, 1024)
    with torch.no_grad():
        model.output.weight[:4] = 0
        model.output.weight[200] = 100 * model.output.weight[200].abs()
    found = classify(model, corpus)
    assert sum(row[-1] for row in found.confusion) + sum(sum(row[:-1]) for row in found.confusion) == 48
    assert all(sum(row) == 12 for row in found.confusion)

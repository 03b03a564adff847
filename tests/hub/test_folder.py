"""The folder of an exported model, as someone uses it who has torch and transformers, and not this package."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from ecp_scale.checkpoint.export import ExportedModel, export
from ecp_scale.checkpoint.folder import find_checkpoint
from ecp_scale.checkpoint.weights_file import WriteOptions
from ecp_scale.errors import InputError
from ecp_scale.evaluation.generation import Sampling, generate
from tests.corpus import ShardedText
from tests.launching import environment
from tests.parallel.layouts import Layout, trained

pytest.importorskip("transformers")
ALONE = "import sys\nfor name in ('ecp_scale', 'deepspeed', 'megatron'):\n    sys.modules[name] = None\n"
USE = """
import numpy as np, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, out = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
texts = ["def first(", "import os\\nfor name in os.listdir("]
batch = tokenizer(texts, return_tensors="pt", padding=True)
assert batch.attention_mask[0, 0] == 0 and batch.attention_mask[:, -1].all()
generated = model.generate(**batch, max_new_tokens=20, do_sample=False)
ids = tokenizer(texts[1], return_tensors="pt").input_ids
model.save_pretrained(out)
tokenizer.save_pretrained(out)
again = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, dtype=torch.bfloat16)
assert again.dtype == torch.bfloat16
assert AutoTokenizer.from_pretrained(out, trust_remote_code=True)(texts).input_ids == tokenizer(texts).input_ids
with torch.no_grad():
    np.savez(out + ".npz", ids=ids.numpy(), logits=model(ids).logits.numpy(), generated=generated.numpy(),
             start=batch.input_ids.shape[1], narrow=again(ids).logits.float().numpy())
"""
TRAIN = """
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
folder, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
windows = torch.randint(50, (4, 64), generator=torch.Generator().manual_seed(1))
data = [{"input_ids": row, "labels": row} for row in windows]
arguments = TrainingArguments(
    out, max_steps=20, per_device_train_batch_size=4, learning_rate=3e-3, logging_steps=1, report_to=[], use_cpu=True,
    gradient_checkpointing=True, save_strategy="no", disable_tqdm=True, eval_strategy="steps", eval_steps=20,
)
trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data)
trainer.train()
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
assert losses[-1] < 0.8 * losses[0], losses
trainer.save_model(out)
with torch.no_grad():
    torch.save(model(windows).logits, out + "/logits.pt")
"""


def alone(script: str, folder: Path, out: Path, home: Path) -> None:
    """Run a script that cannot import this package."""
    # Without what other tests leave of ranks, which accelerate takes for a launch.
    variables = {**environment(), "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    words = [sys.executable, "-c", ALONE + script, str(folder), str(out)]
    done = subprocess.run(words, env=variables, capture_output=True, text=True, cwd=home)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture
def folder(sharded_text: ShardedText, tmp_path: Path) -> Path:
    """An exported model in several files."""
    export(find_checkpoint(trained(Layout(), sharded_text)), tmp_path / "model", WriteOptions(file_bytes=100_000))
    return tmp_path / "model"


def test_it_is_used_without_this_package(folder: Path, sharded_text: ShardedText, tmp_path: Path) -> None:
    alone(USE, folder, tmp_path / "saved", tmp_path)
    found = np.load(tmp_path / "saved.npz")
    exported = ExportedModel.open(folder)
    model, tokenizer = exported.load(), exported.tokenizer
    ids = tokenizer.encode("import os\nfor name in os.listdir(")
    assert found["ids"].tolist() == [ids]
    with torch.no_grad():
        expected = model.logits(torch.tensor([ids]))
    assert_close(torch.from_numpy(found["logits"]), expected, rtol=0, atol=1e-5)
    assert_close(torch.from_numpy(found["narrow"]), expected, rtol=0, atol=0.1)
    end = tokenizer.end_of_document
    for row, text in zip(found["generated"], ("def first(", "import os\nfor name in os.listdir("), strict=True):
        new = list(generate(model, tokenizer.encode(text), 20, Sampling(temperature=0), end))
        assert row[found["start"] :][: len(new)].tolist() == new
    # What it saved is read by ours.
    with pytest.raises(InputError, match=r"saved: holds .*choose a new folder"):
        export(find_checkpoint(trained(Layout(), sharded_text)), tmp_path / "saved")
    saved = ExportedModel.open(tmp_path / "saved")
    assert saved.config == exported.config
    with torch.no_grad():
        assert torch.equal(saved.load().logits(torch.tensor([ids])), expected)


def test_their_trainer_lowers_the_loss_and_ours_reads_what_it_saves(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    alone(TRAIN, folder, tmp_path / "tuned", tmp_path)
    (tmp_path / "tuned" / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes())
    windows = torch.randint(50, (4, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = ExportedModel.open(tmp_path / "tuned").load().logits(windows)
    assert_close(found, torch.load(tmp_path / "tuned" / "logits.pt"), rtol=0, atol=1e-5)


def test_its_card_and_config_say_what_it_is(folder: Path) -> None:
    card = (folder / "README.md").read_text()
    assert 'AutoModelForCausalLM.from_pretrained("model", trust_remote_code=True)' in card
    config = json.loads((folder / "config.json").read_text())
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_ecp.EcpForCausalLM"
    exported = ExportedModel.open(folder)
    assert f"{exported.config.parameters:,} parameters" in card
    assert config["eos_token_id"] == exported.tokenizer.end_of_document

"""Any part of any parameter out of the files of any layout, and nothing read besides."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from ecp_scale.checkpoint.folder import CheckpointRecord, find_checkpoint
from ecp_scale.errors import InputError
from ecp_scale.parallel.partition import Partition, Share
from ecp_scale.zero.saved_states import STEP, SavedStates
from ecp_scale.zero.state_files import SavedFile, read_states
from tests.corpus import ShardedText
from tests.launching import metrics, run_successfully
from tests.parallel.layouts import CONVERTED, Layout, trained


def saved_states(checkpoint: Path) -> SavedStates:
    record = CheckpointRecord.read(checkpoint)
    return SavedStates(checkpoint, record.files, record.partitions, record.tensor_parallel)


def whole(saved: SavedStates, name: str) -> torch.Tensor:
    shape = saved.shape(name)
    return saved.weight(name, 0, math.prod(shape)).view(shape)


def share_of(partition: Partition, whole_shape: list[int], size: int, rank: int, padded_rows: int) -> Share:
    shape = list(whole_shape)
    if partition.vocabulary_rows is not None:
        shape[0] = padded_rows
    if partition.partition_dim is not None:
        shape[partition.partition_dim] //= size
    return partition.share(shape, size, rank)


@pytest.fixture
def bytes_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of every read of states."""
    found: list[int] = []
    read = SavedFile.read

    def counted(self: SavedFile, out: memoryview, begin: int) -> None:
        found.append(len(out))
        read(self, out, begin)

    monkeypatch.setattr(SavedFile, "read", counted)
    return found


@pytest.mark.parametrize("layout", CONVERTED, ids=str)
def test_a_rank_of_another_layout_reads_what_it_holds_and_no_more(
    layout: Layout, sharded_text: ShardedText, bytes_read: list[int]
) -> None:
    saved = saved_states(find_checkpoint(trained(layout, sharded_text)))
    for name, partition in saved.partitions.items():
        expected = whole(saved, name)
        for size in (1, 2, 4):
            padded_rows = -(-expected.shape[0] // 4) * 4
            shares = [partition.split(expected, size, rank, padded_rows).flatten() for rank in range(size)]
            for rank, split in enumerate(shares):
                share = share_of(partition, list(expected.shape), size, rank, padded_rows)
                assert share.elements == len(split)
                # All of it, runs as ZeRO-3 cuts it in three, the last one padded, and a run inside rows.
                third = -(-len(split) // 3)
                windows = [(0, len(split)), *((third * n, third * (n + 1)) for n in range(3)), (1, len(split) - 1)]
                for start, stop in windows:
                    bytes_read.clear()
                    keys = [key for key in saved.keys(name) if key != STEP]
                    read = saved.read(name, share, start, stop, keys)
                    padded = torch.cat((split, torch.zeros(third)))[start:stop]
                    assert torch.equal(read["weight"], padded), (name, size, rank, start, stop)
                    held = sum(run.length for run in share.runs(start, stop)) * len(keys) * 4
                    copies = 1 if partition.partition_dim is not None else len(saved._ranks)
                    assert sum(bytes_read) == held * copies


def test_states_of_a_rank_whose_partition_is_several_flat_tensors(sharded_text: ShardedText, tmp_path: Path) -> None:
    """As where a rank holds more than a billion elements of a ZeRO-3 model."""
    layout = Layout(data=2, zero=3, settings="paper")
    weights = []
    for number, size in enumerate((1_000_000_000, 9_000)):
        json_file = tmp_path / f"{number}.json"
        section = {"stage": 3, "overlap_comm": False, "sub_group_size": size}
        json_file.write_text(json.dumps({"zero_optimization": section}))
        output = tmp_path / f"run{number}"
        options = [*layout.options(sharded_text, output), "--training.steps=3", f"--deepspeed_config={json_file}"]
        run_successfully("launch/pretrain_ecp.py", *options, ranks=2)
        checkpoint = find_checkpoint(output)
        file = next(checkpoint.glob("*_optim_states.pt"))
        assert (len(read_states(file)["optimizer_state_dict"]["fp32_flat_groups"]) > 2) == (size == 9_000)
        saved = saved_states(checkpoint)
        weights.append({name: whole(saved, name) for name in saved.partitions})
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    # What holds other flat tensors is read as what has another layout is.
    for output in (tmp_path / "run0", tmp_path / "run1"):
        options = [*layout.options(sharded_text, output), "--training.steps=4", "--allow-rate-jump", "--resume=auto"]
        run_successfully("launch/pretrain_ecp.py", *options, f"--deepspeed_config={tmp_path / '1.json'}", ranks=2)
    assert metrics(tmp_path / "run0")[3]["loss"] == metrics(tmp_path / "run1")[3]["loss"]


def test_a_file_that_ends_early_and_copies_that_differ_are_named(sharded_text: ShardedText, tmp_path: Path) -> None:
    path = tmp_path / "short.pt"
    path.write_bytes(b"123")
    with pytest.raises(InputError, match=r"short\.pt: ends at byte 3, expected 6"):
        SavedFile(path).read(memoryview(bytearray(4)), 2)
    saved = saved_states(find_checkpoint(trained(Layout(tensor=2, zero=1), sharded_text)))
    replicated = next(name for name, partition in saved.partitions.items() if partition.partition_dim is None)
    saved._ranks[1].pieces[replicated][:] = [
        piece._replace(offset=piece.offset + 1) for piece in saved._ranks[1].pieces[replicated]
    ]
    with pytest.raises(InputError, match="its copies on the tensor-parallel ranks differ"):
        whole(saved, replicated)


def test_a_file_that_the_record_does_not_list_is_not_read(sharded_text: ShardedText, tmp_path: Path) -> None:
    checkpoint = tmp_path / "copy"
    shutil.copytree(find_checkpoint(trained(Layout(data=2, zero=3), sharded_text)), checkpoint)
    before = saved_states(checkpoint)
    expected = {name: whole(before, name) for name in before.partitions}
    for kind in ("optim", "model"):
        shutil.copy(
            next(checkpoint.glob(f"*rank_1_*{kind}*")), checkpoint / f"zero_pp_rank_2_mp_rank_00_{kind}_states.pt"
        )
    after = saved_states(checkpoint)
    assert all(torch.equal(whole(after, name), expected[name]) for name in expected)


def test_files_that_do_not_hold_all_of_a_parameter_are_refused(sharded_text: ShardedText, tmp_path: Path) -> None:
    checkpoint = find_checkpoint(trained(Layout(data=2, zero=2), sharded_text))
    record = CheckpointRecord.read(checkpoint)
    files = [name for name in record.files if "rank_1_" not in name]
    with pytest.raises(
        InputError, match=r"the files of tensor rank 0 hold \d+ elements of .*, expected|disagree about"
    ):
        SavedStates(checkpoint, files, record.partitions, record.tensor_parallel)

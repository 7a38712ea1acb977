"""Checkpoint folders: what goes in comes out, retention, selection, and every refusal."""

import hashlib
import json
import logging
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from condgen.disk import from_json, to_json
from condgen.engine import checkpoint as module
from condgen.engine.checkpoint import CheckpointStore, load_strict, read_checkpoint
from condgen.engine.manifest import seal
from condgen.errors import CheckpointError

FIXTURE = Path(__file__).parent / "fixtures" / "step-00000003"


def tensors(value=1.0):
    return {"system": {"weight": torch.full((2, 3), value)}, "ema": {"weight": torch.full((2, 3), value / 2)}}


@pytest.fixture
def store(tmp_path):
    return CheckpointStore(tmp_path / "checkpoints")


def fill(store, *steps):
    for step in steps:
        store.save(step, tensors(step), {"step": step})


# contents


def test_every_dtype_and_layout_comes_back_bit_equal(store):
    base = torch.randn(6, 5)
    values = {
        "f32": torch.randn(3, 2),
        "f64": torch.randn(3, dtype=torch.float64),
        "bf16": torch.randn(7).bfloat16(),
        "f16": torch.randn(7).half(),
        "f8": torch.randn(4).to(torch.float8_e4m3fn),
        "c64": torch.randn(2, dtype=torch.complex64),
        "i64": torch.tensor([2**62, -1]),
        "u8": torch.arange(5, dtype=torch.uint8),
        "bool": torch.tensor([True, False]),
        "scalar": torch.tensor(3),
        "empty": torch.zeros(0, 4),
        "transposed": base.t(),
        "row": base[2],
        "overlapping": base[1:4],
        "channels_last": torch.randn(1, 3, 2, 2).to(memory_format=torch.channels_last),
        "expanded": torch.tensor(2.0).expand(3),
        "infinite": torch.tensor([float("inf")]),
        "parameter": nn.Parameter(torch.randn(2)),
    }
    store.save(1, {"system": values}, {})
    found = store.load(1).tensors("system")
    assert set(found) == set(values)
    for name, value in values.items():
        assert found[name].dtype == value.dtype and found[name].shape == value.shape, name
        same = found[name].contiguous().flatten().view(torch.uint8)
        assert torch.equal(same, value.detach().contiguous().flatten().view(torch.uint8)), name


def test_tied_tensors_are_stored_once_and_come_back_as_one(store):
    table = torch.randn(100, 10)
    path = store.save(1, {"system": {"encoder": table, "decoder": table, "view": table.t()}}, {})
    found = store.load(1).tensors("system")
    assert found["encoder"] is found["decoder"]
    assert torch.equal(found["view"], table.t())
    size = (path / "system.safetensors").stat().st_size
    assert 2 * 4000 < size < 2 * 4000 + 600  # the table once, its transpose once


def test_saving_does_not_change_or_alias_the_tensors_of_the_caller(store):
    value = torch.ones(3)
    store.save(1, {"system": {"a": value}}, {})
    found = store.load(1).tensors("system")["a"]
    found.zero_()
    assert value.sum() == 3


def test_state_floats_come_back_exactly_including_those_json_lacks(store):
    state = {
        "lr": 0.1 + 0.2,
        "nan": float("nan"),
        "inf": [float("inf"), -float("inf")],
        "n": 2**70,
        "s": "é\n",
        "none": None,
    }
    store.save(1, tensors(), state)
    found = store.load(1).state
    assert found["nan"] != found["nan"]
    assert {k: v for k, v in found.items() if k != "nan"} == {k: v for k, v in state.items() if k != "nan"}
    raw = (store.folder / "step-00000001" / "state.json").read_text()
    json.loads(raw, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


@pytest.mark.parametrize(
    ("state", "place"),
    [
        ({"a": {"b": torch.ones(1)}}, "a.b is a Tensor"),
        ({"a": [{1: 2}]}, "the key 1 at a"),
        ({"a": {1, 2}}, "a is a set"),
    ],
)
def test_state_that_is_not_json_is_refused_with_its_place(store, state, place):
    with pytest.raises(CheckpointError, match=place):
        store.save(1, tensors(), state)
    assert store.steps() == [] and not list(store.folder.iterdir())


def test_groups_that_cannot_be_stored_are_refused(store):
    with pytest.raises(CheckpointError, match="cannot name a file"):
        store.save(1, {"../out": {}}, {})
    with pytest.raises(CheckpointError, match=r"system\.a is a float"):
        store._check_space = lambda *_: 0
        store.save(1, {"system": {"a": 1.0}}, {})
    assert store.steps() == []


def test_an_unknown_group_lists_those_that_exist(store):
    fill(store, 1)
    with pytest.raises(CheckpointError, match="no tensors named 'optim-x'; it has system, ema"):
        store.load(1).tensors("optim-x")


# choosing a step


def test_no_checkpoint_is_none_and_missing_folder_is_not_made(store):
    assert store.latest() is None and store.steps() == [] and not store.folder.exists()


def test_explicit_step_is_never_replaced_by_another(store):
    fill(store, 5, 10)
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 7; steps in .*: 5, 10"):
        store.load(7)
    flip(store.folder / "step-00000010" / "system.safetensors", 90)
    with pytest.raises(CheckpointError, match=r"sha256.*steps in .*: 5$"):
        store.load(10)
    assert store.load(5).step == 5


def flip(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(bytes(data))


def test_damaged_newest_is_skipped_and_named(store, caplog):
    fill(store, 5, 10)
    flip(store.folder / "step-00000010" / "ema.safetensors", 90)
    with caplog.at_level(logging.WARNING):
        assert store.latest().step == 5
    assert "step-00000010" in caplog.text and "sha256" in caplog.text


def test_all_damaged_is_an_error_not_a_fresh_start(store):
    fill(store, 5, 10)
    for path in store.folder.glob("step-*/state.json"):
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"no checkpoint can be used.*00000010.*00000005"):
        store.latest()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda p: (p / "manifest.json").unlink(), "not a checkpoint"),
        (lambda p: (p / "ema.safetensors").unlink(), "missing files"),
        (lambda p: (p / "extra.bin").write_bytes(b"x"), "does not list"),
        (lambda p: (p / "sub").mkdir(), "does not list"),
        (lambda p: edit_hash(p / "manifest.json"), "its own sha256"),
        (lambda p: (p / "manifest.json").write_text("[" * 100_000), "damaged"),
        (lambda p: (p / "manifest.json").write_text("[]"), "damaged"),
        (lambda p: swap_for_link(p / "state.json"), "not a plain file"),
        (lambda p: swap_for_link(p / "manifest.json"), "not a checkpoint"),
    ],
)
def test_a_folder_that_does_not_match_its_manifest_is_skipped(store, change, reason):
    fill(store, 5, 10)
    change(store.folder / "step-00000010")
    assert store.latest().step == 5
    with pytest.raises(CheckpointError, match=reason):
        store.load(10)


def edit_hash(path):
    text = path.read_text()
    at = text.index('"sha256": "') + len('"sha256": "')
    path.write_text(text[:at] + ("0" if text[at] != "0" else "1") + text[at + 1 :])


def swap_for_link(path):
    moved = path.parent.parent / path.name
    os.rename(path, moved)
    path.symlink_to(moved)


def test_a_renamed_folder_is_not_another_step(store):
    fill(store, 5, 10)
    os.rename(store.folder / "step-00000010", store.folder / "step-00000099")
    assert store.latest().step == 5


def test_files_of_a_file_manager_do_not_spoil_a_checkpoint(store):
    fill(store, 5)
    (store.folder / "step-00000005" / ".DS_Store").write_bytes(b"x")
    assert store.latest().step == 5


def test_file_changed_after_it_was_verified_is_refused(store):
    fill(store, 5)
    found = store.latest()
    flip(store.folder / "step-00000005" / "system.safetensors", 90)
    with pytest.raises(CheckpointError, match="contents changed"):
        found.tensors("system")


# retention


def test_two_newest_milestones_and_best_are_kept(tmp_path):
    store = CheckpointStore(tmp_path, keep=2, keep_every=4)
    for step in range(1, 11):
        fill(store, step)
        if step == 3:
            assert store.mark_best(3, "fid", 10.0, higher_is_better=False)
    assert store.steps() == [3, 4, 8, 9, 10]
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("options", [{"keep": 1}, {"keep": 0}, {"keep_every": 0}])
def test_retention_that_would_lose_runs_is_refused(tmp_path, options):
    with pytest.raises(CheckpointError, match="keep"):
        CheckpointStore(tmp_path, **options)


def test_damaged_checkpoints_do_not_count_as_kept_ones(store):
    fill(store, 1, 2)
    (store.folder / "step-00000002" / "state.json").write_bytes(b"")
    fill(store, 3)
    assert 1 in store.steps() and 3 in store.steps()


def test_failed_delete_warns_and_is_tried_again(store, monkeypatch, caplog):
    fill(store, 1, 2)
    real, calls = shutil.rmtree, []

    def fails_once(path, *args, **kwargs):
        if ".del-" in str(path) and not calls:
            calls.append(path)
            raise OSError(16, "Device or resource busy")
        return real(path, *args, **kwargs)

    monkeypatch.setattr(shutil, "rmtree", fails_once)
    fill(store, 3)
    assert "busy" in caplog.text and store.steps() == [2, 3] and list(store.folder.glob(".del-*"))
    fill(store, 4)
    assert store.steps() == [3, 4] and not list(store.folder.glob(".del-*"))


def test_best_follows_the_metric_and_its_direction(store):
    fill(store, 1, 2)
    assert store.best() is None
    assert store.mark_best(1, "fid", 10.0, higher_is_better=False)
    assert not store.mark_best(2, "fid", 11.0, higher_is_better=False)
    assert not store.mark_best(2, "fid", float("nan"), higher_is_better=False)
    assert store.best() == {"step": 1, "metric": "fid", "value": 10.0, "higher_is_better": False}
    assert store.mark_best(2, "r_precision", 0.2, higher_is_better=True)
    assert store.best()["step"] == 2
    with pytest.raises(CheckpointError, match="step 9 has no checkpoint"):
        store.mark_best(9, "fid", 1.0, higher_is_better=False)


def test_a_damaged_best_pointer_is_ignored(store, caplog):
    fill(store, 1)
    (store.folder / "best.json").write_bytes(b"{")
    assert store.best() is None and "best.json" in caplog.text
    fill(store, 2, 3)


# rewinding


def test_going_back_sets_newer_checkpoints_aside_and_loses_none(store):
    fill(store, 5, 10)
    store.mark_best(10, "fid", 1.0, higher_is_better=False)
    store.rewind(5)
    assert store.steps() == [5] and store.best() is None
    fill(store, 10)
    store.rewind(5)
    aside = sorted(path.name for path in (store.folder / "set-aside").iterdir())
    assert aside == ["step-00000010", "step-00000010-2"]
    assert read_checkpoint(store.folder / "set-aside" / "step-00000010").step == 10


def test_saving_below_newer_steps_sets_them_aside_instead_of_retiring_itself(store):
    fill(store, 5, 10, 15)
    fill(store, 12)
    assert store.steps() == [10, 12] and store.latest().step == 12


def test_an_existing_step_is_never_overwritten(store):
    fill(store, 5)
    with pytest.raises(CheckpointError, match="never overwritten"):
        store.save(5, tensors(9), {})
    assert store.load(5).tensors("system")["weight"][0, 0] == 5


def test_a_damaged_step_can_be_saved_again(store, caplog):
    fill(store, 5, 10)
    flip(store.folder / "step-00000010" / "system.safetensors", 90)
    fill(store, 10)
    assert store.load(10).step == 10 and (store.folder / "set-aside" / "step-00000010").is_dir()


# writing


def test_order_of_writing(store, monkeypatch):
    fill(store, 1, 2)
    calls = []
    real_sync, real_rename, real_delete = os.fsync, os.rename, shutil.rmtree

    def sync(handle):
        calls.append(("sync", os.path.basename(os.readlink(f"/proc/self/fd/{handle}"))))
        real_sync(handle)

    def rename(source, target):
        calls.append(("rename", Path(source).name, Path(target).name))
        real_rename(source, target)

    def delete(path, *args, **kwargs):
        if Path(path).exists():
            calls.append(("delete", Path(path).name))
        real_delete(path, *args, **kwargs)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "rename", rename)
    monkeypatch.setattr(shutil, "rmtree", delete)
    fill(store, 3)
    temp = f".tmp-00000003-{os.getpid()}"
    retired = calls[7][2]
    assert calls == [
        ("sync", "system.safetensors"),
        ("sync", "ema.safetensors"),
        ("sync", "state.json"),
        ("sync", "manifest.json"),
        ("sync", temp),
        ("rename", temp, "step-00000003"),
        ("sync", "checkpoints"),
        ("rename", "step-00000001", retired),
        ("delete", retired),
    ]
    assert retired.startswith(".del-")


def test_stale_temporary_folders_are_cleaned_and_live_ones_stay(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    names = [
        f".tmp-00000001-{dead.pid}",
        f".tmp-00000001-{child.pid}",
        f".tmp-00000001-{os.getpid()}",
        f".tmp-00000002-{os.getpid()}",
    ]
    for name in names:
        shutil.copytree(FIXTURE, tmp_path / name)
    os.utime(tmp_path / names[2])
    os.utime(tmp_path / names[3], (0, 0))  # our pid, but from before this process: another container's
    try:
        store = CheckpointStore(tmp_path)
        assert store.latest() is None
        store.prepare()
        assert [name for name in names if (tmp_path / name).exists()] == names[1:3]
    finally:
        child.communicate(b"\n")


def test_a_leftover_with_our_pid_and_step_does_not_block_saving(store):
    store.prepare()
    (store.folder / f".tmp-00000001-{os.getpid()}" / "x").mkdir(parents=True)
    fill(store, 1)
    assert store.latest().step == 1


def test_modes_follow_the_umask(store):
    before = os.umask(0o022)
    try:
        path = store.save(1, tensors(), {})
    finally:
        os.umask(before)
    assert {stat.S_IMODE(p.stat().st_mode) for p in path.iterdir()} == {0o644}
    assert stat.S_IMODE(path.stat().st_mode) == 0o755


@pytest.mark.parametrize("dangling", [False, True])
def test_a_link_in_the_place_of_a_checkpoint_is_refused(store, tmp_path, dangling):
    store.prepare()
    target = tmp_path / "elsewhere"
    if not dangling:
        target.mkdir()
        (target / "keep").write_text("mine")
    (store.folder / "step-00000001").symlink_to(target)
    with pytest.raises(CheckpointError, match="symbolic link"):
        fill(store, 1)
    assert store.steps() == [] and target.exists() != dangling
    assert dangling or (target / "keep").read_text() == "mine"


def test_a_file_in_the_place_of_the_folder_is_an_error_before_step_one(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot write checkpoints to .*: (File exists|Not a directory)"):
        CheckpointStore(tmp_path / "checkpoints").prepare()
    with pytest.raises(CheckpointError, match="Not a directory"):
        CheckpointStore(tmp_path / "checkpoints" / "deeper").prepare()


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_read_only_folder_is_an_error_before_step_one(tmp_path):
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(CheckpointError, match="Permission denied"):
            CheckpointStore(tmp_path / "checkpoints").prepare()
    finally:
        tmp_path.chmod(0o755)


def test_too_little_room_is_an_error_before_anything_is_written(store, monkeypatch):
    fill(store, 1)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 100, 100))
    with pytest.raises(CheckpointError, match=r"step-00000002: [\d,]+ bytes are needed .* and 100 are free"):
        fill(store, 2)
    assert [path.name for path in store.folder.iterdir()] == ["step-00000001"]


# older layouts


def test_schema_0_is_migrated():
    found = read_checkpoint(FIXTURE)
    assert found.step == 3 and found.groups == ("ema", "system") and found.state == {"step": 3, "seed": 7}
    assert torch.equal(found.tensors("ema")["weight"], torch.tensor([0.5, 1.0]))
    assert torch.equal(found.tensors("system")["weight"], torch.tensor([1.0, 2.0]))


@pytest.mark.parametrize("schema", [2, 99])
def test_a_newer_schema_is_refused_even_if_an_older_checkpoint_is_there(store, schema):
    fill(store, 1, 2)
    reseal(store.folder / "step-00000002", schema=schema)
    for read in (store.latest, lambda: store.load(2)):
        with pytest.raises(
            CheckpointError, match=f"schema {schema} and this condgen reads up to 1; use the condgen version"
        ):
            read()


def reseal(path, **changes):
    body = from_json((path / "manifest.json").read_bytes())
    del body["sha256"]
    (path / "manifest.json").write_bytes(seal({**body, **changes}))


@pytest.mark.parametrize(
    "changes",
    [
        {"schema": "1"}, {"schema": -1}, {"schema": True}, {"step": "2"}, {"step": 3}, {"groups": None}, {"files": {}},
        {"groups": {"x": {"file": "../y", "tied": {}}}}, {"files": {"state.json": {"bytes": "1", "sha256": "x"}}},
        {"files": []},
    ],
)  # fmt: skip
def test_a_crafted_manifest_with_a_valid_seal_is_refused(store, changes):
    fill(store, 1, 2)
    reseal(store.folder / "step-00000002", **changes)
    with pytest.raises(CheckpointError):
        store.load(2)
    assert store.latest().step == 1


def test_a_crafted_tie_to_nothing_is_refused(store):
    fill(store, 1)
    reseal(store.folder / "step-00000001", groups={"system": {"file": "system.safetensors", "tied": {"a": "nowhere"}}})
    with pytest.raises(CheckpointError, match="nowhere"):
        store.load(1).tensors("system")


def test_text_files_are_capped_before_they_are_read(store, monkeypatch):
    fill(store, 1)
    monkeypatch.setattr("condgen.engine.manifest.MAX_JSON_BYTES", 10)
    with pytest.raises(CheckpointError, match="at most 10 are read"):
        store.load(1)


def test_a_pickle_is_not_loaded(store, tmp_path):
    marker = tmp_path / "executed"

    class Malicious:
        def __reduce__(self):
            return (os.mkdir, (str(marker),))

    fill(store, 1)
    path = store.folder / "step-00000001"
    torch.save(Malicious(), path / "system.safetensors")
    data = (path / "system.safetensors").read_bytes()
    body = from_json((path / "manifest.json").read_bytes())
    files = {**body["files"], "system.safetensors": {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}}
    reseal(path, files=files)
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        store.load(1).tensors("system")
    assert not marker.exists()


# weights


def test_nan_weights_are_refused_unless_forced(store):
    store.save(1, {"system": {"fine": torch.ones(2), "bad": torch.tensor([1.0, float("nan")])}}, {})
    with pytest.raises(CheckpointError, match="holds NaN in system: bad"):
        store.load(1).tensors("system")
    assert store.load(1).tensors("system", allow_nan=True)["bad"].isnan().any()


def test_load_strict_names_the_first_five_of_each_kind():
    layers = nn.ModuleDict({f"l{i}": nn.Linear(2, 2, bias=False) for i in range(8)})
    given = {f"l{i}.weight": torch.zeros(3, 2) for i in range(2)} | {f"m{i}": torch.zeros(1) for i in range(7)}
    with pytest.raises(CheckpointError) as caught:
        load_strict(layers, given, "system", hint="system.width is 2 here and 3 there")
    text = str(caught.value)
    assert "missing (6): l2.weight, l3.weight, l4.weight, l5.weight, l6.weight, ..." in text
    assert "unexpected (7): m0, m1, m2, m3, m4, ..." in text and "m5" not in text
    assert "wrong shape (2): l0.weight (3, 2) instead of (2, 2)" in text and "system.width is 2 here" in text
    assert all(layer.weight.abs().sum() > 0 for layer in layers.values())


def test_load_strict_round_trip_of_tied_weights(store):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(3, 3, bias=False)
            self.b = nn.Linear(3, 3, bias=False)
            self.b.weight = self.a.weight
            self.register_buffer("count", torch.tensor(4))

    first, second = Tied(), Tied()
    store.save(1, {"system": first.state_dict()}, {})
    load_strict(second, store.load(1).tensors("system"), "system")
    assert torch.equal(first.a.weight, second.a.weight) and second.a.weight is second.b.weight


def test_json_is_canonical():
    value = {"b": [1, 2.5, {"x": None}], "a": "ü"}
    assert to_json(from_json(to_json(value))) == to_json(value)

"""An export is written whole or not at all, read strictly, and never executes anything."""

import json
import os
import pickle
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from condgen import registry
from condgen.errors import CheckpointError, ConfigError
from condgen.inference import export, hub
from condgen.inference.export import ExportInfo, make_system, read_export, write_export, write_info
from condgen.systems.base import System
from condgen.types import BoxesSpec, ConditionSpec, KeypointsSpec, LabelSpec, TargetSpec, TextSpec

PROJECT = Path(__file__).parents[1] / "toy_project"
SPEC = ConditionSpec(
    label=LabelSpec(2, ("fox", "owl")),
    text=TextSpec(pooled=6, encoder="stub"),
    boxes=BoxesSpec(2),
    keypoints=KeypointsSpec(2, ("left eye", "right eye"), ((0, 1),)),
    nullable=True,
)
INFO = ExportInfo(
    "toy", SPEC, TargetSpec(3, 4, 4), options={"widths": (5, 6)}, text={"encoder": "stub", "fingerprint": "f00"},
    task="text2image", data={"name": "emoji", "attribution": "by someone"}, step=7,
)  # fmt: skip


@pytest.fixture(autouse=True)
def project(monkeypatch):
    monkeypatch.setenv("CONDGEN_PROJECT", str(PROJECT))


def build(**options) -> System:
    torch.manual_seed(1)
    return registry.load("systems", "toy", System)(condition=SPEC, target=INFO.target, widths=(5, 6), **options)


@pytest.fixture
def folder(tmp_path):
    return write_export(tmp_path / "run" / "export", build(), {}, INFO)


def edit(folder, **changes):
    data = json.loads((folder / "config.json").read_text())
    data.update(changes)
    (folder / "config.json").write_text(json.dumps(data))


def replace_weights(folder, content: bytes):
    import hashlib

    (folder / "model.safetensors").write_bytes(content)
    edit(folder, weights={"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()})


def load(folder) -> System:
    info, tensors = read_export(folder)
    return make_system(info, tensors, str(folder))


def test_everything_comes_back(folder):
    info, _ = read_export(folder)
    assert info.modules == ("generator", "style_encoder")
    assert info.condition == SPEC and info.target == INFO.target and info.label_names == ("fox", "owl")
    assert (info.step, info.task, info.attribution, dict(info.text)) == (7, "text2image", "by someone", INFO.text)
    system, source = load(folder), build()
    for name, tensor in system.generator.state_dict().items():
        assert torch.equal(tensor, source.generator.state_dict()[name])
    assert not system.training


def test_only_what_sampling_needs_is_stored_and_loaded(folder):
    assert {name.split(".")[0] for name in load_file(folder / "model.safetensors")} == {"generator", "style_encoder"}
    system = load(folder)
    assert not hasattr(system, "critic") and sorted(p.name for p in folder.iterdir()) == [
        "config.json", "model.safetensors",
    ]  # fmt: skip


def test_averaged_weights_take_the_place_of_raw_ones(tmp_path):
    system = build()
    name = "generator.layers.0.weight"
    average = {name: system.state_dict()[name] + 1}
    tensors = read_export(write_export(tmp_path / "e", system, average, INFO))[1]
    assert torch.equal(tensors[name], average[name])
    assert torch.equal(tensors["generator.layers.0.bias"], system.state_dict()["generator.layers.0.bias"])
    with pytest.raises(CheckpointError, match=r"no tensors named generator\.nothing"):
        write_export(tmp_path / "f", system, {"generator.nothing": torch.zeros(1)}, INFO)


def test_tied_weights_are_stored(tmp_path):
    system = build()
    system.style_encoder.bias = system.style_encoder.weight  # one tensor under two names
    tensors = read_export(write_export(tmp_path / "e", system, {}, INFO))[1]
    assert torch.equal(tensors["style_encoder.bias"], tensors["style_encoder.weight"])


def test_files_follow_the_umask_and_leave_nothing_behind(tmp_path):
    before = os.umask(0o022)
    try:
        write_export(tmp_path / "e", build(), {}, INFO)
        write_export(tmp_path / "e", build(), {}, INFO)  # an older export is replaced
    finally:
        os.umask(before)
    assert [p.name for p in tmp_path.iterdir()] == ["e"]
    assert stat.S_IMODE((tmp_path / "e" / "model.safetensors").stat().st_mode) == 0o644


def test_a_failed_write_keeps_the_older_export(folder, monkeypatch):
    before = (folder / "model.safetensors").read_bytes()
    rename, calls = os.rename, []

    def failing(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(export.os, "rename", failing)
    with pytest.raises(CheckpointError, match="No space left"):
        write_export(folder, build(), {"generator.layers.0.bias": torch.ones(5)}, INFO)
    monkeypatch.undo()
    monkeypatch.setenv("CONDGEN_PROJECT", str(PROJECT))
    assert (folder / "model.safetensors").read_bytes() == before
    assert [p.name for p in folder.parent.iterdir()] == ["export"]


def test_nothing_is_written_through_a_link_or_with_nan(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(CheckpointError, match="is a link"):
        write_export(tmp_path / "link", build(), {}, INFO)
    assert not list((tmp_path / "real").iterdir())
    with pytest.raises(CheckpointError, match=r"generator\.layers\.0\.bias hold NaN"):
        write_export(tmp_path / "e", build(), {"generator.layers.0.bias": torch.full((5,), torch.nan)}, INFO)
    with pytest.raises(CheckpointError, match="cannot be written as JSON"):
        write_info(tmp_path / "system.json", ExportInfo("toy", SPEC, INFO.target, options={"x": torch.zeros(1)}))


# hostile and damaged folders


def test_one_flipped_bit_is_refused(folder):
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="does not match the sha256"):
        read_export(folder)


def test_short_and_large_files_are_refused_before_reading(folder):
    path = folder / "model.safetensors"
    with pytest.raises(CheckpointError, match="the limit is 100"):
        read_export(folder, max_bytes=100)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match="the copy is incomplete"):
        read_export(folder)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors is missing"):
        read_export(folder)
    with open(folder / "config.json", "ab") as file:
        file.truncate(export.MAX_CONFIG_BYTES + 1)
    with pytest.raises(CheckpointError, match="more than 16,777,216 are not read"):
        read_export(folder)


class Trap:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (open, (str(self.marker), "w"))


def test_a_pickle_is_never_opened(folder, tmp_path):
    trap = pickle.dumps(Trap(tmp_path / "executed"))
    for name in ("pytorch_model.bin", "model.pt", "data.pkl"):
        (folder / name).write_bytes(trap)
    load(folder)
    replace_weights(folder, trap)
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        load(folder)
    assert not (tmp_path / "executed").exists()


def test_wrong_keys_are_named_five_at_most(folder, tmp_path):
    tensors = load_file(folder / "model.safetensors")
    own = dict(tensors)
    del own["generator.layers.0.bias"]
    own["generator.layers.0.weight"] = torch.zeros(2, 2)
    own |= {f"extra.{i}": torch.zeros(1) for i in range(7)}
    save_file(own, tmp_path / "w")
    replace_weights(folder, (tmp_path / "w").read_bytes())
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    text = str(caught.value)
    assert "missing: generator.layers.0.bias;" in text
    assert "extra.4 and 2 more" in text and "extra.5" not in text
    assert "generator.layers.0.weight (2, 2) instead of (5, 28)" in text


def test_a_config_that_asks_for_a_huge_network_allocates_nothing(folder):
    edit(folder, options={"widths": [2**20, 2**20]})  # 4 TiB of weights
    with pytest.raises(CheckpointError, match="wrong shape"):
        load(folder)


def test_nan_weights_are_refused(folder, tmp_path):
    tensors = load_file(folder / "model.safetensors")
    tensors["generator.layers.0.bias"][0] = torch.inf
    save_file(tensors, tmp_path / "w")
    replace_weights(folder, (tmp_path / "w").read_bytes())
    with pytest.raises(CheckpointError, match="NaN or inf"):
        load(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2, "version": "9.0"}, "format 2 .*written by condgen 9.0"),
        ({"format": None}, "format null"),
        ({"system": 3}, "system is 3; expected a JSON string"),
        ({"system": "os.system"}, "no systems named 'os.system'"),
        ({"system": "../../evil"}, "no systems named"),
        ({"system": "tyo"}, "Did you mean 'toy'"),
        ({"system": "joint_embedding"}, "makes no pictures"),
        ({"options": [1]}, "expected a JSON object"),
        ({"options": {"no_such": 1}}, "toy has no options no_such"),
        ({"options": {"target": 1}}, "toy has no options target"),
        ({"options": {"widths": [[1]]}}, "refuses the stored options"),
        ({"target": {"channels": 3, "height": 4}}, "condition or target cannot be read"),
        ({"target": {"channels": 3, "height": -4, "width": 4}}, "target.height is -4"),
        ({"target": {"channels": 3, "height": 2**20, "width": 2**20}}, "one sample would hold"),
        ({"target": {"channels": True, "height": 4, "width": 4}}, "target.channels is True"),
        ({"condition": {"label": {"num_classes": 10**12}}}, r"condition.label.num_classes is 1000000000000"),
        ({"condition": {"label": {"wrong": 1}}}, "cannot be read"),
        ({"condition": {"label": 5}}, "cannot be read"),
        ({"weights": None}, "states no size and sha256"),
    ],
)
def test_wrong_entries_are_readable_errors(folder, changes, message):
    edit(folder, **changes)
    with pytest.raises((CheckpointError, ConfigError), match=message):
        load(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"format": 1}'])
def test_a_config_that_is_no_config(folder, content):
    (folder / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError):
        read_export(folder)


def test_building_leaves_the_global_random_state(folder):
    state = torch.get_rng_state()
    load(folder)
    assert torch.equal(torch.get_rng_state(), state)


# hub


def test_fetching_asks_for_json_and_safetensors_only(monkeypatch, folder):
    import huggingface_hub

    asked = {}

    def fake(repo, **options):
        asked.update(options, repo=repo)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
    assert hub.fetch_export("someone/foxes", "v1") == folder
    assert asked == {"repo": "someone/foxes", "revision": "v1", "allow_patterns": ["*.json", "*.safetensors"]}

    def broken(repo, **options):
        raise OSError("no route")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", broken)
    with pytest.raises(CheckpointError, match=r"no folder someone/foxes here.*OSError: no route"):
        hub.fetch_export("someone/foxes")


def test_pushing_sends_the_export_and_a_card(monkeypatch, folder):
    import huggingface_hub

    run, sent = folder.parent, {}
    (run / "samples").mkdir()
    for step in (1, 2):
        (run / "samples" / f"step-0000000{step}.png").write_bytes(b"png%d" % step)
    (run / "eval").mkdir()
    (run / "eval" / "kid.json").write_text(json.dumps({"name": "kid", "value": 0.01234, "signature": "n=64|x"}))
    (folder / "notes.pkl").write_bytes(b"private")

    class Api:
        def create_repo(self, repo, **options):
            sent["repo"] = (repo, options)

        def upload_folder(self, *, folder_path, **options):
            sent["files"] = {p.name: p.read_bytes() for p in Path(folder_path).iterdir()}
            return "https://hub/commit/1"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert hub.push_to_hub(run, "someone/foxes") == "https://hub/commit/1"
    assert sent["repo"] == ("someone/foxes", {"private": True, "exist_ok": True})
    assert sorted(sent["files"]) == ["README.md", "config.json", "model.safetensors", "samples.png"]
    assert sent["files"]["samples.png"] == b"png2"
    card = sent["files"]["README.md"].decode()
    assert card.startswith("---\nlibrary_name: condgen\n")
    for part in (
        'condgen.load("someone/foxes")',
        "by someone",
        "| kid | 0.01234 | `n=64/x` |",
        "fox, owl",
        "(samples.png)",
    ):
        assert part in card

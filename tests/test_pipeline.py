"""`condgen.load`: five lines, anywhere, and the same picture for the same (condition, seed, id)."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as PilImage

import condgen
from condgen import registry
from condgen.errors import CheckpointError, ConfigError, DataError, ShapeError
from condgen.inference.export import ExportInfo, write_export, write_info
from condgen.inference.result import slug
from condgen.pixels import pixels_to_uint8
from condgen.systems.base import System
from condgen.types import (
    Boxes,
    BoxesSpec,
    Condition,
    ConditionSpec,
    FramesSpec,
    ImageSpec,
    KeypointsSpec,
    LabelSpec,
    TargetSpec,
    Text,
    TextSpec,
)

REPO = Path(__file__).parents[1]
PROJECT = REPO / "tests" / "toy_project"
TARGET = TargetSpec(3, 8, 8)
NAMES = ("animals-nature", "food_drink", "people")
FULL = ConditionSpec(
    label=LabelSpec(3, NAMES),
    text=TextSpec(pooled=6, encoder="stub"),
    boxes=BoxesSpec(3),
    keypoints=KeypointsSpec(2, ("left eye", "right eye"), ((0, 1),)),
    image=ImageSpec(3, 8, 8),
    frames=FramesSpec(2, 3, 8, 8),
    nullable=True,
)


class StubEncoder:
    """Six numbers per sentence."""

    name, spec, fingerprint = "stub", TextSpec(pooled=6), "f00"

    def __init__(self):
        self.seen = []

    def encode(self, strings):
        self.seen.extend(strings)
        rows = [[float(b) / 64 for b in s.encode()[:6].ljust(6)] for s in strings]
        return Text(pooled=torch.tensor(rows), strings=tuple(strings))


@pytest.fixture(autouse=True)
def project(monkeypatch):
    monkeypatch.setenv("CONDGEN_PROJECT", str(PROJECT))


def build(spec, target=TARGET) -> System:
    torch.manual_seed(2)
    system = registry.load("systems", "toy", System)(condition=spec, target=target)
    with torch.no_grad():
        for module in system.modules():
            if isinstance(module, torch.nn.BatchNorm1d):
                module.running_mean.normal_()
    return system


@pytest.fixture
def make(tmp_path):
    count = 0

    def make(*fields, nullable=False, target=TARGET, encoder=None, folder=None, **options):
        nonlocal count
        count += 1
        spec = FULL.only(fields)
        spec = ConditionSpec(**dict(spec.items()), nullable=nullable)
        folder = folder or tmp_path / f"run{count}" / "export"
        text = {"encoder": "stub", "fingerprint": "f00"} if "text" in fields else {}
        info = ExportInfo("toy", spec, target, text=text, data={"label_names": list(NAMES), "attribution": "by us"})
        write_export(folder, build(spec, target), {}, info)
        return condgen.load(folder, device="cpu", encoder=encoder or StubEncoder(), **options)

    return make


def same(a, b):
    torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    assert torch.equal(pixels_to_uint8(a), pixels_to_uint8(b))


# the five lines


def test_five_lines_without_network_in_another_process(make, tmp_path):
    make("label", folder=tmp_path / "run" / "export")
    script = """
import socket, sys
def refuse(*args, **options): raise OSError("no network in this test")
class Refusing(socket.socket):
    connect = connect_ex = bind = refuse
socket.socket, socket.create_connection, socket.getaddrinfo = Refusing, refuse, refuse
import condgen
assert "torch" not in sys.modules, "import condgen must stay quick"
pipe = condgen.load("run", device="cpu")
pipe(label="people", seed=0).images[0].save("out.png")
heavy = {"torchvision", "transformers", "kornia", "av", "accelerate", "omegaconf", "huggingface_hub"} & set(sys.modules)
assert not heavy, heavy
"""
    env = {**os.environ, "PYTHONPATH": str(REPO), "CONDGEN_PROJECT": str(PROJECT)}
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    here = condgen.load(tmp_path / "run", device="cpu")(label="people", seed=0).images[0]
    there = np.asarray(PilImage.open(tmp_path / "out.png", formats=("PNG",)))
    assert np.array_equal(there, np.asarray(here)) and here.size == (8, 8)


def test_the_package_offers_its_names_lazily():
    assert {"load", "Pipeline", "Samples", "Condition", "System", "push_to_hub"} <= set(dir(condgen))
    assert condgen.Condition is Condition and condgen.__version__
    for name in condgen.__all__:
        assert getattr(condgen, name) is not None
    with pytest.raises(AttributeError, match="no_such"):
        _ = condgen.no_such


# the same picture


def test_a_sample_depends_on_text_seed_and_id_alone(make):
    pipe = make("text")
    base = pipe(text="a red fox", num=5, seed=1).pixels
    for batch_size in (1, 3, 8):
        same(pipe(text="a red fox", num=5, seed=1, batch_size=batch_size).pixels, base)
    same(pipe(text="a red fox", num=2, seed=1).pixels, base[:2])
    more = pipe(text=["a red fox", "an owl"], num=5, seed=1, batch_size=4)
    same(more.pixels[:5], base)
    assert more.ids == (0, 1, 2, 3, 4) * 2 and more.prompts == 2
    same(pipe(text="a red fox", ids=[4, 0], seed=1).pixels, base[[4, 0]])
    for other in (pipe(text="a red fox", num=5, seed=2), pipe(text="an owl", num=5, seed=1)):
        assert (other.pixels - base).abs().amax((1, 2, 3)).min() > 1e-3


def test_what_comes_back(make):
    made = make("label", "text")(text=["a red fox", "an owl"], label=["People", 0], num=3, seed=4)
    assert len(made) == 6 and made.pixels.shape == (6, 3, 8, 8) and made.seeds == (4,) * 6
    assert made.conditions.label.tolist() == [2, 2, 2, 0, 0, 0]
    assert made.conditions.text.strings == ("a red fox",) * 3 + ("an owl",) * 3
    assert [i.size for i in made.images] == [(8, 8)] * 6 and made.images[0].mode == "RGB"
    assert np.array_equal(np.asarray(made.images[4]), pixels_to_uint8(made.pixels[4]).permute(1, 2, 0).numpy())
    grid = made.grid()
    assert grid.width > 3 * 96 + 60 and grid.height > 2 * 96 and made.grid(title="x").height > grid.height


def test_saving_names_files_safely_and_says_what_they_are(make, tmp_path):
    text = "../../etc/\x00passwd " + "x" * 500
    made = make("label", "text")(text=[text, "an owl"], label="people", seed=4)
    paths = made.save(tmp_path / "out")
    assert all(p.parent == tmp_path / "out" and len(p.name) < 80 for p in paths)
    assert paths[1].name.startswith("00001-an-owl-")
    rows = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert rows[1]["text"] == "an owl" and rows[1]["label"] == "people" and (rows[1]["seed"], rows[1]["id"]) == (4, 0)
    assert rows[0]["file"] == paths[0].name and len(rows[0]["sha256"]) == 64
    with PilImage.open(paths[1], formats=("PNG",)) as picture:
        assert not picture.info
        assert np.array_equal(np.asarray(picture), np.asarray(made.images[1]))
    assert slug("a b") != slug("a-b") and slug("").startswith("sample-")


def test_clips(make, tmp_path):
    made = make("label", target=TargetSpec(3, 8, 8, frames=4))(label=[0, 1], num=2)
    assert made.pixels.shape == (4, 4, 3, 8, 8) and made.images[0].size == (32, 8) and len(made.clips[0]) == 4
    assert made.grid().height > 4 * 96
    with PilImage.open(made.save(tmp_path / "out")[3], formats=("PNG",)) as clip:
        assert clip.n_frames == 4
        clip.seek(2)
        assert np.array_equal(np.asarray(clip.convert("RGB")), np.asarray(made.clips[3][2]))


def test_an_unconditional_system(make):
    pipe = make()
    assert pipe(num=3).pixels.shape == (3, 3, 8, 8) and pipe().grid().size
    with pytest.raises(ConfigError, match=r"no condition.*ignore label"):
        pipe(label=1)


def test_precision(make, tmp_path):
    pipe = make("label", folder=tmp_path / "e")
    half = condgen.load(tmp_path / "e", device="cpu", precision="bf16")
    full, low = pipe(label=1).pixels, half(label=1).pixels
    assert low.dtype == torch.float32 and 0 < (full - low).abs().max() < 0.1
    with pytest.raises(ConfigError, match="fp32 or bf16 or fp16"):
        condgen.load(tmp_path / "e", precision="fp8")
    with pytest.raises(ConfigError, match="try device='auto'"):
        condgen.load(tmp_path / "e", device="quantum")


def test_only_generating_modules_are_kept(make):
    assert [name for name, _ in make("label").system.named_children()] == ["generator", "style_encoder"]


# what may be asked


def test_unused_and_missing_fields_are_errors(make):
    pipe = make("label", "text")
    with pytest.raises(ConfigError, match="trained with label, text and would ignore keypoints"):
        pipe(text="x", label=0, keypoints=[(0.1, 0.1), None])
    with pytest.raises(ConfigError, match='needs text: pass text="a sentence"'):
        pipe(label=0)
    with pytest.raises(ConfigError, match="needs label and text"):
        pipe()
    with pytest.raises(ConfigError, match="label is None in a row"):
        pipe(text=["x", "y"], label=[0, None])


def test_partial_conditions_where_the_system_was_trained_for_them(make):
    pipe = make(*FULL.given, nullable=True)
    nothing = pipe()
    assert not any(nothing.conditions.is_present(n).any() for n in FULL.given) and not pipe.encoder.seen
    one = pipe(text="a fox")
    assert one.conditions.is_present("text").all() and not one.conditions.is_present("boxes").any()
    mixed = pipe(text=["a fox", None], label=1)
    same(mixed.pixels[:1], pipe(text="a fox", label=1).pixels)
    same(mixed.pixels[1:], pipe(label=1).pixels)
    assert mixed.conditions.is_present("text").tolist() == [True, False]
    pipe.system.requires = ("keypoints",)
    with pytest.raises(ConfigError, match="needs keypoints"):
        pipe(text="a fox")


def test_every_way_to_write_a_condition_means_the_same(make, tmp_path):
    pipe = make(*FULL.given, nullable=True)
    grey = torch.full((3, 8, 8), 0, dtype=torch.uint8)
    grey[0] = 255
    array = grey.permute(1, 2, 0).numpy()
    file = tmp_path / "in.png"
    PilImage.fromarray(array).save(file)
    forms = {
        "label": ["people", "PEOPLE ", 2, torch.tensor(2)],
        "boxes": [(0.1, 0.2, 0.5, 0.6), [(0.1, 0.2, 0.5, 0.6)], torch.tensor([[0.1, 0.2, 0.5, 0.6]]),
                  [torch.tensor([0.1, 0.2, 0.5, 0.6])], [[(0.1, 0.2, 0.5, 0.6)]]],
        "keypoints": [{"left eye": (0.25, 0.5)}, [(0.25, 0.5), None], [[(0.25, 0.5), None]],
                      [{"Left-Eye": (0.25, 0.5)}]],
        "image": [grey, array, PilImage.fromarray(array), str(file), file, grey / 127.5 - 1, [file]],
        "frames": [[file, file], [grey, grey], torch.stack([grey] * 2), [[file, file]], [grey, file, file]],
    }  # fmt: skip
    for name, ways in forms.items():
        first = pipe(**{name: ways[0]}).pixels
        assert (first - pipe().pixels).abs().max() > 1e-4, name
        for way in ways[1:]:
            made = pipe(**{name: way})
            assert len(made) == 1, (name, way)
            same(made.pixels, first)


def test_rows_of_every_field(make):
    pipe = make(*FULL.given, nullable=True)
    boxes = [[(0, 0, 0.5, 0.5), (0.5, 0.5, 1, 1)], [], None]
    made = pipe(boxes=boxes, text="same for all", keypoints=[{"left eye": (0, 0)}, None, [None, (1, 1)]])
    assert made.conditions.boxes.valid.sum(1).tolist() == [2, 0, 0]
    assert made.conditions.is_present("boxes").tolist() == [True, True, False]
    assert made.conditions.keypoints.visible.tolist() == [[True, False], [False, False], [False, True]]
    assert made.grid().size
    clips = pipe(frames=[[torch.zeros(3, 8, 8)], [torch.zeros(3, 8, 8)] * 2]).conditions.frames
    assert clips.mask.tolist() == [[False, True], [True, True]]  # one frame is the most recent one


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"label": "peple"}, "Did you mean 'people'"),
        ({"label": 3}, r"out of range; this system knows 0\.\.2"),
        ({"label": -1}, "out of range"),
        ({"label": 1.5}, "out of range"),
        ({"label": True}, "out of range"),
        ({"label": object()}, "class name or a number"),
        ({"label": []}, "empty list"),
        ({"text": ""}, "pass a sentence"),
        ({"text": 3}, "pass a sentence"),
        ({"text": ["a", "b"], "label": [0, 1, 2]}, "text: 2, label: 3|label: 3, text: 2"),
        ({"boxes": [(0, 0, 5, 5)]}, r"corners in \[0, 1\]"),
        ({"boxes": [(0.5, 0.5, 0.1, 0.1)]}, "x1 > x0"),
        ({"boxes": [(0, 0, 1)]}, "a box has 3 numbers"),
        ({"boxes": [(0, 0, float("nan"), 1)]}, "NaN"),
        ({"boxes": [(0, 0, 1, 1)] * 4}, "at most 3"),
        ({"boxes": "x"}, "cannot be read"),
        ({"keypoints": {"nose": (0, 0)}}, "no keypoint named 'nose'"),
        ({"keypoints": [(0, 0)]}, "takes 2 .left eye, right eye"),
        ({"keypoints": [(0, 2), None]}, r"\[0, 1\]"),
        ({"keypoints": {"left eye": (0, 0, 1)}}, "3 numbers"),
        ({"image": "no/such.png"}, "the file is missing"),
        ({"image": 7}, "cannot be read from int"),
        ({"image": torch.full((3, 8, 8), 200.0)}, r"\[-1, 1\]"),
        ({"image": torch.full((3, 8, 8), torch.nan)}, r"\[-1, 1\]"),
        ({"image": torch.zeros(5, 8, 8)}, r"must be \(3, H, W\)"),
        ({"image": np.zeros((8, 8, 3))}, "must be uint8"),
        ({"num": 0}, "at least one sample"),
        ({"num": 2, "ids": [1]}, "num=2 with 1 ids"),
        ({"condition": Condition(label=torch.tensor([1])), "text": "x"}, "either condition= or text"),
    ],
)
def test_wrong_values_say_what_to_pass(make, values, message):
    pipe = make(*FULL.given, nullable=True)
    with pytest.raises((ConfigError, DataError, ShapeError), match=message):
        pipe(**values)


@pytest.mark.filterwarnings("ignore:Image size")  # Pillow only warns about the bomb
def test_hostile_pictures_are_data_errors(make, tmp_path):
    pipe = make("image")
    eps = tmp_path / "a.png"
    eps.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n")
    bomb = tmp_path / "b.png"
    PilImage.new("1", (10_000, 10_000)).save(bomb)
    cut = tmp_path / "c.png"
    PilImage.new("RGB", (64, 64), (255, 0, 0)).save(cut)
    cut.write_bytes(cut.read_bytes()[:60])
    for path in (eps, bomb, cut):
        with pytest.raises(DataError, match=path.name):
            pipe(image=path)


def test_pictures_of_any_size_and_mode(make, tmp_path):
    pipe = make("image")
    for mode in ("L", "RGBA", "P", "CMYK", "1", "I;16", "LA"):
        assert pipe(image=PilImage.new(mode, (31, 17))).pixels.isfinite().all()
    clear = pipe(image=PilImage.new("RGBA", (5, 5), (0, 0, 0, 0))).conditions.image
    assert (clear.pixels == 1).all()  # alpha is laid on white
    assert pipe(image=torch.zeros(1, 30, 20)).conditions.image.pixels.shape == (1, 3, 8, 8)


def test_a_condition_record_is_taken_as_it_is(make):
    pipe = make("label", "boxes", nullable=True)
    boxes = Boxes(torch.tensor([[[0.1, 0.2, 0.5, 0.6], [0.0] * 4, [0.0] * 4]]), torch.tensor([[True, False, False]]))
    same(pipe(condition=Condition(boxes=boxes)).pixels, pipe(boxes=(0.1, 0.2, 0.5, 0.6)).pixels)
    strings = make("text")(condition=Condition(text=Text(strings=("a fox", "an owl"))), num=2)
    assert len(strings) == 4 and strings.conditions.text.pooled.shape == (4, 6)


# text encoders


def test_another_encoder_than_in_training_is_refused(make, tmp_path, caplog):
    other, narrow = StubEncoder(), StubEncoder()
    other.fingerprint, narrow.spec = "bad", TextSpec(pooled=5)
    with pytest.raises(ConfigError, match="fingerprint bad, trained with f00"):
        make("text", encoder=other)(text="x")
    with pytest.raises(ConfigError, match="width 6; the encoder stub gives 5"):
        make("text", encoder=narrow)(text="x")
    with caplog.at_level(logging.WARNING):
        make("text", encoder=other, check_encoder=False)(text="x")
    assert "sentences would mean something else" in caplog.text


def test_the_encoder_named_in_the_export_is_used(tmp_path):
    encoders = pytest.importorskip("condgen.conditions.text_encoders")
    encoder = encoders.text_encoder("hash_bow", tokens=True, length=8)
    spec = ConditionSpec(text=encoder.spec)
    text = {"encoder": "hash_bow", "tokens": True, "length": 8, "fingerprint": encoder.fingerprint}
    write_export(tmp_path / "e", build(spec), {}, ExportInfo("toy", spec, TARGET, text=text))
    pipe = condgen.load(tmp_path / "e", device="cpu")
    made = pipe(text=["a red fox", "a red fox", "an owl"])
    same(made.pixels[:1], made.pixels[1:2])
    assert torch.equal(made.conditions.text.pooled[2:], encoder.encode(["an owl"]).pooled)


# style


def test_style_goes_through_the_systems_encoder(make, tmp_path):
    pipe = make("label")
    red, blue = torch.zeros(2, 3, 8, 8).unbind(0)
    red[0], blue[2] = 1, 1
    made = pipe(label=["people", 0], style=red)
    assert len(made) == 2 and (made.pixels[0] - made.pixels[1]).abs().max() > 1e-3
    same(pipe(label="people", style=[red, blue]).pixels[:1], made.pixels[:1])
    same(pipe(label=[2, 2, 0], style=[red, blue, red], batch_size=2).pixels[[0, 2]], made.pixels)
    condition = Condition(label=torch.tensor([2]))
    direct = pipe.system.decode(pipe.system.encode(red[None], condition), condition)
    same(made.pixels[:1], direct.detach())
    assert len(make()(style=[red, blue])) == 2
    with pytest.raises(ConfigError, match="3 styles for 2 prompts"):
        pipe(label=[0, 1], style=[red, blue, red])
    with pytest.raises(ConfigError, match="leave num and ids out"):
        pipe(label=0, style=red, num=2)
    pipe.system.__class__ = type("NoEncoder", (type(pipe.system),), {"encode": None})
    with pytest.raises(ConfigError, match="takes no style"):
        pipe(label=0, style=red)


# finding a system


def test_run_folders_without_export_use_the_newest_checkpoint(tmp_path, caplog):
    checkpoint = pytest.importorskip("condgen.engine.checkpoint")
    spec = ConditionSpec(label=LabelSpec(3))
    system, run = build(spec), tmp_path / "run"
    store = checkpoint.CheckpointStore(run / "checkpoints")
    state = system.state_dict()
    for step in (5, 9):
        average = {k: t + step for k, t in state.items() if k.endswith("layers.0.weight")}
        store.save(step, {"system": state, "ema": average}, {})
    with pytest.raises(CheckpointError, match=r"no system\.json"):
        condgen.load(run, device="cpu")
    write_info(run / "system.json", ExportInfo("toy", spec, TARGET))
    with caplog.at_level(logging.WARNING):
        pipe = condgen.load(run, device="cpu")
    assert "no export yet" in caplog.text and "step 9" in pipe.source and pipe.info.step == 9
    key = "generator.layers.0.weight"
    assert torch.equal(pipe.system.state_dict()[key], state[key] + 9)
    assert pipe(label=1).pixels.shape == (1, 3, 8, 8)


def test_folders_that_hold_no_system(tmp_path):
    with pytest.raises(CheckpointError, match="there is no run or export folder"):
        condgen.load(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="neither an export nor checkpoints"):
        condgen.load(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError):
        condgen.load(tmp_path)


def test_names_of_folders_never_reach_the_network(monkeypatch, tmp_path):
    from condgen.inference import hub

    asked = []
    monkeypatch.setattr(hub, "fetch_export", lambda repo, revision: asked.append(repo) or tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for name in ("runs/typo", "./a", "../a/b", "/abs/x", "name"):
        with pytest.raises(CheckpointError):
            condgen.load(name)
    assert not asked
    with pytest.raises(CheckpointError):
        condgen.load("someone/foxes")
    assert asked == ["someone/foxes"]


def test_code_inside_an_export_is_not_run(make, tmp_path, monkeypatch):
    folder = tmp_path / "sent"
    make("label", folder=folder)
    (folder / "systems").mkdir()
    code = (PROJECT / "systems" / "toy.py").read_text()
    (folder / "systems" / "toy.py").write_text(code + f"\nopen({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.setenv("CONDGEN_PROJECT", str(folder))
    with pytest.raises(CheckpointError, match="brings its own code"):
        condgen.load(folder)
    assert not (tmp_path / "ran").exists()


def test_repr_says_what_to_ask(make):
    text = repr(make("label", "text"))
    assert "toy -> 3x8x8" in text and 'text="a sentence"' in text

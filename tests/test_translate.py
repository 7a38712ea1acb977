"""`condgen translate`: any size, seams, resumption, broken files, names."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image as PilImage

from condgen.cli import main
from condgen.engine.export import ExportInfo, write_export
from condgen.engine.translate import starts, translate, window
from condgen.errors import ConfigError
from condgen.systems.base import System
from condgen.systems.pix2pix import Pix2Pix
from condgen.types import ConditionSpec, ImageSpec, TargetSpec

SPEC, TARGET = ConditionSpec(image=ImageSpec(3, 16, 16)), TargetSpec(3, 16, 16)
OPTIONS = {"generator_width": 4, "discriminator_width": 4, "patch": 16}


class Negative(System):
    """One size only; turns a picture into its negative."""

    consumes = ("map",)

    def phases(self):
        return []

    def sample(self, condition, *, random):
        return -condition.image.pixels


@pytest.fixture
def run(tmp_path):
    torch.manual_seed(0)
    system = Pix2Pix(condition=SPEC, target=TARGET, **OPTIONS)
    tensors = {n: t for n, t in system.state_dict().items() if n.startswith("generator.")}
    write_export(
        tmp_path / "run" / "export", system, tensors,
        ExportInfo(system="pix2pix", options=OPTIONS, condition=SPEC, target=TARGET),
    )  # fmt: skip
    return str(tmp_path / "run")


def paint(path, size=(20, 30), seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    PilImage.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), np.uint8)).save(path)
    return path


def read(path):
    return np.asarray(PilImage.open(path))


def test_tiles_cover_and_overlap_and_leave_no_seam():
    for length in (16, 17, 24, 40, 100):
        at = starts(length, 16)
        assert at[0] == 0 and at[-1] == length - 16 and all(0 < b - a <= 8 for a, b in itertools.pairwise(at))
    assert (window(16, 16) > 0).all()
    picture = torch.rand(3, 37, 51) * 2 - 1
    (made,) = translate(Negative(condition=SPEC, target=TARGET), [picture], [0], fit="tile")
    torch.testing.assert_close(made, -picture)  # an exact system stays exact under blending


@pytest.mark.parametrize("fit", ["pad", "tile", "stretch"])
def test_any_size_comes_back_and_does_not_depend_on_the_others(fit):
    torch.manual_seed(0)
    system = Pix2Pix(condition=SPEC, target=TARGET, **OPTIONS)
    pictures = [torch.rand(3, h, w) * 2 - 1 for h, w in ((16, 16), (5, 7), (33, 20), (33, 20))]
    together = translate(system, pictures, [1, 2, 3, 4], fit=fit)
    assert [p.shape for p in together] == [p.shape for p in pictures]
    for at, picture in enumerate(pictures):
        (alone,) = translate(system, [picture], [at + 1], fit=fit, batch_size=1)
        torch.testing.assert_close(alone, together[at], atol=1e-5, rtol=0)


def test_a_system_of_one_size_is_tiled_and_refuses_padding():
    system = Negative(condition=SPEC, target=TARGET)
    with pytest.raises(ConfigError, match="one size only"):
        translate(system, [torch.zeros(3, 20, 20)], [0], fit="pad")
    assert translate(system, [torch.zeros(3, 20, 20)], [0])[0].shape == (3, 20, 20)


def test_a_folder_with_a_broken_file_goes_on_and_resumes(run, tmp_path, capsys):
    source, out = tmp_path / "in", tmp_path / "out"
    for n in range(3):
        paint(source / "sub" / f"{n}.jpg", seed=n)
    paint(source / "twin.png")
    paint(source / "twin.jpg")
    (source / "broken.png").write_bytes(b"not a picture")
    (source / "notes.txt").write_text("no picture")
    words = ["translate", run, str(source), "-o", str(out), "--batch-size", "2"]
    assert main(words) == 3
    said = capsys.readouterr()
    assert (
        "failed: broken.png: it is not a picture" in said.err and "5 translated, 0 already there, 1 failed" in said.out
    )
    made = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    pictures = {"sub/0.png", "sub/1.png", "sub/2.png", "twin.png.png", "twin.jpg.png"}
    assert made == pictures | {"translate.json"}
    assert read(out / "sub/0.png").shape == (30, 20, 3)
    before, first = (out / "sub/1.png").stat().st_mtime_ns, read(out / "sub/0.png")
    (out / "sub/0.png").unlink()
    paint(source / "broken.png")
    assert main(words) == 0
    assert "2 translated, 4 already there, 0 failed" in capsys.readouterr().out
    assert (out / "sub/1.png").stat().st_mtime_ns == before  # done files are not touched
    assert np.abs(read(out / "sub/0.png").astype(int) - first).max() <= 1  # in another batch now
    assert main([*words, "--seed", "1"]) == 2  # would mix two seeds in one folder
    assert "--overwrite" in capsys.readouterr().err


def test_one_file_a_glob_and_exif(run, tmp_path, capsys):
    photo = tmp_path / "in" / "photo.jpg"
    paint(photo)
    exif = PilImage.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees
    PilImage.open(photo).save(photo, exif=exif)
    assert main(["translate", run, str(photo), "-o", str(tmp_path / "one.webp")]) == 0
    assert read(tmp_path / "one.webp").shape == (20, 30, 3)
    PilImage.new("RGBA", (9, 9), (0, 0, 0, 0)).save(tmp_path / "in" / "clear.png")
    assert main(["translate", run, str(tmp_path / "in" / "*.png"), "-o", str(tmp_path / "globbed")]) == 0
    assert read(tmp_path / "globbed" / "clear.png").shape == (9, 9, 3)


@pytest.mark.parametrize(
    ("source", "out", "code", "says"),
    [("in", "in", 3, "no pictures"), ("none", "out", 3, "no pictures"), ("in", "out.png", 2, "need a folder")],
)
def test_what_cannot_be_done_is_said(run, tmp_path, capsys, source, out, code, says):
    paint(tmp_path / "in" / "a.png")
    assert main(["translate", run, str(tmp_path / source), "-o", str(tmp_path / out)]) == code
    assert says in capsys.readouterr().err

"""`condgen translate`: any size, seams, resumption, broken and hostile files, names, class maps, videos."""

import itertools
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image as PilImage

import condgen
from condgen.cli import main
from condgen.commands import translate as command
from condgen.data.video import probe, read_frames
from condgen.errors import ConfigError
from condgen.inference.export import ExportInfo, write_export
from condgen.inference.translate import starts, translate, window
from condgen.rng import derive
from condgen.show.clips import write_clip
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


def huge_png() -> bytes:
    """A header of 60000 x 60000 pixels and next to no data: what a decompression bomb looks like."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("form", ["", "**/*.*"])
def test_hostile_files_are_reported_and_the_rest_goes_on(run, tmp_path, capsys, form):
    source, out = tmp_path / "in", tmp_path / "out"
    whole = paint(source / "cut.jpg", (64, 64)).read_bytes()
    (source / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (source / "bomb.png").write_bytes(huge_png())
    (source / "text.png").write_text("no picture")
    (source / "empty.png").write_bytes(b"")
    (source / "loop.png").symlink_to(source / "loop.png")
    (source / "gone.png").symlink_to(source / "nowhere.png")
    (source / "again").symlink_to(source, target_is_directory=True)  # a folder inside itself
    (source / "folder.png").mkdir()
    for n in range(3):
        paint(source / f"{n}.png", seed=n)
    assert main(["translate", run, str(source / form), "-o", str(out), "--batch-size", "2"]) == 3
    said = capsys.readouterr()
    assert "3 translated, 0 already there, 6 failed" in said.out
    for name, reason in {
        "cut.jpg": "truncated", "bomb.png": "3600000000 pixels; at most 50000000", "text.png": "not a picture",
        "empty.png": "the file is empty", "loop.png": "leads nowhere or in a circle", "gone.png": "leads nowhere",
    }.items():  # fmt: skip
        assert any(f"failed: {name}" in line and reason in line for line in said.err.splitlines()), (name, said.err)
    assert {p.name for p in out.glob("*.png")} == {"0.png", "1.png", "2.png"}


def test_the_batch_size_changes_nothing(run, tmp_path):
    for n, size in enumerate([(16, 16), (16, 16), (20, 30), (16, 16), (40, 20)]):
        paint(tmp_path / "in" / f"{n}.png", size, seed=n)
    for batch in ("1", "2", "5"):
        words = ["translate", run, str(tmp_path / "in"), "-o", str(tmp_path / batch), "--batch-size", batch]
        assert main(words) == 0
    for n in range(5):
        one, two, five = (read(tmp_path / b / f"{n}.png").astype(int) for b in ("1", "2", "5"))
        assert np.abs(one - two).max() <= 1 and np.abs(one - five).max() <= 1  # kernels round, 8 bits show it rarely


def test_large_pictures_of_one_batch_do_not_add_up():
    """At most LARGEST_WHOLE pixels are in the network at once, whatever the batch size."""
    system, seen = Pix2Pix(condition=SPEC, target=TARGET, **OPTIONS), []
    system.sample = lambda condition, *, random, height=0, width=0: (
        seen.append(condition.image.pixels.shape[0] * height * width) or condition.image.pixels
    )
    side = 1024
    translate(system, [torch.zeros(3, side, side)] * 9, list(range(9)), batch_size=8)
    assert max(seen) == 4 * side * side and sum(seen) == 9 * side * side


@pytest.mark.skipif(torch.cuda.is_available(), reason="fp16 works on a GPU")
def test_fp16_on_a_cpu_is_said_before_anything_is_written(run, tmp_path, capsys):
    paint(tmp_path / "in" / "0.png")
    words = ["translate", run, str(tmp_path / "in"), "-o", str(tmp_path / "out"), "--precision"]
    assert main([*words, "fp16"]) == 2
    assert "fp16 needs a GPU" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert main([*words, "bf16"]) == 0
    assert main([*words, "fp32"]) == 2 and "precision" in capsys.readouterr().err  # would mix two in one folder


class Classes(System):
    """Draws the class of every pixel as its brightness; refuses what is not one-hot."""

    consumes = ("map",)

    def phases(self):
        return []

    def sample(self, condition, *, random):
        pixels = condition.image.pixels
        assert set(pixels.unique().tolist()) <= {-1.0, 1.0} and bool(((pixels > 0).sum(1) == 1).all())
        return (pixels.argmax(1, keepdim=True) / 4 * 2 - 1).expand(-1, 3, -1, -1)


def test_maps_of_classes_are_never_blended():
    spec = ConditionSpec(image=ImageSpec(5, 16, 16, classes=5))
    ids = torch.randint(0, 5, (37, 51))
    source = torch.where(ids[None] == torch.arange(5)[:, None, None], 1.0, -1.0)
    for fit in ("tile", "stretch"):
        (made,) = translate(Classes(condition=spec, target=TARGET), [source], [0], fit=fit)
        assert made.shape == (3, 37, 51)
        if fit == "tile":
            assert torch.equal(((made[0] + 1) * 2).round().long(), ids)


def test_a_run_of_class_numbers_reads_numbers(tmp_path, capsys):
    spec = ConditionSpec(image=ImageSpec(5, 16, 16, classes=5))
    system = Pix2Pix(condition=spec, target=TARGET, **OPTIONS)
    tensors = {n: t for n, t in system.state_dict().items() if n.startswith("generator.")}
    info = ExportInfo(system="pix2pix", options=OPTIONS, condition=spec, target=TARGET)
    write_export(tmp_path / "run" / "export", system, tensors, info)
    ids = np.random.default_rng(0).integers(0, 5, (20, 24)).astype(np.uint8)
    (tmp_path / "in").mkdir()
    PilImage.fromarray(ids).save(tmp_path / "in" / "grey.png")
    painted = PilImage.fromarray(ids)
    painted.putpalette([(7 * i) % 256 for i in range(768)])
    painted.save(tmp_path / "in" / "palette.png")
    PilImage.fromarray(ids.astype(np.uint16)).save(tmp_path / "in" / "deep.png")
    PilImage.fromarray(ids + np.uint8(9)).save(tmp_path / "in" / "wrong.png")
    words = ["translate", str(tmp_path / "run"), str(tmp_path / "in"), "-o", str(tmp_path / "out")]
    assert main(words) == 3
    assert "failed: wrong.png: 480 of 480 pixels hold no class" in capsys.readouterr().err
    pipe = condgen.load(tmp_path / "run")
    source = torch.where(torch.from_numpy(ids).long()[None] == torch.arange(5)[:, None, None], 1.0, -1.0)
    for name in ("grey", "palette", "deep"):
        assert read(tmp_path / "out" / f"{name}.png").shape == (20, 24, 3)
        asked = pipe.condition({"image": str(tmp_path / "in" / f"{name}.png")}).image.pixels[0]
        held = torch.nn.functional.interpolate(source[None], size=(16, 16), mode="nearest-exact")[0]
        assert torch.equal(asked, held)
    mean = read(tmp_path / "out" / "grey.png").astype(int)
    (direct,) = translate(pipe.system, [source], [derive("translate", "grey.png")])
    assert np.abs(mean - ((direct + 1) * 127.5).round().permute(1, 2, 0).numpy()).max() <= 1


def test_transparency_lies_on_the_background_of_the_training(tmp_path):
    system = Pix2Pix(condition=SPEC, target=TARGET, **OPTIONS)
    tensors = {n: t for n, t in system.state_dict().items() if n.startswith("generator.")}
    clear, black = tmp_path / "in" / "clear.png", tmp_path / "in" / "black.png"
    paint(black)
    PilImage.new("RGBA", (16, 16), (200, 0, 0, 0)).save(clear)
    PilImage.new("RGB", (16, 16)).save(black)
    for background in (0, 255):
        info = ExportInfo(
            system="pix2pix", options=OPTIONS, condition=SPEC, target=TARGET, data={"background": background}
        )
        write_export(tmp_path / f"run{background}" / "export", system, tensors, info)
        pipe = condgen.load(tmp_path / f"run{background}")
        read_ = [command._read(pipe, path) for path in (clear, black)]
        assert torch.equal(*read_) is (background == 0)


def video(path, frames=5, size=(32, 24)):
    clip = torch.randint(0, 256, (frames, 3, 1, 1), dtype=torch.uint8).expand(-1, -1, size[1], size[0])
    write_clip(path, list(clip), fps=12)
    return path


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".gif"])
def test_a_video_keeps_its_rate_its_size_and_its_frames(run, tmp_path, capsys, suffix):
    source, out = video(tmp_path / "in.mp4"), tmp_path / f"out{suffix}"
    words = ["translate", run, str(source), "-o", str(out), "--batch-size", "2"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "5 frames translated at 12 a second, without sound" in said
    clip = probe(out)
    assert (clip.width, clip.height) == (32, 24) and abs(clip.fps - 12) < (1 if suffix == ".gif" else 0.01)
    assert len(list(read_frames(out))) == 5
    before = out.stat().st_mtime_ns
    assert main(words) == 0 and "already there" in capsys.readouterr().out and out.stat().st_mtime_ns == before
    assert main([*words, "--overwrite"]) == 0 and out.stat().st_mtime_ns != before


def test_frames_of_a_video_do_not_depend_on_the_batch_and_share_their_noise(run, tmp_path):
    source = tmp_path / "still.mp4"
    write_clip(source, [torch.full((3, 24, 32), 90, dtype=torch.uint8)] * 4, fps=8)
    for batch in ("1", "3"):
        assert main(["translate", run, str(source), "-o", str(tmp_path / batch), "--batch-size", batch]) == 0
    one, three = ([read(p) for p in sorted((tmp_path / b).glob("*.png"))] for b in ("1", "3"))
    assert len(one) == len(three) == 4
    gaps = [np.abs(a.astype(int) - b).max() for a, b in zip(one, three, strict=True)]
    assert max(gaps) <= 1 and np.abs(one[0].astype(int) - one[3]).max() <= 3  # the still stays still


def test_what_cannot_be_done_with_a_video_is_said(run, tmp_path, capsys):
    source = video(tmp_path / "in.mp4")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a.txt").write_text("")
    for out, says in (
        ("out.png", "a video becomes"),
        ("in.mp4", "the source itself"),
        ("full", "a folder that is there"),
    ):
        assert main(["translate", run, str(source), "-o", str(tmp_path / out)]) == 2
        assert says in capsys.readouterr().err
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    assert main(["translate", run, str(tmp_path / "bad.mp4"), "-o", str(tmp_path / "out.mp4")]) == 3
    whole = source.read_bytes()
    (tmp_path / "bad.mp4").write_bytes(whole[: len(whole) // 2])
    assert main(["translate", run, str(tmp_path / "bad.mp4"), "-o", str(tmp_path / "out.mp4")]) == 3
    assert not (tmp_path / "out.mp4").exists() and not list(tmp_path.glob("*tmp*"))


@pytest.mark.parametrize(
    ("source", "out", "code", "says"),
    [("in", "in", 3, "no pictures"), ("none", "out", 3, "no pictures"), ("in", "out.png", 2, "need a folder")],
)
def test_what_cannot_be_done_is_said(run, tmp_path, capsys, source, out, code, says):
    paint(tmp_path / "in" / "a.png")
    assert main(["translate", run, str(tmp_path / source), "-o", str(tmp_path / out)]) == code
    assert says in capsys.readouterr().err

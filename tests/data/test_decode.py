"""Decoding: one documented result per kind of file, hostile files become DataError, geometry follows pixels."""

import ast
import contextlib
import io
import random
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from condgen.data import decode
from condgen.data.decode import WHOLE, cut, decode_image, move_boxes, move_points, read_header, resize
from condgen.errors import ConfigError, DataError

REPO = Path(__file__).parents[2]


def encoded(image: PIL.Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def photo(size: tuple[int, int] = (40, 30)) -> PIL.Image.Image:
    width, height = size
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return PIL.Image.fromarray(np.stack([x, y, 255 - x], -1).astype(np.uint8))


def png16(values: np.ndarray) -> bytes:
    """A 16-bit PNG of (H, W, C); Pillow cannot write one with colour."""
    height, width, channels = values.shape
    rows = b"".join(b"\0" + values[y].astype(">u2").tobytes() for y in range(height))
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def _palette(transparent: bool) -> bytes:
    image = PIL.Image.new("P", (3, 2), 1)
    image.putpalette([255, 0, 0, 0, 0, 255])
    return encoded(image, transparency=1) if transparent else encoded(image)


def _turned(orientation: int) -> bytes:
    exif = PIL.Image.Exif()
    exif[decode.ORIENTATION] = orientation
    return encoded(photo((3, 2)), exif=exif)


def _animated() -> bytes:
    frames = [PIL.Image.new("RGB", (3, 2), colour) for colour in ("red", "blue")]
    return encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)


# D5: name, bytes, shape, top left pixel
KINDS = [
    ("bilevel", encoded(PIL.Image.new("1", (3, 2), 1)), (1, 2, 3), [255]),
    ("grey", encoded(PIL.Image.new("L", (3, 2), 77)), (1, 2, 3), [77]),
    ("grey jpeg", encoded(PIL.Image.new("L", (3, 2), 77), "JPEG"), (1, 2, 3), [77]),
    ("grey alpha", encoded(PIL.Image.new("LA", (3, 2), (0, 51))), (1, 2, 3), [204]),
    ("grey key", encoded(PIL.Image.new("L", (3, 2), 9), transparency=9), (1, 2, 3), [255]),
    ("rgb", encoded(PIL.Image.new("RGB", (3, 2), (1, 2, 3))), (3, 2, 3), [1, 2, 3]),
    ("rgb key", encoded(PIL.Image.new("RGB", (3, 2), (1, 2, 3)), transparency=(1, 2, 3)), (3, 2, 3), [255] * 3),
    ("rgba", encoded(PIL.Image.new("RGBA", (3, 2), (0, 100, 255, 51))), (3, 2, 3), [204, 224, 255]),
    ("clear", encoded(PIL.Image.new("RGBA", (3, 2), (9, 9, 9, 0))), (3, 2, 3), [255] * 3),
    ("palette", _palette(False), (3, 2, 3), [0, 0, 255]),
    ("palette key", _palette(True), (3, 2, 3), [255, 255, 255]),
    ("cmyk", encoded(PIL.Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"), (3, 8, 8), [254, 0, 0]),
    ("animated", _animated(), (3, 2, 3), [255, 0, 0]),
    ("one pixel", encoded(PIL.Image.new("RGB", (1, 1), (5, 6, 7))), (3, 1, 1), [5, 6, 7]),
    ("exif 6", _turned(6), (3, 3, 2), [0, 255, 255]),
]


@pytest.mark.parametrize(("data", "shape", "corner"), [k[1:] for k in KINDS], ids=[k[0] for k in KINDS])
def test_one_result_for_each_kind(data, shape, corner):
    pixels = decode_image(data)
    assert pixels.dtype == torch.uint8 and pixels.shape == shape and pixels.is_contiguous()
    assert (pixels[:, 0, 0].int() - torch.tensor(corner)).abs().max() <= 1
    header = read_header(data)
    assert (header.channels, header.height, header.width, header.deep) == (*shape, False)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_sixteen_bits_are_kept(channels):
    values = np.random.default_rng(0).integers(0, 65536, (5, 7, channels))
    values[..., -1] = 65535 if channels in (2, 4) else values[..., -1]  # opaque, so that colour stays exact
    colours = 1 if channels < 3 else 3
    pixels = decode_image(png16(values))
    assert pixels.dtype == torch.float32 and pixels.shape == (colours, 5, 7)
    back = ((pixels.double() + 1) * 32767.5).round().permute(1, 2, 0).numpy()
    assert np.array_equal(back, values[..., :colours])
    header = read_header(png16(values))
    assert (header.channels, header.deep, header.width, header.height) == (colours, True, 7, 5)


def test_tiff_depths(tmp_path):
    values = np.array([[0, 65535, 32768]], np.uint16)
    PIL.Image.fromarray(values).save(tmp_path / "a.tif")
    expected = torch.tensor([[[-1.0, 1.0, 32768 / 32767.5 - 1]]])
    torch.testing.assert_close(decode_image(tmp_path / "a.tif"), expected)
    PIL.Image.fromarray(np.array([[0.5, -1]], np.float32)).save(tmp_path / "b.tif")
    assert decode_image(tmp_path / "b.tif").tolist() == [[[0.5, -1.0]]]
    for wrong in (np.array([[0, 70000]], np.int32), np.array([[0, 255.0]], np.float32), np.array([[np.nan]], "f4")):
        PIL.Image.fromarray(wrong).save(tmp_path / "c.tif")
        with pytest.raises(DataError, match="no known range"):
            decode_image(tmp_path / "c.tif")


def test_channels_asked_for():
    grey, rgb = encoded(PIL.Image.new("L", (2, 2), 50)), encoded(PIL.Image.new("RGB", (2, 2), (255, 0, 0)))
    clear = encoded(PIL.Image.new("RGBA", (2, 2), (10, 20, 30, 0)))
    assert decode_image(grey, channels=3)[:, 0, 0].tolist() == [50, 50, 50]
    assert decode_image(rgb, channels=1)[:, 0, 0].tolist() == [76]
    assert decode_image(rgb, channels=4)[:, 0, 0].tolist() == [255, 0, 0, 255]
    assert decode_image(clear, channels=4)[:, 0, 0].tolist() == [10, 20, 30, 0]
    assert decode_image(clear, background=(1, 2, 3))[:, 0, 0].tolist() == [1, 2, 3]
    assert decode_image(png16(np.zeros((2, 2, 1))), channels=3).tolist() == torch.full((3, 2, 2), -1.0).tolist()
    with pytest.raises(ConfigError, match="channels=2"):
        decode_image(grey, channels=2)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_orientation_is_applied(orientation, kind):
    exif = PIL.Image.Exif()
    exif[decode.ORIENTATION] = orientation
    data = encoded(photo((12, 8)), kind, exif=exif)
    expected = PIL.ImageOps.exif_transpose(PIL.Image.open(io.BytesIO(data), formats=(kind,)))
    assert np.array_equal(decode_image(data).permute(1, 2, 0).numpy(), np.asarray(expected))
    header = read_header(data)
    assert (header.width, header.height) == expected.size


# hostile files


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_cut_files_are_refused_or_whole(kind):
    """D1: at 25 cut points the answer is DataError, or every pixel of the original (only the tail was lost)."""
    data = encoded(photo(), kind)
    whole = decode_image(data)
    refused = 0
    for cut_at in [len(data) * i // 25 for i in range(25)]:
        try:
            assert torch.equal(decode_image(data[:cut_at]), whole), cut_at
        except DataError as error:
            assert str(error)
            refused += 1
    assert refused >= 20


@pytest.mark.parametrize("data", [b"", b"\0", b"GIF89a", random.Random(0).randbytes(4000), b"<svg/>"])
def test_garbage_is_refused(data):
    with pytest.raises(DataError):
        decode_image(data)


def _fuzz(rounds: int, seed: int) -> None:
    source = random.Random(seed)
    seeds = [encoded(photo((16, 12)), kind) for kind in ("PNG", "JPEG", "WEBP")] + [png16(np.zeros((4, 4, 3)))]
    for _ in range(rounds):
        data = bytearray(source.choice(seeds))
        for _ in range(source.randint(1, 8)):
            data[source.randrange(len(data))] = source.randrange(256)
        with contextlib.suppress(DataError):
            decode_image(bytes(data))


@pytest.mark.filterwarnings("ignore")
def test_only_data_errors_escape():
    _fuzz(150, seed=1)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_only_data_errors_escape_at_length():
    _fuzz(2000, seed=2)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bomb_is_refused_from_the_header():
    for side in (8000, 10_000, 30_000):
        head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
        png = (
            b"\x89PNG\r\n\x1a\n"
            + struct.pack(">I", 13)
            + b"IHDR"
            + head
            + struct.pack(">I", zlib.crc32(b"IHDR" + head))
        )
        body = struct.pack(">I", 10) + b"IDAT" + b"\0" * 10 + struct.pack(">I", zlib.crc32(b"IDAT" + b"\0" * 10))
        # no pixel data to speak of: had it decoded, the reason would be damage and not the size
        with pytest.raises(DataError, match=r"pixels"):
            decode_image(png + body)
    with pytest.raises(DataError, match="at most 10 are decoded"):
        decode_image(encoded(photo()), max_pixels=10)


@pytest.mark.faults
def test_bomb_takes_no_memory():
    code = """
import io, resource, sys, warnings
import PIL.Image, torch
from condgen.data.decode import decode_image
from condgen.errors import DataError
warnings.simplefilter("ignore")
data = sys.stdin.buffer.read()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    decode_image(data)
except DataError as error:
    print("refused", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    bomb = encoded(PIL.Image.new("1", (10_000, 10_000)))
    assert len(bomb) < 20_000
    child = subprocess.run([sys.executable, "-c", code], input=bomb, capture_output=True, cwd=REPO, timeout=60)
    word, grown = child.stdout.split()
    assert word == b"refused" and int(grown) < 50_000  # KiB


def test_disguised_formats_are_refused(tmp_path):
    """D4: TIFF, BMP and GIF count only under their own suffix; EPS and others never."""
    for kind, suffix in (("TIFF", ".tif"), ("BMP", ".bmp"), ("GIF", ".gif")):
        data = encoded(photo(), kind)
        (tmp_path / f"a{suffix}").write_bytes(data)
        assert decode_image(tmp_path / f"a{suffix}").shape[1:] == (30, 40)
        for name in ("a.png", "a.jpg", "a.eps", "a"):
            (tmp_path / name).write_bytes(data)
            with pytest.raises(DataError, match="accepted format"):
                decode_image(tmp_path / name)
        with pytest.raises(DataError, match="accepted format"):
            decode_image(data)
    for kind in ("EPS", "PCX", "PPM"):
        (tmp_path / "b.png").write_bytes(encoded(photo(), kind))
        with pytest.raises(DataError, match="accepted format"):
            decode_image(tmp_path / "b.png")
    (tmp_path / "c.png").write_bytes(encoded(photo(), "JPEG"))  # a JPEG called .png is everyday, not an attack
    assert decode_image(tmp_path / "c.png").shape == (3, 30, 40)


def test_files_that_are_not_pictures(tmp_path):
    with pytest.raises(DataError, match="missing"):
        decode_image(tmp_path / "none.png")
    with pytest.raises(DataError, match="not a regular file"):
        decode_image(tmp_path)
    (tmp_path / "empty.png").touch()
    with pytest.raises(DataError, match="empty"):
        decode_image(tmp_path / "empty.png")


def test_too_many_bytes_are_refused_unread(tmp_path, monkeypatch):
    monkeypatch.setattr(decode, "MAX_BYTES", 100)
    with pytest.raises(DataError, match="at most 100"):
        decode_image(encoded(photo()))


def _calls(tree: ast.AST) -> list[ast.Call]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


def _opens_pictures(call: ast.Call) -> bool:
    return ast.unparse(call.func).endswith(
        ("Image.open", "decode_png", "decode_jpeg", "decode_image_file", "read_image")
    )


def test_every_open_names_its_formats():
    """D4: pictures are opened in one file, and every open lists the formats that it takes.

    torchvision's decoders are not used at all: its PNG decoder crashed the process on a damaged 16-bit file.
    """
    found = 0
    for folder in ("condgen", "tasks", "tools"):
        for path in sorted((REPO / folder).rglob("*.py")):
            for call in filter(_opens_pictures, _calls(ast.parse(path.read_text()))):
                found += 1
                # the report shrinks sample grids that condgen itself wrote; everything else is a user's file
                own = path.relative_to(REPO).as_posix() in ("condgen/data/decode.py", "condgen/engine/report.py")
                assert own, f"{path}:{call.lineno} opens a picture; use decode_image"
                assert any(k.arg == "formats" for k in call.keywords), f"{path}:{call.lineno}"
    assert found >= 1


# geometry


@pytest.mark.parametrize("policy", ["stretch", "crop", "pad"])
@pytest.mark.parametrize("source", [(30, 40), (40, 30), (7, 200), (1, 1), (1, 500), (64, 64)])
def test_frame_sizes(policy, source):
    """D6: every size ends as the size asked for, 1x1 and 1x500 too."""
    frame, _ = resize(torch.zeros(3, *source, dtype=torch.uint8), (16, 24), policy)
    assert frame.shape[-2] >= 16 and frame.shape[-1] >= 24
    assert policy == "crop" or frame.shape[-2:] == (16, 24)
    assert cut(frame, (16, 24))[0].shape == (3, 16, 24)


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(40, 90),
    width=st.integers(40, 90),
    policy=st.sampled_from(["stretch", "crop", "pad"]),
    load=st.integers(32, 48),
    at=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    flip=st.booleans(),
    corner=st.tuples(st.floats(0, 0.6), st.floats(0, 0.6)),
)
def test_boxes_and_points_follow_the_pixels(height, width, policy, load, at, flip, corner):
    """A bright block, found again in the output, lies where its box and its centre were moved to."""
    x0, y0 = int(corner[0] * width), int(corner[1] * height)
    x1, y1 = x0 + width // 3, y0 + height // 3
    pixels = torch.zeros(1, height, width, dtype=torch.uint8)
    pixels[:, y0:y1, x0:x1] = 255
    frame, whole = resize(pixels, (load, load), policy, background=0)
    out, window = cut(frame, (32, 32), at)
    out = out.flip(-1) if flip else out
    scale = torch.tensor([width, height, width, height])
    boxes, valid = move_boxes(torch.tensor([[x0, y0, x1, y1]]) / scale, [whole, window], flip)
    ink = out[0] >= 128
    if valid[0] and ink.any():
        ys, xs = torch.nonzero(ink.any(1)).flatten(), torch.nonzero(ink.any(0)).flatten()
        found = torch.tensor([xs[0], ys[0], xs[-1] + 1, ys[-1] + 1]) / 32
        assert (boxes[0] - found).abs().max() <= 1.01 / 32
    centre = torch.tensor([[(x0 + x1) / 2 / width, (y0 + y1) / 2 / height]])
    xy, visible = move_points(centre, torch.tensor([True]), [whole, window], flip)
    if visible[0]:
        x, y = (xy[0] * 32).clamp(0, 31.99).int().tolist()
        assert out[0, y, x] > 100
    else:
        assert xy.tolist() == [[0.0, 0.0]]


def test_box_with_a_quarter_left_is_dropped():
    box = torch.tensor([[0.0, 0.0, 0.4, 1.0]])
    kept, valid = move_boxes(box, [(0.29, 0.0, 1.0, 1.0)])  # 0.11 of 0.4 is left
    assert valid.tolist() == [True] and kept[0, 0] == 0
    _, valid = move_boxes(box, [(0.31, 0.0, 1.0, 1.0)])  # 0.09 of 0.4
    assert valid.tolist() == [False]


def test_mirror_swaps_point_pairs():
    xy, visible = torch.tensor([[0.1, 0.2], [0.9, 0.3]]), torch.tensor([True, False])
    moved, seen = move_points(xy, visible, [WHOLE], flip=True, flip_pairs=[(0, 1)])
    assert seen.tolist() == [False, True]
    torch.testing.assert_close(moved[1], torch.tensor([0.9, 0.2]))


def test_pad_is_background_and_deep_pixels_keep_their_range():
    frame, _ = resize(torch.zeros(3, 10, 20, dtype=torch.uint8), (20, 20), "pad", background=9)
    assert frame[:, 0].unique().tolist() == [9] and frame[:, 10].unique().tolist() == [0]
    deep, _ = resize(torch.full((1, 10, 20), 0.5), (20, 20), "pad")
    assert deep[0, 0, 0] == 1 and deep[0, 10, 0] == 0.5


def test_wrong_sizes_are_named():
    with pytest.raises(ConfigError, match="stretch"):
        resize(torch.zeros(1, 4, 4), (2, 2), "squash")
    with pytest.raises(ConfigError, match="load_size"):
        cut(torch.zeros(1, 4, 4), (5, 4))

"""Reading clips: every kind of file, exact seeks, short and hostile files, nothing fetched, nothing kept open."""

import os
import resource
import struct
import threading
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import av
import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from condgen.data import video
from condgen.data._demux import to_pixels
from condgen.data._stills import natural
from condgen.data.video import frame_times, probe, read_frames
from condgen.errors import ConfigError, DataError
from condgen.show.clips import write_clip

CONTAINERS = ("mp4", "webm", "gif", "avi")


def moving(frames: int = 24, size: int = 32, seed: int = 0) -> list[Tensor]:
    """Smooth noise that slides, so that every frame differs and compresses."""
    noise = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    wide = (F.interpolate(noise, size=(size * 2, size * 2), mode="bilinear")[0] * 255).to(torch.uint8)
    return [wide[:, t // 2 : t // 2 + size, t : t + size] for t in range(frames)]


def encode(path: Path, codec: str, options: dict[str, str], frames: int = 48, gop: int = 12, rate: int = 25, **stamps):
    """A clip straight from PyAV, with B-frames and keyframes as asked."""
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=rate, options=options)
        stream.width = stream.height = 64
        stream.pix_fmt, stream.gop_size = "yuv420p", gop
        for t, frame in enumerate(moving(frames, 64)):
            picture = av.VideoFrame.from_ndarray(frame.permute(1, 2, 0).contiguous().numpy(), format="rgb24")
            if "pts" in stamps:
                picture.pts, picture.time_base = stamps["pts"](t), Fraction(1, rate)
            out.mux(stream.encode(picture))
        out.mux(stream.encode())
    return path


def frames_of(path: Path | str, **options: object) -> Tensor:
    return torch.stack(list(read_frames(path, **options)))


# kinds


def test_lossless_videos_and_folders_give_back_every_pixel(tmp_path):
    given = torch.stack(moving())
    for name in ("a.mp4", "a.webm", "a.avi", "folder"):
        write_clip(tmp_path / name, given, lossless=True, fps=12)
        assert torch.equal(frames_of(tmp_path / name), given), name
        info = probe(tmp_path / name)
        assert (info.width, info.height) == (32, 32)
        if name != "folder":
            assert info.fps == pytest.approx(12) and info.seconds == pytest.approx(2)


def test_the_content_decides_and_not_the_name(tmp_path):
    given = write_clip(tmp_path / "a.webm", moving(), lossless=True)
    renamed = tmp_path / "a.mp4"
    given.rename(renamed)
    assert torch.equal(frames_of(renamed), torch.stack(moving()))


def test_arrays_columns_and_folders(tmp_path):
    mnist = np.random.default_rng(0).integers(0, 255, (5, 3, 8, 8), dtype=np.uint8)  # (T, N, H, W)
    np.save(tmp_path / "m.npy", mnist)
    assert probe(tmp_path / "m.npy").clips == 3 and probe(tmp_path / "m.npy").frames == 5
    got = frames_of(tmp_path / "m.npy", clip=2, start=1)
    assert torch.equal(got, torch.from_numpy(mnist[1:, 2])[:, None].expand(-1, 3, -1, -1))
    with pytest.raises(DataError, match=r"m\.npy: it has clips 0\.\.2, not 3"):
        frames_of(tmp_path / "m.npy", clip=3)
    np.save(tmp_path / "rgb.npy", mnist.transpose(0, 2, 3, 1))
    assert probe(tmp_path / "rgb.npy").clips == 1 and frames_of(tmp_path / "rgb.npy").shape == (5, 3, 8, 8)
    np.save(tmp_path / "float.npy", mnist.astype(np.float32))
    with pytest.raises(DataError, match="float32"):
        frames_of(tmp_path / "float.npy")

    column = np.random.default_rng(1).integers(0, 255, (32, 8, 3), dtype=np.uint8)
    PIL.Image.fromarray(column).save(tmp_path / "stack.png")
    assert probe(tmp_path / "stack.png").frames == 4
    expected = torch.from_numpy(column).reshape(4, 8, 8, 3).permute(0, 3, 1, 2)
    assert torch.equal(frames_of(tmp_path / "stack.png", start=1, stride=2), expected[1::2])
    PIL.Image.fromarray(column[:31]).save(tmp_path / "odd.png")
    with pytest.raises(DataError, match="not a column of square frames"):
        frames_of(tmp_path / "odd.png")

    for number in (1, 2, 10):
        (tmp_path / "f").mkdir(exist_ok=True)
        PIL.Image.new("RGB", (4, 4), (number, 0, 0)).save(tmp_path / "f" / f"frame{number}.png")
    assert frames_of(tmp_path / "f")[:, 0, 0, 0].tolist() == [1, 2, 10]
    PIL.Image.new("RGB", (4, 5)).save(tmp_path / "f" / "frame11.png")
    with pytest.raises(DataError, match=r"f: frame frame11\.png has size 4 x 5, the first one 4 x 4"):
        frames_of(tmp_path / "f")


def test_natural_order():
    names = ["b", "a10", "a2", "a02b", "10", "9"]
    assert sorted(names, key=natural) == ["9", "10", "a2", "a02b", "a10", "b"]


def test_a_phone_clip_is_turned_as_it_asks(tmp_path):
    path = write_clip(tmp_path / "a.mp4", [F.pad(f, (0, 16)) for f in moving(6)], lossless=True)
    flat = frames_of(path)
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 40  # the 3 x 3 matrix of a version 0 track header
    data[at : at + 36] = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)  # a quarter turn clockwise
    path.write_bytes(data)
    assert probe(path).width == 32 and probe(path).height == 48
    assert torch.equal(frames_of(path), torch.rot90(flat, -1, (2, 3)))


def test_transparency_is_laid_on_white(tmp_path):
    pictures = [PIL.Image.new("RGBA", (8, 8), (0, 0, 0, alpha)) for alpha in (0, 255)]
    pictures[0].save(tmp_path / "a.apng", save_all=True, append_images=pictures[1:], duration=100, format="PNG")
    got = frames_of(tmp_path / "a.apng")
    assert got[0].unique().tolist() == [255] and got[1].unique().tolist() == [0]


# seeking


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("closed.mp4", "libx264", {"bf": "3"}),
        ("open.mp4", "libx264", {"bf": "3", "x264-params": "open-gop=1:keyint=12:min-keyint=12:scenecut=0"}),
        ("refresh.mkv", "libx264", {"x264-params": "intra-refresh=1:keyint=12"}),
        ("a.mkv", "libx264", {"bf": "2"}),
        ("a.webm", "libvpx-vp9", {"deadline": "realtime", "auto-alt-ref": "1", "lag-in-frames": "8"}),
        ("vp8.webm", "libvpx", {"deadline": "good", "auto-alt-ref": "1", "lag-in-frames": "8"}),
        ("mpeg4.avi", "mpeg4", {"bf": "2"}),
        ("a.mov", "mpeg4", {}),
    ],
)
def test_a_seek_gives_what_a_linear_read_gives(tmp_path, name, codec, options):
    path = encode(tmp_path / name, codec, options)
    whole = frames_of(path)
    assert len(whole) == 48
    for start in (1, 11, 12, 13, 23, 24, 25, 36, 47):
        assert torch.equal(frames_of(path, start=start, stop=start + 4), whole[start : start + 4]), start
    assert torch.equal(frames_of(path, at=[2, 3, 30, 47]), whole[[2, 3, 30, 47]])


@pytest.mark.parametrize("group", ["open-gop=0", "open-gop=1"])
def test_a_seek_does_not_decode_from_the_beginning(tmp_path, monkeypatch, group):
    path = encode(tmp_path / "a.mp4", "libx264", {"bf": "2", "x264-params": f"{group}:keyint=12:scenecut=0"})
    seen = []
    decoded = video.decoded
    monkeypatch.setattr(video, "decoded", lambda *a, **k: (seen.append(f.pts) or f for f in decoded(*a, **k)))
    frames_of(path, start=40, stop=42)
    assert len(seen) <= 9  # a keyframe near 36 and what follows, not the 42 frames from the beginning


def test_times_of_a_clip_with_a_variable_rate(tmp_path):
    path = encode(tmp_path / "v.mkv", "libx264", {"bf": "2"}, frames=10, pts=lambda t: t + (t > 4) * 5)
    assert np.diff(frame_times(path)) == pytest.approx([0.04] * 4 + [0.24] + [0.04] * 4, abs=2e-3)
    assert frame_times(write_clip(tmp_path / "folder", moving(3))) is None


def test_a_wrong_request_is_a_configuration_error(tmp_path):
    path = write_clip(tmp_path / "a.avi", moving(4))
    for wrong in ({"start": -1}, {"stride": 0}, {"start": 2, "stop": 2}, {"at": []}, {"at": [2, 2]}, {"at": [-1]}):
        with pytest.raises(ConfigError):
            frames_of(path, **wrong)
    assert len(frames_of(path, stop=100)) == 4
    with pytest.raises(DataError, match=r"a\.avi: it has no frame 4"):
        frames_of(path, start=4)


# files that are short, damaged or no clips


@pytest.mark.parametrize("kind", CONTAINERS)
def test_a_clip_that_was_cut_short_is_never_silent(tmp_path, kind):
    whole = write_clip(tmp_path / f"a.{kind}", moving()).read_bytes()
    for part in range(1, 30):
        short = tmp_path / f"cut.{kind}"
        short.write_bytes(whole[: len(whole) * part // 30])
        with pytest.raises(DataError, match=rf"^cut\.{kind}: (cut short|its content)") as error:
            frames_of(short, stop=2)
        if part == 29 and kind != "mp4":  # an mp4 cut there may have lost all of its frames
            assert int(str(error.value).split(";")[1].split()[0]) >= 20


def test_damage_in_the_middle_is_told_with_its_place(tmp_path):
    path = encode(tmp_path / "a.mp4", "libx264", {"bf": "0"}, gop=4)
    data = bytearray(path.read_bytes())
    at, size = data.index(b"mdat") + 4, len(data)
    data[at + size // 3 : at + size // 2] = bytes(255 - i % 7 for i in range(size // 2 - size // 3))
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"a\.mp4: damaged after ([5-9]|\d\d) frames"):
        frames_of(path)


def test_only_data_errors_escape_from_damaged_bytes(tmp_path):
    draw = np.random.default_rng(0)
    for kind in CONTAINERS:
        whole = write_clip(tmp_path / f"a.{kind}", moving(8)).read_bytes()
        for _ in range(6):
            data = np.frombuffer(whole, np.uint8).copy()
            data[draw.integers(0, len(data), 6)] = draw.integers(0, 256, 6)
            bad = tmp_path / f"bad.{kind}"
            bad.write_bytes(data.tobytes())
            try:
                probe(bad)
                frames_of(bad, start=1)
            except DataError as error:
                assert str(error).startswith("bad.")


def test_what_is_no_clip(tmp_path):
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "text.mp4").write_text("hello" * 9)
    (tmp_path / "none").mkdir()
    os.mkfifo(tmp_path / "pipe.mp4")
    with av.open(str(tmp_path / "sound.mp4"), "w") as out:
        stream = out.add_stream("aac", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 8000
        out.mux(stream.encode(sound))
        out.mux(stream.encode())
    for name, reason in {
        "empty.mp4": "the file is empty",
        "text.mp4": "its content is none of mp4",
        "none": "the folder holds no picture",
        "pipe.mp4": "it is not a regular file",
        "sound.mp4": "there is no video stream in it",
        "missing.mp4": "the file is missing",
    }.items():
        for read in (probe, frames_of):
            with pytest.raises(DataError, match=f"^{name}: {reason}"):
                read(tmp_path / name)


def test_absurd_sizes_are_refused_from_the_header(tmp_path):
    path = write_clip(tmp_path / "a.avi", moving(3))
    with pytest.raises(DataError, match=r"a\.avi: it has no size that can be decoded .at most 1000 pixels"):
        frames_of(path, max_pixels=1000)
    data = path.read_bytes()
    at = data.index(b"strf") + 8 + 4  # width and height of the stream's format
    path.write_bytes(data[:at] + struct.pack("<ii", 60_000, 60_000) + data[at + 8 :])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match="no size that can be decoded"):
        frames_of(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB; the frame would need 10 GB


# playlists and addresses


@pytest.fixture
def server():
    """A loopback server that counts requests."""
    hits: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            hits.append(self.path)
            self.send_response(404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    held = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=held.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{held.server_port}", hits
    held.shutdown()
    held.server_close()


def test_playlists_and_addresses_are_refused_and_nothing_is_fetched(tmp_path, server):
    address, hits = server
    secret = tmp_path / "secret.mp4"
    write_clip(secret, moving(3))
    texts = {
        "hls.mp4": f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{address}/a.ts\n#EXTINF:1,\nfile:///etc/passwd\n",
        "list.m3u8": f"\ufeff\n#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile://{secret}\n",
        "concat.avi": f"ffconcat version 1.0\nfile '{secret}'\nfile '{address}/b.mp4'\n",
        "join.txt": f"file '{secret}'\n",
        "dash.webm": f'<?xml version="1.0"?>\n<MPD><BaseURL>{address}/</BaseURL></MPD>',
        "session.gif": "v=0\no=- 0 0 IN IP4 127.0.0.1\n",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
        for read in (probe, frames_of, frame_times):
            with pytest.raises(DataError, match=f"^{name}: it is .*never opened"):
                read(tmp_path / name)
    for path in (f"{address}/clip.mp4", f"file://{secret}", "data:/x", f"hls+{address}/l.m3u8"):
        with pytest.raises(DataError, match="it is an address; only local files are read"):
            frames_of(path)
    for path in (f"concat:{secret}|{secret}", f"file:{secret}", "pipe:0"):
        with pytest.raises(DataError, match="missing|address"):
            frames_of(path)
    # FFmpeg itself would see the playlist; the demuxer that it is given decides
    assert len(frames_of(secret)) == 3 and hits == []


# resources


def _open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts open files through /proc")
def test_nothing_stays_open_and_memory_is_flat(tmp_path):
    good = write_clip(tmp_path / "a.mp4", moving(4, 16))
    short = tmp_path / "short.mp4"
    short.write_bytes(good.read_bytes()[:-200])

    def rounds(count: int) -> None:
        for turn in range(count):
            next(read_frames(good, start=turn % 4))  # left half way
            probe(good)
            with pytest.raises(DataError):
                frames_of(short)

    rounds(60)
    files, memory = _open_files(), _resident()
    rounds(250)  # four opens each
    assert _open_files() == files
    assert _resident() - memory < 8 * 2**20


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


# real clips


def test_real_clips_are_read_exactly_from_any_frame(real_clips):
    path = real_clips / "nasa.mp4"
    assert probe(path).frames == 325 == len(frame_times(path))
    whole = [frame.sum().item() for frame in read_frames(path)]
    assert len(whole) == 325
    for start in (162, 322):
        assert [frame.sum().item() for frame in read_frames(path, start=start)] == whole[start:]


@pytest.mark.slow
def test_an_open_group_of_pictures_in_a_real_clip(real_clips):
    path = real_clips / "mouse.mp4"  # its keyframes are followed by frames shown before them
    whole = list(read_frames(path, start=0, stop=260))
    assert all(torch.equal(a, b) for a, b in zip(read_frames(path, start=251, stop=260), whole[251:], strict=True))


@pytest.fixture
def real_clips() -> Path:
    root = Path(os.environ.get("CONDGEN_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")
    folder = root / "videos" / "raw"
    if not folder.is_dir():
        pytest.skip("shared clips are not beside this checkout")
    return folder


def test_frames_are_converted_on_one_thread():
    """FFmpeg's default starts a pool of threads for each frame, which took longer than decoding it."""
    given = []

    class Frame:
        format = av.VideoFormat("yuv420p", 4, 2)
        rotation = 0

        def to_ndarray(self, **options):
            given.append(options)
            return np.zeros((2, 4, 3), np.uint8)

    assert to_pixels(Frame()).shape == (3, 2, 4) and given == [{"format": "rgb24", "threads": 1}]

"""Writing clips: what comes back, sizes, rates, notes; whole files or none; grids with the condition first."""

from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from condgen.data.video import probe, read_frames
from condgen.errors import CondgenError, ConfigError, ShapeError
from condgen.pixels import pixels_to_uint8
from condgen.show.clips import grid_clip, write_clip
from condgen.types import Condition, Frames

EVERY = ("a.mp4", "a.webm", "a.gif", "a.avi", "folder")


def smooth(frames: int = 6, height: int = 32, width: int = 32, channels: int = 3) -> list[Tensor]:
    """Float frames in [-1, 1] of a slow, pale ramp."""
    ramp = torch.linspace(-0.8, 0.8, width).expand(channels, height, width)
    return [(ramp * (1 - t / frames)).clone() for t in range(frames)]


def back(path: Path) -> Tensor:
    return torch.stack(list(read_frames(path)))


@pytest.mark.parametrize("name", EVERY)
def test_every_kind_comes_back_close_with_its_rate_and_length(tmp_path, name):
    given = torch.stack([pixels_to_uint8(f) for f in smooth()])
    path = write_clip(tmp_path / name, smooth(), fps=5)
    got = back(path)
    assert got.shape == given.shape and (got.int() - given.int()).abs().float().mean() < 2.5
    assert abs((got.float() - given.float()).mean()) < 1  # no shift of range or matrix
    if name != "folder":
        assert probe(path).fps == pytest.approx(5) and probe(path).seconds == pytest.approx(1.2)


@pytest.mark.parametrize("name", ["a.mp4", "a.webm", "a.avi", "folder"])
def test_lossless_is_every_pixel_of_noise_at_an_odd_size(tmp_path, name):
    noise = torch.randint(0, 256, (5, 3, 17, 23), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(back(write_clip(tmp_path / name, noise, lossless=True)), noise)


def test_an_odd_size_repeats_its_edge_where_chroma_needs_even_ones(tmp_path):
    got = back(write_clip(tmp_path / "a.mp4", smooth(3, 33, 31)))
    assert got.shape[2:] == (34, 32)
    given = torch.stack([pixels_to_uint8(f) for f in smooth(3, 33, 31)])
    assert (got[:, :, :33, :31].int() - given.int()).abs().float().mean() < 2
    assert (got[..., 31].int() - got[..., 30].int()).abs().max() <= 6


def test_grey_and_alpha_become_rgb(tmp_path):
    grey = smooth(2, channels=1)
    got = back(write_clip(tmp_path / "grey", grey))
    assert torch.equal(got, torch.stack([pixels_to_uint8(f) for f in grey]).expand(-1, 3, -1, -1))
    clear = torch.tensor([0, 0, 0, 0], dtype=torch.uint8)[:, None, None].expand(4, 8, 8)
    assert back(write_clip(tmp_path / "clear", [clear])).unique().tolist() == [255]


def test_a_gif_loops_for_ever_and_keeps_time_and_still_frames(tmp_path):
    still = [smooth()[0]] * 7
    path = write_clip(tmp_path / "a.gif", still, fps=8, comment="a licence line " * 30)
    with PIL.Image.open(path) as picture:
        assert picture.info["loop"] == 0 and picture.n_frames == 7
        assert picture.info["comment"].decode() == "a licence line " * 30
        times = []
        for number in range(7):
            picture.seek(number)
            times.append(picture.info["duration"])
    assert sum(times) == 880 and set(times) == {120, 130}  # 7 / 8 s in hundredths
    assert len(back(path)) == 7
    assert (back(path).float() - back(path)[0].float()).abs().max() == 0


@pytest.mark.parametrize("name", ["a.mp4", "a.webm", "a.avi"])
def test_notes_are_kept_and_nothing_else_is(tmp_path, name):
    import av

    def notes(path: Path) -> dict[str, str]:
        with av.open(str(path)) as held:
            return {key.lower(): value for key, value in held.metadata.items()}

    found = notes(write_clip(tmp_path / name, smooth(), title="a fox", comment="CC BY-SA 4.0"))
    assert (found["title"], found["comment"]) == ("a fox", "CC BY-SA 4.0")
    plain = write_clip(tmp_path / f"plain-{name}", smooth())
    assert not {"title", "comment", "software", "creation_time"} & set(notes(plain))
    again = write_clip(tmp_path / f"again-{name}", smooth())
    assert plain.read_bytes() == again.read_bytes()


def test_png_frames_carry_the_notes(tmp_path):
    path = write_clip(tmp_path / "f", smooth(2), comment="CC BY-SA 4.0")
    with PIL.Image.open(path / "000001.png") as picture:
        assert picture.text == {"Comment": "CC BY-SA 4.0"}


def test_wrong_requests_say_what_is_allowed(tmp_path):
    with pytest.raises(ConfigError, match=r"clip\.mkv: clips are written as \.mp4, .*, or as a folder"):
        write_clip(tmp_path / "clip.mkv", smooth())
    for fps in (0, -1, float("nan"), 1000):
        with pytest.raises(ConfigError, match="fps="):
            write_clip(tmp_path / "a.mp4", smooth(), fps=fps)
    with pytest.raises(ConfigError, match="256 colours"):
        write_clip(tmp_path / "a.gif", smooth(), lossless=True)
    with pytest.raises(ConfigError, match="there are no frames"):
        write_clip(tmp_path / "a.mp4", [])
    with pytest.raises(ShapeError, match="frame 1 has"):
        write_clip(tmp_path / "a.mp4", [*smooth(1), *smooth(1, 16)])
    with pytest.raises(ShapeError, match="frame 0 has shape"):
        write_clip(tmp_path / "a.mp4", torch.zeros(2, 2, 8, 8))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", EVERY)
def test_an_error_half_way_leaves_nothing_and_the_old_file(tmp_path, name):
    def frames():
        yield smooth()[0]
        raise KeyError("the sampler broke")

    with pytest.raises(KeyError):
        write_clip(tmp_path / name, frames())
    assert list(tmp_path.iterdir()) == []
    if name == "folder":
        write_clip(tmp_path / name, smooth())
        with pytest.raises(CondgenError, match="will not be replaced"):
            write_clip(tmp_path / name, smooth())
        return
    old = write_clip(tmp_path / name, smooth()).read_bytes()
    with pytest.raises(KeyError):
        write_clip(tmp_path / name, frames())
    assert (tmp_path / name).read_bytes() == old and len(list(tmp_path.iterdir())) == 1
    assert write_clip(tmp_path / name, smooth(3)).read_bytes() != old


def test_a_link_and_a_folder_are_not_replaced(tmp_path):
    (tmp_path / "b.mp4").mkdir()
    (tmp_path / "a.mp4").symlink_to(tmp_path / "elsewhere.mp4")
    for name in ("a.mp4", "b.mp4"):
        with pytest.raises(CondgenError, match="will not be replaced"):
            write_clip(tmp_path / name, smooth())
    assert not (tmp_path / "elsewhere.mp4").exists()


def test_a_grid_shows_the_condition_then_plays_it_before_the_samples(tmp_path):
    red, green, blue = (torch.eye(3)[i][:, None, None].expand(3, 96, 96) * 2 - 1 for i in range(3))
    clips = torch.stack([green, blue])[None, None].expand(2, 3, -1, -1, -1, -1)  # 2 rows, 3 columns, 2 frames
    condition = Condition(frames=Frames(torch.stack([red])[None].expand(2, -1, -1, -1, -1), torch.ones(2, 1).bool()))
    pages = list(grid_clip(clips, condition, title="clips", attribution="a licence"))
    assert len(pages) == 3 and len({page.shape for page in pages}) == 1

    def shares(page: Tensor) -> list[int]:
        colours = torch.tensor([[255, 0, 0], [0, 255, 0], [0, 0, 255]], dtype=torch.uint8)
        return [int((page == c[:, None, None]).all(0).sum()) // (96 * 96) for c in colours]

    # two rows: the condition's own tile always shows red; three samples a row play red, then green, then blue
    assert [shares(page) for page in pages] == [[8, 0, 0], [2, 6, 0], [2, 0, 6]]
    left = pages[1][0].float().sub(pages[1][1].float()).gt(200).nonzero()[:, 1]
    right = pages[1][1].float().sub(pages[1][0].float()).gt(200).nonzero()[:, 1]
    assert left.max() < right.min()  # the condition stands before the samples
    with_real = list(grid_clip(clips[:, :1], real=clips[:, 0]))
    assert len(with_real) == 2 and shares(with_real[0]) == [0, 4, 0]
    assert write_clip(tmp_path / "grid.mp4", pages).stat().st_size > 0
    with pytest.raises(ShapeError, match="clips have shape"):
        next(grid_clip(torch.zeros(2, 3, 8, 8)))


def test_uint8_clips_and_float_conditions_meet(tmp_path):
    past = Frames(torch.full((1, 1, 3, 8, 8), -1.0), torch.ones(1, 1).bool())
    page = next(grid_clip(torch.full((1, 2, 3, 8, 8), 255, dtype=torch.uint8), Condition(frames=past)))
    assert np.asarray(page).min() == 0
    assert F.relu(page.float()).max() == 255

"""Pixels of a grid are the generated pixels; what was asked stands beside them; files hold nothing else."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor

from condgen.errors import ShapeError
from condgen.show.asked import COLOURS, asked_cells, drawable, fit, printable, wrap
from condgen.show.drawing import MIN_TILE, draw_clip_strip, draw_grid, save_png, to_pil
from condgen.show.pictures import by_class, enlarge, into, to_rgb
from condgen.types import Boxes, Condition, Frames, Keypoints, Text
from condgen.types import Image as Source

RED, BLUE = (255, 0, 0), (0, 0, 255)


def plain(colour, size=16):
    """(3, size, size) of one colour, float in [-1, 1]."""
    return (torch.tensor(colour) / 127.5 - 1).view(3, 1, 1).expand(3, size, size)


def find(picture, colour):
    """x0, y0, x1, y1 around the pixels of exactly this colour, and how many there are."""
    y, x = np.nonzero((np.asarray(picture) == colour).all(-1))
    return (x.min(), y.min(), x.max() + 1, y.max() + 1) if len(x) else None, len(x)


def text_rows(picture):
    """Rows of pixels that hold dark ink."""
    return np.nonzero((np.asarray(picture.convert("L")) < 110).any(1))[0]


def grid(rows=2, columns=3, size=16):
    return torch.stack(
        [torch.stack([plain((40 * r, 40 * c + 20, 200), size) for c in range(columns)]) for r in range(rows)]
    )


@pytest.mark.parametrize(("size", "tile"), [(16, 96), (28, 112), (32, 96), (64, 128), (100, 100), (128, 128)])
def test_tiles_are_whole_multiples_and_unchanged(size, tile):
    noise = torch.randint(0, 256, (1, 1, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    page = np.asarray(draw_grid(noise))
    wanted = np.asarray(to_pil(noise[0, 0])).repeat(tile // size, 0).repeat(tile // size, 1)
    assert wanted.shape[0] == tile >= MIN_TILE
    margin = round(16 * tile / 96)
    assert np.array_equal(page[margin : margin + tile, margin : margin + tile], wanted)


def test_rows_are_conditions_and_columns_samples():
    page = draw_grid(grid(), Condition(label=torch.tensor([0, 1])), label_names=["fox", "owl"])
    at = {(r, c): find(page, (40 * r, 40 * c + 20, 200)) for r in range(2) for c in range(3)}
    for (r, c), (box, count) in at.items():
        assert count == 96 * 96
        assert box[0] == at[0, c][0][0] and box[1] == at[r, 0][0][1]
    assert at[0, 0][0][0] < at[0, 1][0][0] < at[0, 2][0][0] and at[0, 0][0][1] < at[1, 0][0][1]


def test_flat_samples_are_shared_out_over_conditions_and_else_near_square():
    flat = grid().flatten(0, 1)
    condition = Condition(label=torch.tensor([0, 1]))
    assert np.array_equal(np.asarray(draw_grid(flat, condition)), np.asarray(draw_grid(grid(), condition)))
    field = draw_grid(flat[:5])
    assert field.width > field.height > field.width / 2  # 3 + 2 tiles
    assert draw_grid(flat, columns=6).height < field.height
    with pytest.raises(ShapeError, match="shared out"):
        draw_grid(flat[:5], condition)
    with pytest.raises(ShapeError, match="one condition per row"):
        draw_grid(grid(), condition.index([0]))
    with pytest.raises(ShapeError):
        draw_grid(flat[0])
    with pytest.raises(ShapeError):
        draw_grid(flat[:0])


def test_caption_stands_left_of_its_row():
    samples = grid()
    one = draw_grid(samples, Condition(text=Text(strings=("a red fox", ""))))
    left = find(one, (0, 20, 200))[0][0]
    column = one.crop((0, 30, left - 4, one.height))
    rows = text_rows(column) + 30
    assert len(rows) and rows.max() < find(one, (40, 20, 200))[0][1]  # ink in the first row only: "any text" is grey
    two = draw_grid(samples, Condition(text=Text(strings=("a red fox", "a blue owl"))))
    assert text_rows(two.crop((0, 30, left - 4, two.height))).max() + 30 > find(two, (40, 20, 200))[0][1]


def test_long_captions_stay_in_their_cell():
    long = Condition(text=Text(strings=("word " * 500, "w" * 5000)))
    page = draw_grid(grid(), long)
    (left, top, _, _), count = find(page, (0, 20, 200))
    assert count == 96 * 96 and left < 3 * 96
    (_, below, _, _), _ = find(page, (40, 20, 200))
    between = np.asarray(page.convert("L"))[top + 97 : below - 1, :left]
    assert (between > 200).all()


def test_labels_are_tags_in_their_colour_and_names_may_lack():
    page = draw_grid(grid(), Condition(label=torch.tensor([1, 7])), label_names=["fox", "owl"])
    cells = asked_cells(Condition(label=torch.tensor([1, 7, -1])), (96, 96), ["fox", "owl_bird"])
    assert [c.label for c in cells] == ["owl bird", "class 7", ""]
    tint = tuple(round(255 - (255 - c) * 0.14) for c in ImageColor.getrgb(COLOURS[1]))
    assert find(page, tint)[1] > 200
    soft = asked_cells(Condition(label=torch.tensor([[0.2, 0.8], [0.0, 0.0]])), (96, 96), ["fox", "owl"])
    assert [c.label for c in soft] == ["0.8 owl + 0.2 fox", ""]
    asked = Condition(label=torch.tensor([[1.0, -1.0, 1.0], [0.0, 1.0, 0.0]]))
    assert [c.label for c in asked_cells(asked, (96, 96), ["fox", "owl"])] == ["fox + class 2 - owl", "owl"]


def test_boxes_and_keypoints_are_drawn_where_they_are():
    boxes = Boxes(torch.tensor([[[0.25, 0.25, 0.75, 0.75], [0.0, 0.0, 0.1, 0.1]]]), torch.tensor([[True, False]]))
    points = Keypoints(torch.tensor([[[0.5, 0.5], [0.1, 0.9]]]), torch.tensor([[False, True]]))
    cell = asked_cells(Condition(boxes=boxes, keypoints=points), (96, 96))[0]
    ((name, panel),) = cell.pictures
    assert name == "layout"
    first, second = (ImageColor.getrgb(c) for c in COLOURS[:2])
    (x0, y0, x1, y1), _ = find(panel, first)
    assert abs(x0 - 24) <= 2 and abs(y0 - 24) <= 2 and abs(x1 - 72) <= 2 and abs(y1 - 72) <= 2
    (x0, y0, x1, y1), _ = find(panel, second)
    assert abs((x0 + x1) / 2 - 9.6) <= 1.5 and abs((y0 + y1) / 2 - 86.4) <= 1.5
    blank = asked_cells(Condition(boxes=boxes).drop(1.0), (96, 96))[0].pictures[0][1]
    assert find(blank, first)[1] == 0


def test_overlay_draws_on_samples_only_when_asked():
    boxes = Condition(boxes=Boxes(torch.tensor([[[0.2, 0.2, 0.8, 0.8]]]), torch.tensor([[True]])))
    colour = ImageColor.getrgb(COLOURS[0])
    tiles = grid(1, 2)
    without, over = draw_grid(tiles, boxes), draw_grid(tiles, boxes, overlay=True)
    assert find(without, (0, 20, 200))[1] == 96 * 96 > find(over, (0, 20, 200))[1]
    assert find(over, colour)[1] > 2 * find(without, colour)[1]
    assert find(over, (0, 20, 200))[1] > 85 * 96  # the inside of a box is not tinted


def test_source_past_and_real_have_their_columns():
    past = Frames(torch.stack([plain((0, 255, 0), 8), plain((0, 128, 0), 8)])[None], torch.tensor([[False, True]]))
    condition = Condition(image=Source(plain(RED, 32)[None]), frames=past)
    page = draw_grid(grid(1, 1), condition, real=plain(BLUE)[None])
    order = [find(page, c) for c in (RED, (0, 128, 0), BLUE, (0, 20, 200))]
    assert [count for _, count in order] == [96 * 96] * 4
    assert [box[0] for box, _ in order] == sorted(box[0] for box, _ in order)
    assert find(page, (0, 255, 0))[1] == 0  # the masked frame is not shown
    with pytest.raises(ShapeError, match="one per row"):
        draw_grid(grid(2, 1), real=plain(BLUE)[None])


def test_masked_source_is_grey_where_nothing_was_given():
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., :8] = 1
    cell = asked_cells(Condition(image=Source(plain(RED)[None], mask)), (96, 96))[0]
    assert find(cell.pictures[0][1], RED)[0] == (0, 0, 48, 96)


def test_attribution_and_title_add_ink_and_fit():
    small = draw_grid(grid(1, 1))
    signed = draw_grid(
        grid(1, 1), attribution="All emojis designed by OpenMoji. License: CC BY-SA 4.0", title="A title"
    )
    assert signed.height > small.height and signed.width == small.width
    below = np.asarray(signed.convert("L"))[find(signed, (0, 20, 200))[0][3] + 3 :]
    assert (below < 180).any() and (below[:, -12:] > 250).all() and (below[-3:] > 250).all()


def test_clips_run_from_left_to_right():
    clip = torch.stack([plain((t * 10, 99, 99)) for t in range(20)])[None]
    page = draw_clip_strip(clip, most=4)
    shown = [t for t in range(20) if find(page, (t * 10, 99, 99))[1] == 96 * 96]
    assert shown == [0, 6, 13, 19]
    left = [find(page, (t * 10, 99, 99))[0][0] for t in shown]
    assert left == sorted(left)
    with pytest.raises(ShapeError):
        draw_clip_strip(clip[0])


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5])
def test_any_number_of_channels_can_be_looked_at(channels):
    assert draw_grid(torch.zeros(2, channels, 8, 8)).mode == "RGB"
    if channels in (2, 5):
        with pytest.raises(ShapeError, match="1, 3 or 4"):
            to_pil(torch.zeros(channels, 8, 8))


def test_alpha_is_laid_on_white():
    pixels = torch.full((4, 8, 8), -1.0)
    assert to_rgb(pixels).getpixel((0, 0)) == (255, 255, 255)


def test_scaling():
    assert enlarge(Image.new("L", (10, 30))).size == (40, 120)
    assert enlarge(Image.new("L", (200, 30))).size == (200, 30)
    assert into(Image.new("RGB", (300, 100), RED), (96, 96)).getpixel((48, 4)) == (255, 255, 255)


def test_text_is_made_drawable():
    from PIL import ImageFont

    font = ImageFont.load_default(12)
    assert printable("caf\u00e9 \u2013 \u201cNULL\x00\n\u202e\u2026\U0001f98a") == 'cafe - "NULL ...?'
    assert drawable("a") == "a" and len(printable("x" * 10_000)) <= 400
    lines = wrap("one two three " + "w" * 90, font, 60)
    assert " ".join(lines[:-1]) == "one two three" and all(font.getlength(line) <= 60 for line in lines)
    assert fit("short", font, 200) == "short" and fit("", font, 5) == ""
    assert printable("") == "" and wrap("", font, 10) == []


def test_files_hold_pixels_only(tmp_path):
    picture = Image.new("RGB", (8, 8), RED)
    picture.info.update(comment="/home/somebody", dpi=(72, 72), icc_profile=b"secret profile")
    exif = Image.Exif()
    exif[0x010E] = "secret"
    picture.info["exif"] = exif.tobytes()
    path = save_png(picture, tmp_path / "deep" / "a.png")
    content = path.read_bytes()
    with Image.open(path, formats=("PNG",)) as again:
        assert not again.info and not again.getexif() and again.getpixel((0, 0)) == RED
    assert b"secret" not in content and [p.name for p in path.parent.iterdir()] == ["a.png"]
    assert picture.info["comment"] == "/home/somebody"  # the caller's picture stays as it was


@pytest.mark.parametrize("classes", [2, 4, 5, 19, 40])
def test_maps_of_classes_are_drawn_with_one_colour_a_class(classes):
    """Every class has its own colour, float and uint8 alike; maps that are no classes stay as they are."""
    ids = torch.arange(64).view(8, 8) % classes
    one_hot = torch.where(ids[None] == torch.arange(classes)[:, None, None], 1.0, -1.0)
    seen = by_class(one_hot)
    assert seen.shape == (3, 8, 8) and torch.equal(seen, by_class(((one_hot + 1) * 127.5).to(torch.uint8)))
    colours = torch.stack([seen[:, ids == c][:, 0] for c in range(classes)]).float()
    gaps = torch.cdist(colours, colours) + 1e3 * torch.eye(classes)
    assert gaps.min() > 14  # of 255
    assert all(len(seen[:, ids == c].unique(dim=1)[0]) == 1 for c in range(classes))
    assert torch.equal(by_class(one_hot[None].repeat(3, 1, 1, 1))[1], seen)
    three = torch.where(torch.arange(3)[:, None, None] == ids % 3, 1.0, -1.0)
    assert by_class(three) is three and by_class(three, sure=True).shape == (3, 8, 8)  # red, green, blue or classes
    soft = one_hot * 0.9
    assert by_class(soft) is soft
    condition = Condition(image=Source(one_hot[None]))
    page = draw_grid(torch.zeros(1, 1, 3, 8, 8), condition)
    shown = {tuple(c) for _, c in page.getcolors(1 << 16)}
    assert {tuple(int(v) for v in c) for c in colours} <= shown

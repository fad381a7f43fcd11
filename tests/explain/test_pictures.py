"""The pictures of explanations show what the numbers say, each thing at its place, whatever the image and the names."""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image, ImageDraw

from helpers import TURNED, cell_box, save_turned
from protopush.data.images import read_image
from protopush.data.regions import Regions
from protopush.data.transforms import View
from protopush.errors import InputError
from protopush.explain import ClassEvidence, Explanation, Match, draw_gallery, draw_panel, draw_why_not, explain_image
from protopush.explain.checked_region import Region
from protopush.explain.figure_canvas import (
    Page,
    draw_box,
    draw_sees,
    part_tile,
    resized,
    with_map,
    with_outline,
    with_unseen,
)
from protopush.explain.figure_style import (
    COLOURS,
    INK,
    NARROW,
    WIDE,
    fit_text,
    percent,
    region_words,
    text_width,
    unseen_share,
    window_shares,
    wrapped,
)
from protopush.explain.neighbours import Neighbour, Neighbours
from protopush.explain.panel import BETWEEN, LEFT
from protopush.nn.prototypes import Anchor
from test_explain import GRID, MARKED, NAMES, TRANSFORM, bright_match, brightness_model, marked_picture

GREY = (90, 91, 92)
PINK = (250, 0, 250)
SIZES = [(300, 100), (100, 300), (1, 1), (20, 20), (1500, 10), (1, 700)]


def an_anchor(**changes):
    values = {"file": "a/x.png", "box": (50, 50, 100, 100), "image_size": (400, 200), **changes}
    return Anchor("x", 3, GRID, 0.5, 0.9, **values)


def an_explanation(matches, name="mel", size=(300, 100), file="folder/picture.png", others=1):
    total = sum(match.contribution for match in matches)
    names = [name, *(f"other {i}" for i in range(others))]
    classes = [ClassEvidence(i, text, 0.8 / (i + 1) ** 2, total + 0.1, 0.1, matches) for i, text in enumerate(names)]
    return Explanation(file, size, 0, name, 0.8, classes, View.of(size, (200, 200)))


def a_match(k=0, box=(100, 25, 125, 50), anchor=None, contribution=1.0, **changes):
    values = {"sees": (100, 0, 200, 100), "values": tuple(np.linspace(-0.1, 0.6, 16).tolist()), **changes}
    rows = math.isqrt(len(values["values"]))
    values["regions"] = Regions.grid((rows, len(values["values"]) // rows), (200, 200))
    return Match(0, k, contribution / 2, 2.0, contribution, 5, box=box, anchor=anchor, **values)


def no_picture(c, k):
    return None


def where(picture, colour):
    """(x0, y0, x1, y1) around all pixels of exactly this colour."""
    rows, columns = np.nonzero((np.asarray(picture) == colour).all(axis=-1))
    assert len(rows), f"no pixel of colour {colour}"
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


def where_not(picture, colour):
    """(x0, y0, x1, y1) around all pixels of other colours."""
    rows, columns = np.nonzero((np.asarray(picture) != colour).any(axis=-1))
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


def count(picture, colour):
    return int((np.asarray(picture) == colour).all(axis=-1).sum())


def assert_within_margins(picture, width):
    assert (picture.mode, picture.width) == ("RGB", width)
    pixels = np.asarray(picture)
    assert (pixels[:, :24] == 255).all(), "something overflows the left margin"
    assert (pixels[:, -24:] == 255).all(), "something overflows the right margin"
    assert (pixels[:20] == 255).all()
    assert (pixels[-20:] == 255).all()


@pytest.fixture
def written(monkeypatch):
    """All text that is drawn, as (text, size)."""
    lines, draw = [], ImageDraw.ImageDraw.text

    def text(self, xy, text, *args, font, **kwargs):
        lines.append((text, font.size))
        return draw(self, xy, text, *args, font=font, **kwargs)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    return lines


# What pictures are made of.


def test_draw_box_frames_the_box_and_leaves_its_inside():
    picture = Image.new("RGB", (60, 40), GREY)
    draw_box(picture, (20, 10, 40, 30), COLOURS[0], line=3)
    assert where(picture, COLOURS[0]) == (20, 10, 40, 30)
    assert count(picture, COLOURS[0]) == 20 * 20 - 14 * 14
    assert count(picture.crop((23, 13, 37, 27)), GREY) == 14 * 14
    assert {picture.getpixel((19, 20)), picture.getpixel((40, 20))} == {(255, 255, 255)}
    assert {picture.getpixel((18, 20)), picture.getpixel((41, 20))} == {(0, 0, 0)}


@pytest.mark.parametrize("box", [(0, 0, 1, 1), (59, 39, 60, 40), (10.2, 10.2, 10.4, 10.4), (0, 0, 60, 40)])
def test_draw_box_of_any_size(box):
    picture = Image.new("RGB", (60, 40), GREY)
    draw_box(picture, box, COLOURS[0])
    assert count(picture, COLOURS[0]) >= 1


@pytest.mark.parametrize("text", ["w" * 500, "i" * 500, "Nävus größer " * 40, "one two\nthree\tfour " * 30])
@pytest.mark.parametrize("width", [30, 100, 333])
def test_fit_text_never_overflows(text, width):
    fitted = fit_text(text, 16, width)
    assert "..." in fitted
    assert "\n" not in fitted
    assert width * 0.6 - 12 < text_width(fitted, 16) <= width


def test_fit_text_keeps_short_text_and_both_ends_of_long():
    assert fit_text("ISIC_0024306.jpg", 16, 300) == "ISIC_0024306.jpg"
    fitted = fit_text("lesion_" * 20 + "0024306.jpg", 16, 200)
    assert fitted.startswith("lesion_")
    assert fitted.endswith("4306.jpg")


def test_wrapped_text_is_whole_or_says_that_it_is_not():
    text = "hiding the outlined part takes the similarity from one to another " * 3
    for width in (90, 200, 600):
        every = wrapped(text, 16, width, most=99)
        assert " ".join(every) == " ".join(text.split())
        assert all(text_width(line, 16) <= width for line in every)
        # each line is full: the next line's first word would not have fitted
        assert all(text_width(f"{line} {after.split()[0]}", 16) > width for line, after in pairwise(every))
        short = wrapped(text, 16, width, most=2)
        assert short[0] == every[0]
        assert len(short) == min(2, len(every))
        assert ("..." in short[-1]) == (len(every) > 2)
    assert wrapped("", 16, 100, most=3) == []
    (long_word,) = wrapped("w" * 300, 16, 100, most=3)
    assert text_width(long_word, 16) <= 100


def test_what_is_drawn_lies_side_by_side_and_below_each_other_on_paper_that_grows():
    page = Page(WIDE)
    red, blue = Image.new("RGB", (30, 10), (255, 0, 0)), Image.new("RGB", (30, 20), (0, 0, 255))
    below = page.columns(32, 40, [red, blue], width=30, gap=5)
    assert below == 60
    assert page.picture(32, below + 9000, red) == 9070
    drawn = page.done(9070)
    assert drawn.size == (WIDE.width, 9070 + WIDE.margin)
    assert where(drawn.crop((0, 0, WIDE.width, 100)), (255, 0, 0)) == (32, 40, 62, 50)
    assert where(drawn, (0, 0, 255)) == (67, 40, 97, 60)
    assert where(drawn, (255, 0, 0)) == (32, 40, 62, 9070)


def test_text_stays_in_its_column():
    for text, along in (("w" * 99, 0.0), ("W i " * 40, 0.5), ("I", 1.0)):
        page = Page(WIDE)
        bottom = page.text(100, 50, text, 16, 70, most=3, along=along)
        x0, y0, x1, y1 = where_not(page.done(bottom), (255, 255, 255))
        assert 100 <= x0 < x1 <= 171
        assert 50 <= y0 < y1 <= bottom
    assert x0 > 150  # the last one is on the right
    assert page.text(100, 50, "", 16, 70) == 50


def test_one_way_to_write_a_percentage():
    written = {0: "0%", 1e-9: "<0.1%", 0.0006: "0.1%", 0.5: "50.0%", 0.99949: "99.9%", 0.9996: ">99.9%", 1: "100%"}
    assert {share: percent(share) for share in written} == written


# What lies over pictures.


@pytest.mark.parametrize("size", [(300, 100), (100, 300), (120, 90), (50, 50), (1500, 10)])
@pytest.mark.parametrize("crop_pct", [1.0, 0.8])
def test_the_map_peaks_in_its_box_and_only_what_was_seen_has_colour(size, crop_pct):
    view = View.of(size, (200, 200), crop_pct)
    seen = cell_box(view, 0, (1, 1))
    for cell in range(16):
        values = np.zeros(16)
        values[cell] = 0.7
        shown = np.asarray(with_map(Image.new("RGB", size, GREY), values.reshape(4, 4).tolist(), view), dtype=int)
        coloured = shown.max(axis=-1) != shown.min(axis=-1)
        inside = np.zeros(size[::-1], dtype=bool)
        inside[seen[1] : seen[3], seen[0] : seen[2]] = True
        assert not coloured[~grown(inside)].any()  # a pixel on the edge may be seen by a half
        assert coloured[~grown(~inside)].all()
        rows, columns = np.nonzero(shown.sum(axis=-1) == shown[inside].sum(axis=-1).max())
        x0, y0, x1, y1 = cell_box(view, cell, GRID)
        assert x0 - 0.5 <= columns.mean() + 0.5 <= x1 + 0.5
        assert y0 - 0.5 <= rows.mean() + 0.5 <= y1 + 0.5


def grown(mask):
    """The mask and its eight neighbours."""
    padded = np.pad(mask, 1)
    return np.any([padded[y : y + mask.shape[0], x : x + mask.shape[1]] for y in range(3) for x in range(3)], axis=0)


def test_the_map_leaves_the_picture_visible_and_hides_more_where_it_is_more_similar():
    """Stripes below a map of two values: their contrast survives everywhere, most where the similarity is low."""
    stripes = np.zeros((100, 100, 3), dtype=np.uint8)
    stripes[::2] = 200
    shown = np.asarray(with_map(Image.fromarray(stripes), [[0.1, 0.9]], View.of((100, 100), (200, 200))), dtype=int)
    low, high = (abs(shown[10, x] - shown[11, x]).max() for x in (2, 97))
    assert 130 < low <= 160
    assert 40 < high < 80


def test_a_map_of_one_value_and_any_scale():
    view, grey = View.of((40, 40), (200, 200)), Image.new("RGB", (40, 40), GREY)
    flat = with_map(grey, [[0.3, 0.3], [0.3, 0.3]], view)
    assert len(flat.getcolors()) == 1
    first, second = (with_map(grey, values, view) for values in ([[0.0, 1.0]], [[-0.3, -0.2]]))
    assert np.abs(np.asarray(first, dtype=int) - np.asarray(second, dtype=int)).max() <= 1  # each has its own scale


def test_the_unseen_thirds_are_marked_and_the_middle_is_untouched():
    shown = np.asarray(with_unseen(Image.new("RGB", (300, 100), GREY), View.of((300, 100), (200, 200))))
    untouched = (shown == GREY).all(axis=-1)
    assert untouched[:, 100:200].all()
    assert not untouched[:, :100].any()
    assert not untouched[:, 200:].any()
    assert len(np.unique(shown[:, :100].reshape(-1, 3), axis=0)) == 2  # hatched
    whole = with_unseen(Image.new("RGB", (50, 50), GREY), View.of((50, 50), (200, 200)))
    assert whole.getcolors() == [(2500, GREY)]
    assert unseen_share(View.of((50, 50), (200, 200))) == 0
    assert unseen_share(View.of((50, 50), (200, 200), crop_pct=0.5)) == pytest.approx(0.75)


@pytest.mark.parametrize("line", [1, 2])
def test_the_outline_of_any_union_of_blocks(line):
    """Pixel by pixel: white within ``line`` of the outside, black one further in and one further out."""
    random = np.random.default_rng(line)
    view = View.of((40, 30), (30, 30))
    for share in (0.1, 0.4, 0.8, 1.0):
        boxes = [cell_box(view, cell, (6, 6)) for cell in np.flatnonzero(random.random(36) < share)]
        found = np.asarray(with_outline(Image.new("RGB", (80, 60), GREY), boxes, (40, 30), line))
        inside = {(x, y) for x0, y0, x1, y1 in boxes for x in range(2 * x0, 2 * x1) for y in range(2 * y0, 2 * y1)}
        for y in range(60):
            for x in range(80):
                assert tuple(found[y, x]) == outlined(inside, x, y, line), (x, y)


def outlined(inside, x, y, line):
    def any_within(reach, wanted):
        span = range(-reach, reach + 1)
        return any(((x + i, y + j) in inside) == wanted for i in span for j in span)

    if (x, y) not in inside:
        return (0, 0, 0) if any_within(1, True) else GREY
    if any_within(line, False):
        return (255, 255, 255)
    return (0, 0, 0) if any_within(line + 1, False) else GREY


# The panel.


@pytest.mark.parametrize("size", [(300, 100), (100, 300), (900, 300), (40, 40)])
def test_panel_draws_the_box_at_its_place_and_keeps_the_aspect(size):
    """In the picture's part that the model saw nothing but the box and its number is drawn."""
    width, height = size
    middle, side = (width // 2, height // 2), min(size) // 5
    box = (*middle, middle[0] + side, middle[1] + side)
    panel = draw_panel(an_explanation([a_match(box=box)], size=size), Image.new("RGB", size, GREY), no_picture)
    left = panel.crop((0, 0, WIDE.margin + LEFT + 8, panel.height))
    x0, y0, x1, y1 = where(left, GREY)
    assert (x1 - x0) / (y1 - y0) == pytest.approx(1, rel=0.02)  # what was seen is square
    scale = (x1 - x0) / min(size)
    x0, y0 = x0 - (width - min(size)) / 2 * scale, y0 - (height - min(size)) / 2 * scale
    # the number beside the box has its colour too: take the row and the column through the box's middle
    pixels = (np.asarray(left) == COLOURS[0]).all(axis=-1)
    across = np.flatnonzero(pixels[round(y0 + (box[1] + box[3]) / 2 * scale)]) - x0
    down = np.flatnonzero(pixels[:, round(x0 + box[2] * scale) - 2]) - y0
    assert [across.min(), across.max() + 1] == pytest.approx([box[0] * scale, box[2] * scale], abs=1.5)
    assert [down.min(), down.max() + 1] == pytest.approx([box[1] * scale, box[3] * scale], abs=1.5)


def map_tile(panel, height):
    """The map of the wide panel's first row: what is as high as it is in the map's column."""
    column = panel.crop((x := WIDE.margin + LEFT + BETWEEN, 0, x + WIDE.side, panel.height))
    rows = np.flatnonzero((np.asarray(column) != 255).any(axis=(1, 2)))
    runs = np.split(rows, np.flatnonzero(np.diff(rows) > 1) + 1)
    ((top, bottom),) = [(run[0], run[-1] + 1) for run in runs if abs(len(run) - height) <= 1]
    return column.crop((0, top, WIDE.side, bottom))


def test_the_panel_of_a_cropped_file_from_end_to_end(tmp_path):
    """The map's peak is the marked place in pixels of the file, and the thirds that the crop left out are dark."""
    marked_picture().save(tmp_path / "marked.png")
    explanation = explain_image(brightness_model(), tmp_path / "marked.png", TRANSFORM, NAMES, also=["bright"])
    bright = next(some for some in explanation.classes if some.class_name == "bright")
    explanation = replace(explanation, classes=[bright])
    panel = draw_panel(explanation, Image.new("RGB", (300, 100), (60, 60, 60)), no_picture)
    tile = np.asarray(map_tile(panel, WIDE.side / 3), dtype=int).sum(axis=-1)
    scale = WIDE.side / 300
    y, x = (np.argwhere(tile == tile.max()) + 0.5).mean(axis=0) / scale
    x0, y0, x1, y1 = MARKED
    assert x0 <= x <= x1
    assert y0 <= y <= y1
    assert bright_match(explanation).box == MARKED
    lines = np.abs(np.diff(tile, axis=1))
    assert lines[:, : int(98 * scale)].max() > 150, "no hatching on the left"
    assert np.median(tile[:, : int(98 * scale)]) < 0.5 * tile[:, int(102 * scale) : int(198 * scale)].min()
    assert np.median(tile[:, int(203 * scale) :]) < 0.5 * tile[:, int(102 * scale) : int(198 * scale)].min()


def panel_of_file(path):
    explanation = explain_image(brightness_model(), path, TRANSFORM, NAMES)
    return draw_panel(explanation, read_image(path), no_picture).tobytes()


def test_a_turned_photo_has_the_panel_of_the_upright_one(tmp_path):
    random = np.random.default_rng(0).integers(0, 255, (100, 300, 3), dtype=np.uint8)
    upright = Image.fromarray(random)
    upright.paste((250, 250, 250), MARKED)
    panels = set()
    for orientation in TURNED:
        path = tmp_path / str(orientation) / "photo.png"
        path.parent.mkdir()
        save_turned(upright, path, orientation)
        panels.add(panel_of_file(path))
    assert len(panels) == 1


@pytest.mark.parametrize("match", ["local", "global"])
@pytest.mark.parametrize("size", SIZES)
def test_panels_of_any_shape_of_picture(tmp_path, size, match):
    path = tmp_path / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)).save(path)
    explanation = explain_image(brightness_model(match), path, TRANSFORM, NAMES)
    regions = [a_region(some, boxes=[explanation.seen]) for some in explanation.classes[0].matches]
    for narrow, width in ((False, 1480), (True, 800)):
        panel = draw_panel(explanation, read_image(path), no_picture, regions=regions, narrow=narrow)
        assert_within_margins(panel, width)
        assert count(panel, COLOURS[0]) > 200
        other = explanation.classes[1].class_name
        assert_within_margins(draw_why_not(explanation, other, read_image(path), no_picture, narrow=narrow), width)


def test_a_match_of_whole_pictures_says_so(written):
    whole = a_match(values=(0.5,), box=(100, 0, 200, 100))
    draw_panel(an_explanation([whole]), Image.new("RGB", (300, 100), GREY), no_picture)
    texts = [text for text, _ in written]
    assert "the whole picture" in texts
    assert "where it is similar" not in texts
    written.clear()
    draw_panel(an_explanation([a_match()]), Image.new("RGB", (300, 100), GREY), no_picture)
    texts = [text for text, _ in written]
    assert "the whole picture" not in texts
    assert {"where it is similar", "-0.10", "0.60"} <= set(texts)  # the ends of the map's scale
    assert "own scale" in " ".join(texts)


def test_a_smaller_copy_of_the_image_gives_the_same_panel():
    matches = [a_match(anchor=an_anchor())]
    panels = [
        draw_panel(an_explanation(matches), Image.new("RGB", size, GREY), no_picture)
        for size in ((300, 100), (150, 50))
    ]
    assert panels[0].tobytes() == panels[1].tobytes()


def marked_source(size):
    """The anchor's part in pink, in a picture of another size than the anchor's original (400x200)."""
    source = Image.new("RGB", size, (0, 90, 0))
    scale = size[0] / 400
    source.paste(PINK, tuple(round(edge * scale) for edge in (50, 50, 100, 100)))
    return source


@pytest.mark.parametrize("size", [(400, 200), (200, 100), (800, 400)])
def test_the_anchor_is_cropped_from_a_picture_of_any_size(size):
    panel = draw_panel(
        an_explanation([a_match(anchor=an_anchor())]),
        Image.new("RGB", (300, 100), GREY),
        lambda c, k: marked_source(size),
    )
    # the part is half as wide as its tile of 164 pixels: 82 with 3 of frame on each side; in the whole picture it is 21
    assert 72 * 72 <= count(panel, PINK) <= 76 * 76 + 21 * 21
    gallery = draw_gallery(["mel"], lambda c, k: an_anchor(), lambda c, k: marked_source(size), 1, 1)
    assert 52 * 52 <= count(gallery, PINK) <= 60 * 60 + 16 * 16


def test_the_picture_is_asked_for_by_class_and_slot():
    asked = []
    matches = [a_match(k=4, anchor=an_anchor()), a_match(k=1, anchor=an_anchor()), a_match(k=2)]
    draw_panel(an_explanation(matches), Image.new("RGB", (300, 100)), lambda c, k: asked.append((c, k)))
    assert asked == [(0, 4), (0, 1)]  # the third has no anchor, hence no picture


def test_matches_of_one_cell_all_stay_visible():
    matches = [a_match(k=k, contribution=5.0 - k, box=(125, 25, 150, 50)) for k in range(5)]
    panel = draw_panel(an_explanation(matches), Image.new("RGB", (300, 100), GREY), no_picture)
    large = panel.crop(tuple(map(int, where(panel.crop((0, 0, WIDE.margin + LEFT + 8, panel.height)), GREY))))
    row = round(0.375 * large.height)
    middle = large.crop((0, row, large.width, row + 1))
    for colour in COLOURS[:5]:
        assert count(large, colour) > WIDE.badge**2 * 0.6, "a number is hidden"
        assert count(middle, colour) >= 2, "a frame is hidden"


@pytest.mark.parametrize("narrow", [False, True])
def test_rows_and_footer_grow_with_the_prototypes(narrow):
    matches = [a_match(k=k, anchor=an_anchor(), contribution=3.0 - k / 2) for k in range(10)]
    image = Image.new("RGB", (300, 100), GREY)
    heights = [
        draw_panel(an_explanation(matches), image, no_picture, rows=rows, narrow=narrow).height for rows in (5, 10, 20)
    ]
    assert heights[0] < heights[1] == heights[2]
    with pytest.raises(InputError, match="rows is 0"):
        draw_panel(an_explanation(matches), image, no_picture, rows=0)


def test_a_class_without_a_prototype_in_use(written):
    draw_panel(an_explanation([]), Image.new("RGB", (300, 100), GREY), no_picture)
    assert "No prototype of this class is in use." in [text for text, _ in written]


def test_bars_are_as_long_as_the_contributions():
    matches = [a_match(k=0, contribution=2.0), a_match(k=1, contribution=1.0), a_match(k=2, contribution=-0.5)]
    panel = draw_panel(an_explanation(matches, others=0), Image.new("RGB", (300, 100), GREY), no_picture)
    right = panel.crop((panel.width - 340, 0, panel.width, panel.height))
    first, second = ((np.asarray(right) == COLOURS[i]).all(axis=-1).sum(axis=1).max() for i in (0, 1))
    assert second == pytest.approx(first / 2, abs=2)
    badge = WIDE.badge**2
    assert count(right, COLOURS[2]) < badge  # the bar against is hollow, the number is not


# What is seen beyond a box.


def test_a_local_part_is_shown_alone_at_both_places():
    """Two crops of the same size fill their tiles; nothing of what lies around them is there."""
    image, source = Image.new("RGB", (300, 100), GREY), Image.new("RGB", (400, 200), GREY)
    image.paste(PINK, (100, 25, 125, 50))
    source.paste(PINK, (50, 50, 100, 100))
    anchor = replace(an_anchor(sees=(50, 50, 100, 100)), region=(0, 0, 50, 50))
    match = a_match(sees=(100, 25, 125, 50), anchor=anchor, values=(0.1, 0.2))
    for reach, least, most in (("box", 146, 160), ("all", 70, 76)):  # less the frame, and what resampling mixes with it
        explanation = replace(an_explanation([match]), reach=reach)
        panel = draw_panel(explanation, image, lambda c, k: source)
        left = WIDE.margin + LEFT + BETWEEN + WIDE.side + WIDE.gap
        for x in (left, left + WIDE.side + WIDE.gap):
            tile = panel.crop((x, 0, x + WIDE.side, panel.height))
            assert least**2 <= count(tile, PINK) <= most**2  # whole, though the picture is wide
            assert (count(tile, GREY) > 0) == (reach == "all")


def test_windows_of_two_sizes_are_shown_at_one_scale():
    """The picture is seen at its own size: 25 pixels here, beside an anchor of 50."""
    view = View.of((100, 100), (100, 100))
    match = a_match(box=(0, 0, 25, 25), sees=(0, 0, 25, 25), anchor=replace(an_anchor(), region=(0, 0, 50, 50)))
    assert window_shares(match, view, "box") == (0.5, 1.0)
    assert window_shares(replace(match, box=(0, 0, 100, 100)), view, "box") == (1.0, 0.5)
    assert window_shares(replace(match, box=(0, 0, 49, 49)), view, "box") == (1.0, 1.0)
    assert window_shares(match, view, "more") == window_shares(replace(match, anchor=None), view, "box") == (1.0, 1.0)
    part = part_tile(Image.new("RGB", (100, 100), PINK), (0, 0, 25, 25), COLOURS[0], 164, (0, 0, 25, 25), 0.5)
    assert part.size == (164, 164)
    assert where(part, COLOURS[0]) == (41, 41, 123, 123)


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("reach", ["box", "more", "all"])
def test_gallery_of_whole_images_speaks_of_no_boxes(written, reach, narrow):
    whole = an_anchor(box=(0, 0, 400, 200), sees=(0, 0, 400, 200), pooled=True)
    options = {"neighbours": lambda c, k: NEAR, "narrow": narrow, "reach": reach}
    draw_gallery(["mel", "nv", "bkl"], lambda c, k: whole, no_picture, 1, 1, **options)
    said = " ".join(text for text, _ in written)
    assert "Left what the model sees of an image, right all of it." in said
    assert "Each prototype stands for an image as a whole." in said
    assert not any(word in said for word in ("box", "thin frame", "the part"))
    written.clear()
    draw_gallery(["mel"], lambda c, k: [whole, an_anchor()][k], no_picture, 1, 2, reach=reach)
    said = " ".join(text for text, _ in written)
    assert "Left the part, right its whole image" in said
    assert "as a whole" not in said


def test_what_a_part_sees_has_a_thin_frame():
    picture, ink = Image.new("RGB", (80, 60), GREY), COLOURS[2]
    draw_sees(picture, (30, 20, 40, 30), (10, 5, 70, 55), ink)
    assert where(picture, ink) == (10, 5, 70, 55)
    assert count(picture, ink) == 60 * 50 - 58 * 48
    assert count(picture, (255, 255, 255)) == 58 * 48 - 56 * 46
    for sees in (None, (30, 20, 40, 30)):  # the whole picture, or no more than the box
        plain = Image.new("RGB", (80, 60), GREY)
        draw_sees(plain, (30, 20, 40, 30), sees, ink)
        assert count(plain, GREY) == 80 * 60
    match = a_match(sees=(80, 10, 145, 70), anchor=an_anchor(sees=(20, 20, 180, 180)))
    image = Image.new("RGB", (300, 100), GREY)
    panels = [
        draw_panel(replace(an_explanation([match]), reach=reach), image, lambda c, k: image)
        for reach in ("all", "more")
    ]
    thin = [count(panel, COLOURS[0]) for panel in panels]
    assert thin[1] != thin[0]
    part = part_tile(image, (100, 25, 125, 50), COLOURS[0], 164, (80, 10, 145, 70))
    x0, y0, x1, y1 = where(part, COLOURS[0])
    assert (x1 - x0, y1 - y0) == pytest.approx((65 * 164 / 71.5, 60 * 164 / 71.5), abs=1.5)
    inside = part.crop((x0 + 2, y0 + 2, x1 - 2, y1 - 2))
    left, top, right, bottom = where(inside, COLOURS[0])
    assert (right - left, bottom - top) == pytest.approx((25 * 164 / 71.5, 25 * 164 / 71.5), abs=1.5)
    assert count(inside, COLOURS[0]) == 2 * (right - left + bottom - top) - 4  # one pixel wide: cells are small


@pytest.mark.parametrize(
    ("reach", "said"),
    [("box", "nothing outside it can change"), ("more", "The thin frame is all"), ("all", "sees the whole image")],
)
def test_the_words_say_what_the_model_sees(written, reach, said):
    explanation, image = replace(an_explanation([a_match()]), reach=reach), Image.new("RGB", (300, 100), GREY)
    draw_panel(explanation, image, no_picture)
    draw_why_not(explanation, "other 0", image, no_picture)
    draw_gallery(["mel"], lambda c, k: an_anchor(), no_picture, 1, 1, reach=reach)
    assert " ".join(text for text, _ in written).count(said) == 3


def test_all_places_that_count_are_framed_in_the_map_and_said(written):
    image, boxes = Image.new("RGB", (300, 100), GREY), ((175, 50, 200, 75), (200, 0, 225, 25))
    panels = [
        draw_panel(an_explanation([a_match(more=more)]), image, no_picture, narrow=narrow)
        for more in ((), boxes)
        for narrow in (False, True)
    ]
    alone, alone_narrow, three, three_narrow = [count(panel, COLOURS[0]) for panel in panels]
    assert three > alone
    assert three_narrow > alone_narrow
    texts = [text for text, _ in written]
    assert sum("(mean of 3 places)" in text for text in texts) == 2
    assert sum("mean of the 3 most similar places" in text for text in texts) == 2


# Checked regions.


def a_region(match, **changes):
    values = {"share": 0.061, "in_box": 0.5, "similarity": 0.81, "hidden": 0.42, "blurred": 0.1, "reached": True}
    return Region(match.class_index, match.prototype, **{"boxes": [(100, 0, 150, 50)], **values, **changes})


def test_a_region_is_outlined_in_its_own_row_and_told():
    matches = [a_match(k=3), a_match(k=1)]
    explanation, image = an_explanation(matches), Image.new("RGB", (300, 100), GREY)
    region = a_region(matches[1])
    plain, checked = (draw_panel(explanation, image, no_picture, regions=some) for some in (None, [region]))
    small = resized(image, WIDE.side, WIDE.side)
    bare = with_map(small, matches[0].map, explanation.view)
    outlined_map = with_outline(bare, region.boxes, (300, 100))
    assert places(plain, bare) == 2
    assert (places(checked, bare), places(checked, outlined_map)) == (1, 1)
    foreign = [replace(region, class_index=5), replace(region, prototype=2)]
    assert draw_panel(explanation, image, no_picture, regions=foreign).tobytes() == plain.tobytes()


def places(panel, piece):
    """How often the wide panel's column of maps has exactly this piece."""
    x = WIDE.margin + LEFT + BETWEEN
    pixels, wanted = np.asarray(panel)[:, x : x + piece.width], np.asarray(piece)
    tops = range(panel.height - piece.height)
    return sum(bool((pixels[top : top + piece.height] == wanted).all()) for top in tops)


def test_what_a_region_says():
    match = a_match()
    assert (
        region_words(a_region(match))
        == "hiding the outlined 6.1% (50.0% of it in the box) takes the similarity from 0.81 to 0.42"
    )
    assert "outlined 0.4%" in region_words(a_region(match, share=0.004))
    assert "outlined <0.1%" in region_words(a_region(match, share=0.0004))
    assert "(100% of it" in region_words(a_region(match, in_box=1.0))
    unexplained = a_region(match, boxes=[], share=0.0, hidden=0.81, blurred=0.85, reached=False)
    assert region_words(unexplained) == "no region explains it: the blurred picture is as similar (0.85)"
    assert "hardly matters" in region_words(a_region(match, hidden=0.808, blurred=0.807))


# Why not.


def two_classes(said=(3.0, 1.5, 0.25), other=(2.0, 1.75), biases=(0.5, -0.25)):
    def evidence(c, name, contributions, bias, probability):
        matches = [
            replace(a_match(k=k, contribution=value, anchor=an_anchor()), class_index=c)
            for k, value in enumerate(contributions)
        ]
        return ClassEvidence(c, name, probability, sum(contributions) + bias, bias, matches)

    logits = [sum(some) + bias for some, bias in zip((said, other), biases, strict=True)]
    share = 1 / (1 + math.exp(logits[1] - logits[0]))
    classes = [evidence(0, "mel", said, biases[0], share), evidence(1, "nv", other, biases[1], 1 - share)]
    return Explanation("a.png", (300, 100), 0, "mel", share, classes, View.of((300, 100), (200, 200)))


def drawn_why_not(explanation, **options):
    return draw_why_not(
        explanation, "nv", Image.new("RGB", (300, 100), GREY), lambda c, k: marked_source((400, 200)), **options
    )


@pytest.mark.parametrize("narrow", [False, True])
def test_why_not_adds_up_in_words(written, narrow):
    """Logits: 3 + 1.5 + 0.25 + 0.5 = 5.25 and 2 + 1.75 - 0.25 = 3.5."""
    explanation = two_classes()
    drawn_why_not(explanation, rows=2, narrow=narrow)
    texts = [text for text, _ in written]
    for row in (
        ["shown above (2, 2)", "4.50", "3.75", "+0.75"],
        ["the others (1, 0)", "0.25", "0.00", "+0.25"],
        ["bias", "0.50", "-0.25", "+0.75"],
        ["score (logit)", "5.25", "3.50", "+1.75"],
    ):
        start = texts.index(row[0])
        assert texts[start : start + 4] == row
    said, other = explanation.classes
    assert math.exp(1.75) == pytest.approx(said.probability / other.probability)
    assert "So mel (85.2%) is 5.75 times as probable as nv (14.8%)." in " ".join(texts)


@pytest.mark.parametrize(
    ("contributions", "said"),
    [((0.0,), "1.00 times"), ((2.0, 3.0), "148 times"), ((9.0,), "8,103 times"), ((1e4,), "more than a million times")],
)
def test_how_many_times_as_probable(written, contributions, said):
    drawn_why_not(two_classes(contributions, (0.0,), (0.0, 0.0)))
    assert f"is {said} as probable" in " ".join(text for text, _ in written)


def test_why_not_asks_for_the_pictures_of_both_classes_and_compares_their_bars():
    asked = []
    explanation = two_classes(said=(3.0, 1.0), other=(1.5,))
    picture = draw_why_not(
        explanation, "nv", Image.new("RGB", (300, 100), GREY), lambda c, k: asked.append((c, k)), rows=1
    )
    assert asked == [(0, 0), (1, 0)]
    half = (WIDE.content - BETWEEN) // 2
    ends = (WIDE.margin + half, WIDE.margin + WIDE.content)  # the words are on the right of each half
    halves = [picture.crop((end - 256, 0, end, picture.height)) for end in ends]
    bars = [(np.asarray(half) == COLOURS[0]).all(axis=-1).sum(axis=1).max() for half in halves]
    assert bars[1] == pytest.approx(bars[0] / 2, abs=2)
    with pytest.raises(InputError, match="rows is 0"):
        drawn_why_not(explanation, rows=0)
    with pytest.raises(InputError, match="no evidence for class 'df'"):
        draw_why_not(explanation, "df", Image.new("RGB", (300, 100)), no_picture)
    with pytest.raises(InputError, match="predicted class"):
        draw_why_not(explanation, "mel", Image.new("RGB", (300, 100)), no_picture)


# The gallery.


def test_a_model_of_one_slot_and_one_class():
    explanation = an_explanation([a_match(contribution=0.0)], others=0)
    assert count(draw_panel(explanation, Image.new("RGB", (300, 100), GREY), no_picture), COLOURS[0]) > 100
    gallery = draw_gallery(["only"], lambda c, k: an_anchor(), no_picture, 1, 1)
    assert gallery.height < 500


def test_gallery_of_seven_classes_and_ten_prototypes():
    asked = []

    def source_of(c, k):
        asked.append((c, k))
        return marked_source((400, 200))

    def draw(per_class):
        return draw_gallery([f"class {c}" for c in range(7)], lambda c, k: an_anchor(), source_of, 7, 10, per_class)

    few, every = draw(5), draw(10)
    assert asked == [(c, k) for c in range(7) for k in range(5)] + [(c, k) for c in range(7) for k in range(10)]
    assert few.width == every.width == 1480
    assert few.height < every.height <= 4000
    assert all(count(every, colour) > 1000 for colour in COLOURS)  # one for each class
    with pytest.raises(InputError, match="per_class is 0"):
        draw(0)


def test_gallery_passes_over_empty_slots():
    gallery = draw_gallery(
        ["a", "b"],
        lambda c, k: an_anchor() if (c, k) in {(0, 1), (1, 3)} else None,
        lambda c, k: marked_source((400, 200)),
        2,
        4,
    )
    assert 2 * 52 * 52 <= count(gallery, PINK) <= 2 * (60 * 60 + 16 * 16)


def a_neighbour(sample, class_index, similarity, box=(0, 0, 10, 10)):
    return Neighbour(sample, f"{sample}.png", class_index, similarity, 0, box)


NEAR = Neighbours(
    own=[a_neighbour(i, 0, 0.9 - i / 100) for i in range(4)],
    others=[a_neighbour(10 + i, 1 + i, 0.8 - i / 100) for i in range(3)],
)


@pytest.mark.parametrize("narrow", [False, True])
def test_gallery_shows_three_neighbours_of_the_class_and_two_of_others(written, narrow):
    asked = []

    def picture_of(neighbour):
        asked.append(neighbour.sample)
        return Image.new("RGB", (40, 40), (0, 90, 0)) if neighbour.sample != 11 else None

    options = {"neighbours": lambda c, k: NEAR, "picture_of": picture_of, "narrow": narrow}
    gallery = draw_gallery(["mel", "nv", "bkl"], lambda c, k: an_anchor(), no_picture, 1, 1, **options)
    assert asked == [0, 1, 2, 10, 11]
    texts = [text for text, _ in written]
    captions = [text for text in texts if text.split()[0] in {"mel", "nv", "bkl"} and len(text.split()) == 2]
    assert captions == ["mel 0.90", "mel 0.89", "mel 0.88", "nv 0.80", "bkl 0.79"]
    assert "no picture" in texts
    # each part is framed in its class's colour, and those of other classes lie together in a frame to the right
    own, other = where(gallery, COLOURS[0]), where(gallery, COLOURS[1])
    assert count(gallery, COLOURS[0]) > 3 * count(gallery, COLOURS[1]) > 300
    dark = (np.asarray(gallery) == INK).all(axis=-1)
    columns, lines = np.flatnonzero(dark.sum(axis=0) > 130), np.flatnonzero(dark.sum(axis=1) > 260)
    assert own[2] < columns.min() < other[0] < other[2] < columns.max()
    assert lines.min() < other[1] < other[3] < lines.max()


def test_gallery_of_prototypes_without_neighbours(written):
    for found in (None, Neighbours([], [])):
        written.clear()
        gallery = draw_gallery(["mel"], lambda c, k: an_anchor(), no_picture, 1, 1, neighbours=lambda c, k, n=found: n)
        assert_within_margins(gallery, 1480)
        assert [text for text, _ in written].count("none") == 2


# All of them.


@pytest.mark.parametrize(
    "anchor",
    [
        None,
        an_anchor(),
        an_anchor(box=None, image_size=None),
        an_anchor(file=None, verified=False),
        an_anchor(file="x" * 300 + ".png"),
    ],
)
@pytest.mark.parametrize("mode", [None, "L", "RGBA"])
def test_panel_and_gallery_stand_whatever_is_missing(anchor, mode):
    name = "a class name\nthat never ends " * 20
    matches = [a_match(anchor=anchor, contribution=c) for c in (1.0, 0.0, -2.0)]
    explanation = an_explanation(matches, name=name, file="y" * 300 + ".png", others=0)

    def source_of(c, k):
        return Image.new(mode, (40, 20)) if mode else None

    panel = draw_panel(explanation, Image.new("L", (300, 100), 90), source_of)
    gallery = draw_gallery([name, "b"], lambda c, k: anchor if c else None, source_of, 2, 1)
    for picture in (panel, gallery):
        assert_within_margins(picture, 1480)
        assert 200 < picture.height < 2400


HOSTILE = {
    "empty": "",
    "long": "w" * 400,
    "words": "W " * 200,
    "control": "a\x00b\x1b[31m\r\n\tc",
    "reversed": "\u202egnp.exe",
    "not unicode": "caf\udce9\udcff",
    "emoji": "🙂" * 40,
    "wide": "名前" * 40,
}


@pytest.mark.parametrize("name", HOSTILE.values(), ids=HOSTILE.keys())
@pytest.mark.parametrize("narrow", [False, True])
def test_no_name_breaks_a_picture(name, narrow, written):
    anchor = an_anchor(file=f"folder/{name}")
    matches = [a_match(anchor=anchor)]
    explanation = an_explanation(matches, name=name, file=name)
    near = Neighbours([replace(a_neighbour(1, 0, 0.5), name=name)], [a_neighbour(2, 1, 0.5)])
    image, width = Image.new("RGB", (300, 100), GREY), 800 if narrow else 1480
    assert_within_margins(draw_panel(explanation, image, no_picture, narrow=narrow), width)
    assert_within_margins(draw_why_not(explanation, "other 0", image, no_picture, narrow=narrow), width)
    for neighbours in (None, lambda c, k: near):
        gallery = draw_gallery(
            [name, name], lambda c, k: anchor, no_picture, 2, 1, neighbours=neighbours, narrow=narrow
        )
        assert_within_margins(gallery, width)
    assert all(text.isprintable() for text, _ in written)


def test_text_of_narrow_pictures_is_large_enough_for_a_phone(written):
    explanation = two_classes()
    image = Image.new("RGB", (300, 100), GREY)
    regions = [a_region(match) for match in explanation.classes[0].matches]
    draw_panel(explanation, image, no_picture, regions=regions, narrow=True)
    drawn_why_not(explanation, narrow=True)
    for neighbours in (None, lambda c, k: NEAR):
        draw_gallery(
            ["mel", "nv", "bkl"], lambda c, k: an_anchor(), no_picture, 3, 1, neighbours=neighbours, narrow=True
        )
    assert len(written) > 60
    assert min(size for _, size in written) >= 22 == NARROW.small


@pytest.mark.parametrize("name", ["Nävus", "дерма", "ναevus"])
def test_letters_beyond_ascii_are_drawn(name):
    """Pillow's own font would draw every one of them as the same empty box."""
    beyond = [letter for letter in name if not letter.isascii()]

    def drawn(letter):
        return draw_gallery([letter * 6], lambda c, k: None, no_picture, 1, 1).tobytes()

    assert all(drawn(letter) != drawn("\uffff") for letter in beyond)

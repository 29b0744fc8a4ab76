"""The style of pictures: colours that can be read and told apart, labels that do not meet, and nothing that is cut off."""

import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import pictures
from matplotlib.colors import to_rgb
from matplotlib.text import Text

COLORS = (pictures.OFFLINE, pictures.RATIO, pictures.SUPPORT, pictures.ONLINE, pictures.TRL, pictures.TEACHER, pictures.TEXT)
#: Machado, Oliveira and Fernandes, "A physiologically-based model for simulation of color vision deficiency" (2009), severity 1.
VISIONS = {
    "all cones": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def linear(color):
    srgb = np.array(to_rgb(color))
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


def contrast(one, other):
    """Return the contrast as the Web Content Accessibility Guidelines define it."""
    low, high = sorted(float(linear(color) @ (0.2126, 0.7152, 0.0722)) for color in (one, other))
    return (high + 0.05) / (low + 0.05)


def lab(rgb):
    """Return the CIELAB values of linear sRGB, D65."""
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ np.clip(rgb, 0, 1) / (0.9505, 1, 1.089)
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("page", pictures.PAGES)
def test_text_and_colours_can_be_read_on_every_page(page):
    assert contrast(pictures.TEXT, page) >= 4
    assert all(contrast(color, page) >= 2.99 for color in COLORS)


@pytest.mark.parametrize("vision", VISIONS)
def test_any_two_colours_can_be_told_apart(vision):
    seen = [lab(np.array(VISIONS[vision]) @ linear(color)) for color in COLORS]
    assert min(np.linalg.norm(a - b) for a, b in combinations(seen, 2)) >= 22


def test_arms_of_one_kind_have_one_colour():
    assert pictures.color_of("TRL DistillationTrainer; rate x 3") == pictures.TRL
    assert pictures.color_of("online OPD, 8 candidates, residual") == pictures.ONLINE
    assert pictures.color_of("stored top-8, reverse KL") == pictures.SUPPORT
    assert pictures.color_of("Lightning, ratio to ref") == pictures.RATIO
    assert pictures.color_of("Lightning, clip 1") == pictures.OFFLINE
    assert pictures.color_of("SFT") == pictures.color_of("no teacher: by entropy") == pictures.TEXT


def test_labels_of_lines_that_end_together_do_not_meet(tmp_path):
    figure, (axes,) = pictures.panels(1, 1, height=3)
    names = ["online OPD", "a name that takes more than one line of letters", "SFT", "Lightning"]
    for name in names:
        pictures.band(axes, [0, 1], [[0, 1], [0, 1.1]], name)
    pictures.label_ends(axes)
    pictures.save(figure, tmp_path / "labels.png")
    boxes = [Text.get_window_extent(text) for text in axes.texts]  # without their leaders
    assert len(boxes) == len(names)
    assert not any(a.y0 < b.y1 - 1 and b.y0 < a.y1 - 1 for a, b in combinations(boxes, 2))


def test_a_picture_that_would_be_cut_is_refused(tmp_path):
    figure, (axes,) = pictures.panels(1, 1, height=2)
    axes.text(0.5, 0.5, "long " * 60).set_in_layout(False)
    pictures.save(figure, tmp_path / "within.png")  # what the layout leaves out counts for nothing
    figure.text(0.9, 0.5, "long " * 20)
    with pytest.raises(ValueError, match="inches, expected at most"):
        pictures.save(figure, tmp_path / "cut.png")


def test_a_band_is_the_interval_of_students_t():
    _, (axes,) = pictures.panels(1, 1, height=2)
    pictures.band(axes, [0, 1], [[0.0, 1.0], [0.0, 3.0]], "online OPD")
    assert axes.collections[0].get_paths()[0].get_extents().extents == pytest.approx([0, 2 - 12.7062, 1, 2 + 12.7062], abs=1e-3)


def test_every_picture_of_the_docs_is_shown_on_a_page():
    root = Path(__file__).parents[1]
    pages = "".join(page.read_text() for page in (*root.glob("*.md"), *root.glob("docs/**/*.md"), root / "benchmarks" / "RESULTS.md"))
    assert [picture.name for picture in root.glob("docs/*.png") if f"{picture.name})" not in pages] == []

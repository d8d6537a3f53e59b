"""A figure in words: every kind of mark is counted as it is drawn, and a change of the figure shows."""

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest

from i2f import figures

mpl.use("Agg")


@pytest.fixture
def ax():
    figure, ax = plt.subplots()
    yield ax
    plt.close(figure)


def row(ax, kind):
    table = figures.summary(ax.figure).set_index("drawn as")
    assert table.index.is_unique
    return table.loc[kind]


def test_lines_and_points_by_hand(ax):
    ax.plot([0, 1, 2], [1, 10, 1000])
    ax.plot([4], [2])
    ax.scatter([1, 2], [0.5, 1 / 3])
    ax.set_title("one\ntwo")
    found = row(ax, "lines")
    assert (found.panel, found.shows, found.points) == (1, "one two", 4)
    assert (found.x, found.y) == ("1.5 [0, 4]", "6 [1, 1e+03]")
    assert row(ax, "points").y == "0.417 [0.333, 0.5]"


@pytest.mark.parametrize("draw", ["plot", "scatter"])
def test_what_is_not_finite_is_not_counted(ax, draw):
    getattr(ax, draw)([0, 1, np.nan, 3], np.ma.masked_equal([1.0, np.inf, 2.0, 5.0], 5.0))
    (found,) = figures.summary(ax.figure).itertuples()
    assert (found.points, found.x, found.y) == (1, "0 [0, 0]", "1 [1, 1]")


def test_nothing_that_is_finite_leaves_no_point(ax):
    ax.scatter([1, 2], [np.nan, np.nan])
    assert (row(ax, "points").points, row(ax, "points").x) == (0, "–")


def test_a_logarithmic_axis_shows_positive_values_alone(ax):
    ax.scatter([1, 2, 3], [-1, 0, 4])
    assert row(ax, "points").points == 3
    ax.set_yscale("log")
    assert (row(ax, "points").points, row(ax, "points").x) == (1, "3 [3, 3]")
    ax.set(yscale="linear", xscale="symlog")
    assert row(ax, "points").points == 3


def test_bars_count_by_their_ends(ax):
    ax.bar([0, 1], [2, 5], bottom=[1, 0])
    assert (row(ax, "bars").x, row(ax, "bars").y) == ("0.5 [0, 1]", "4 [3, 5]")
    _, other = plt.subplots()
    other.barh(["a", "b", "c"], [2, 5, 7], left=1)
    assert (row(other, "bars").x, row(other, "bars").y) == ("6 [3, 8]", "1 [0, 2]")
    plt.close(other.figure)


def test_ranges_have_two_ends(ax):
    ax.vlines([1, 2], [0, 3], [5, np.nan])
    assert (row(ax, "ranges").points, row(ax, "ranges").y) == (2, "2.5 [0, 5]")  # of the one that is drawn


def test_rules_have_one_coordinate(ax):
    ax.axvline(0.05)
    ax.axhline(3.0)
    ax.axhline(4.0)
    vertical, horizontal = row(ax, "vertical rules"), row(ax, "horizontal rules")
    assert (vertical.points, vertical.x, vertical.y) == (1, "0.05 [0.05, 0.05]", "–")
    assert (horizontal.points, horizontal.x, horizontal.y) == (2, "–", "3.5 [3, 4]")


def test_error_bars_are_lines_and_ranges(ax):
    ax.errorbar([1, 2], [3, 4], yerr=[0.5, 1.0], capsize=2)
    assert row(ax, "lines").points == 2 + 4  # and two caps each
    assert row(ax, "ranges").y == "3.25 [2.5, 5]"


@pytest.mark.parametrize("shape", [(4, 4), (4, 4, 3)])
def test_pictures_count_their_pixels(ax, shape):
    pixels = np.zeros(shape)
    pixels[0, 0] = 1
    ax.imshow(pixels)
    found = row(ax, "picture")
    assert (found.points, found.x, found.y) == (pixels.size, "–", "0 [0, 1]")
    dark = figures.summary(ax.figure)
    ax.images[0].set_data(pixels + 0.25)
    assert not dark.equals(figures.summary(ax.figure))


def test_categories_count_as_their_places(ax):
    ax.plot(["a", "b"], [1, 2])
    assert row(ax, "lines").x == "0.5 [0, 1]"


def test_words_count_where_there_is_nothing_else(ax):
    ax.text(0, 1, "a")
    ax.text(1, 2, "b")
    assert (row(ax, "texts").points, row(ax, "texts").y) == (2, "1.5 [1, 2]")
    ax.plot([1], [1])
    assert list(figures.summary(ax.figure)["drawn as"]) == ["lines"]


def test_a_legend_is_no_mark(ax):
    ax.plot([1, 2], [1, 2], label="drawn")
    ax.plot([], [], label="only named")
    ax.legend()
    assert row(ax, "lines").points == 2


def test_empty_panels_say_so_and_hidden_ones_have_no_row():
    figure, (drawn, empty, off, hidden) = plt.subplots(1, 4)
    drawn.plot([1], [1])
    empty.set_xlabel("level")
    off.set_axis_off()
    hidden.set_visible(False)
    found = figures.summary(figure).set_index("panel")
    assert list(found["drawn as"]) == ["lines", "nothing"]
    assert (found.shows[2], found.points[2]) == ("level", 0)
    plt.close(figure)


def test_a_figure_without_panels_is_a_table_without_rows():
    figure = plt.figure()
    assert list(figures.summary(figure).columns) == ["panel", "shows", "drawn as", "points", "x", "y"]
    plt.close(figure)

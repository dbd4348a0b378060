"""Pictures of tracks: what is drawn where, and which regions have one."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from saved_models import tiny_folder  # noqa: F401  (a fixture)
from tolerances import FLOAT64_RELATIVE

import gengram
from gengram.inference.jobs import ModelOptions, run_job
from gengram.inference.jobs import track_picture as pictures
from gengram.inference.jobs.track import finished_tracks, track_job
from gengram.sequences.annotation import Gene
from gengram.sequences.intervals import Interval

for library in ("matplotlib", "pyBigWig", "pysam"):
    pytest.importorskip(library)

FASTA, GTF = gengram.DEMO_DATA / "region.fa.gz", gengram.DEMO_DATA / "region.gtf.gz"
NAME = "chr21_25.7M"


@pytest.fixture(scope="module")
def job(tiny_folder):  # noqa: F811
    return track_job(FASTA, ModelOptions(str(tiny_folder), device="cpu"), [f"{NAME}:34,801-34,900", f"{NAME}:1-500"])


@pytest.fixture(scope="module")
def folder(job, tmp_path_factory):
    return run_job(job, tmp_path_factory.mktemp("tracks") / "out").output


@pytest.fixture
def figure(monkeypatch, folder, tmp_path):
    """Draws a region and returns the figure, which was written too."""

    def draw(start, end, genes=()):
        region, found = Interval(NAME, start, end), []
        monkeypatch.setattr(pictures, "write_figure", lambda path, figure: found.append(figure) or write(path, figure))
        pictures.draw_tracks(folder, FASTA, region, tmp_path / "picture.svg", genes)
        return found[0]

    write = pictures.write_figure
    return draw


def texts(axis):
    return [text.get_text() for text in axis.texts]


def test_letters_and_genes_are_drawn_where_there_is_room(figure):
    genes = pictures.read_genes_of(GTF, Interval(NAME, 34_800, 34_900))
    drawn = figure(34_800, 34_900, genes)
    labels = [axis.get_ylabel().split("\n")[0] for axis in drawn.axes]
    assert labels == ["genes", "", "surprisal", "entropy", "gate", "gate", "residual", "residual"]
    assert {"← ATP5J", "GABPA →"} <= set(texts(drawn.axes[0]))
    rows = "".join(texts(drawn.axes[1]))
    forward, reverse = rows[:100], rows[100:]
    assert forward.startswith("CCAGAACTGG") and reverse.startswith("GGTCTTGACC")
    assert drawn.axes[0].get_title().startswith(f"{NAME}:34,801-34,900 by tiny-model")
    assert [axis.get_ylabel().split("\n")[0] for axis in figure(0, 500).axes] == labels[2:]
    assert "means of" not in drawn.axes[0].get_title()


def test_values_are_above_the_line_and_below_it(figure, folder):
    from gengram.inference.jobs.track_files import read_track

    axis = figure(34_800, 34_900).axes[1]
    upwards, downwards = ([patch for patch in axis.patches if sign * patch.get_data()[0][5] > 0] for sign in (1, -1))
    for (patch,), strand, sign in ((upwards, "forward", 1), (downwards, "reverse", -1)):
        values = read_track(folder / f"surprisal.{strand}.bw", NAME, 34_800, 34_900)
        np.testing.assert_array_equal(sign * patch.get_data()[0], values)
        assert patch.get_data()[1][0] == 34_800.5  # the first base is at 34,801, counted from 1
    low, high = axis.get_ylim()
    assert low == -high < 0


def test_a_region_without_values_can_be_drawn(figure):
    assert len(figure(20_000, 30_000).axes) == 6


def test_the_same_picture_is_the_same_file(figure, tmp_path):
    figure(0, 500)
    first = (tmp_path / "picture.svg").read_bytes()
    figure(0, 500)
    assert first == (tmp_path / "picture.svg").read_bytes() and first.startswith(b"<?xml")


@given(st.lists(st.tuples(st.integers(0, 900), st.integers(1, 300)), max_size=12))
def test_genes_of_a_row_do_not_touch(places):
    region = Interval("r", 100, 1000)
    genes = [Gene("r", str(number), "+", start, start + size, (), ()) for number, (start, size) in enumerate(places)]
    rows = pictures.pack_genes(genes, region)
    assert sorted(gene.name for gene in rows) == sorted(gene.name for gene in genes)
    for one in genes:
        for other in genes:
            if one is not other and rows[one] == rows[other]:
                assert max(one.end, 100) < max(other.start, 100) or max(other.end, 100) < max(one.start, 100)


@given(st.lists(st.one_of(st.floats(0, 10, width=32), st.just(math.nan)), min_size=1, max_size=40), st.integers(1, 9))
def test_steps_are_means_of_what_is_known(values, width):
    found = pictures.means_of_bins(np.array(values, dtype=np.float32), width)
    parts = [[x for x in values[i : i + width] if not math.isnan(x)] for i in range(0, len(values), width)]
    expected = [sum(part) / len(part) if part else math.nan for part in parts]
    np.testing.assert_allclose(found, expected, rtol=FLOAT64_RELATIVE)


def test_each_region_has_a_picture_of_its_own(job, tmp_path):
    places = pictures.plan_pictures(job, tmp_path / "x.png")
    assert {path.name: str(region) for path, region in places.items()} == {
        f"x.{NAME}_1-500.png": f"{NAME}:1-500",
        f"x.{NAME}_34801-34900.png": f"{NAME}:34801-34900",
    }
    one = track_job(FASTA, job.model, [NAME])
    assert list(pictures.plan_pictures(one, tmp_path / "x.svg")) == [tmp_path / "x.svg"]
    (tmp_path / "x.svg").touch()
    with pytest.raises(FileExistsError, match=r"x.svg exists already"):
        pictures.plan_pictures(one, tmp_path / "x.svg")
    with pytest.raises(ValueError, match=r"--image: expected a name that ends in .svg or .png, got 'x.pdf'"):
        pictures.plan_pictures(one, tmp_path / "x.pdf")
    with pytest.raises(ValueError, match="expected at most 50 regions"):
        regions = [f"{NAME}:{start}-{start + 5}" for start in range(1, 1000, 10)]
        pictures.plan_pictures(track_job(FASTA, job.model, regions), tmp_path / "y.svg")


def test_regions_whose_names_become_alike_keep_their_pictures(tmp_path):
    records = ("a b", "a.b", "a:b", "a_b", "a|b")
    regions = [Interval(record, 0, 5) for record in records]
    places = pictures.pictures_of(regions, tmp_path / "x.svg")
    assert list(places.values()) == regions
    names = ["x.a_b_1-5.svg", "x.a.b_1-5.svg", *(f"x.a_b_1-5.{number}.svg" for number in (2, 3, 4))]
    assert [path.name for path in places] == names


def test_finished_tracks_are_known_by_their_record(job, folder, tmp_path):
    summary = finished_tracks(job, folder)
    assert summary.items == 600 and summary.computed == 0 and summary.is_written
    assert finished_tracks(track_job(FASTA, job.model, [NAME]), folder) is None
    assert finished_tracks(job, tmp_path) is None
    (tmp_path / "record.json").write_text("[]")
    assert finished_tracks(job, tmp_path) is None

"""The report of `gengram explain` as a reader sees it: in a browser, from a file, without network."""

import pytest
from browsers import DESKTOP, PHONE, chromium, visit  # noqa: F401  (a fixture)
from saved_models import tiny_folder  # noqa: F401  (a fixture)
from tiny_models import tiny_model

import gengram
from gengram import GengramForCausalLM, GengramTokenizer
from gengram.cli import main

for library in ("matplotlib", "pysam"):
    pytest.importorskip(library)

REGIONS = ["chr21_25.7M:35,061-35,080", "chr21_25.7M:35,101-35,120"]


@pytest.fixture(scope="module")
def report(chromium, tiny_folder, tmp_path_factory):  # noqa: F811
    """A report of two regions, with all parts that need no further library."""
    folder = tmp_path_factory.mktemp("explain") / "out"
    fasta, gtf = (str(gengram.DEMO_DATA / f"region.{kind}.gz") for kind in ("fa", "gtf"))
    words = [*REGIONS, "--fasta", fasta, "--gtf", gtf, "--model", str(tiny_folder), "--knock-out", "GTA"]
    assert main(["explain", *words, "--output", str(folder), "--device", "cpu", "--quiet"]) == 0
    return folder / "report.html"


@pytest.mark.slow
@pytest.mark.parametrize("width", [PHONE, DESKTOP])
def test_a_report_opens_offline_and_fits_the_screen(chromium, report, width):  # noqa: F811
    with visit(chromium, report.as_uri(), width, offline=True) as found:
        assert found.requests == [report.as_uri()]
        found.check_width()
        assert found.check_pictures() == len(list((report.parent / "pictures").iterdir()))
        assert found.check_text("td, th") > 100 and found.check_text("p, figcaption, h1, h2, h3, a") > 10
        for number, link in enumerate(found.page.query_selector_all("nav a"), 1):
            link.click()
            assert found.page.evaluate("scrollY") > 0
            heading = found.page.query_selector(f"#region{number} h2" if number <= len(REGIONS) else "#kmers h2")
            assert heading.bounding_box()["y"] < 844
        assert found.faults == []


@pytest.mark.slow
def test_what_is_wider_than_a_phone_can_be_scrolled_and_says_so(chromium, report):  # noqa: F811
    with visit(chromium, report.as_uri(), PHONE, offline=True) as found:
        wide = found.page.query_selector(".wide:has(img)")
        assert wide.evaluate("each => each.scrollWidth > each.clientWidth")
        wide.focus()  # by keyboard, too
        found.page.keyboard.press("ArrowRight")
        found.page.wait_for_function("each => each.scrollLeft > 0", arg=wide)
        assert found.page.is_visible(".hint")
    with visit(chromium, report.as_uri(), DESKTOP, offline=True) as found:
        assert not found.page.is_visible(".hint")


@pytest.mark.slow
@pytest.mark.parametrize("width", [PHONE, DESKTOP])
def test_the_page_of_a_whole_model(chromium, tiny_folder, tmp_path, width):  # noqa: F811
    pytest.importorskip("sklearn")
    tiny_model(GengramForCausalLM, seed=3, memory_layers=[]).save_pretrained(tmp_path / "twin")
    GengramTokenizer(model_max_length=48).save_pretrained(tmp_path / "twin")
    words = [str(gengram.DEMO_DATA / "region.fa.gz"), "--model", str(tiny_folder), "--twin", str(tmp_path / "twin")]
    words += ["--output", str(tmp_path / "out"), "--device", "cpu", "--quiet"]
    assert main(["explain", "--model-only", *words]) == 0
    page = tmp_path / "out" / "report.html"
    with visit(chromium, page.as_uri(), width, offline=True) as found:
        assert found.requests == [page.as_uri()]
        found.check_width()
        assert found.check_pictures() == len(list((tmp_path / "out" / "pictures").iterdir())) == 2
        assert found.check_text("td, th") > 100 and found.check_text("p, figcaption, h1, h2, h3, a") > 10
        assert found.faults == []

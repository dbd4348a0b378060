"""The page of `gengram serve` in a browser: a sequence is typed, a button is pressed, and the answer is read."""

import os
import re
import subprocess
import sys
import urllib.request

import pytest
from browsers import DESKTOP, PHONE, chromium, visit  # noqa: F401  (a fixture)
from source_tree import ROOT

for library in ("fastapi", "prometheus_client", "uvicorn"):
    pytest.importorskip(library)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def address(chromium, tiny_folder):  # noqa: F811
    """Where a server answers."""
    options = ["--name", "tiny", "--most-bases", "200", "--port", "0", "--quiet", "--device", "cpu"]
    process = subprocess.Popen(
        [sys.executable, "-m", "gengram", "serve", str(tiny_folder), *options],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        address = re.search(r"at (http://127\.0\.0\.1:\d+)", process.stdout.readline())[1]
        assert urllib.request.urlopen(f"{address}/health", timeout=120).status == 200  # its socket waits for it
        yield address
    finally:
        process.terminate()
        process.wait(60)
        process.stdout.close()


def answered(form, **typed) -> tuple[str, bool]:
    """What a form says when its fields are filled and its button is pressed, and whether it is an error."""
    for name, text in typed.items():
        form.query_selector(f'[name="{name}"]').fill(text)
    form.query_selector("button").click()
    form.wait_for_selector("button:not([disabled])")
    output = form.query_selector("output")
    assert output.is_visible()
    return output.inner_text(), output.get_attribute("class") == "error"


@pytest.mark.parametrize("width", [PHONE, DESKTOP])
def test_a_reader_asks_and_reads_answers_and_errors(chromium, address, width):  # noqa: F811
    with visit(chromium, address, width) as found:
        assert found.page.inner_text("#model") == "tiny"
        forms = {form.get_attribute("data-path"): form for form in found.page.query_selector_all("form")}
        completions, score, embeddings = (forms[f"v1/{name}"] for name in ("completions", "score", "embeddings"))
        text, is_error = answered(completions, prompt="ACGT\nacgt", max_tokens="150", temperature="0.75")
        assert not is_error and re.fullmatch("[ACGT]{150}", text)
        text, is_error = answered(score, reference="ACGTTGCA", alternative="ACGATGCA")
        assert not is_error and re.match(r"llr -?[0-9.]+ nats: the alternative is (less|more) likely\nforward ", text)
        assert "as likely" in answered(score, reference="ACGT", alternative="ACGT")[0]
        text, is_error = answered(embeddings, input="ACGTTGCA")
        assert not is_error and text.startswith("32 numbers: ")
        found.check_width()
        assert found.check_text("label, button, output, h1, h2, p, a") > 10
        assert found.faults == []

        text, is_error = answered(completions, prompt="MKVL")
        assert is_error and "expected DNA" in text and "'L'" in text
        text, is_error = answered(embeddings, input="A" * 201)
        assert is_error and "at most 200 bases, got 201" in text
        text, is_error = answered(score, reference="ACG", alternative="AC")
        assert is_error and "got 3 and 2" in text
        found.check_width()
        found.check_text("output")
        assert found.origins() == {address}
        found.page.route("**/v1/*", lambda route: route.abort())  # as if the server had ended
        text, is_error = answered(embeddings, input="ACGT")
        assert is_error and "does not answer" in text

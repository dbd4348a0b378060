"""`gengram serve`: every answer is that of a direct call, whoever asks beside; what exceeds a limit is said so."""

import asyncio
import base64
import gc
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from saved_models import tiny_folder  # noqa: F401  (a fixture)
from source_tree import ROOT
from tiny_models import tiny_model
from tolerances import LOG_LIKELIHOOD_FP32, SAME_HIDDEN_STATES_FP32

from gengram import GengramForMaskedLM, GengramTokenizer
from gengram.cli import main
from gengram.inference.effects import Change
from gengram.inference.embeddings import SequenceEncoder
from gengram.inference.generation import BaseGenerator, Sampling, random_draws
from gengram.inference.loaded_model import load_model
from gengram.inference.window_effects import WindowEffects

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")
httpx = pytest.importorskip("httpx")

from fastapi.testclient import TestClient  # noqa: E402

from gengram.commands.serve import listening_socket  # noqa: E402
from gengram.inference.serving import batching, server  # noqa: E402
from gengram.inference.serving.served_model import ServedModel  # noqa: E402
from gengram.inference.serving.server import Limits, serving_app  # noqa: E402

LIMITS = Limits(bases=200, sequences=8, waiting=500, body=20_000)


@pytest.fixture(scope="module")
def loaded(tiny_folder):  # noqa: F811
    return load_model(str(tiny_folder), "causal", device="cpu")


@pytest.fixture(scope="module")
def client(loaded):
    with TestClient(serving_app(ServedModel(loaded, 4096), "tiny", LIMITS), base_url="http://localhost") as client:
        yield client


def some_bases(generator, length):
    return "".join(generator.choice("ACGT") for _ in range(length))


def test_completions_are_those_of_a_direct_call(client, loaded):
    body = {"prompt": ["ACGTTGCA", "ttgacN"], "max_tokens": 12, "n": 2, "seed": 5, "temperature": 0.8, "top_p": 0.9}
    answer = client.post("/v1/completions", json=body)
    assert answer.status_code == 200
    found = answer.json()
    generator = BaseGenerator(loaded.model, loaded.tokenizer, Sampling(0.8, top_p=0.9))
    expected = [
        generator.continued([prompt], random_draws(5, prompt, sample, 12)[None])[0]
        for prompt in body["prompt"]
        for sample in (1, 2)
    ]
    assert [choice["text"] for choice in found["choices"]] == expected
    assert found["usage"] == {"prompt_tokens": 14, "completion_tokens": 48, "total_tokens": 62}
    echoed = client.post("/v1/completions", json={**body, "echo": True}).json()
    assert [choice["text"] for choice in echoed["choices"]][::2] == [
        prompt + new for prompt, new in zip(body["prompt"], expected[::2], strict=True)
    ]


def test_options_that_are_null_are_not_given(client):
    names = ["max_tokens", "temperature", "top_p", "top_k", "n", "echo", "stream", "user", "model"]
    names += ["best_of", "frequency_penalty", "logit_bias", "logprobs", "presence_penalty", "stop", "stream_options"]
    plain = client.post("/v1/completions", json={"prompt": "ACGT", "seed": 1}).json()["choices"]
    body = {"prompt": "ACGT", "seed": 1, "suffix": None, **dict.fromkeys(names)}
    assert client.post("/v1/completions", json=body).json()["choices"] == plain
    nulls = dict.fromkeys(("encoding_format", "layer", "pooling", "strands", "dimensions", "user", "model"))
    plain = client.post("/v1/embeddings", json={"input": "ACGT"}).json()["data"]
    assert client.post("/v1/embeddings", json={"input": "ACGT", **nulls}).json()["data"] == plain


def test_a_model_is_found_by_its_name(loaded):
    with TestClient(serving_app(ServedModel(loaded, 4096), "org/tiny"), base_url="http://localhost") as client:
        (listed,) = client.get("/v1/models").json()["data"]
        assert client.get("/v1/models/org/tiny").json() == client.get("/v1/models/org%2Ftiny").json() == listed
        other = client.get("/v1/models/gpt")
    assert other.status_code == 404 and "expected the model 'org/tiny'" in other.json()["error"]["message"]


def test_a_seed_that_was_drawn_is_said_and_gives_the_same_again(client):
    body = {"prompt": "ACGT", "max_tokens": 40}
    first = client.post("/v1/completions", json=body).json()
    again = client.post("/v1/completions", json={**body, "seed": first["seed"]}).json()
    other = client.post("/v1/completions", json=body).json()
    assert again["choices"] == first["choices"] != other["choices"]


@pytest.mark.parametrize("pooling, strands", [("mean", "both"), ("last", "forward"), ("centre", "reverse")])
def test_embeddings_are_those_of_a_direct_call(client, tiny_folder, pooling, strands):  # noqa: F811
    sequences = ["ACGTTGCA", "ttgacN" * 20]
    body = {"input": sequences, "pooling": pooling, "strands": strands, "layer": 1}
    found = client.post("/v1/embeddings", json=body).json()["data"]
    expected = SequenceEncoder(str(tiny_folder), device="cpu").vectors(sequences, 1, pooling, strands)
    for each, vector in zip(found, expected, strict=True):
        np.testing.assert_allclose(each["embedding"], vector, atol=SAME_HIDDEN_STATES_FP32)
    body["encoding_format"] = "base64"  # which OpenAI's own client asks for
    again = client.post("/v1/embeddings", json=body).json()["data"]
    raw = [np.frombuffer(base64.b64decode(each["embedding"]), dtype="<f4") for each in again]
    np.testing.assert_allclose(raw, expected, atol=SAME_HIDDEN_STATES_FP32)


def test_scores_are_those_of_a_direct_call(client, loaded):
    windows = [("ACGTTGCAGG", "ACGTTACAGG"), ("acgttgcagg", "acgtttgcag"), ("ACGT", "ACGT")]
    body = {"variants": [{"reference": one, "alternative": other} for one, other in windows]}
    found = client.post("/v1/score", json=body).json()["data"]
    effects = list(
        WindowEffects(loaded.model, loaded.tokenizer).of(
            [Change(one.upper(), other.upper(), 0) for one, other in windows]
        )
    )
    for each, effect in zip(found, effects, strict=True):
        assert each["llr"] == pytest.approx(effect.mean("llr"), abs=LOG_LIKELIHOOD_FP32)
        assert each["llr_reverse"] == pytest.approx(effect.reverse.llr, abs=LOG_LIKELIHOOD_FP32)
    assert found[2]["llr"] == 0
    forward = client.post("/v1/score", json={**body, "strands": "forward"}).json()["data"][0]
    assert forward["llr_reverse"] is None and forward["llr"] == forward["llr_forward"]


def test_no_answer_is_mixed_up_with_another(client, loaded):
    generator = random.Random(4)
    asked = [
        (number, some_bases(generator, generator.randint(1, 90)), generator.randint(1, 30)) for number in range(24)
    ]
    alone = BaseGenerator(loaded.model, loaded.tokenizer, Sampling())

    def ask(number, prompt, new):
        kind = number % 3
        if kind == 0:
            body = {"prompt": prompt, "max_tokens": new, "seed": number}
            return client.post("/v1/completions", json=body).json()["choices"][0]["text"]
        if kind == 1:
            return client.post("/v1/embeddings", json={"input": prompt}).json()["data"][0]["embedding"]
        windows = {"reference": (prompt + "A")[:40] + "C", "alternative": (prompt + "A")[:40] + "G"}
        return client.post("/v1/score", json={"variants": [windows]}).json()["data"][0]["llr"]

    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda each: ask(*each), asked))
    encoder = SequenceEncoder(loaded.__class__(loaded.model.base_model, loaded.tokenizer))
    effects = WindowEffects(loaded.model, loaded.tokenizer)
    for (number, prompt, new), answer in zip(asked, found, strict=True):
        if number % 3 == 0:
            assert answer == alone.continued([prompt], random_draws(number, prompt, 1, new)[None])[0]
        elif number % 3 == 1:
            np.testing.assert_allclose(answer, encoder.vectors([prompt])[0], atol=SAME_HIDDEN_STATES_FP32)
        else:
            start = (prompt + "A")[:40]
            (effect,) = effects.of([Change(f"{start}C", f"{start}G", len(start))])
            assert answer == pytest.approx(effect.mean("llr"), abs=LOG_LIKELIHOOD_FP32)


@pytest.mark.parametrize(
    "path, body, status, said",
    [
        ("completions", {"prompt": "ACGT", "max_tokens": 197}, 400, "at most 200 bases, new ones included, got 201"),
        ("completions", {"prompt": ["A"] * 5, "n": 2}, 400, "at most 8 sequences in a request, got 10"),
        ("completions", {"prompt": "MKVL"}, 400, "prompt: expected DNA .* got 'L'"),
        ("completions", {"prompt": "A", "max_tokens": 0}, 400, "max_tokens: .*greater than or equal to 1"),
        ("completions", {"prompt": "A", "logprobs": 2}, 400, "logprobs: this server has no such option"),
        ("completions", {"prompt": "A", "stream": True}, 400, "stream"),
        ("completions", {"prompt": "A", "pooling": None}, 400, "pooling: this server has no such option"),
        ("completions", {"prompt": []}, 400, "prompt"),
        ("completions", [], 400, "dictionary"),
        ("embeddings", {"input": ["ACGT", ""]}, 400, "expected bases, got an empty sequence"),
        ("embeddings", {"input": "AC-GT"}, 400, "got '-' at base 3; remove the gaps"),
        ("embeddings", {"input": "ACGT", "layer": 99}, 400, "layer"),
        ("embeddings", {"input": "ACGT", "dimensions": 2}, 400, "dimensions: this server has no such option"),
        ("embeddings", {"input": None}, 400, "input: Field required"),
        ("embeddings", {"input": "A" * 201}, 400, "at most 200 bases, got 201"),
        ("score", {"variants": []}, 400, "variants"),
        ("score", {"variants": [{"reference": "ACG", "alternative": "AC"}]}, 400, "one length.* got 3 and 2"),
        ("score", {"variants": [{"reference": "A" * 60, "alternative": "C" * 60}]}, 400, "at most 48 bases.* got 60"),
        ("score", {"variants": [{"reference": "A", "alternative": "<DEL>"}]}, 400, "alternative: expected DNA"),
        ("none", {}, 404, "Not Found"),
        ("embeddings", {"input": ["ACGT" * 20] * 300}, 413, "at most 20,000 bytes"),
    ],
)
def test_what_cannot_be_answered_is_said_so(client, path, body, status, said):
    answer = client.post(f"/v1/{path}", json=body)
    assert answer.status_code == status
    assert re.search(said, answer.json()["error"]["message"])


def test_a_body_without_a_length_is_limited_too(client):
    answer = client.post("/v1/embeddings", content=(b" " * 1000 for _ in range(30)))
    assert answer.status_code == 413


def test_a_body_that_is_no_json_is_refused(client):
    answer = client.post("/v1/embeddings", content=b"{", headers={"content-type": "application/json"})
    assert answer.status_code == 400 and "JSON" in answer.json()["error"]["message"]


def test_more_than_can_wait_is_refused_and_the_rest_answered(loaded):
    served = ServedModel(loaded, 4096)
    begun, go_on = threading.Event(), threading.Event()
    compute = served.compute

    def slow(key, payloads, is_wanted):
        begun.set()
        assert go_on.wait(30)
        return compute(key, payloads, is_wanted)

    served.compute = slow
    app = serving_app(served, "tiny", Limits(waiting=2))
    with TestClient(app, base_url="http://localhost") as client, ThreadPoolExecutor(2) as pool:
        first = pool.submit(client.post, "/v1/embeddings", json={"input": "ACGT"})
        assert begun.wait(30)
        second = pool.submit(client.post, "/v1/embeddings", json={"input": ["ACGT", "G"]})
        while client.get("/health").json()["waiting"] < 2:
            time.sleep(0.01)
        answer = client.post("/v1/embeddings", json={"input": "A"})
        assert answer.status_code == 429 and answer.headers["retry-after"] == "1"
        assert "at most 2 can" in answer.json()["error"]["message"]
        answer = client.post("/v1/embeddings", json={"input": ["A", "C", "G"]})  # which no waiting would help
        assert answer.status_code == 400 and "at most 2 sequences" in answer.json()["error"]["message"]
        go_on.set()
        assert [each.result(30).status_code for each in (first, second)] == [200, 200]


def test_a_fault_is_an_error_in_json_and_raised_for_the_log(loaded):
    served = ServedModel(loaded, 4096)

    def broken(key, payloads, is_wanted):
        raise RuntimeError("a secret of ours")
        yield

    served.compute = broken
    app = serving_app(served, "tiny")
    body = {"prompt": "ACGT"}
    with TestClient(app, base_url="http://localhost", raise_server_exceptions=False) as client:
        answer = client.post("/v1/completions", json=body)
        assert (
            answer.status_code == 500 and answer.json()["error"]["message"] == "the server failed; its log says why."
        )
        assert 'path="/v1/completions",status="500"} 1.0' in client.get("/metrics").text
    with TestClient(serving_app(served, "tiny"), base_url="http://localhost") as client:
        with pytest.raises(RuntimeError, match="a secret of ours"):
            client.post("/v1/completions", json=body)


async def asked_by_hand(app, parts, cancel_at=None):
    """What the application sends to a client that sends these parts; cancelled, if asked so, when that is true."""
    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"", "http_version": "1.1"}
    sent = []

    async def receive():
        if not parts:
            await asyncio.Event().wait()
        return parts.pop(0)

    async def send(message):
        sent.append(message)

    asking = asyncio.create_task(app({**scope, "headers": headers, "scheme": "http"}, receive, send))
    while cancel_at is not None and not cancel_at():
        await asyncio.sleep(0.01)
    if cancel_at is not None:
        asking.cancel("timeout graceful shutdown exceeded")
    await asyncio.wait_for(asking, 60)
    return sent


def test_an_answer_that_is_cut_off_when_the_server_ends_is_said_so(loaded):
    """uvicorn cancels what has not ended when the time to finish is over."""
    served, begun, ended = ServedModel(loaded, 4096), threading.Event(), threading.Event()

    def unending(key, payloads, is_wanted):
        try:
            while is_wanted(0):
                begun.set()
                time.sleep(0.001)  # as a step does, or this thread would keep the locks of others
                yield []
        finally:
            ended.set()

    served.compute = unending
    app = serving_app(served, "tiny")
    parts = [{"type": "http.request", "body": b'{"prompt": "ACGT"}'}]
    start, body = asyncio.run(asked_by_hand(app, parts, begun.is_set))
    assert start["status"] == 503 and "has ended" in json.loads(body["body"])["error"]["message"]
    assert ended.wait(30)
    begun.clear()
    parts = [{"type": "http.request", "body": b'{"pro', "more_body": True}]
    start, _ = asyncio.run(asked_by_hand(app, parts, lambda: not parts))
    assert start["status"] == 503
    with TestClient(app, base_url="http://localhost") as client:  # whose end would not come if works went on
        assert '"/v1/completions",status="503"} 1.0' in client.get("/metrics").text
    assert not begun.is_set()


def test_a_client_that_leaves_while_it_sends_is_no_fault_of_ours(loaded):
    app = serving_app(ServedModel(loaded, 4096), "tiny")
    parts = [{"type": "http.request", "body": b'{"pro', "more_body": True}, {"type": "http.disconnect"}]
    assert asyncio.run(asked_by_hand(app, parts)) == []
    with TestClient(app, base_url="http://localhost") as client:
        assert 'status="499"} 1.0' in client.get("/metrics").text


def test_a_long_completion_keeps_nobody_waiting_and_ends_when_its_client_has_left(loaded, monkeypatch, caplog):
    monkeypatch.setattr(batching, "_TURN", 0.0)
    monkeypatch.setattr(server, "_LOOK_AGAIN", 0.01)
    served = ServedModel(loaded, 4096)
    compute, ended = served.compute, []

    def watched(key, payloads, is_wanted):
        try:
            yield from compute(key, payloads, is_wanted)
        finally:
            ended.append(key[0])

    served.compute = watched
    app = serving_app(served, "tiny")
    body = json.dumps({"prompt": "ACGT", "max_tokens": 16_000}).encode()
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"", "http_version": "1.1"}
    scope |= {"headers": [(b"host", b"localhost"), (b"content-type", b"application/json")], "scheme": "http"}

    async def asked() -> None:
        parts = [{"type": "http.request", "body": body}]
        left = asyncio.Event()

        async def receive():
            if not parts:
                await left.wait()
            return parts.pop() if parts else {"type": "http.disconnect"}

        async def send(message):
            pass

        long = asyncio.create_task(app(scope, receive, send))
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=60) as client:
            while "gengram_batch_sequences_sum 0.0" in (await client.get("/metrics")).text:
                await asyncio.sleep(0.01)
            answer = await client.post("/v1/embeddings", json={"input": "ACGT"})
            assert answer.status_code == 200 and "continue" not in ended
            left.set()
            await asyncio.wait_for(long, 60)
            while "continue" not in ended:
                await asyncio.sleep(0.01)
            counts = (await client.get("/metrics")).text
            assert 'gengram_requests_total{path="/v1/completions",status="499"} 1.0' in counts

    asyncio.run(asyncio.wait_for(asked(), 120))
    gc.collect()
    assert "never retrieved" not in caplog.text


def test_a_masked_model_scores_and_embeds_but_does_not_continue(tmp_path):
    tiny_model(GengramForMaskedLM, max_position_embeddings=48).save_pretrained(tmp_path)
    GengramTokenizer(model_max_length=48).save_pretrained(tmp_path)
    app = serving_app(ServedModel(load_model(str(tmp_path), "masked", device="cpu"), 4096), "masked")
    with TestClient(app, base_url="http://localhost") as client:
        answer = client.post("/v1/completions", json={"prompt": "ACGT"})
        assert answer.status_code == 400 and "cannot continue" in answer.json()["error"]["message"]
        windows = {"reference": "ACGTA", "alternative": "ACCTA"}
        assert np.isfinite(client.post("/v1/score", json={"variants": [windows]}).json()["data"][0]["llr"])
        assert client.post("/v1/embeddings", json={"input": "ACGT"}).status_code == 200


def test_health_models_counts_and_page(client):
    assert client.get("/health").json()["status"] == "ok"
    assert client.get("/v1/models").json()["data"][0]["id"] == "tiny"
    unequal = {"variants": [{"reference": "ACGT", "alternative": "ACG"}]}
    assert client.post("/v1/score", json=unequal).status_code == 400
    counts = client.get("/metrics").text
    assert (
        'gengram_requests_total{path="/v1/score",status="400"}' in counts and "gengram_batch_sequences_sum" in counts
    )
    page = client.get("/").text
    assert "https://" not in page and "http://" not in page  # it works offline, and loads nothing foreign
    for path in re.findall(r'data-path="([^"]+)"', page):
        assert f'"{path}": (form)' in page and f'"{path}": (answer)' in page


def test_a_web_page_of_another_host_cannot_ask(client):
    assert client.get("/health", headers={"host": "evil.example"}).status_code == 400


@pytest.mark.parametrize("address, host", [("127.0.0.2", "127.0.0.2:8000"), ("::1", "[::1]:8000")])
def test_a_server_may_be_called_by_its_address(loaded, address, host):
    app = serving_app(ServedModel(loaded, 4096), "tiny", hosts=server.names_of(address))
    with TestClient(app, base_url="http://localhost") as client:
        assert client.get("/health", headers={"host": host}).status_code == 200
        assert client.get("/health", headers={"host": "127.0.0.3"}).status_code == 400
    assert server.names_of("192.168.0.1") is server.names_of("0.0.0.0") is None


def test_answers_on_their_way_are_finished_when_the_server_is_asked_to_end(tiny_folder):  # noqa: F811
    process = subprocess.Popen(
        [sys.executable, "-m", "gengram", "serve", str(tiny_folder), "--port", "0", "--quiet", "--device", "cpu"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    address = re.search(r"at (http://127\.0\.0\.1:\d+)", process.stdout.readline())[1]
    with httpx.Client(base_url=address, timeout=60) as client, ThreadPoolExecutor(1) as pool:
        for _ in range(600):
            try:
                assert client.get("/health").status_code == 200
                break
            except httpx.TransportError:
                time.sleep(0.1)
        asked = pool.submit(client.post, "/v1/completions", json={"prompt": "ACGT", "max_tokens": 150})
        while client.get("/metrics").text.count("gengram_batch_sequences_sum 0.0"):
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert len(asked.result(60).json()["choices"][0]["text"]) == 150
    assert process.wait(60) in (0, -signal.SIGTERM)


@pytest.mark.parametrize("dtype, is_said", [("float32", False), ("bfloat16", True)])
def test_a_dtype_in_which_a_seed_does_not_fix_the_bases_is_said(dtype, is_said, tiny_folder, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr("uvicorn.Server.run", lambda self, sockets: None)
    assert main(["serve", str(tiny_folder), "--port", "0", "--device", "cpu", "--dtype", dtype]) == 0
    assert (f"in {dtype} a seed may give other bases" in capsys.readouterr().out) == is_said


def test_no_packet_of_an_answer_waits_for_another():
    with (
        listening_socket("127.0.0.1", 0) as listening,
        socket.create_connection(listening.getsockname()),
        listening.accept()[0] as accepted,
    ):
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@pytest.mark.parametrize("port", ["-1", "65536"])
def test_a_port_that_there_is_not_is_an_error_in_one_line(tiny_folder, port, capsys):  # noqa: F811
    assert main(["serve", str(tiny_folder), "--port", port]) == 1
    assert capsys.readouterr().err == f"error: port: expected 0 to 65535, got {port}.\n"


def test_an_address_that_is_taken_is_an_error_in_one_line(tiny_folder, capsys):  # noqa: F811
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["serve", str(tiny_folder), "--port", str(taken.getsockname()[1])]) == 1
    assert "Traceback" not in (said := capsys.readouterr().err) and "in use" in said

"""`gengram serve` under load: 64 clients at once beside one after the other, every answer compared with a direct call.

    python benchmarks/serving.py [--clients 64] [--seconds 120] [--device cuda] [--checked 300]

A server with gengram-mini is started on the loopback address. Each client asks one request after the other: one of
three completes (16 to 48 new bases), one embeds, one scores a variant; sequences have 20 to 400 random bases. Then one
client asks requests of the same kind, one at a time, for half of the time. The same is done with each kind by itself,
for a quarter of the time, and one client scores beside a completion that does not end. All answers, or
so many of them by chance, are compared with calls of the model in this process; all take half an hour. Writes
`benchmarks/results/serving.json`.
"""

import argparse
import asyncio
import json
import os
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from gengram import DEFAULT_MODEL
from gengram.inference.effects import Change
from gengram.inference.embeddings import SequenceEncoder
from gengram.inference.generation import BaseGenerator, Sampling, random_draws
from gengram.inference.loaded_model import LoadedModel, load_model
from gengram.inference.memory_use import fast_memory
from gengram.inference.window_effects import WindowEffects
from gengram.support.machine import describe_machine
from gengram.support.whole_output import write_whole

RESULTS = Path(__file__).parent / "results" / "serving.json"
SHORTEST, LONGEST = 20, 400
NEW_BASES = (16, 48)
LONG_COMPLETION = 16_000
ALLOWED = 1e-4  # by which a number may differ from a direct call's

Request = tuple[str, dict[str, Any]]
Asked = tuple[Request, int, dict[str, Any], float]  # with the status, the answer, and the seconds it took


KINDS = ("completions", "embeddings", "score")


def requests_of(client: int, kinds: Sequence[str]) -> Any:
    """The requests of a client, without end."""
    generator = random.Random(client)
    while True:
        bases = "".join(generator.choices("ACGT", k=generator.randint(SHORTEST, LONGEST)))
        kind = generator.choice(kinds)
        if kind == "completions":
            new = generator.randint(*NEW_BASES)
            yield "completions", {"prompt": bases, "max_tokens": new, "seed": generator.randrange(2**32)}
        elif kind == "embeddings":
            yield "embeddings", {"input": bases}
        else:
            place = len(bases) // 2
            other = generator.choice([base for base in "ACGT" if base != bases[place]])
            windows = {"reference": bases, "alternative": bases[:place] + other + bases[place + 1 :]}
            yield "score", {"variants": [windows]}


async def ask(address: str, clients: range, seconds: float, kinds: Sequence[str] = KINDS) -> tuple[list[Asked], float]:
    """What these clients asked in so many seconds, and how long it took until the last answer."""
    done: list[Asked] = []
    start = time.perf_counter()

    async def one(client: httpx.AsyncClient, number: int) -> None:
        for path, body in requests_of(number, kinds):
            began = time.perf_counter()
            if began - start > seconds:
                return
            answer = await client.post(f"/v1/{path}", json=body)
            done.append(((path, body), answer.status_code, answer.json(), time.perf_counter() - began))

    limits = httpx.Limits(max_connections=len(clients))
    async with httpx.AsyncClient(base_url=address, timeout=300, limits=limits) as client:
        await asyncio.gather(*(one(client, number) for number in clients))
    return done, time.perf_counter() - start


async def ask_beside_a_long_completion(address: str, seconds: float) -> tuple[list[Asked], float]:
    """One client's scores while a completion is made that nobody waits for the end of."""
    async with httpx.AsyncClient(base_url=address, timeout=300) as client:
        body = {"prompt": "ACGT", "max_tokens": LONG_COMPLETION}
        long = asyncio.create_task(client.post("/v1/completions", json=body))
        await asyncio.sleep(1)
        done = await ask(address, range(1, 2), seconds, ["score"])
        assert not long.done(), "the long completion ended; let it be longer"
        long.cancel()
    return done


def wrong_answers(done: list[Asked], loaded: LoadedModel) -> int:
    """How many answers differ from those of direct calls."""
    generator = BaseGenerator(loaded.model, loaded.tokenizer, Sampling())
    encoder = SequenceEncoder(LoadedModel(loaded.model.base_model, loaded.tokenizer))
    effects = WindowEffects(loaded.model, loaded.tokenizer)
    wrong = 0
    for (path, body), status, answer, _ in done:
        if status != 200:
            wrong += 1
        elif path == "completions":
            draws = random_draws(body["seed"], body["prompt"], 1, body["max_tokens"])
            wrong += answer["choices"][0]["text"] != generator.continued([body["prompt"]], draws[None])[0]
        elif path == "embeddings":
            wrong += not np.allclose(
                answer["data"][0]["embedding"], encoder.vectors([body["input"]])[0], rtol=0, atol=ALLOWED
            )
        else:
            windows = body["variants"][0]
            change = Change(windows["reference"], windows["alternative"], len(windows["reference"]) // 2)
            (found,) = effects.of([change])
            assert found is not None
            wrong += abs(answer["data"][0]["llr"] - found.mean("llr")) > ALLOWED
    return wrong


def summary(done: list[Asked], seconds: float) -> dict[str, Any]:
    """Rates and times of answers."""
    times = sorted(took for *_, took in done)
    return {
        "requests": len(done),
        "not_200": sum(status != 200 for _, status, *_ in done),
        "requests_per_second": round(len(done) / seconds, 2),
        "median_seconds": round(statistics.median(times), 3),
        "slowest_of_20_seconds": round(times[int(0.95 * (len(times) - 1))], 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--device")
    parser.add_argument("--checked", type=int, help="answers to compare with direct calls; all unless given")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    result: dict[str, Any] = {
        "what": __doc__.partition("\n")[0] if __doc__ else "",
        "machine": describe_machine() | {"device": arguments.device or "cpu"},
        "clients": arguments.clients,
    }
    phases = [("mixed", KINDS, arguments.seconds), *((kind, [kind], arguments.seconds / 4) for kind in KINDS)]
    done: list[Asked] = []
    command = [sys.executable, "-m", "gengram", "serve", "--port", "0", "--quiet"]
    command += ["--device", arguments.device] if arguments.device else []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ}) as server:
        try:
            assert server.stdout is not None
            found = re.search(r"http://\S+", server.stdout.readline())
            assert found, "the server did not start"
            asyncio.run(ask(found[0], range(1), 5))  # warms up
            for name, kinds, seconds in phases:
                together = asyncio.run(ask(found[0], range(arguments.clients), seconds, kinds))
                if name == "mixed":
                    counts = httpx.get(f"{found[0]}/metrics").text
                first = arguments.clients
                alone = asyncio.run(ask(found[0], range(first, first + 1), seconds / 2, kinds))
                done += together[0] + alone[0]
                result[name] = {"together": summary(*together), "one_by_one": summary(*alone)}
                rates = [entry["requests_per_second"] for entry in result[name].values()]
                result[name]["times_as_many_requests"] = round(rates[0] / rates[1], 2)
            beside = asyncio.run(ask_beside_a_long_completion(found[0], arguments.seconds / 8))
            result["score beside a long completion"] = summary(*beside)
            done += beside[0]
        finally:
            server.terminate()
    batches = {
        name: float(re.search(rf"gengram_batch_sequences_{name} (\S+)", counts)[1])  # type: ignore[index]
        for name in ("sum", "count")
    }
    result["sequences_per_batch"] = round(batches["sum"] / batches["count"], 2)
    result["answers"] = len(done)
    if arguments.checked:
        done = random.Random(0).sample(done, min(arguments.checked, len(done)))
    result["answers_checked"] = len(done)
    loaded = load_model(DEFAULT_MODEL, "causal", device=arguments.device)
    with fast_memory(loaded.model):
        result["wrong_answers"] = wrong_answers(done, loaded)
    write_whole(arguments.output, json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()

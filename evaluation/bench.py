"""Runs a suite on models and baselines, and reports."""

import fnmatch
import hashlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..support.machine import describe_machine
from ..support.whole_output import write_whole
from .protocols import FINE_TUNING, RUNNERS, EvaluatedModel, needs_model
from .report import write_report
from .suite import Suite, Task


def bench(
    suite: Suite,
    models: Sequence[EvaluatedModel],
    data: Path,
    output: Path,
    tasks: str = "*",
    protocols: Sequence[str] | None = None,
    seeds: Sequence[int] = (0,),
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Run what is missing of a suite, and write the report of all that is there.

    Every run leaves a file below `output/runs`, so that an interrupted evaluation goes on where it was.

    Args:
        suite: what to do.
        models: what to evaluate; baselines run once, beside them.
        data: folder that the suite's paths are relative to.
        output: folder of the results.
        tasks: shell pattern of the tasks' names.
        protocols: instead of those that the tasks name.
        seeds: of classifiers, held-out rows and new heads.
        progress: show bars, and a line per run.

    Raises:
        ValueError: if a task does not know a protocol, no task matches, or data are not as the suite says.
    """
    chosen = [task for task in suite.tasks if fnmatch.fnmatchcase(task.name, tasks)]
    if not chosen:
        raise ValueError(f"no task matches {tasks!r}; the suite has {', '.join(task.name for task in suite.tasks)}.")
    plan = [run for task in chosen for run in _runs(task, models, protocols or task.protocols, seeds)]
    if not plan:
        raise ValueError("nothing to run: every protocol needs a model, and none was given.")
    results = []
    for number, (task, protocol, model, seed) in enumerate(plan, start=1):
        name = model.name if model is not None else protocol
        path = output / "runs" / f"{_key(task, protocol, model, seed)}.json"
        if path.exists():
            results.append(json.loads(path.read_text()))
            continue
        if progress:
            print(f"{number} of {len(plan)}: {task.name}, {name}, {protocol}, seed {seed}", file=sys.stderr)
        start = time.perf_counter()
        found = RUNNERS[type(task)][1](protocol, model, task, data, seed, progress)
        result = {
            "suite": suite.name,
            "task": task.name,
            "metric": task.metric,
            "model": None if model is None else model.name,
            "protocol": protocol,
            "seed": seed,
            **found,
            "seconds": time.perf_counter() - start,
            "machine": describe_machine(),
        }
        write_whole(path, json.dumps(result, indent=1) + "\n")
        results.append(result)
    write_report(suite, results, output)
    return results


def _runs(
    task: Task, models: Sequence[EvaluatedModel], protocols: Sequence[str], seeds: Sequence[int]
) -> list[tuple[Task, str, EvaluatedModel | None, int]]:
    known = RUNNERS[type(task)][0]
    unknown = [protocol for protocol in protocols if protocol not in known]
    if unknown:
        raise ValueError(f"task {task.name!r}: unknown protocols {unknown}; it can do {list(known)}.")
    return [
        (task, protocol, model, seed)
        for protocol in protocols
        for model in (models if needs_model(protocol) else [None])
        for seed in seeds
    ]


def _key(task: Task, protocol: str, model: EvaluatedModel | None, seed: int) -> str:
    """A file name that changes with anything that a result depends on."""
    unused = {"protocols", "metric"} | (set() if protocol in FINE_TUNING else {"fine_tuning"})
    described = {
        "task": {name: value for name, value in asdict(task).items() if name not in unused},
        "protocol": protocol,
        "model": None if model is None else [model.name, str(model.dtype), model.loading, _weights(model.name)],
        "seed": seed,
    }
    digest = hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()[:12]
    return f"{task.name.replace('/', '_').replace(' ', '_')}-{protocol}-{digest}"


def _weights(name: str) -> list[Any] | None:
    """What tells the weights of a local folder from others under the same name."""
    folder = Path(name)
    if not folder.is_dir():
        return None
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(folder.glob("*.safetensors"))]

"""Runs a suite on models and baselines, and reports."""

import contextlib
import fnmatch
import importlib.util
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..support.errors import InputError, MissingExtraError, plain_words, quoted
from ..support.figures import pyplot
from ..support.input_file import is_read_once, shown_name
from ..support.machine import describe_machine
from ..support.printable import printable
from .differences import FIELDS, paired_differences
from .evaluated_model import EvaluatedModel
from .protocols import KINDS, needs_model
from .report import write_report
from .run_files import data_files, read_run, run_path, without_nan, write_run
from .suite import ClassificationTask, Suite, Task


class Run(NamedTuple):
    """One protocol on one task by one model (`None` for baselines), and where its result is."""

    task: Task
    protocol: str
    model: EvaluatedModel | None
    seed: int
    path: Path

    @property
    def way(self) -> str:
        """Model, protocol and seed, in words."""
        name = "" if self.model is None else f"{printable(self.model.name)}, "
        return f"{name}{self.protocol}, seed {self.seed}"


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

    Every run leaves a file below `output/runs`, so that an interrupted evaluation goes on where it was. What can be
    known to fail is refused before the first run: data, protocols, libraries, results that were changed.

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
        InputError: if a task does not know a protocol, no task matches, data are not as the suite says, or the file
            of a run is not as it was written; the message names the task and the file.
        OSError: if a file cannot be read or written.
        MissingExtraError: if a protocol needs a library that is not installed.
    """
    chosen = [task for task in suite.tasks if fnmatch.fnmatchcase(task.name, tasks)]
    if not chosen:
        raise InputError(f"no task matches {tasks!r}; the suite has {quoted(task.name for task in suite.tasks)}.")
    plan = [run for task in chosen for run in _runs(task, models, protocols or task.protocols, seeds, data, output)]
    if not plan:
        raise InputError("nothing to run: every protocol needs a model, and none was given.")
    for model in models:
        if not model.name.isprintable():  # it goes into reports and JSON
            raise InputError(f"expected names of models without control characters, got {model.name!r}.")
    (output / "runs").mkdir(parents=True, exist_ok=True)
    pyplot()
    results, missing = {}, []
    for run in plan:
        stored = read_run(run.path)
        if stored is None:
            missing.append(run)
        else:
            results[run.path] = stored
    _check_libraries(missing)
    for task in chosen:
        names = [run.protocol for run in missing if run.task is task]
        if names:
            _read(task, data, names)
    loaded: tuple[Task | None, Any] = (None, None)
    for number, run in enumerate(missing, start=1):
        if progress:
            print(f"{number} of {len(missing)}: {run.task.name}, {run.way}", file=sys.stderr)
        if loaded[0] is not run.task:
            loaded = run.task, _read(run.task, data, [run.protocol])
        start = time.perf_counter()
        with _named(run.task, data, run):
            result = KINDS[type(run.task)].run(run.protocol, run.model, run.task, loaded[1], run.seed, progress)
        name = None if run.model is None else run.model.name
        described: dict[str, Any] = {"task": run.task.name, "model": name, "protocol": run.protocol, "seed": run.seed}
        described["loading"] = None if run.model is None else _loading(run.model)
        seconds = {"seconds": time.perf_counter() - start, "machine": describe_machine()}
        results[run.path] = without_nan({**described, **result, **seconds})
        write_run(run.path, results[run.path])
    plan += _earlier(suite, models, data, output, {run.path for run in plan}, results)
    plan.sort(key=lambda run: suite.tasks.index(run.task))
    found = [{"suite": suite.name, "metric": run.task.metric, **results[run.path]} for run in plan]
    shown = [{name: value for name, value in result.items() if name not in FIELDS} for result in found]
    write_report(suite, shown, paired_differences(found, models[0].name if models else None), output)
    return shown


def _runs(
    task: Task,
    models: Sequence[EvaluatedModel],
    protocols: Sequence[str],
    seeds: Sequence[int],
    data: Path,
    output: Path,
) -> list[Run]:
    """The runs of a task, each once."""
    known = KINDS[type(task)].protocols
    unknown = [protocol for protocol in protocols if protocol not in known]
    if unknown:
        raise InputError(
            f"task {task.name!r}: unknown protocols {quoted(unknown, list(known))}; it can do {', '.join(known)}."
        )
    runs = [
        Run(task, protocol, model, seed, run_path(output, task, protocol, model, seed, data))
        for protocol in protocols
        for model in (models if needs_model(protocol) else [None])
        for seed in seeds
    ]
    return list({run.path: run for run in runs}.values())


def _loading(model: EvaluatedModel) -> dict[str, Any]:
    """How a model is loaded, as JSON can hold it."""
    loading = {"dtype": str(model.dtype).removeprefix("torch."), **model.loading}
    return {name: value for name, value in loading.items() if isinstance(value, str | bool | int | float | None)}


def _earlier(
    suite: Suite,
    models: Sequence[EvaluatedModel],
    data: Path,
    output: Path,
    planned: set[Path],
    results: dict[Path, dict[str, Any]],
) -> list[Run]:
    """Runs of earlier calls whose task, data and model are still the same; their results are put into `results`.

    A model that was loaded in several ways, as in two dtypes, has those runs only that are like the ones now, or else
    like the newest.
    """
    tasks = {task.name: task for task in suite.tasks}
    known = {model.name: model for model in models}
    found = []
    paths = set((output / "runs").glob("*.json")) - planned
    for path in sorted(paths, key=lambda path: (-path.stat().st_mtime_ns, path.name)):
        stored = read_run(path)
        if stored is None or stored["task"] not in tasks or "loading" not in stored:  # an older version's
            continue
        task, protocol, name, seed = tasks[stored["task"]], stored["protocol"], stored["model"], stored["seed"]
        model = None
        if name is not None:
            loading = dict(stored["loading"])
            dtype = getattr(torch, loading.pop("dtype"))
            model = known.setdefault(name, EvaluatedModel(name, None, dtype, **loading))
        if run_path(output, task, protocol, model, seed, data) == path:
            results[path] = stored
            found.append(Run(task, protocol, model, seed, path))
    return sorted(found, key=lambda run: (run.way, run.path))


def _read(task: Task, data: Path, protocols: Sequence[str]) -> Any:
    with _named(task, data):
        for path in data_files(task, data):
            if is_read_once(path):
                raise InputError(f"{shown_name(path)}: expected a file, got a folder, a pipe or a device.")
        return KINDS[type(task)].read(task, data, protocols)


@contextlib.contextmanager
def _named(task: Task, data: Path, run: Run | None = None) -> Iterator[None]:
    """Errors say which task and run they are of, and which files it reads."""
    try:
        yield
    except (ValueError, OSError, MissingExtraError) as error:
        message = plain_words(error) if isinstance(error, OSError) else str(error)
        where = f"task {task.name!r}"
        if run is not None:  # what it ran on; errors of reading name their file themselves
            files = [printable(path) for path in data_files(task, data)]
            where += f", {run.way}"
            where += f" ({', '.join(files[:4])})" if files else ""
        kind = MissingExtraError if isinstance(error, MissingExtraError) else InputError
        raise kind(f"{where}: {message}") from error


def _check_libraries(runs: Sequence[Run]) -> None:
    """Refuse protocols whose library is not installed, before hours of others."""
    for run in runs:
        needed = {"lora": "peft", "baseline-kmer-xgboost": "xgboost"}.get(run.protocol)
        if run.protocol == "frozen" and isinstance(run.task, ClassificationTask) and "xgboost" in run.task.classifiers:
            needed = "xgboost"
        if needed is not None and importlib.util.find_spec(needed) is None:
            raise MissingExtraError(
                f"task {run.task.name!r}, {run.protocol}: needs {needed}: pip install 'gengram[evaluation]'"
            )

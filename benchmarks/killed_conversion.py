"""A quantising conversion of 4 GB that is killed again and again: its memory, and whether the result is the same.

    python benchmarks/killed_conversion.py [--folder DIR] [--experts int8] [--attention int8] [--kills 5]

Makes the `torch_dist` checkpoint of `benchmarks/conversion.py` under DIR (four layers of the released sizes, four
experts each; 10 GB are needed for a while, all is deleted at the end). It is converted once without a break. Then the
converter is started and ended by SIGKILL at random moments, so many times, and started once more to its end. All files
must be the same, and `gengram verify` must find nothing. Writes peaks to `benchmarks/results/killed_conversion.json`.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from conversion import CONVERT, Weights, write_torch_dist

from gengram.support.machine import describe_machine

RESULTS = Path(__file__).parent / "results" / "killed_conversion.json"
LAYERS, SHARD = 4, "500MB"


def convert(source: Path, output: Path, kinds: list[str], seconds: float | None = None) -> dict | None:
    """One run of the converter; `None` if it was killed after so many seconds."""
    command = [sys.executable, "-c", CONVERT, str(source), str(output), "--max-shard-size", SHARD, *kinds]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            out, error = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            return None
    if process.returncode:
        raise RuntimeError(error)
    return {"seconds": json.loads(out)["seconds"], "peak_bytes": int(error.split()[-1]) * 1024}


def digests(folder: Path) -> dict[str, str]:
    found = {}
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, help="where to make the checkpoint; the system's by default")
    parser.add_argument("--experts", default="int8")
    parser.add_argument("--attention")
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    kinds = ["--experts", options.experts, *(["--attention", options.attention] if options.attention else [])]
    folder = Path(tempfile.mkdtemp(prefix="gengram-benchmark-", dir=options.folder))
    try:
        source, output = folder / "source", folder / "output"
        write_torch_dist(source, LAYERS, Weights())
        source_bytes = sum(path.stat().st_size for path in source.iterdir())
        whole = convert(source, output, kinds)
        assert whole is not None
        print(f"without a break: {whole}", flush=True)
        expected = digests(output)
        shutil.rmtree(output)
        moments, generator = [], random.Random(options.seed)
        for _ in range(options.kills):
            moment = generator.uniform(0.05, 0.6) * whole["seconds"]
            done = convert(source, output, kinds, moment)
            moments.append(
                {"seconds": moment, "finished": done is not None, "files": len(list(folder.glob(".output*/*")))}
            )
            print(f"killed: {moments[-1]}", flush=True)
            if done is not None:
                break
        last = convert(source, output, kinds) if not output.exists() else None
        found = digests(output)
        command = [sys.executable, "-m", "gengram", "verify", str(output)]
        started = time.monotonic()
        verified = subprocess.run(command, capture_output=True, text=True)
        results = {
            "source_bytes": source_bytes,
            "output_bytes": sum(path.stat().st_size for path in output.iterdir()),
            "without_a_break": whole,
            "killed": moments,
            "last_run": last,
            "same_files": found == expected,
            "verify": {"exit_code": verified.returncode, "seconds": time.monotonic() - started},
        }
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(verified.stdout, verified.stderr)
    print(json.dumps(results, indent=1))
    facts = {name: str(value) for name, value in vars(options).items() if name != "folder"}
    machine = describe_machine() | {"load_average": os.getloadavg()}
    RESULTS.write_text(json.dumps({"machine": machine, "options": facts, "results": results}, indent=1) + "\n")
    if not results["same_files"] or verified.returncode:
        sys.exit("the results differ, or are not verified")


if __name__ == "__main__":
    main()

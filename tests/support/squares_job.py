"""A job without a model: squares of the numbers in a file, which can be told to fail."""

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from gengram.inference.jobs import JobChunk, ModelOptions
from gengram.inference.jobs.tables import beside_table, write_table

SCHEMA = pa.schema([("number", pa.int64()), ("square", pa.int64())])


@dataclass
class Squares:
    numbers: Path
    model: ModelOptions
    per_chunk: int = 3
    joined: int = 1  # chunks that belong together
    kill_at: int | None = None  # the number at which the process dies, once
    fail_at: int | None = None
    at_number: tuple[int, Callable[[], object]] | None = None  # what happens when this number is squared
    at_write: Callable[[], object] | None = None  # what happens while the output is written
    name: str = "squares"
    unit: str = "number"

    @property
    def inputs(self):
        return {"numbers": self.numbers}

    def settings(self):
        return {"per_chunk": self.per_chunk}

    def chunks(self):
        numbers = [int(line) for line in self.numbers.read_text().split()]
        for start in range(0, len(numbers), self.per_chunk):
            part = numbers[start : start + self.per_chunk]
            yield JobChunk(len(part), part, continues=start // self.per_chunk % self.joined > 0)

    def worker(self, device):
        def compute(numbers):
            if self.fail_at in numbers:
                raise RuntimeError(f"cannot square {self.fail_at}")
            if self.at_number is not None and self.at_number[0] in numbers:
                self.at_number[1]()
            if self.kill_at in numbers:
                died = self.numbers.with_suffix(".died")
                if not died.exists():
                    died.touch()
                    os.kill(os.getpid(), signal.SIGKILL)
            with self.numbers.with_suffix(".log").open("a") as log:
                log.write(f"{numbers}\n")
            return pa.table([numbers, [number**2 for number in numbers]], schema=SCHEMA)

        return compute

    def beside(self, output):
        return beside_table(output)

    def write(self, results, output, record):
        assert [table.num_rows for table in results] == [table.num_rows for table in results]  # read again each time
        write_table(results, output, record, SCHEMA)
        if self.at_write is not None:
            self.at_write()


def main():
    """`python squares_job.py NUMBERS OUTPUT [KILL_AT|--restart]`: a process of its own."""
    import sys

    from gengram.inference.jobs import run_job

    restart = sys.argv[3:] == ["--restart"]
    kill_at = int(sys.argv[3]) if sys.argv[3:] and not restart else None
    run_job(Squares(Path(sys.argv[1]), ModelOptions(), kill_at=kill_at), sys.argv[2], restart=restart)


if __name__ == "__main__":
    main()

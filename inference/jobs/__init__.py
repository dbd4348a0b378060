"""Jobs: a file in, a file out, in chunks that are computed once, wherever and however often a run is stopped.

| file | holds |
|---|---|
| `job.py` | what a job is, and the options that all jobs share |
| `run.py` | `run_job`: checks, computes what is missing, writes the output whole |
| `finished_chunks.py` | the hidden folder beside the output, with the results of finished chunks |
| `common_start.py` | how processes that share one output begin together |
| `processes.py` | which chunks are this process's: `--shard`, torchrun, accelerate |
| `on_ray.py` | chunks computed by actors of Ray |
| `record.py` | what an output says of how it was made |
| `tables.py` | outputs that are tables: TSV and Parquet |
"""

from .job import Job, JobChunk, ModelOptions
from .processes import Share
from .run import JobSummary, run_job

__all__ = ["Job", "JobChunk", "JobSummary", "ModelOptions", "Share", "run_job"]

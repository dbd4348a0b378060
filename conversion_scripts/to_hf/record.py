"""`conversion.json`: where each tensor of a converted folder came from, with hashes of its bytes on both sides."""

from typing import Any

from ...support.versions import installed_version
from ..files.dtypes import dtype_name
from ..hub.hub_path import size_of
from ..hub.repository import HubRepository
from ..mapping.weight_table import TABLE_VERSION
from .job import ConversionJob


def conversion_record(
    job: ConversionJob,
    digests: dict[str, str],
    source_digests: dict[str, str],
    unchecked: dict[str, str],
    files: dict[str, str],
) -> dict[str, Any]:
    """What `conversion.json` says.

    Args:
        job: The conversion.
        digests: The hash of each tensor that was written.
        source_digests: The hash of each tensor that was read.
        unchecked: Why bytes of a tensor that was read could not be compared with a checksum.
        files: The hash of each file that must stay as it was written, beside weights and `config.json`.
    """
    checkpoint, plan = job.checkpoint, job.plan
    return {
        "table_version": TABLE_VERSION,
        "gengram_version": installed_version("gengram"),
        "source": {
            "path": str(checkpoint.path.resolve()),
            "format": checkpoint.format,
            "iteration": checkpoint.iteration,
            **({} if job.repository is None else {"hub": _hub_record(job.repository)}),
            "files": [{"name": job.relative_name(file), "bytes": size_of(file)} for file in checkpoint.files],
            "args": job.arguments.as_json(),
            "tensors": {
                move.source: {
                    "sha256": source_digests[move.source],
                    "dtype": dtype_name(checkpoint.tensors[move.source].dtype),
                    "shape": list(move.entry.shape),
                    **({"unchecked": unchecked[move.source]} if move.source in unchecked else {}),
                }
                for move in plan.moves
            },
        },
        "weights": {
            spec.name: {
                "sha256": digests[spec.name],
                "dtype": dtype_name(spec.dtype),
                "shape": list(spec.shape),
                "sources": job.sources([spec]),
            }
            for spec in job.specs
        },
        "files": files,
        "dropped": [{"name": entry.name, "reason": entry.reason, "bytes": entry.nbytes} for entry in job.dropped],
    }


def _hub_record(repository: HubRepository) -> dict[str, str]:
    return {"repo_id": repository.repo_id, "revision": repository.revision, "commit": repository.commit}

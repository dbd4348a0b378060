"""The ranks of tensor and expert parallelism that write the `torch` format, and their folders."""

from dataclasses import dataclass

MODEL_FILE = "model_optim_rng.pt"  # in each folder


@dataclass(frozen=True)
class Rank:
    """One `mp_rank_*` folder of one pipeline stage: what it holds."""

    tensor: int  # rank for what is not an expert
    expert: int  # which slice of the experts
    expert_tensor: int  # rank inside these experts


def saving_ranks(tensor: int, expert: int, expert_tensor: int) -> list[Rank]:
    """The ranks of one stage that write a `torch` checkpoint: those that are first among copies of their experts.

    Ranks are numbered with tensor parallelism innermost, for experts too (the authors' `parallel_state.py`, order
    tp-cp-ep-dp-pp).
    """
    return [
        Rank(number % tensor, number // expert_tensor % expert, number % expert_tensor)
        for number in range(expert_tensor * expert)
    ]


def rank_folder(rank: Rank, stage: int, stages: int, expert_slices: int) -> str:
    """Name of a rank's folder (`get_checkpoint_name` in the authors' `checkpointing.py`)."""
    name = f"mp_rank_{rank.tensor:02d}"
    name += f"_{stage:03d}" if stages > 1 else ""
    return name + (f"_{rank.expert:03d}" if expert_slices > 1 else "")

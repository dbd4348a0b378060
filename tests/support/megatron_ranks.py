"""What each process of Megatron writes under tensor and expert parallelism, apart from the code under test."""

from math import lcm

import torch


def cut(name, tensor, shape, rank, ranks):
    """A rank's part, row by row from the definition of each layer."""
    if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        return tensor[rank * shape.vocab // ranks : (rank + 1) * shape.vocab // ranks]
    if name.endswith("linear_qkv.weight"):
        per_group = (shape.heads // shape.groups + 2) * shape.head_dim
        groups = [g for g in range(shape.groups) if g * ranks // shape.groups == rank]
        return torch.cat([tensor[g * per_group : (g + 1) * per_group] for g in groups])
    if name.endswith("linear_proj.weight"):
        heads = range(rank * shape.heads // ranks, (rank + 1) * shape.heads // ranks)
        return torch.cat([tensor[:, h * shape.head_dim : (h + 1) * shape.head_dim] for h in heads], dim=1)
    width = range(rank * shape.width // ranks, (rank + 1) * shape.width // ranks)
    if "linear_fc1.weight" in name:
        return torch.stack([tensor[i] for i in width] + [tensor[shape.width + i] for i in width])
    if "linear_fc2.weight" in name:
        return torch.stack([tensor[:, i] for i in width], dim=1)
    return tensor


def renamed(name, expert):
    if ".local_experts." in name:
        head, _, tail = name.partition(".local_experts.")
        return f"{head}.local_experts.{expert}.{tail.partition('.')[2]}"
    return f"{name.rstrip('0123456789')}{expert}"


def save_ranks(root, weights, shape, args, grid, edit=None):
    """Writes what each process of Megatron would; `edit(folder name, model)` spoils a file."""
    stages, tp, ep, etp = grid
    args.pipeline_model_parallel_size, args.tensor_model_parallel_size = stages, tp
    args.expert_model_parallel_size, args.expert_tensor_parallel_size = ep, etp
    per_stage = shape.layers // stages
    for stage in range(stages):
        for process in range(lcm(tp, ep * etp)):
            if process // (etp * ep):
                continue  # a copy of the experts of an earlier process
            t, e, et = process % tp, process // etp % ep, process % etp
            model = {}
            for name, tensor in weights.items():
                key = name
                if ".layers." in name:
                    layer, _, tail = name.removeprefix("decoder.layers.").partition(".")
                    if int(layer) // per_stage != stage:
                        continue
                    key = f"decoder.layers.{int(layer) % per_stage}.{tail}"
                elif stage != (0 if name.startswith("embedding") else stages - 1):
                    continue
                if ".experts." in name:
                    digits = name.split(".local_experts.")[1].split(".")[0] if "local_experts" in name else name[-1]
                    local = shape.experts // ep
                    if int(digits) // local != e:
                        continue
                    key = renamed(key, int(digits) % local)
                    model[key] = cut(name, tensor, shape, et, etp).clone()
                else:
                    model[key] = cut(name, tensor, shape, t, tp).clone()
            model["decoder.layers.0.self_attention.linear_qkv._extra_state"] = None
            folder = f"mp_rank_{t:02d}" + (f"_{stage:03d}" if stages > 1 else "") + (f"_{e:03d}" if ep > 1 else "")
            if edit:
                edit(folder, model)
            path = root / "iter_0000123" / folder
            path.mkdir(parents=True)
            saved = {"args": args, "checkpoint_version": 3.0, "iteration": 123, "model": model}
            torch.save(saved, path / "model_optim_rng.pt")
    (root / "latest_checkpointed_iteration.txt").write_text("123")
    return root

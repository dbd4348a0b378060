"""A host with memories, spread over two processes, learns and computes what one process does."""

import pytest
import torch
from graft_hosts import grafted, random_ids
from safetensors.torch import load_file
from tolerances import SAME_FP32, SAME_MODEL_FP32

from gengram.motif_memory import attached_memories, save_memory

PROCESSES, STEPS = 2, 3


def train(model, ids):
    """Losses of some steps; each row of `ids` weighs the same, in whichever process it is."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for step in range(STEPS):
        loss = model(input_ids=ids[step], labels=ids[step], use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)


def batches():
    return torch.stack([random_ids(batch=2 * PROCESSES, length=30, seed=step) for step in range(STEPS)])


def in_each_process(rank, name, folder):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard
    from torch.distributed.tensor import DTensor

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=PROCESSES)
    model = grafted(name).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    mesh = init_device_mesh("cpu", (PROCESSES,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert all(isinstance(model.get_submodule(f"model.{layer}"), FSDPModule) for layer in attached_memories(model))
    assert all(isinstance(weight, DTensor) for weight in model.parameters())

    mine = slice(2 * rank, 2 * rank + 2)
    losses = train(model, batches()[:, mine])
    dist.all_reduce(losses)
    with torch.no_grad():
        logits = model.eval()(batches()[0, mine]).logits
    generated = model.generate(batches()[0, mine, :20], max_new_tokens=5, min_new_tokens=5, do_sample=False)
    save_memory(model, folder / "memory")
    torch.save({"losses": losses / PROCESSES, "logits": logits, "generated": generated}, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_two_processes_of_fsdp_are_one(name, tmp_path):
    torch.multiprocessing.spawn(in_each_process, (name, tmp_path), nprocs=PROCESSES)
    model = grafted(name).train()
    losses = train(model, batches())
    model.eval()
    first = batches()[0]
    generated = model.generate(first[:, :20], max_new_tokens=5, min_new_tokens=5, do_sample=False)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(PROCESSES)]
    for process in found:
        torch.testing.assert_close(process["losses"], losses, rtol=0, atol=SAME_FP32)
    with torch.no_grad():
        expected = model(first).logits
    logits = torch.cat([process["logits"] for process in found])
    torch.testing.assert_close(logits, expected, rtol=0, atol=SAME_MODEL_FP32)
    assert torch.equal(torch.cat([process["generated"] for process in found]), generated)

    saved = load_file(tmp_path / "memory" / "motif_memory.safetensors")
    memories = attached_memories(model)
    assert len(saved) == sum(len(memory.state_dict()) for memory in memories.values())
    for layer, memory in memories.items():
        for weight, value in memory.state_dict().items():
            torch.testing.assert_close(saved[f"{layer}.{weight}"], value, rtol=0, atol=SAME_MODEL_FP32)

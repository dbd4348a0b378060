"""Memory that tensors take from each other: never two at once."""

import random
import threading

import pytest
import torch

from gengram.conversion_scripts.files import tensor_memory
from gengram.conversion_scripts.files.tensor_memory import empty_tensor, reused_memory

MEGA = 2**20


@pytest.fixture(autouse=True)
def small_arena(monkeypatch):
    monkeypatch.setattr(tensor_memory, "ARENA", 8 * MEGA)


def test_memory_of_a_dropped_tensor_is_taken_again():
    with reused_memory():
        first = empty_tensor((MEGA,), torch.float32)
        place = first.data_ptr()
        view = first[10:20].numpy()
        del first
        second = empty_tensor((MEGA,), torch.float32)
        assert second.data_ptr() != place, "a view still looks at the first one's memory"
        del view
        third = empty_tensor((2, MEGA // 2), torch.float32)
        assert third.data_ptr() == place
        assert third.shape == (2, MEGA // 2)


@pytest.mark.parametrize("reused", [True, False])
def test_tensors_do_not_share_memory(reused):
    """Four threads make and drop tensors, more than the arena holds; each keeps what was written into it."""
    problems = []

    def work(seed):
        draw, held = random.Random(seed), []
        for step in range(100):
            dtype = draw.choice([torch.float32, torch.bfloat16, torch.uint8])
            tensor = empty_tensor((draw.randrange(MEGA // 4, 2 * MEGA) // dtype.itemsize,), dtype)
            value = (seed * 100 + step) % 251
            held.append((tensor.fill_(value), value))
            if len(held) > draw.randrange(4):
                tensor, value = held.pop(draw.randrange(len(held)))
                problems.extend(["overwritten"] if (tensor != value).any() else [])
                del tensor

    def all_threads():
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    if reused:
        with reused_memory():
            all_threads()
    else:
        all_threads()
    assert not problems


def test_a_tensor_outlives_the_block():
    with reused_memory():
        tensor = empty_tensor((MEGA,), torch.float32).fill_(3)
        with reused_memory():
            inner = empty_tensor((MEGA,), torch.float32).fill_(4)
        assert empty_tensor((MEGA,), torch.float32).data_ptr() not in (tensor.data_ptr(), inner.data_ptr())
    assert (tensor == 3).all() and (inner == 4).all()
    assert tensor_memory._arena is None


def test_larger_than_the_arena_and_empty():
    with reused_memory():
        assert empty_tensor((16 * MEGA,), torch.uint8).fill_(1).sum() == 16 * MEGA
        assert empty_tensor((0, 5), torch.float32).shape == (0, 5)

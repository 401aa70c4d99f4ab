import ctypes

import processes
import pytest
import torch
import torch.distributed as dist


def gather_ranks(rank, base):
    numbers = [torch.zeros((), dtype=torch.long) for _ in range(2)]
    dist.all_gather(numbers, torch.tensor(base + rank))
    return [int(number) for number in numbers]


def crash(rank):
    if rank:
        ctypes.string_at(0)
    return rank


def fail(rank):
    raise ValueError(f"rank {rank} failed")


def test_every_process_returns_its_result(tmp_path):
    assert processes.run(gather_ranks, 2, tmp_path, 5) == [[5, 6], [5, 6]]


def test_a_crash_raises_with_its_stack(tmp_path):
    with pytest.raises(RuntimeError, match=r"(?s)process 1 terminated with signal SIGSEGV.*process 1: .*in crash"):
        processes.run(crash, 2, tmp_path)


def test_an_exception_propagates(tmp_path):
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match=r"rank \d failed"):
        processes.run(fail, 2, tmp_path)

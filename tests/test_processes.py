"""What the tests of several processes stand on."""

import ctypes

import processes
import pytest
import torch
import torch.distributed as dist


def ranks(rank, base):
    numbers = [torch.zeros((), dtype=torch.long) for _ in range(2)]
    dist.all_gather(numbers, torch.tensor(base + rank))
    return [int(number) for number in numbers]


def crash(rank):
    if rank:
        ctypes.string_at(0)
    return rank


def refuse(rank):
    raise ValueError(f"rank {rank} refuses")


def test_every_process_returns_what_it_made(tmp_path):
    assert processes.run(ranks, 2, tmp_path, 5) == [[5, 6], [5, 6]]


def test_a_crash_says_where(tmp_path):
    with pytest.raises(RuntimeError, match=r"(?s)process 1 terminated with signal SIGSEGV.*process 1: .*in crash"):
        processes.run(crash, 2, tmp_path)


def test_an_error_is_passed_on(tmp_path):
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match=r"rank \d refuses"):
        processes.run(refuse, 2, tmp_path)

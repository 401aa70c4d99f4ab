"""Run a function in several processes of one gloo group and collect their results."""

import faulthandler
import os
from pathlib import Path

import torch
import torch.distributed as dist


def run(function, processes, folder, *arguments):
    """Return ``function(rank, *arguments)`` for every rank. A crash raises RuntimeError with the process's stack."""
    try:
        torch.multiprocessing.spawn(_process, (function, processes, str(folder), arguments), nprocs=processes)
    except torch.multiprocessing.ProcessExitedException as error:
        stacks = [f"process {rank}: {text}" for rank in range(processes) if (text := _stacks(folder, rank).read_text())]
        raise RuntimeError("\n".join([str(error), *stacks])) from error
    return [torch.load(_result(folder, rank)) for rank in range(processes)]


def _process(rank, function, processes, folder, arguments):
    faulthandler.enable(open(_stacks(folder, rank), "w"))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=processes)
    torch.save(function(rank, *arguments), _result(folder, rank))
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # FSDP2 keeps the group alive: gloo's threads would free tensors while the interpreter shuts down


def _stacks(folder, rank):
    return Path(folder, f"{rank}.stacks")


def _result(folder, rank):
    return Path(folder, f"{rank}.pt")

"""Runs a function in several processes that are joined by gloo and brings back what each of them made."""

import faulthandler
import os
from pathlib import Path

import torch
import torch.distributed as dist


def run(function, processes, folder, *arguments):
    """``function(rank, *arguments)`` of every rank. A process that crashes says where it was."""
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
    os._exit(0)  # FSDP2 keeps its group: gloo's threads would still run, and free tensors, while the interpreter ends


def _stacks(folder, rank):
    return Path(folder, f"{rank}.stacks")


def _result(folder, rank):
    return Path(folder, f"{rank}.pt")

"""Data parallelism: one process per core, each with half of the documents of a step.

Two processes of one thread beat one process of two threads: they meet twice a step instead of at
every operation, so a core lent to someone else delays the other by its share only.
"""

import os
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

PORT = "29517"


def run(target: Callable[..., None], num_workers: int, *arguments: object) -> None:
    """Calls `target(*arguments)` in every worker, and waits for all of them."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": PORT, "OMP_NUM_THREADS": "1"}
    mp.spawn(enter, (num_workers, target, arguments), nprocs=num_workers)


def enter(rank: int, num_workers: int, target: Callable[..., None], arguments: tuple) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=num_workers)
    target(*arguments)
    dist.destroy_process_group()


def average_gradients(model: nn.Module) -> None:
    gradients = [parameter.grad for parameter in model.parameters()]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def summed(*values: float) -> list[float]:
    """Each value's sum over the workers."""
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total)
    return total.tolist()


def agreed(value: float) -> float:
    """The first worker's value: its clock is everybody's clock."""
    shared = torch.tensor(value, dtype=torch.float64)
    dist.broadcast(shared, src=0)
    return shared.item()


def shared_map(function: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """`function(rows)` where each worker computes some of the rows, equally many."""
    size, rank = dist.get_world_size(), dist.get_rank()
    mine = function(rows.chunk(size)[rank]).contiguous()
    out = torch.empty_like(rows)
    dist.all_gather(list(out.chunk(size)), mine)
    return out

"""Several processes. Our methods call parts of the network, which bypasses DistributedDataParallel's own reducer.

So gradients are averaged by hand, once per step, after all backward passes.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch import distributed as dist


def is_distributed() -> bool:
    """True inside an initialised process group."""
    return dist.is_available() and dist.is_initialized()


def average_gradients(parameters: Iterable[nn.Parameter], flags: Tensor) -> Tensor:
    """Replace every gradient by its mean over the processes, in one all-reduce; nothing to do in a single process.

    Args:
        parameters: the same on every process; those without a gradient count as zero, and have one afterwards: the
            coarsest segmentation layer, which the loss does not use, then decays by the optimiser's weight decay.
        flags: (F,) float, one per yes-or-no question on which the processes must agree.

    Returns:
        (F,) the flags, summed over the processes.
    """
    if not is_distributed():
        return flags
    parameters = [p for p in parameters if p.requires_grad]
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([flags.float(), *(g.reshape(-1).float() for g in gradients)])
    dist.all_reduce(flat)
    summed, flat = flat[: flags.numel()], flat[flags.numel() :] / dist.get_world_size()
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = part.view_as(parameter).to(parameter.dtype)
    return summed


def gather_rows(rows: Tensor) -> Tensor:
    """The rows of all processes, those of rank 0 first; in a single process the rows themselves.

    Args:
        rows: (N, ...), no gradient; N may differ between the processes, the other axes may not.
    """
    if not is_distributed():
        return rows
    count = torch.tensor([rows.shape[0]], device=rows.device)
    of_each = [torch.zeros_like(count) for _ in range(dist.get_world_size())]
    dist.all_gather(of_each, count)
    counts = [int(c) for c in of_each]
    padded = rows.new_zeros(max(counts), *rows.shape[1:])
    padded[: rows.shape[0]] = rows
    gathered = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(gathered, padded)
    return torch.cat([part[:c] for part, c in zip(gathered, counts, strict=True)])


def mean_over_processes(values: list[float]) -> list[float]:
    """The mean of each value over the processes; in a single process the values themselves."""
    if not is_distributed():
        return values
    summed = torch.tensor(values, dtype=torch.float64, device=_communication_device())
    dist.all_reduce(summed)
    return (summed / dist.get_world_size()).tolist()


def broadcast_state(*modules: nn.Module) -> None:
    """Give every process the parameters and buffers of rank 0."""
    if not is_distributed():
        return
    for module in modules:
        for tensor in module.state_dict().values():
            on_device = tensor.to(_communication_device())
            dist.broadcast(on_device, 0)
            tensor.copy_(on_device)


def _communication_device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")

"""Several processes. Our methods call parts of the network, which bypasses DistributedDataParallel's own reducer.

So gradients are averaged by hand, once per step, after all backward passes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch import distributed as dist


def is_distributed() -> bool:
    """True inside an initialised process group."""
    return dist.is_available() and dist.is_initialized()


def average_gradients(parameters: Sequence[nn.Parameter], flags: Tensor) -> Tensor:
    """Replace every gradient by its mean over the processes, in one all-reduce; nothing to do in a single process.

    Args:
        parameters: the same on every process. Those without a gradient count as zero and have one afterwards, so that
            the sizes agree; who steps then takes it away where no process had one, see the result.
        flags: (F,) float, one per yes-or-no question on which the processes must agree.

    Returns:
        (F,) the flags, summed over the processes; with several processes followed by a number for each of
        ``parameters``: how many of them had a gradient. To be read on the host with what else is read.
    """
    if not is_distributed():
        return flags
    had = torch.tensor([float(p.grad is not None) for p in parameters]).to(flags.device, non_blocking=True)
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    head = torch.cat([flags.float(), had])
    flat = torch.cat([head, *(g.reshape(-1).float() for g in gradients)])
    dist.all_reduce(flat)
    summed, flat = flat[: head.numel()], flat[head.numel() :] / dist.get_world_size()
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = part.view_as(parameter).to(parameter.dtype)
    return summed


_counts: dict[tuple, list[list[int]]] = {}  # shapes and types of what is gathered here -> numbers of rows by process


def gather_rows(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The rows of all processes, those of rank 0 first, of several tensors in one exchange.

    In a single process the tensors themselves. The numbers of rows are exchanged once for each combination of shapes,
    so a process must not change its numbers while others keep theirs.

    Args:
        tensors: (N, ...), no gradient, whole numbers below 2^24 if any; N may differ between the processes, the other
            axes may not.
    """
    if not is_distributed() or not tensors:
        return tensors
    flat = torch.cat([tensor.reshape(-1).float() for tensor in tensors])
    key = tuple((tuple(tensor.shape), tensor.dtype, tensor.device) for tensor in tensors)
    if key not in _counts:
        mine = torch.tensor([tensor.shape[0] for tensor in tensors], device=flat.device)
        of_each = [torch.zeros_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(of_each, mine)
        _counts[key] = [counts.tolist() for counts in of_each]
    widths = [tensor[:1].numel() if len(tensor) else 0 for tensor in tensors]
    lengths = [[n * width for n, width in zip(counts, widths, strict=True)] for counts in _counts[key]]
    padded = flat.new_zeros(max(map(sum, lengths)))
    padded[: flat.numel()] = flat
    gathered = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(gathered, padded)
    parts = [part[: sum(sizes)].split(sizes) for part, sizes in zip(gathered, lengths, strict=True)]
    return tuple(
        torch.cat(pieces).reshape(-1, *tensor.shape[1:]).to(tensor.dtype)
        for tensor, pieces in zip(tensors, zip(*parts, strict=True), strict=True)
    )


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

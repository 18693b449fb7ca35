"""What a training step costs and holds, counted on tensors without values: no GPU, no images and hardly any time.

Operations: floating-point operations of convolutions and matrix products, over those of the stock step; the mean over
four points of the training after the burn-in. Memory: the largest sum of live tensors at any moment of a step, weights,
gradients, momentum, activations (fp16 where torch's autocast has it) and the batch together. cuDNN's scratch space, the
CUDA context (about 0.5 GiB) and what torch's allocator keeps in reserve come on top.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from nnunetv2_semisup import discovery
from nnunetv2_semisup.benchmark import records, speed
from nnunetv2_semisup.benchmark.grid import BASELINE
from nnunetv2_semisup.training.step import MAX_GRADIENT_NORM

COLUMNS = ("dataset", "configuration", "plans", "patch", "batch", "trainer", "operations_ratio", "gib", "commit")
ROOM = 1.5  # GiB beside the live tensors that a GPU should have
CARDS = (11, 24, 40)  # GB


def count(dataset: str, configuration: str, plans: str, trainers: Iterable[str] | None = None) -> list[dict]:
    """Rows (:data:`COLUMNS`) of the stock trainer and of ``trainers``.

    Args:
        dataset: full name of a preprocessed data set; no image of it is read.
        configuration: e.g. ``3d_fullres``.
        plans: name of the plans.
        trainers: names without epoch suffix; None for all of ours.
    """
    names = [BASELINE, *(name for name in trainers or discovery.trainers() if name != BASELINE)]
    rows: list[dict] = []
    for name in names:
        operations, gib, patch, batch = _count_one(dataset, configuration, plans, name)
        stock = rows[0]["operations"] if rows else operations
        common = {"dataset": dataset, "configuration": configuration, "plans": plans, "commit": records.commit()}
        numbers = {"operations": operations, "operations_ratio": operations / stock, "gib": gib}
        rows.append({**common, "patch": " x ".join(map(str, patch)), "batch": batch, "trainer": name, **numbers})
    return rows


def _count_one(dataset: str, configuration: str, plans: str, name: str) -> tuple[float, float, list[int], int]:
    trainer = speed.build(dataset, configuration, plans, name, "cpu")
    batch = speed.random_batch(trainer)  # with distance maps and the like, which need values
    fake, live = _Fake(), _Live()
    _take_values_away(trainer, fake)
    batch = tree_map_only(Tensor, fake.from_tensor, batch)
    with fake, live:
        tree_map_only(Tensor, live.see, [*_state(trainer), batch])
        step = _in_half_precision(trainer)
        step(batch, speed.POINTS[0])  # the optimiser's state exists from the first step on
        live.peak = 0
        for point in speed.POINTS:
            step(batch, point)
        peak = live.peak
        with FlopCounterMode(display=False) as counter:  # apart: its hooks keep feature maps alive
            for point in speed.POINTS:
                step(batch, point)
        operations = counter.get_total_flops() / len(speed.POINTS)
        shape = trainer.configuration_manager.patch_size, trainer.batch_size
    return operations, peak / 2**30, *shape


def _modules(trainer: Any) -> list[nn.Module]:
    roots = [trainer.network, *([trainer.method] if speed.is_ours(trainer) else [])]
    return [module for root in roots for module in root.modules()]


def _state(trainer: Any) -> list[Tensor]:
    """Weights and buffers."""
    found = [[*module._parameters.values(), *module._buffers.values()] for module in _modules(trainer)]
    return [tensor for tensors in found for tensor in tensors if tensor is not None]


def _take_values_away(trainer: Any, fake: FakeTensorMode) -> None:
    """Put fake tensors in the place of weights and buffers, in the optimiser too."""
    new: dict[Tensor, nn.Parameter] = {}
    for module in _modules(trainer):
        for key, parameter in module._parameters.items():
            if parameter is not None:
                if parameter not in new:
                    new[parameter] = nn.Parameter(fake.from_tensor(parameter.detach()), parameter.requires_grad)
                module._parameters[key] = new[parameter]
        for key, buffer in module._buffers.items():
            module._buffers[key] = None if buffer is None else fake.from_tensor(buffer)
    for group in trainer.optimizer.param_groups:
        group["params"] = [new[parameter] for parameter in group["params"]]


def _in_half_precision(trainer: Any) -> Callable[[dict, float], None]:
    """A step as on a GPU: forward passes under autocast."""
    half: Callable[[], AbstractContextManager] = partial(
        torch.autocast, "cpu", dtype=torch.float16, cache_enabled=False
    )
    if speed.is_ours(trainer):
        trainer._autocast = half
        return partial(speed.step, trainer)

    def stock_step(batch: dict, point: float) -> None:
        """nnU-Net's step, which ends with a value that a fake tensor does not have."""
        trainer.optimizer.zero_grad(set_to_none=True)
        with half():
            loss = trainer.loss(trainer.network(batch["data"]), batch["target"])
        loss.backward()
        nn.utils.clip_grad_norm_(trainer.network.parameters(), MAX_GRADIENT_NORM)
        trainer.optimizer.step()

    return stock_step


class _Fake(FakeTensorMode):
    """Copied networks stay in the same mode."""

    def __deepcopy__(self, memo: dict) -> _Fake:
        return self


class _Live(TorchDispatchMode):
    """Bytes of the tensors that are alive, and the most there were; values that are asked for are 0."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.peak = 0

    def see(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.now += self.sizes[key]
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, key)
        return tensor

    def _gone(self, key: int) -> None:
        self.now -= self.sizes.pop(key, 0)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__ == "_local_scalar_dense":
            return 0.0 if args[0].dtype.is_floating_point else 0
        return tree_map_only(Tensor, self.see, function(*args, **(kwargs or {})))


def table(rows: list[dict]) -> str:
    """The rows as Markdown."""
    cards = [f"{card} GB" for card in CARDS]
    header = ["trainer", "counted over stock", "live tensors, GiB", *cards]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for row in rows:
        needed = float(row["gib"]) + ROOM
        fits = ["yes" if needed * 2**30 <= card * 1e9 else "no" for card in CARDS]
        cells = [f"`{row['trainer']}`", f"{float(row['operations_ratio']):.2f}", f"{float(row['gib']):.1f}", *fits]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def sections(results: Path) -> str:
    """``results/counted.csv`` as Markdown, a table per plans; empty without that file."""
    groups: dict[str, list[dict]] = {}
    for row in records.read_csv(results / "counted.csv"):
        what = f"patches of {row['patch']} voxels, batch {row['batch']}"
        groups.setdefault(f"{row['configuration']}, {what}, commit {row['commit']}:", []).append(row)
    return "\n".join(f"{title}\n\n{table(rows)}\n" for title, rows in groups.items())


def write(results: Path, rows: list[dict]) -> Path:
    """Put ``rows`` into ``results/counted.csv``, in the place of earlier ones of the same plans and trainers."""
    file = results / "counted.csv"

    def key(row: dict) -> tuple[str, ...]:
        return tuple(str(row[name]) for name in ("configuration", "patch", "batch", "trainer"))

    new = {key(row) for row in rows}
    records.write_csv(file, COLUMNS, [*(row for row in records.read_csv(file) if key(row) not in new), *rows])
    return file

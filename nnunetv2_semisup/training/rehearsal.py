"""Training steps on random batches, apart from any training: what a step costs and whether it will fit.

No image is read and nothing is left on the disk. With tensors that have no values no GPU is needed and hardly any time.
"""

from __future__ import annotations

import contextlib
import os
import random
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import numpy as np
import torch
from nnunetv2.run.run_training import get_trainer_from_args
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from nnunetv2_semisup.files import environment
from nnunetv2_semisup.training.step import MAX_GRADIENT_NORM

POINTS = (0.125, 0.375, 0.625, 0.875)  # of training
ROOM = 1.5  # GiB beside the live tensors that a GPU should have


def build(dataset: str, configuration: str, plans: str, name: str, device: str) -> nnUNetTrainer:
    """The trainer that nnU-Net finds under ``name``, ready for :func:`step`."""
    return _prepared(
        lambda: get_trainer_from_args(dataset, configuration, "all", name, plans, device=torch.device(device))
    )


def twin(trainer: nnUNetTrainer) -> nnUNetTrainer:
    """Another trainer of the same class, plans and settings, on the CPU, ready for :func:`step`."""
    plans = {**trainer.plans_manager.plans, "continue_training": False}  # nnU-Net hands it over there, and takes it out

    def make() -> nnUNetTrainer:
        where = trainer.configuration_name, trainer.fold, trainer.dataset_json
        twin = type(trainer)(plans, *where, device=torch.device("cpu"))
        if hasattr(trainer, "settings"):
            twin.settings = trainer.settings  # those of a checkpoint of 0.1.0 are not all in the plans
        return twin

    return _prepared(make)


def _prepared(make: Callable[[], nnUNetTrainer]) -> nnUNetTrainer:
    """What ``make`` makes, initialised; the log that its constructor writes goes to a folder that is removed."""
    quiet = {"nnUNet_wandb_enabled": "0"}  # the training that asks may be logging to W&B in this process
    with tempfile.TemporaryDirectory() as folder, environment(nnUNet_results=folder, **quiet), _silent():
        trainer = make()
        trainer.initialize()
    trainer.print_to_log_file = lambda *arguments, **options: None
    trainer.network.train()
    if is_ours(trainer):
        trainer.begin_terms()
        trainer.method.train()
    return trainer


def is_ours(trainer: nnUNetTrainer) -> bool:
    """Whether it is a semi-supervised trainer of this package, with a method and an unlabelled batch."""
    return hasattr(trainer, "method")


def random_batch(trainer: nnUNetTrainer, seed: int = 0) -> dict:
    """A batch as the loader gives it: normal noise, a random valid target, on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    manager = trainer.label_manager
    size = (trainer.batch_size, trainer.num_input_channels, *trainer.configuration_manager.patch_size)
    targets = []
    for scale in trainer._get_deep_supervision_scales():
        shape = [round(n * s) for n, s in zip(size[2:], scale, strict=True)]
        if manager.has_regions:
            channels = manager.num_segmentation_heads + manager.has_ignore_label
            targets.append(torch.rand((size[0], channels, *shape), generator=generator) > 0.5)
        else:
            values = torch.randint(len(manager.all_labels), (size[0], 1, *shape), generator=generator)
            targets.append(values.to(torch.int16))
    batch = {"data": torch.randn(size, generator=generator), "target": targets, "keys": ["case"] * size[0]}
    if is_ours(trainer):
        count = trainer._unlabeled_batch_size()
        data = torch.randn((count, *size[1:]), generator=generator)
        unlabelled = {"data": data, "keys": ["case"] * count}
        if trainer.method.wants_partners:
            unlabelled["partners"] = torch.randn(data.shape, generator=generator)
        batch["unlabelled"] = unlabelled
        if transform := trainer.method.labelled_transform():
            batch |= transform(batch)
    return batch


def step(trainer: nnUNetTrainer, batch: dict, point: float) -> None:
    """One training step as at ``point`` (share of training done)."""
    trainer.current_epoch = int(point * trainer.num_epochs)
    trainer.train_step(batch)


def memory_warning(trainer: nnUNetTrainer, available: int, what: str) -> str | None:
    """What to do where the largest step of a training would not fit, or why that is not known; None if it fits.

    Args:
        trainer: of the training; another one like it is counted, so nothing happens to it.
        available: bytes of memory of the GPU.
        what: options of ``nnUNetv2_semisup_plans`` that name data set and plans.
    """
    name = type(trainer).__name__
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            gib = count(twin(trainer), operations=False)[1]
    except Exception as error:  # whatever it is: a forecast must not end the training that it is made for
        return f"WARNING: whether {name} fits this GPU could not be counted ({type(error).__name__}: {error})"
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
    if (gib + ROOM) * 2**30 <= available:
        return None
    return (
        f"WARNING: the largest step of {name} holds {gib:.1f} GiB of tensors, and about {ROOM} GiB come on top; this "
        f"GPU has {available / 2**30:.1f} GiB. Training begins as stock nnU-Net, which needs less, and may run out of "
        "memory when the method's terms or a later stage begin. Smaller plans: nnUNetv2_semisup_plans "
        f"{what} -o smaller with --patch_size or --batch_size; or a trainer that needs less: "
        "nnUNetv2_semisup_trainers --list"
    )


def count(trainer: nnUNetTrainer, operations: bool = True) -> tuple[float, float]:
    """Floating-point operations of a step, the mean over :data:`POINTS` (0 if not asked for), and GiB of live tensors.

    Args:
        trainer: of :func:`build`, on the CPU; its weights lose their values.
        operations: False saves half of the time.
    """
    batch = random_batch(trainer)  # with distance maps and the like, which need values
    fake, live = _Fake(), Live()
    _take_values_away(trainer, fake)
    batch = tree_map_only(Tensor, fake.from_tensor, batch)
    with fake, live:
        tree_map_only(Tensor, live.see, [*_state(trainer), batch])
        one_step = _in_half_precision(trainer)
        one_step(batch, POINTS[0])  # the optimiser's state exists from the first step on
        live.peak = 0
        for point in POINTS:
            one_step(batch, point)
        peak = live.peak / 2**30
        if not operations:
            return 0.0, peak
        with FlopCounterMode(display=False) as counter:  # apart: its hooks keep feature maps alive
            for point in POINTS:
                one_step(batch, point)
    return counter.get_total_flops() / len(POINTS), peak


def _modules(trainer: Any) -> list[nn.Module]:
    roots = [trainer.network, *([trainer.method] if is_ours(trainer) else [])]
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
    if is_ours(trainer):
        trainer._autocast = half
        return partial(step, trainer)

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


class Live(TorchDispatchMode):
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


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        yield

"""A training step of every trainer on pretended CUDA tensors: no device is mixed up, and the host waits once.

torch's fake tensors have a device, a shape and a type but no values, so no GPU is needed. What would wait for a GPU is
noted with its line: reading a value, and copies between host and device that block. Backward passes are torch's own;
its engine asks for a real device, so gradients are zeros here.
"""

from __future__ import annotations

import copy
import traceback
import warnings
from pathlib import Path

import pytest
import torch
from helpers import make_batch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from nnunetv2_semisup import discovery, trainers
from nnunetv2_semisup.trainers import action_plus_plus
from nnunetv2_semisup.training import ready

NAMES = sorted(discovery.trainers())
CASES = [("2d", "4 classes"), ("3d_fullres", "regions")]
OURS, STOCK = "/nnunetv2_semisup/", "/nnunetv2/"


class Fake(FakeTensorMode):
    """Copied networks stay in the same mode."""

    def __deepcopy__(self, memo):
        return self


class Waits(TorchDispatchMode):
    """Notes the lines of ours at which the host waits for the device; values, which do not exist, are 0."""

    def __init__(self):
        super().__init__()
        self.lines: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        if name == "_local_scalar_dense":
            self.note(args[0].device, torch.device("cpu"), False)
            return 0.0 if args[0].dtype.is_floating_point else 0
        if name == "_to_copy":
            self.note(args[0].device, torch.device(kwargs.get("device") or args[0].device), kwargs.get("non_blocking"))
        if name == "copy_":
            self.note(args[1].device, args[0].device, args[2] if len(args) > 2 else kwargs.get("non_blocking"))
        return function(*args, **kwargs)

    def note(self, source: torch.device, target: torch.device, non_blocking: bool | None) -> None:
        if {source.type, target.type} != {"cpu", "cuda"} or non_blocking:
            return
        frame = next(f for f in reversed(traceback.extract_stack()) if OURS in f.filename or STOCK in f.filename)
        line = f"{Path(frame.filename).name}: {frame.line}"
        if OURS in frame.filename and line not in self.lines:
            self.lines.append(line)


@pytest.fixture
def fake(monkeypatch):
    """torch without a device, where it asks for a real one; returns the modes to enter."""

    def move(self, function, recurse=True):
        """Without torch's swapping of tensors, which fake ones refuse."""
        for child in self.children():
            child._apply(function)
        for key, parameter in self._parameters.items():
            if parameter is not None:
                self._parameters[key] = nn.Parameter(function(parameter.detach()), parameter.requires_grad)
        for key, buffer in self._buffers.items():
            self._buffers[key] = None if buffer is None else function(buffer)
        return self

    def backward(loss):
        assert loss.device.type == "cuda" and loss.ndim == 0 and loss.requires_grad

    def gradients(loss, inputs):
        backward(loss)
        return tuple(torch.zeros_like(tensor) for tensor in ([inputs] if isinstance(inputs, torch.Tensor) else inputs))

    try:
        with Fake():
            torch.empty(1, device="cuda")
    except (RuntimeError, AssertionError) as error:
        pytest.skip(f"this torch has no fake CUDA tensors: {error}")
    monkeypatch.setattr(ready, "require_device", lambda device: None)
    monkeypatch.setenv("nnUNet_compile", "f")
    monkeypatch.setattr(nn.Module, "_apply", move)
    monkeypatch.setattr(torch.Tensor, "backward", backward)
    monkeypatch.setattr(torch.autograd, "grad", gradients)
    monkeypatch.setattr(torch, "_foreach_lerp_", lambda a, b, w: [x.lerp_(y, w) for x, y in zip(a, b, strict=True)])
    monkeypatch.setattr(action_plus_plus, "allocate", lambda cosines: torch.arange(len(cosines)))
    return Fake(), Waits()


def build(dataset, name, configuration, device):
    plans = copy.deepcopy(dataset.plans) | {"continue_training": False}
    plans["semisup"] = {name: {"start_dice": 0.0, "ramp_share": 0.0, "num_epochs": 8}}
    trainer = getattr(trainers, name)(plans, configuration, "all", dataset.dataset_json, torch.device(device))
    trainer.print_to_log_file = lambda *arguments, **options: None
    trainer.initialize()
    return trainer


def converted(value, mode):
    if isinstance(value, dict):
        return {key: converted(part, mode) for key, part in value.items()}
    if isinstance(value, list):
        return [converted(part, mode) for part in value]
    return mode.from_tensor(value) if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("configuration", "kind"), CASES)
def test_a_step_waits_once(name, configuration, kind, datasets, use, fake, monkeypatch):
    """In all stages; a loss that needed a value to decide on a shape would end the test with an error of torch."""
    dataset, (mode, waits) = use(datasets(kind)), fake
    batch = make_batch(build(dataset, name, configuration, "cpu"))
    with mode, waits:
        trainer = build(dataset, name, configuration, "cuda")
        batch = converted(batch, mode)
        for parameter in (*trainer.network.parameters(), *trainer.method_parameters()):
            parameter.grad = torch.zeros_like(parameter)
        monkeypatch.setattr(trainer.optimizer, "zero_grad", lambda set_to_none: None)
        for epoch in range(0, trainer.num_epochs, 2):
            trainer.current_epoch = epoch
            trainer.train_step(batch)  # the first step of a stage may fetch what later ones have ready
            waits.lines.clear()
            trainer.train_step(batch)
            [line] = waits.lines
            assert line.startswith("step.py: ") and ".tolist()" in line, f"epoch {epoch}"
        assert all(p.device.type == "cuda" for p in trainer.method.parameters())


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("configuration", "kind"), CASES)
def test_a_step_on_a_gpu_waits_once(name, configuration, kind, datasets, use, monkeypatch):
    monkeypatch.setattr(ready, "require_device", lambda device: None)
    monkeypatch.setenv("nnUNet_compile", "f")
    trainer = build(use(datasets(kind)), name, configuration, "cuda")
    batch = tree_map_only(torch.Tensor, torch.Tensor.pin_memory, make_batch(trainer))
    for epoch in range(0, trainer.num_epochs, 2):
        trainer.current_epoch = epoch
        for _ in range(2):
            trainer.train_step(batch)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                trainer.train_step(batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        waits = [w for w in caught if "synchroniz" in str(w.message) and OURS in w.filename]
        assert len(waits) == 1, [f"{w.filename}:{w.lineno}" for w in waits]

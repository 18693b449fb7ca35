"""Two gloo processes: gradients are averaged, networks stay equal, the result is that of both batches together."""

import copy
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from helpers import make_batch, spawn
from torch import distributed as dist

from nnunetv2_semisup.errors import TrainingFailed
from nnunetv2_semisup.training.distributed import average_gradients, broadcast_state, gather_rows
from nnunetv2_semisup.training.step import finish_step

MEAN_TEACHER = "nnUNetTrainerMeanTeacher"
SETTINGS = {"noise_std": 0.0, "consistency_weight": 1.0}


def gradients_and_flags(rank: int, folder: Path) -> None:
    used, unused_here, unused = (torch.nn.Parameter(torch.zeros(s)) for s in ((2, 3), (4,), (1,)))
    used.grad = torch.full((2, 3), float(rank + 1))
    if rank == 1:
        unused_here.grad = torch.ones(4)
    flags = average_gradients([used, unused_here, unused], torch.tensor([float(rank), 0.0]))
    assert torch.equal(used.grad, torch.full((2, 3), 1.5))
    assert torch.equal(unused_here.grad, torch.full((4,), 0.5)) and torch.equal(unused.grad, torch.zeros(1))
    assert flags.tolist() == [1.0, 0.0, 2.0, 1.0, 0.0], "the flags, then how many had each gradient"
    module = torch.nn.BatchNorm1d(2)
    torch.nn.init.constant_(module.weight, rank)
    module.running_mean.fill_(rank)
    broadcast_state(module)
    assert not module.weight.any() and not module.running_mean.any()


def build_on_rank(rank: int, variables: dict, dataset, seed: int, name: str, **settings):
    """A trainer on the CPU in a process group, started from rank 0's weights."""
    os.environ.update(variables)
    # nnU-Net forces CUDA in a process group, so the trainer must not see it while it is built
    initialised, dist.is_initialized = dist.is_initialized, lambda: False
    torch.manual_seed(seed + rank)  # different weights: rank 0's must win
    trainer = dataset.trainer(name, **settings)
    trainer.initialize()
    dist.is_initialized = initialised
    trainer.local_rank = rank
    trainer.method.reset(trainer.network)
    broadcast_state(trainer.network, trainer.method)
    return trainer


def build_and_step(rank: int, folder: Path, variables: dict, dataset, seed: int) -> None:
    trainer = build_on_rank(rank, variables, dataset, seed, MEAN_TEACHER, **SETTINGS)
    if rank == 0:
        torch.save(copy.deepcopy(trainer.network.state_dict()), folder / "start.pth")
    trainer.train_step(make_batch(trainer, rank))
    torch.save(trainer.network.state_dict(), folder / f"rank{rank}.pth")
    torch.save(trainer.method.state_dict(), folder / f"method{rank}.pth")


def test_a_training_step_of_two_processes_is_the_mean_step(tiny, tmp_path):
    spawn(tmp_path, build_and_step, tiny.variables(tmp_path / "results"), tiny, 5)
    first, second = (torch.load(tmp_path / f"rank{r}.pth") for r in range(2))
    assert all(torch.equal(first[k], second[k]) for k in first)
    methods = [torch.load(tmp_path / f"method{r}.pth") for r in range(2)]
    assert all(torch.equal(methods[0][k], methods[1][k]) for k in methods[0])

    alone = tiny.trainer(MEAN_TEACHER, **SETTINGS)
    alone.initialize()
    alone.network.load_state_dict(torch.load(tmp_path / "start.pth"))
    alone.method.reset(alone.network)
    for seed in range(2):
        batch = make_batch(alone, seed)
        for group in alone.method.losses(alone.network, batch, batch["unlabelled"], alone.progress):
            (sum(w * v for w, v in group.values()) / 2).backward()
    torch.nn.utils.clip_grad_norm_(alone.network.parameters(), 12)
    alone.optimizer.step()
    for key, value in alone.network.state_dict().items():
        torch.testing.assert_close(value, first[key], rtol=1e-5, atol=1e-6)


def test_single_process_is_untouched():
    parameter = torch.nn.Parameter(torch.zeros(1))
    assert average_gradients([parameter], torch.ones(1)).tolist() == [1.0] and parameter.grad is None


def train_validate_and_stop(rank: int, folder: Path, variables: dict, dataset) -> None:
    """In nnU-Net's own wrapper: training and validation in turns, then a stop that only rank 1 is told."""
    trainer = build_on_rank(rank, variables, dataset, 5, MEAN_TEACHER, inference_weights="teacher", **SETTINGS)
    trainer.network = torch.nn.parallel.DistributedDataParallel(trainer.network)
    trainer.is_ddp = True
    for seed in range(2):
        trainer.train_step(make_batch(trainer, 10 * seed + rank))
        with torch.no_grad():
            trainer.on_validation_epoch_start()
            outputs = [trainer.validation_step(make_batch(trainer, 99))]
            trainer.on_validation_epoch_end(outputs)
        trainer.network.train()
    torch.save(trainer.bare_network.state_dict(), folder / f"rank{rank}.pth")
    trainer._stop.listen()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(SystemExit) as stop:
        trainer.train_step(make_batch(trainer, rank))
    trainer._stop.stop_listening()
    assert stop.value.code == 143
    trainer.load_checkpoint(os.path.join(trainer.output_folder, "checkpoint_latest.pth"))
    torch.save(trainer.bare_network.state_dict(), folder / f"resumed{rank}.pth")


def test_two_processes_in_the_wrapper_stay_equal_and_stop_together(tiny, tmp_path):
    spawn(tmp_path, train_validate_and_stop, tiny.variables(tmp_path / "results"), tiny)
    for name in ("rank", "resumed"):
        first, second = (torch.load(tmp_path / f"{name}{r}.pth") for r in range(2))
        assert all(torch.equal(first[k], second[k]) for k in first)


def gather_unequal_rows(rank: int, folder: Path) -> None:
    calls = []
    exchange = dist.all_gather
    dist.all_gather = lambda *arguments: (calls.append(1), exchange(*arguments))
    rows, numbers = torch.full((rank + 1, 2), float(rank), dtype=torch.float16), torch.full((2 - rank,), rank)
    for expected_calls in (2, 1, 1):  # the numbers of rows are exchanged once, then everything in one piece
        calls.clear()
        gathered = gather_rows(rows, numbers, torch.tensor([rank == 1]))
        assert torch.equal(gathered[0], torch.tensor([[0.0, 0], [1, 1], [1, 1]], dtype=torch.float16))
        assert torch.equal(gathered[1], torch.tensor([0, 0, 1]))
        assert torch.equal(gathered[2], torch.tensor([False, True]))
        assert len(calls) == expected_calls


def test_rows_of_a_single_process_are_themselves():
    [rows] = gather_rows(torch.ones(3))
    assert torch.equal(rows, torch.ones(3)) and gather_rows() == ()


def step_with_unused_parameters(rank: int, folder: Path) -> None:
    """The first parameter is used by both, the second by rank 0 alone, the third by none."""
    parameters = [torch.nn.Parameter(torch.ones(2)) for _ in range(3)]
    optimizer = torch.optim.SGD(parameters, lr=0.1, weight_decay=0.5)
    loss = parameters[0].sum() * (rank + 1) + (parameters[1].sum() if rank == 0 else 0)
    loss.backward()
    result = finish_step({"x": 1.0}, {"x": loss.detach()}, {}, parameters, [], optimizer, None, rank == 1)
    assert result.stop and not result.overflow
    assert parameters[2].grad is None and torch.equal(parameters[2], torch.ones(2)), "no weight decay either"
    torch.testing.assert_close(parameters[0].grad, torch.full((2,), 1.5))
    torch.testing.assert_close(parameters[1].grad, torch.full((2,), 0.5))


def exchanges(rank: int, folder: Path) -> None:
    gradients_and_flags(rank, folder)
    gather_unequal_rows(rank, folder)
    step_with_unused_parameters(rank, folder)


def test_exchanges_of_two_processes(tmp_path):
    """Gradients and flags; rows of unequal batches, in order and in one piece; parameters without gradient."""
    spawn(tmp_path, exchanges)


def fail_on_rank_1(rank: int, folder: Path, variables: dict, dataset) -> None:
    """A value that is not finite on one process alone; rank 0 takes its time to write."""
    trainer = build_on_rank(rank, variables, dataset, 5, MEAN_TEACHER, **SETTINGS)
    save = trainer.save_checkpoint

    def slowly(filename):
        time.sleep(1)
        save(filename)

    trainer.save_checkpoint = slowly if rank == 0 else save
    batch = make_batch(trainer, rank)
    if rank == 1:
        batch["data"] *= torch.nan
    with pytest.raises(TrainingFailed):
        trainer.train_step(batch)
    assert os.path.isfile(os.path.join(trainer.output_folder, "checkpoint_failed.pth")), "also for who failed first"


def test_processes_fail_together_when_the_checkpoint_is_written(tiny, tmp_path):
    spawn(tmp_path, fail_on_rank_1, tiny.variables(tmp_path / "results"), tiny)


def step_through_the_stages(rank: int, folder: Path, variables: dict, dataset, name: str) -> None:
    """One step per stage, each process on a batch of its own."""
    trainer = build_on_rank(rank, variables, dataset, 5, name, num_epochs=4, preset="published")
    for epoch in range(3):
        trainer.current_epoch = epoch
        torch.manual_seed(10 * epoch + rank)
        batch = make_batch(trainer, 10 * epoch + rank)
        if rank == 0:
            batch["target"] = [torch.zeros_like(target) for target in batch["target"]]  # the organ is on rank 1 alone
        trainer.train_step(batch)
    torch.save(trainer.network.state_dict() | trainer.method.state_dict(), folder / f"rank{rank}.pth")


@pytest.mark.parametrize("name", ["nnUNetTrainerACTION", "nnUNetTrainerACTIONPlusPlus"])
def test_queues_of_two_processes_agree(name, tiny, tmp_path):
    spawn(tmp_path, step_through_the_stages, tiny.variables(tmp_path / "results"), tiny, name)
    first, second = (torch.load(tmp_path / f"rank{r}.pth") for r in range(2))
    assert {k for k in first if "queue" in k} and first.keys() == second.keys()
    assert all(torch.equal(first[k], second[k]) for k in first)
    # two processes with 2 labelled and 2 unlabelled patches each, in stages one and two
    pushes = {"nnUNetTrainerACTION": 16, "nnUNetTrainerACTIONPlusPlus": 8}[name]
    assert first["queues.global.pointer"] == pushes
    if name == "nnUNetTrainerACTIONPlusPlus":
        torch.testing.assert_close(first["centroids"].norm(dim=1), torch.ones(2))
        assert {0, 1} <= set(first["queues.voxel_labels.rows"].tolist())

"""Step time and memory, on the tiny plans."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nnunetv2_semisup import discovery
from nnunetv2_semisup.benchmark import speed
from nnunetv2_semisup.benchmark.run import Options, _training_seconds
from nnunetv2_semisup.training import rehearsal

from .conftest import make_run

MIB = 2**20


@pytest.mark.filterwarnings("ignore")
def test_every_trainer_over_the_stock_step(tiny):
    names = ["nnUNetTrainerMeanTeacher", "nnUNetTrainerCrossMatch"]
    rows = speed.measure(tiny.name, "3d_fullres", "nnUNetPlans", "cpu", rounds=1, trainers=names)
    *rows, channels_last = rows
    assert channels_last["trainer"] == speed.CHANNELS_LAST and channels_last["step_seconds"] > 0
    assert [row["trainer"] for row in rows] == ["nnUNetTrainer", *names]
    assert rows[0]["step_ratio"] == rows[0]["memory_ratio"] == 1
    assert rows[0]["counted_ratio"] == 1 and rows[1]["counted_ratio"] == pytest.approx(7 / 3, rel=0.02)
    assert all(row["step_seconds"] > 0 and row["peak_memory_mb"] > 0 for row in rows)
    assert all(set(speed.COLUMNS) == set(row) for row in rows)
    # a teacher without gradient; below 1 on a CPU, where our channels-last weights save reordered copies
    assert 0.3 < rows[1]["memory_ratio"] < 2.5
    assert not list((tiny.root / "results").glob("*")), "measuring leaves no model folder"


def test_peak_on_the_cpu_is_what_a_step_holds_at_once():
    network = torch.nn.Linear(256, 256, bias=False)  # 0.25 MiB

    def train_step(batch):
        first = torch.empty(8 * MIB, dtype=torch.uint8)
        second = torch.empty(4 * MIB, dtype=torch.uint8)
        del first, second
        third = torch.empty(9 * MIB, dtype=torch.uint8)
        del third

    trainer = SimpleNamespace(
        network=network, optimizer=torch.optim.SGD(network.parameters()), num_epochs=1, train_step=train_step
    )
    batch = {"data": torch.zeros(MIB // 4), "target": [torch.zeros(MIB // 4)]}  # 1 MiB each
    assert speed._peak_on_cpu(trainer, batch, 0.5) == pytest.approx((2 + 0.25 + 12) * MIB, rel=0.01)


@pytest.mark.parametrize("name", discovery.trainers())
@pytest.mark.parametrize("kind", ["regions", "4 classes"])
def test_random_batches_fit(datasets, use, kind, name):
    dataset = use(datasets(kind))
    stock, trainer = (rehearsal.build(dataset.name, "2d", "nnUNetPlans", n, "cpu") for n in ("nnUNetTrainer", name))
    operations = [_operations(t) for t in (stock, trainer)]
    assert trainer.current_epoch == int(0.9 * trainer.num_epochs)
    assert operations[1] > 1.2 * operations[0], "the step is the method's, not the burn-in's"


def _operations(trainer):
    with FlopCounterMode(display=False) as counter:
        rehearsal.step(trainer, rehearsal.random_batch(trainer), 0.9)
    return counter.get_total_flops()


def test_estimate_of_a_run_that_nobody_has_seen(tiny):
    run = make_run(dataset=tiny.name, plans="nnUNetPlans", trainer="nnUNetTrainer", epochs=1)
    assert 0 < _training_seconds(run, Options("cpu", 1)) < 3600

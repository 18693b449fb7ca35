"""UA-MT: thresholds, uncertainty and the masked difference, in closed form."""

import math

import pytest
import torch
from helpers import make_batch
from hypothesis import given
from hypothesis import strategies as st

from nnunetv2_semisup.network import taps
from nnunetv2_semisup.trainers.uamt import certain_squared_difference, relative_entropy

NAME = "nnUNetTrainerUAMT"


def build(dataset, configuration="3d_fullres", **settings):
    torch.manual_seed(0)
    trainer = dataset.trainer(NAME, configuration, **settings)
    trainer.initialize()
    trainer.method.reset(trainer.network)
    return trainer


def consistency(trainer, progress=0.5):
    batch = make_batch(trainer)
    groups = trainer.method.losses(trainer.network, batch, batch["unlabelled"], progress)
    return next(groups)["consistency"]


def test_threshold_rises_from_the_codes_first_value_to_the_largest_entropy(tiny):
    method = build(tiny).method
    assert method.threshold(0.0) == pytest.approx(0.7517, abs=1e-4)  # 0.521 of ln 2
    assert method.threshold(1.0) == 1
    assert method.threshold(0.5) == pytest.approx(0.75 + 0.25 * math.exp(-1.25))


@given(st.lists(st.floats(0.01, 1), min_size=2, max_size=5))
def test_entropy(values):
    p = torch.tensor(values, dtype=torch.float64)
    p = (p / p.sum()).reshape(1, -1, 1, 1)
    expected = -sum(float(x) * math.log(float(x)) for x in p.flatten()) / math.log(len(values))
    assert relative_entropy(p, False).item() == pytest.approx(expected, abs=1e-4)


def test_entropy_of_one_half_and_of_certainty():
    assert relative_entropy(torch.full((1, 4, 1, 1), 0.25), False).item() == pytest.approx(1, abs=1e-4)
    p = torch.tensor([0.5, 0.0, 1.0]).reshape(1, 3, 1, 1)
    assert relative_entropy(p, True).flatten().tolist() == pytest.approx([1, 0, 0], abs=1e-4)


def test_difference_counts_certain_voxels_alone():
    """Two classes, squares of 0.04; over C times the number of certain voxels, as the code divides by 2 sum(m)."""
    student, teacher = torch.full((1, 2, 2, 2), 0.5), torch.full((1, 2, 2, 2), 0.3)
    certain = torch.tensor([[[[True, False], [False, False]]]])
    assert certain_squared_difference(student, teacher, certain, torch.ones(2)).item() == pytest.approx(0.04)
    assert certain_squared_difference(student, teacher, certain, torch.tensor([1.0, 0.5])).item() == pytest.approx(0.03)


@pytest.mark.parametrize("kind", ["2 classes", "regions"])
def test_where_nothing_is_certain_the_loss_is_zero_and_not_nan(datasets, use, kind):
    trainer = build(use(datasets(kind)), first_threshold=0.0)
    trainer.method.threshold = lambda progress: 0.0
    weight, value = consistency(trainer)
    assert value.item() == 0 and weight == pytest.approx(0.2)
    assert trainer.method.diagnostics["share_certain"] == 0


def test_a_teacher_that_is_its_student_teaches_nothing_without_noise_and_dropout(tiny):
    trainer = build(tiny, noise_std=0.0, dropout=0.0, first_threshold=1.0)
    assert consistency(trainer)[1].item() == pytest.approx(0, abs=1e-10)


def test_there_are_as_many_passes_as_the_paper_has(tiny, monkeypatch):
    trainer = build(tiny)
    seen = []
    encode = taps.encode
    monkeypatch.setattr(taps, "encode", lambda network, images: seen.append(network) or encode(network, images))
    consistency(trainer)
    assert seen == [trainer.method.teacher.module] * 9 + [trainer.network]


def test_published_ramp_lasts_the_whole_training(tiny):
    trainer = build(tiny, preset="published")
    assert consistency(trainer, 0.5)[0] == pytest.approx(0.2 * math.exp(-1.25))

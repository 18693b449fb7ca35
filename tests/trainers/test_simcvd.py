"""The invariants of SimCVD that need the method as a whole; those of its parts are beside the parts."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import make_batch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunetv2_semisup.data.sdm import signed_distance_map
from nnunetv2_semisup.errors import InputError
from nnunetv2_semisup.losses.consistency import probabilities
from nnunetv2_semisup.trainers import simcvd
from nnunetv2_semisup.training.streams import end_augmenters

NAME = "nnUNetTrainerSimCVD"
SMALL = {"proj_pool": 8, "proj_hidden": [6, 5], "proj_dim": 4}
TASKS = [("3d_fullres", "2 classes"), ("2d", "4 classes"), ("3d_fullres", "regions"), ("3d_fullres", "ignore")]
task = pytest.mark.parametrize(("configuration", "kind"), TASKS)


def build(dataset, configuration="3d_fullres", **settings):
    torch.manual_seed(3)
    trainer = dataset.trainer(NAME, configuration, **{**SMALL, **settings})
    trainer.initialize()
    trainer.method.reset(trainer.network)
    return trainer


def part_from_teacher(trainer):
    """Student weights and heads away from the teacher's."""
    with torch.no_grad():
        for p in [*trainer.network.parameters(), *trainer.method.heads.parameters()]:
            p.add_(0.05 * torch.randn_like(p))


def terms(trainer, batch, progress=0.5, seed=11) -> dict[str, tuple[float, torch.Tensor]]:
    torch.manual_seed(seed)
    found = {}
    for group in trainer.method.losses(trainer.network, batch, batch["unlabelled"], progress):
        found |= group
    return found


def values(found) -> dict[str, float]:
    return {name: value.item() for name, (_, value) in found.items()}


def psi(t):
    return math.exp(-5 * (1 - t) ** 2)


# --------------------------------------------------------------------------------------------- the equations, plainly


def slow_terms(trainer, batch, noise_teacher, noise_student) -> dict[str, torch.Tensor]:
    """Equations 1 to 5 with loops over slices and voxels; head dropout is off."""
    method, network = trainer.method, trainer.network
    regions, x = trainer.label_manager.has_regions, batch["unlabelled"]["data"]
    has_depth = x.ndim == 5

    def passes(net, heads, images):
        skips = net.encoder(images)
        features = skips[-1]
        for depth, stage in enumerate(net.decoder.stages):
            features = stage(torch.cat((net.decoder.transpconvs[depth](features), skips[-(depth + 2)]), 1))
        logits = net.decoder.seg_layers[-1](features)
        return probabilities(logits, regions), torch.tanh(heads["sdm"].convolution(features)), skips[-1]

    p_s, sdm_s, v_s = passes(network, method.heads, x + noise_student)
    with torch.no_grad():
        p_t, sdm_t, v_t = passes(method.teacher.module, method.teacher_heads.module, x + noise_teacher)

    def project(heads, volume):
        rows = []
        for image in volume:  # slices along the first axis
            for image_slice in image if has_depth else [image]:
                pooled = F.adaptive_avg_pool2d(image_slice[None], 8).flatten()
                rows.append(heads["projection"].layers(pooled))
        return [row / row.norm() for row in rows]

    contrasts = []
    for c in range(sdm_s.shape[1]):
        mine = project(method.heads, x.mean(1) + sdm_s[:, c])
        theirs = project(method.teacher_heads.module, x.mean(1) + sdm_t[:, c])
        total = 0
        for i in range(len(mine)):
            for anchor, keys in ((theirs[i], mine), (mine[i], theirs)):
                total = total - torch.log_softmax(torch.stack([anchor @ key for key in keys]) / 0.5, 0)[i]
        contrasts.append(total / len(mine))

    pairs = []
    for s, t in zip(v_s.flatten(2), v_t.flatten(2), strict=True):
        for j in range(s.shape[1]):
            cosines = torch.stack([F.cosine_similarity(s[:, j], t[:, k], dim=0) for k in range(s.shape[1])])
            pairs.append(-torch.log_softmax(cosines, 0)[j])

    _, sdm_labelled, _ = passes(network, method.heads, batch["data"])
    return {
        "contrast": sum(contrasts) / len(contrasts),
        "pd": sum(pairs) / len(pairs),
        "con": ((p_s - p_t) ** 2).mean(),
        "supervised": trainer.loss(network(batch["data"]), batch["target"]),
        "sdm": ((sdm_labelled - batch["sdm"])[~torch.isnan(batch["sdm"])] ** 2).mean(),
    }


@task
def test_terms_and_gradients_equal_the_equations(configuration, kind, datasets, use):
    trainer = build(use(datasets(kind)), configuration, proj_dropout=0.0, preset="published")
    part_from_teacher(trainer)
    batch = make_batch(trainer)
    found = terms(trainer, batch, progress=0.3)
    torch.manual_seed(11)
    noises = [(0.1 * torch.randn_like(batch["unlabelled"]["data"])).clamp(-0.2, 0.2) for _ in range(2)]
    expected = slow_terms(trainer, batch, *noises)
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name][1].detach(), expected[name].detach(), rtol=1e-4, atol=1e-6)
    weights = {"contrast": 0.5, "pd": 0.1, "con": 0.1 * psi(0.3), "supervised": 1.0, "sdm": 0.1}
    assert {name: weight for name, (weight, _) in found.items()} == pytest.approx(weights)

    parameters = [*trainer.network.parameters(), *trainer.method_parameters()]
    gradients = []
    for total in (sum(w * v for w, v in found.values()), sum(weights[k] * v for k, v in expected.items())):
        gradients.append(torch.autograd.grad(total, parameters, allow_unused=True))
    scale = max(float(g.abs().max()) for g in gradients[1] if g is not None)
    for mine, slow in zip(*gradients, strict=True):
        assert (mine is None) == (slow is None)
        if mine is not None:
            torch.testing.assert_close(mine, slow, rtol=1e-3, atol=1e-5 * scale)


def test_the_labelled_batch_carries_the_map_of_its_target(datasets, use):
    trainer = build(use(datasets("4 classes")))
    batch = make_batch(trainer)
    assert batch["sdm"].shape == (2, 3, 16, 16, 16)
    expected = signed_distance_map((batch["target"][0][1, 0] == 2).numpy(), (1.0, 1.0, 1.0))
    np.testing.assert_array_equal(batch["sdm"][1, 1].numpy(), expected)


@pytest.mark.parametrize(
    ("configuration", "spacing"), [("3d_fullres", (3.0, 1.0, 0.5)), ("2d", (2.0, 0.5))], ids=lambda value: str(value)
)
@pytest.mark.parametrize("kind", ["ignore", "regions", "regions and ignore"])
def test_the_map_knows_spacing_regions_and_ignored_voxels(configuration, spacing, kind, datasets, use):
    dataset = use(datasets(kind))
    plans = dataset.plans
    plans["configurations"][configuration]["spacing"] = list(spacing)
    trainer = build(dataset, configuration, plans=plans)
    regions, ignore = "regions" in kind, "ignore" in kind
    patch = trainer.configuration_manager.patch_size
    mask, ignored = np.zeros(patch, bool), np.zeros(patch, bool)
    mask[3:9, 4:13] = True
    ignored[0, :2] = ignore
    channels = [mask, mask, ignored][: 2 + ignore] if regions else [np.where(ignored, 2, mask)]
    target = torch.from_numpy(np.stack([np.stack(channels)] * 2))
    maps = trainer.method.labelled_transform()({"target": target})["sdm"]
    expected = signed_distance_map(mask, spacing, ignored)
    assert maps.shape == (2, 1 + regions, *patch)
    np.testing.assert_array_equal(maps.numpy(), np.broadcast_to(expected, maps.shape))
    assert np.isnan(expected).any() == ignore and np.isfinite(expected).mean() > 0.5
    assert not np.array_equal(expected, signed_distance_map(mask, (1.0,) * len(spacing), ignored), equal_nan=True)


# ------------------------------------------------------------------------------------------------ teacher and gradients


def test_teacher_and_its_heads_follow_the_student(tiny):
    trainer = build(tiny)
    part_from_teacher(trainer)
    method = trainer.method
    trainer.train_step(make_batch(trainer))
    pairs = ((method.teacher.module, trainer.network), (method.teacher_heads.module, method.heads))
    for mine, students in pairs:
        assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), students.parameters(), strict=True))
    method.teacher.n_averaged.fill_(10**6)
    method.teacher_heads.n_averaged.fill_(10**6)
    before = copy.deepcopy(pairs)
    trainer.train_step(make_batch(trainer, 1))
    for (mine, students), (old, _) in zip(pairs, before, strict=True):
        for a, b, o in zip(mine.parameters(), students.parameters(), old.parameters(), strict=True):
            torch.testing.assert_close(a, 0.999 * o + 0.001 * b, rtol=1e-5, atol=1e-7)


@task
def test_gradients_reach_student_and_heads_alone(configuration, kind, datasets, use):
    trainer = build(use(datasets(kind)), configuration)
    batch = make_batch(trainer)
    labelled = {**batch, "data": batch["data"].clone().requires_grad_()}
    method = trainer.method
    groups = method.losses(trainer.network, labelled, batch["unlabelled"], 0.5)
    unsupervised = next(groups)
    assert set(unsupervised) == {"contrast", "pd", "con"}
    sum(w * v for w, v in unsupervised.values()).backward()
    assert labelled["data"].grad is None
    sum(w * v for w, v in next(groups).values()).backward()
    assert next(groups, None) is None
    assert all(p.grad is None for m in (method.teacher, method.teacher_heads) for p in m.parameters())
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in method.heads.parameters())
    own = {id(p) for p in trainer.method_parameters()}
    assert own == {id(p) for p in method.heads.parameters()}


def test_contrast_reaches_the_network_through_the_student_map_alone(tiny):
    trainer = build(tiny, proj_dropout=0.0)
    part_from_teacher(trainer)
    images = torch.randn(2, 1, 16, 16, 16)
    mine, theirs = (torch.rand(2, 1, 16, 16, 16).requires_grad_() for _ in range(2))
    trainer.method._contrast(images, mine, theirs).backward()
    assert mine.grad.abs().max() > 0 and theirs.grad is None
    assert all(p.grad is not None for p in trainer.method.heads["projection"].parameters())


def test_equal_networks_without_noise_are_consistent(tiny):
    trainer = build(tiny, noise_std=0.0)
    found = values(terms(trainer, make_batch(trainer)))
    assert found["con"] == 0
    assert float(trainer.method.diagnostics["share_teacher_student_agreement"]) == 1


def contrasted(trainer, monkeypatch, images, student_sdm, teacher_sdm):
    """The student's and teacher's rows of the contrast."""
    seen = []
    monkeypatch.setattr(simcvd, "symmetric_info_nce", lambda s, t, *_: seen.extend((s, t)) or s.sum())
    trainer.method._contrast(images, student_sdm, teacher_sdm)
    return seen


def test_the_two_views_differ_by_their_masks_alone(tiny, monkeypatch):
    images, sdm = torch.randn(2, 1, 16, 16, 16), torch.rand(2, 1, 16, 16, 16)
    mine, theirs = contrasted(build(tiny), monkeypatch, images, sdm, sdm)
    assert not torch.isclose(mine, theirs).all(-1).any()
    mine, theirs = contrasted(build(tiny, proj_dropout=0.0), monkeypatch, images, sdm, sdm)
    torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize(
    "settings",
    [{}, {"num_slices": 7}, {"max_classes": 2}, {"num_slices": 7, "max_classes": 2}, {"sdm_fusion": "union"}],
    ids=str,
)
def test_partners_are_the_same_slice_of_the_same_class(settings, datasets, use, monkeypatch):
    """Two channels, their mean; with a subset of slices or classes it is the same in both networks."""
    trainer = build(use(datasets("4 classes")), **settings)
    for heads in (trainer.method.heads, trainer.method.teacher_heads.module):
        heads["projection"].forward = lambda slices: slices.flatten(2)
    images, sdm = torch.randn(2, 2, 16, 16, 16), torch.rand(2, 3, 16, 16, 16)
    mine, theirs = contrasted(trainer, monkeypatch, images, sdm, sdm)
    assert torch.equal(mine, theirs)
    maps = sdm.amin(1, keepdim=True) if "sdm_fusion" in settings else sdm
    possible = [
        {tuple(s.flatten().tolist()) for s in v}
        for v in (images.mean(1, keepdim=True) + maps).transpose(0, 1).flatten(1, 2)
    ]
    classes = [next(k for k, p in enumerate(possible) if tuple(rows[0].tolist()) in p) for rows in mine]
    assert len(set(classes)) == len(classes) == min(settings.get("max_classes", 3), len(possible))
    for k, rows in zip(classes, mine, strict=True):
        found = {tuple(r.tolist()) for r in rows}
        assert len(found) == settings.get("num_slices", 32) and found <= possible[k]


def test_a_single_slice_has_no_contrast(tiny, monkeypatch):
    trainer = build(tiny, "2d", unlabeled_batch_size=1)
    monkeypatch.setattr(trainer, "_prepare_unlabeled_cases", lambda: pytest.fail("preprocessed first"))
    with pytest.raises(InputError, match="unlabeled_batch_size"):
        trainer.on_train_start()
    assert build(tiny, "2d", unlabeled_batch_size=1, lam=0.0).method.unfit_batch(2, 1) is None
    assert build(tiny).method.unfit_batch(2, 1) is None, "a volume has many slices"


def test_changed_layers_are_named_on_resume(tiny, tmp_path):
    trainer, file = build(tiny), str(tmp_path / "checkpoint_latest.pth")
    trainer.save_checkpoint(file)
    with pytest.raises(InputError, match="proj_dim"):
        build(tiny, proj_dim=6).load_checkpoint(file)


def test_noise_and_projection_follow_their_settings(tiny):
    trainer = build(tiny, noise_std=3.0, noise_clip=0.7, proj_hidden=[7], proj_dim=3, proj_pool=5)
    noise = trainer.method._noise(torch.zeros(2, 1, 16, 16, 16))
    assert float(noise.abs().max()) == pytest.approx(0.7) and (noise.abs() < 0.7).any()
    shapes = [tuple(p.shape) for p in trainer.method.heads["projection"].parameters()]
    assert shapes == [(7, 25), (7,), (3, 7), (3,)]


def test_diagnostics_are_the_shares_they_name(tiny, monkeypatch):
    """Half the voxels and a quarter of the slices of the student agree with the teacher's."""
    trainer = build(tiny)
    sides = torch.ones(2, 1, 16, 16, 16)
    sides[:, :, 8:] = -1  # the student's choice differs in this half
    outputs = iter([torch.cat((torch.ones_like(sides), -torch.ones_like(sides)), 1), torch.cat((sides, -sides), 1)])

    def forward(network, images):
        return simcvd.Prediction(
            next(outputs).requires_grad_(), torch.randn(2, 4, 16, 16, 16), torch.randn(2, 8, 4, 4, 4)
        )

    monkeypatch.setattr(trainer.method, "_forward", forward)
    rows = torch.eye(32)[None]
    for heads, found in (
        (trainer.method.heads, rows[:, [*range(8), *range(9, 32), 8]]),
        (trainer.method.teacher_heads.module, rows),
    ):
        heads["projection"].forward = lambda slices, found=found: found
    trainer.method._unlabelled_terms(trainer.network, torch.zeros(2, 1, 16, 16, 16), {"contrast": 0.5, "con": 0.1})
    shares = {name: float(value) for name, value in trainer.method.diagnostics.items()}
    assert shares.pop("share_volume_1") == 0, "the teacher says background everywhere"
    assert shares == {"share_teacher_student_agreement": 0.5, "share_slices_matched": 0.25}


def test_backbone_dropout_is_in_every_pass_with_its_own_mask(tiny, monkeypatch):
    trainer = build(tiny, backbone_dropout=0.5)
    masks, original = [], simcvd.draw_channel_masks
    monkeypatch.setattr(simcvd, "draw_channel_masks", lambda *a: masks.append(original(*a)) or masks[-1])
    terms(trainer, make_batch(trainer))
    assert len(masks) == 3 and not torch.equal(masks[0][0], masks[1][0])


# ------------------------------------------------------------------------------------------------- weights and settings


def test_psi_and_what_it_ramps(tiny):
    trainer = build(tiny, preset="published")
    batch = make_batch(trainer)
    for progress, factor in ((0.0, math.exp(-5)), (0.5, 0.2865), (1.0, 1.0)):
        weights = {name: weight for name, (weight, _) in terms(trainer, batch, progress).items()}
        expected = {"supervised": 1, "sdm": 0.1, "contrast": 0.5, "pd": 0.1, "con": 0.1 * factor}
        assert weights == pytest.approx(expected, rel=1e-3)
    trainer = build(tiny, ramp_terms=["contrast", "pd"], ramp_length=0.5)
    weights = {name: weight for name, (weight, _) in terms(trainer, batch, 0.25).items()}
    assert weights == pytest.approx(
        {"supervised": 1, "sdm": 0.1, "contrast": 0.5 * psi(0.5), "pd": 0.1 * psi(0.5), "con": 0.1}
    )


@pytest.mark.parametrize(("key", "missing"), [("lam", "contrast"), ("beta", "pd"), ("gamma", "con"), ("alpha", "sdm")])
def test_a_weight_of_zero_leaves_its_term_out(key, missing, tiny):
    trainer = build(tiny, **{key: 0.0})
    batch = make_batch(trainer)
    assert ("sdm" in batch) == (key != "alpha")
    assert set(terms(trainer, batch)) == {"contrast", "pd", "con", "supervised", "sdm"} - {missing}
    trainer.train_step(batch)


SWITCHES = [
    ({"num_slices": 7}, "contrast"),
    ({"sdm_fusion": "union"}, "contrast"),
    ({"max_classes": 2}, "contrast"),
    ({"slice_axis": 2}, "contrast"),
    ({"tau": 0.1}, "contrast"),
    ({"pd_max_tokens": 9}, "pd"),
    ({"sdm_norm": "truncated_mm", "sdm_truncation_mm": 4.0}, "sdm"),
    ({"noise_std": 0.5}, "contrast pd con"),
    ({"backbone_dropout": 0.5}, "contrast pd con sdm supervised"),
]


@pytest.mark.parametrize(("setting", "changed"), SWITCHES, ids=[next(iter(s)) for s, _ in SWITCHES])
def test_each_switch_changes_its_terms_and_trains(setting, changed, datasets, use):
    dataset = use(datasets("4 classes"))
    plain, switched = build(dataset), build(dataset, **setting)
    for trainer in (plain, switched):
        torch.manual_seed(5)
        part_from_teacher(trainer)
    switched.method.load_state_dict(plain.method.state_dict())
    before, after = (values(terms(t, make_batch(t))) for t in (plain, switched))
    assert {name for name in before if abs(before[name] - after[name]) > 1e-6} == set(changed.split())
    switched.train_step(make_batch(switched))


def test_slices_follow_the_axis(tiny):
    """Slice i of volume b is row b * X + i; every axis gives its own planes."""
    trainer = build(tiny)
    volumes = torch.randn(2, 3, 4, 5, 6)
    rows = trainer.method._slices(volumes)
    assert rows.shape == (3, 8, 5, 6) and torch.equal(rows[2, 4 + 3], volumes[1, 2, 3])
    rows = build(tiny, slice_axis=2).method._slices(volumes)
    assert rows.shape == (3, 12, 4, 5) and torch.equal(rows[2, 6 + 5], volumes[1, 2, :, :, 5])
    assert torch.equal(trainer.method._slices(volumes[..., 0]), volumes[..., 0].transpose(0, 1))


@pytest.mark.parametrize(
    "bad",
    [
        {"tau": 0.0},
        {"alpha": -0.1},
        {"ramp_terms": ["sdm"]},
        {"teacher_decay": 1.0},
        {"num_slices": 1},
        {"slice_axis": 3},
        {"proj_hidden": [0]},
        {"sdm_empty": "none"},
    ],
    ids=lambda s: next(iter(s)),
)
def test_bad_settings_are_refused_by_name(bad, tiny):
    with pytest.raises(InputError, match=f"nnUNetTrainerSimCVD.*{next(iter(bad))}"):
        tiny.trainer(NAME, **bad)


# ----------------------------------------------------------------------------------------------------------- the loader


def loaded(trainer, monkeypatch, workers=0):
    monkeypatch.setenv("nnUNet_n_proc_DA", str(workers))
    trainer.initialize()
    trainer.unlabeled_cases = trainer._prepare_unlabeled_cases()
    torch.manual_seed(0)
    np.random.seed(0)
    return trainer.get_dataloaders()


def test_labelled_stream_stays_stock_and_random_states_untouched(datasets, use, monkeypatch):
    """Several batches with the maps equal, tensor by tensor, those of a method that asks for none, and nnU-Net's."""
    dataset = use(datasets("4 classes"))
    streams = [
        loaded(dataset.trainer(name, **settings), monkeypatch)[0]
        for name, settings in ((NAME, SMALL), ("nnUNetTrainerMeanTeacher", {}))
    ]
    batches = []
    for stream in streams:
        torch.manual_seed(4)
        np.random.seed(4)
        batches.append([next(stream) for _ in range(4)])
    for mine, other in zip(*batches, strict=True):
        assert set(mine) - set(other) == {"sdm"} and list(mine["keys"]) == list(other["keys"])
        assert torch.equal(mine["data"], other["data"])
        assert all(torch.equal(a, b) for a, b in zip(mine["target"], other["target"], strict=True))
        assert torch.equal(mine["unlabelled"]["data"], other["unlabelled"]["data"])
        for b in range(2):
            expected = signed_distance_map((mine["target"][0][b, 0] == 1).numpy(), (1.0, 1.0, 1.0))
            np.testing.assert_array_equal(mine["sdm"][b, 0].numpy(), expected)

    stock = nnUNetTrainer(
        dataset.plans | {"continue_training": False}, "3d_fullres", "all", dataset.dataset_json, torch.device("cpu")
    )
    stock.initialize()
    stream, _ = stock.get_dataloaders()
    torch.manual_seed(4)
    np.random.seed(4)
    expected = next(stream)
    assert torch.equal(batches[0][0]["data"], expected["data"])
    assert all(torch.equal(a, b) for a, b in zip(batches[0][0]["target"], expected["target"], strict=True))


def test_maps_come_from_the_workers(tiny, monkeypatch):
    trainer = tiny.trainer(NAME, **SMALL)
    train, _ = trainer.dataloader_train, trainer.dataloader_val = loaded(trainer, monkeypatch, workers=1)
    try:
        batch = next(train)
        expected = signed_distance_map((batch["target"][0][0, 0] == 1).numpy(), (1.0, 1.0, 1.0))
        np.testing.assert_array_equal(batch["sdm"][0, 0].numpy(), expected)
        trainer.train_step(batch)
    finally:
        end_augmenters(trainer.dataloader_train, trainer.dataloader_val)


def test_other_trainers_do_not_ask_for_maps(tiny):
    from nnunetv2_semisup.trainers import TRAINERS

    for name in TRAINERS:
        if name != NAME:
            trainer = tiny.trainer(name)
            trainer.initialize()
            assert trainer.method.labelled_transform() is None, name

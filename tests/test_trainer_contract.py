"""What every trainer promises, whatever its method: a new file in ``trainers/`` is held to this by itself."""

import pickle
from itertools import chain

import numpy as np
import pytest
import torch
from helpers import make_batch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.run.run_training import maybe_load_checkpoint
from nnunetv2.training.logging.nnunet_logger import LocalLogger
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

from nnunetv2_semisup import discovery, names, trainers
from nnunetv2_semisup.training.log import TrainingLog

NAMES = sorted(discovery.trainers())
TASKS = [(c, k) for c in ("2d", "3d_fullres") for k in ("2 classes", "4 classes")] + [
    ("3d_fullres", "regions"),
    ("2d", "ignore"),
    ("3d_fullres", "regions and ignore"),
    ("3d_resenc", "2 classes"),
]

pytestmark = pytest.mark.parametrize("name", NAMES)


class OnlyImages(dict):
    """An unlabelled batch that fails the test when anything but images and ids is asked for."""

    def __getitem__(self, key):
        assert key in ("data", "partners", "keys"), f"a method asked the unlabelled batch for {key!r}"
        return super().__getitem__(key)

    def get(self, key, default=None):
        return self[key]


@pytest.fixture(params=TASKS, ids=lambda t: "-".join(t).replace(" ", "_"))
def build(request, name, datasets, use):
    """``build(**settings)`` makes an initialised trainer for one task."""
    configuration, kind = request.param
    dataset = use(datasets(kind))

    def make(trainer_name=name, **settings):
        torch.manual_seed(1)
        trainer = dataset.trainer(trainer_name, configuration, **settings)
        try:
            trainer.initialize()
        except NotImplementedError as refusal:
            assert "unsupported" in vars(trainer.method_class), "refused without a declaration"
            assert trainer.base_name() in str(refusal)
            pytest.skip(f"declared unsupported: {refusal}")
        return trainer

    make.dataset, make.configuration = dataset, configuration
    return make


def state(module) -> dict:
    return {k: v.clone() for k, v in module.state_dict().items()}


def assert_equal(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


def test_nnunet_finds_it_and_it_pickles(name, monkeypatch):
    monkeypatch.setenv("nnUNet_extTrainer", discovery.ext_trainers_folder())
    for suffix, epochs in (("", None), ("_1epoch", 1), ("_5epochs", 5), ("_137epochs", 137)):
        found = recursive_find_trainer_class_by_name(name + suffix)
        assert found is getattr(trainers, name + suffix)
        assert issubclass(found, trainers.TRAINERS[name])
        assert found.__name__ == name + suffix
        assert names.split_epochs(found.__name__) == (name, epochs)
        assert pickle.loads(pickle.dumps(found)) is found


def test_epoch_suffix_beats_the_setting(name, tiny):
    assert tiny.trainer(name, num_epochs=7).num_epochs == 7
    assert tiny.trainer(f"{name}_5epochs", num_epochs=7).num_epochs == 5
    assert tiny.trainer(f"{name}_5epochs", num_epochs=1).num_epochs == 5  # also where the plans ask for too few


def test_cascade_is_refused_by_name(name, tiny):
    with pytest.raises(NotImplementedError, match="3d_cascade_fullres"):
        tiny.trainer(name, "3d_cascade_fullres").initialize()


def test_terms_and_gradients(build, name):
    """Finite scalar terms; unlabelled batches give nothing but images; gradients reach network and heads alone."""
    trainer = build()
    batch = make_batch(trainer)
    method, network = trainer.method, trainer.network
    method.reset(network)
    frozen = [p for p in method.parameters() if not p.requires_grad]
    names = []
    for group in method.losses(network, batch, OnlyImages(batch["unlabelled"]), progress=0.5):
        assert torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu"), "yielded inside no_grad or autocast"
        for term, (weight, value) in group.items():
            assert isinstance(weight, float) and np.isfinite(weight), term
            assert value.shape == () and torch.isfinite(value), term
            names.append(term)
        sum(weight * value for weight, value in group.values()).backward()
    assert len(names) == len(set(names)) >= 1
    # nnU-Net gives the coarsest segmentation layer the weight 0
    unused = set(network.decoder.seg_layers[0].parameters())
    for key, parameter in network.named_parameters():
        assert parameter in unused or parameter.grad is not None, key
        assert parameter.grad is None or torch.isfinite(parameter.grad).all(), key
    assert all(p.grad is None for p in frozen)


def test_gradients_under_mixed_precision(build, name):
    """In one autocast block per group, as on a GPU, each group gives the gradient that it gives in fp32."""
    trainer = build()
    batch = make_batch(trainer)
    with torch.no_grad():  # a teacher that is its student would leave nothing but rounding to be learned
        for parameter in trainer.method.parameters():
            parameter.mul_(1.0 if parameter.requires_grad else 1.5)
    trained = []
    for precision in (torch.float32, torch.bfloat16):
        trained.append([])
        torch.manual_seed(0)
        groups = trainer.method.losses(trainer.network, batch, batch["unlabelled"], progress=0.5)
        while True:
            with torch.autocast("cpu", precision, enabled=precision != torch.float32, cache_enabled=False):
                group = next(groups, None)
            if group is None:
                break
            assert all(torch.isfinite(value) for _, value in group.values())
            both = torch.nn.ModuleDict({"network": trainer.network, "method": trainer.method})
            both.zero_grad()
            sum(weight * value for weight, value in group.values()).backward()
            trained[-1].append({k: p.grad for k, p in both.named_parameters() if p.grad is not None})
    for exact, rounded in zip(*trained, strict=True):
        assert exact.keys() == rounded.keys()
        a, b = (torch.cat([g.flatten() for g in found.values()]) for found in (exact, rounded))
        assert torch.cosine_similarity(a, b, dim=0) > 0.7 or not a.any()  # least, 0.82: SS-Net's search for a direction


def test_network_and_method_share_no_parameter(build, name):
    trainer = build()
    own = {id(p) for p in trainer.method.parameters()}
    assert not own & {id(p) for p in trainer.network.parameters()}
    assert all(m is not trainer.network for m in trainer.method.modules())
    optimised = {id(p) for g in trainer.optimizer.param_groups for p in g["params"]}
    assert optimised == {id(p) for p in chain(trainer.network.parameters(), trainer.method_parameters())}


def test_zero_weights_are_exactly_the_stock_step(build, name):
    method_class = discovery.trainers()[name].method_class
    ours = build(**dict.fromkeys(method_class.unsupervised_weights, 0.0), **method_class.alters_supervision)
    assert ours.is_supervised
    plans = build.dataset.plans | {"continue_training": False}
    stock = nnUNetTrainer(plans, build.configuration, "all", build.dataset.dataset_json, torch.device("cpu"))
    stock.initialize()
    stock.network.load_state_dict(ours.network.state_dict())
    ours.method.reset(ours.network)
    for seed in range(3):
        batch = make_batch(ours, seed)
        expected = stock.train_step(batch)["loss"]
        assert ours.train_step(batch)["loss"] == expected
        assert_equal(state(ours.network), state(stock.network))


def test_before_the_start_a_step_is_exactly_stocks(build, name):
    """With the settings as they are: nothing of the method is seen until the network knows every class."""
    ours = build(start_dice=0.5, ramp_share=0.2)
    plans = build.dataset.plans | {"continue_training": False}
    stock = nnUNetTrainer(plans, build.configuration, "all", build.dataset.dataset_json, torch.device("cpu"))
    stock.initialize()
    stock.network.load_state_dict(ours.network.state_dict())
    ours.method.reset(ours.network)
    method = state(ours.method)
    for seed in range(2):
        batch = make_batch(ours, seed)
        assert ours.train_step(batch)["loss"] == stock.train_step(batch)["loss"]
        assert_equal(state(ours.network), state(stock.network))
        assert_equal(state(ours.method), method)


def test_published_preset_is_the_papers(build, name):
    """No burn-in, no ramp of ours, no guards; a step works."""
    trainer = build(preset="published", **dict.fromkeys(("start_dice", "ramp_share"), 0.0))
    s = trainer.settings
    assert (s.start_dice, s.ramp_share, s.guards) == (0, 0, False)
    assert all(getattr(s, key) == value for key, value in type(s).published.items())
    trainer.method.reset(trainer.network)
    assert np.isfinite(trainer.train_step(make_batch(trainer))["loss"])


def test_save_load_next_step_identical(build, name, tmp_path):
    first = build()
    first.method.reset(first.network)
    for seed in range(2):
        first.train_step(make_batch(first, seed))
    first.save_checkpoint(str(tmp_path / "checkpoint_latest.pth"))
    second = build()
    second.load_checkpoint(str(tmp_path / "checkpoint_latest.pth"))
    assert second.current_epoch == first.current_epoch + 1
    second.current_epoch = first.current_epoch
    second._steps_in_epoch = first._steps_in_epoch
    assert_equal(state(first.method), state(second.method))
    for trainer in (first, second):
        torch.manual_seed(5)
        trainer.train_step(make_batch(trainer, 9))
    assert_equal(state(first.network), state(second.network))
    assert_equal(state(first.method), state(second.method))


def test_stock_trainer_predicts_the_same(build, name, tmp_path):
    """Weights load strictly into the stock network, and a checkpoint renamed to nnUNetTrainer predicts the same."""
    trainer = build()
    trainer.inference_allowed_mirroring_axes = (0, 1)
    trainer.train_step(make_batch(trainer))
    folder = tmp_path / "model" / "fold_all"
    folder.mkdir(parents=True)
    for file, content in (("plans.json", build.dataset.plans), ("dataset.json", build.dataset.dataset_json)):
        (folder.parent / file).write_text(__import__("json").dumps(content))
    trainer.save_checkpoint(str(folder / "checkpoint_final.pth"))
    checkpoint = torch.load(folder / "checkpoint_final.pth", weights_only=False)
    checkpoint["trainer_name"] = "nnUNetTrainer"
    torch.save(checkpoint, folder / "checkpoint_stock.pth")

    image = np.random.default_rng(0).normal(size=(1, 20, 18, 22)).astype(np.float32)
    predictions = []
    for file in ("checkpoint_final.pth", "checkpoint_stock.pth"):
        predictor = nnUNetPredictor(device=torch.device("cpu"), perform_everything_on_device=False, allow_tqdm=False)
        predictor.initialize_from_trained_model_folder(str(folder.parent), ("all",), file)
        predictor.network.load_state_dict(predictor.list_of_parameters[0])
        predictions.append(predictor.predict_sliding_window_return_logits(torch.from_numpy(image)))
    assert torch.equal(*predictions)


class Killed(BaseException):
    pass


@pytest.mark.robustness
def test_killed_at_an_epochs_end_and_resumed_is_the_uninterrupted_run(name, tiny, monkeypatch):
    """Input: kill between two epochs, then --c, with a seed and no workers. Answer: the same weights, bit for bit."""
    monkeypatch.setattr(LocalLogger, "plot_progress_png", lambda *_: None)  # pictures take most of the time
    monkeypatch.setattr(TrainingLog, "draw", lambda *_: None)
    staged = "stage_fractions" in vars(discovery.settings_class(name)())
    settings = {"num_epochs": 4 if staged else 2, "num_iterations_per_epoch": 2, "num_val_iterations_per_epoch": 1}
    settings |= {"deterministic_seed": 1, "save_every_minutes": 0.0}
    whole = tiny.trainer(name, "2d", **settings)
    whole.run_training()
    killed = tiny.trainer(name, "2d", **settings)
    start_epoch = killed.on_train_epoch_start

    def start_or_die():
        if killed.current_epoch == settings["num_epochs"] - 1:
            raise Killed
        start_epoch()

    killed.on_train_epoch_start = start_or_die
    with pytest.raises(Killed):
        killed.run_training()
    resumed = tiny.trainer(name, "2d", resume=True, **settings)
    maybe_load_checkpoint(resumed, continue_training=True, validation_only=False)
    assert resumed.current_epoch == settings["num_epochs"] - 1
    resumed.run_training()
    assert_equal(state(resumed.network), state(whole.network))
    assert_equal(state(resumed.method), state(whole.method))

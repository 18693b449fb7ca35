import dataclasses
import json
from dataclasses import dataclass
from typing import Literal

import pytest

from nnunetv2_semisup import settings
from nnunetv2_semisup.errors import InputError
from nnunetv2_semisup.settings import SemiSupSettings, resolve, setting


@dataclass(frozen=True)
class Example(SemiSupSettings):
    weight: float = setting(1.0, "paper")
    mode: Literal["fixed", "ramp"] = setting("fixed", "paper")
    stages: tuple[float, ...] = setting((0.1, 0.9), "paper")
    use: bool = setting(True, "paper")

    def __post_init__(self):
        super().__post_init__()
        self.require(self.weight >= 0, "weight", "0 or more")


def test_overrides_and_json_round_trip():
    given = {"weight": 2, "mode": "ramp", "stages": [1, 0.5], "use": False, "unlabeled_batch_size": None}
    resolved = resolve(Example, given, "plans")
    assert resolved == Example(weight=2.0, mode="ramp", stages=(1.0, 0.5), use=False)
    assert isinstance(resolved.weight, float)
    assert resolve(Example, json.loads(json.dumps(settings.as_json(resolved))), "plans") == resolved


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"wieght": 1}, "unknown setting 'wieght'.*weight"),
        ({"weight": "1"}, "weight = '1' has the wrong type.*float"),
        ({"weight": True}, "wrong type"),
        ({"weight": float("nan")}, "wrong type"),
        ({"weight": -1}, "plans: setting weight = -1.0 is out of range"),
        ({"mode": "slow"}, "mode = 'slow' has the wrong type"),
        ({"use": 1}, "wrong type"),
        ({"num_epochs": 1.5}, "num_epochs = 1.5"),
        ({"num_epochs": 0}, "out of range"),
        ({"unlabeled_batch_size": 0}, "out of range"),
        ({"stages": [1, "x"]}, "stages = 'x'"),
        (["weight"], "expected keys and values"),
    ],
)
def test_wrong_input_is_one_clear_line(overrides, message):
    with pytest.raises(InputError, match=message) as error:
        resolve(Example, overrides, "plans")
    assert "\n" not in str(error.value) and str(error.value).startswith("plans")


def test_every_setting_of_every_method_has_a_source():
    from nnunetv2_semisup import discovery

    for trainer in discovery.trainers().values():
        for field in dataclasses.fields(trainer.method_class.settings_class):
            assert field.metadata["source"], field.name


@pytest.mark.parametrize(("text", "value"), [("0.5", 0.5), ("3", 3), ("true", True), ("null", None), ("abc", "abc")])
def test_parse_value(text, value):
    assert settings.parse_value(text) == value

import dataclasses
import json
from dataclasses import dataclass
from typing import Literal

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nnunetv2_semisup import settings
from nnunetv2_semisup.errors import InputError
from nnunetv2_semisup.settings import SemiSupSettings, resolve, setting


@dataclass(frozen=True)
class Example(SemiSupSettings):
    weight: float = setting(1.0, "paper", within="[0, inf)")
    mode: Literal["fixed", "ramp"] = setting("fixed", "paper")
    stages: tuple[float, ...] = setting((0.1, 0.9), "paper", within="(0, 1]")
    use: bool = setting(True, "paper")


def test_overrides_and_json_round_trip():
    given = {"weight": 2, "mode": "ramp", "stages": [1, 0.5], "use": False, "unlabeled_batch_size": None}
    resolved = resolve(Example, given, "plans")
    assert resolved == Example(weight=2.0, mode="ramp", stages=(1.0, 0.5), use=False)
    assert isinstance(resolved.weight, float)
    assert resolve(Example, json.loads(json.dumps(settings.as_json(resolved))), "plans") == resolved


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"wieght": 1}, "unknown setting 'wieght'; did you mean weight[?]"),
        ({"qqqqqq": 1}, "unknown setting 'qqqqqq'; known are .*weight"),
        ({"weight": "1"}, "weight = '1' has the wrong type.*float"),
        ({"weight": True}, "wrong type"),
        ({"weight": float("nan")}, "wrong type"),
        ({"weight": -1}, r"plans: setting weight = -1.0 is out of range: it must be in \[0, inf\)"),
        ({"stages": [1, 0.5, 0]}, r"stages = \(1.0, 0.5, 0.0\) is out of range: it must be in \(0, 1\]"),
        ({"mode": "slow"}, "mode = 'slow' has the wrong type: it must be 'fixed' or 'ramp'"),
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


@hypothesis.settings(deadline=None)
@given(st.data(), st.floats(-1e6, 1e6), st.floats(1e-3, 1e6), st.sampled_from("[("), st.sampled_from("])"))
def test_a_value_is_accepted_exactly_within_its_interval(data, low, width, opening, closing):
    high = low + width
    interval = f"{opening}{low}, {high}{closing}"
    numbers = st.floats(low - width, high + width) | st.sampled_from([low, high])
    entries = tuple(data.draw(st.lists(numbers, max_size=4)))
    inside = [low < x < high or (x == low and opening == "[") or (x == high and closing == "]") for x in entries]

    def accepted(value) -> bool:
        field = ("value", float | tuple[float, ...] | None, setting(value, "paper", within=interval))
        try:
            dataclasses.make_dataclass("Drawn", [field], bases=(SemiSupSettings,), frozen=True)()
        except InputError as error:
            assert str(error) == f"setting value = {value!r} is out of range: it must be in {interval}"
            return False
        return True

    assert accepted(entries) == all(inside)
    assert [accepted(entry) for entry in entries] == inside
    assert accepted(None)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_an_interval_may_be_unbounded(value):
    assert Example(weight=abs(value))
    if value < 0:
        with pytest.raises(InputError, match="weight"):
            Example(weight=value)


def test_every_setting_of_every_method_has_a_source():
    from nnunetv2_semisup import discovery

    for trainer in discovery.trainers().values():
        for field in dataclasses.fields(trainer.method_class.settings_class):
            assert field.metadata["source"], field.name


@pytest.mark.parametrize(("text", "value"), [("0.5", 0.5), ("3", 3), ("true", True), ("null", None), ("abc", "abc")])
def test_parse_value(text, value):
    assert settings.parse_value(text) == value

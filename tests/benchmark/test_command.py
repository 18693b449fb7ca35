"""The benchmark's arguments."""

import pytest

from nnunetv2_semisup.benchmark.command import key_values
from nnunetv2_semisup.errors import InputError


def test_slurm_parameters():
    assert key_values(["slurm_partition=gpu", "timeout_min=60"]) == {"slurm_partition": "gpu", "timeout_min": 60}
    with pytest.raises(InputError, match="KEY=VALUE"):
        key_values(["partition"])

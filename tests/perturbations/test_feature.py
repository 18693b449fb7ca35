import pytest
import torch

from nnunetv2_semisup.perturbations.feature import draw_channel_masks, drop_channels


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("rate", [0.25, 0.75])
def test_masks(dim, rate):
    skips = [torch.randn(6, c, *[n] * dim) for c, n in ((200, 4), (300, 2))]
    masks = draw_channel_masks(skips, rate)
    for skip, mask in zip(skips, masks, strict=True):
        assert mask.shape == (*skip.shape[:2], *[1] * dim), "constant over space"
        assert mask.unique().tolist() == pytest.approx([0.0, 1 / (1 - rate)])
        assert abs(float((mask == 0).float().mean()) - rate) < 0.05
        assert not torch.equal(mask[0], mask[1]), "samples differ"
    assert not torch.equal(masks[0][:, :200], masks[1][:, :200]), "levels differ"
    for skip, mask, dropped in zip(skips, masks, drop_channels(skips, masks), strict=True):
        assert torch.equal(dropped, skip * mask)


def test_rate_zero_is_identity_bit_for_bit():
    skips = [torch.randn(2, 3, 4, 4)]
    assert torch.equal(drop_channels(skips, draw_channel_masks(skips, 0.0))[0], skips[0])

"""What a labelled target says, as the losses of partly known patches take it."""

import torch

from nnunetv2_semisup.labels import labels_and_weights


def test_of_classes():
    target = torch.tensor([[[[0, 1, 2, 3]]]])
    label, weight = labels_and_weights([target, target[..., ::2]], False, 3)
    assert label.dtype == torch.int64 and label.flatten().tolist() == [0, 1, 2, 0]
    assert weight.flatten().tolist() == [1, 1, 1, 0]
    assert labels_and_weights(target, False, None)[1].all()


def test_of_regions():
    target = torch.tensor([[[[1, 0, 1]], [[1, 0, 0]], [[0, 0, 1]]]])
    label, weight = labels_and_weights(target, True, 3)
    assert label.dtype == torch.bool and label[0, :, 0].tolist() == [[True, False, True], [True, False, False]]
    assert weight[0, :, 0].tolist() == [[1, 1, 0], [1, 1, 0]]
    assert labels_and_weights(target, True, None)[0].shape[1] == 3

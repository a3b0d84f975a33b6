import numpy as np
import pytest
import torch

from talib_fast.finetune.bss import BatchSpectralShrinkage


def test_features_are_a_tensor():
    with pytest.raises(TypeError, match=r"expected features as a tensor, got list"):
        BatchSpectralShrinkage()([[1.0]])


@pytest.mark.parametrize("k", [2, np.int32(2), np.array(2), torch.tensor(2), torch.tensor(2, dtype=torch.uint8)])
def test_fault_integers_of_some_kinds_were_refused(k):
    loss, features = BatchSpectralShrinkage(k), torch.randn(4, 6)
    assert type(loss.k) is int and loss.k == 2 and repr(loss) == "BatchSpectralShrinkage(k=2)"
    torch.testing.assert_close(loss(features), torch.linalg.svdvals(features)[-2:].square().sum())


@pytest.mark.parametrize("k", [1.0, True, "1", None, torch.tensor(1.0), torch.tensor(True), torch.tensor([1, 1])])
def test_k_is_no_integer(k):
    with pytest.raises(TypeError, match=r"expected k to be an integer, got"):
        BatchSpectralShrinkage(k)


@pytest.mark.parametrize("k", [-1, torch.tensor(-1)])
def test_k_is_negative(k):
    with pytest.raises(ValueError, match=r"expected k >= 0, got"):
        BatchSpectralShrinkage(k)

import pytest

from talib_fast.finetune.bss import BatchSpectralShrinkage


def test_features_are_a_tensor():
    with pytest.raises(TypeError, match=r"expected features as a tensor, got list"):
        BatchSpectralShrinkage()([[1.0]])

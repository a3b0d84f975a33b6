import pytest
import torch


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> torch.device:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def _seed_and_one_thread() -> None:
    torch.set_num_threads(1)  # the tensors are small; several threads only wait for each other
    torch.manual_seed(0)

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--batch", type=int, default=16, help="images in a batch of test_speed.py")
    parser.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="where test_speed.py runs")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("device") == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: there is no GPU that this torch can use")
    if config.getoption("batch") < 2:
        raise pytest.UsageError(f"--batch: expected at least 2 images, got {config.getoption('batch')}")

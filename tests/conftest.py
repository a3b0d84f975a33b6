import importlib
import os
import sys

import build_parts
import pytest
import torch
from process_support import handlers_kept


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--library", help="run the operators of this compiled library instead of the package's own")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "no_cover: disable coverage for this test.")  # pytest-cov may be missing
    library = config.getoption("--library")
    if library is not None:
        if os.environ.get("TALIB_FAST_BACKEND") != "pytorch":
            raise pytest.UsageError("--library needs TALIB_FAST_BACKEND=pytorch: one library serves each operator")
        importlib.import_module("talib_fast")
        torch.ops.load_library(library)


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> torch.device:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def _seed_and_one_thread() -> None:
    torch.set_num_threads(1)  # the tensors are small, so more threads would only wait for each other
    torch.manual_seed(0)


@pytest.fixture
def kept_signal_handlers():
    with handlers_kept():
        yield


@pytest.fixture
def toolkit() -> build_parts.Toolkit:
    found = build_parts.find_toolkit(os.environ)
    if isinstance(found, str):
        pytest.skip(found)
    return found


@pytest.fixture(scope="session", autouse=True)
def _ranks_end_with_the_session():
    yield
    if "rank_support" in sys.modules:
        sys.modules["rank_support"].end_processes()


@pytest.fixture
def on_host_harness(pytestconfig):
    """Whether CUDA kernels run on the host."""
    return pytestconfig.getoption("--library") is not None

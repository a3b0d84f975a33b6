import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--batch", type=int, default=48, help="images per batch in benchmarks")

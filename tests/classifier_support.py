"""Small modules and checks that the classifiers' tests share."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Backbone(nn.Module):
    out_features = 6

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.bn = nn.BatchNorm2d(6)

    def forward(self, x):
        return self.bn(self.conv(x))


class Vectors(nn.Module):
    """A backbone whose feature maps are its inputs."""

    out_features = 3

    def forward(self, x):
        return x


def images(batch=4, device="cpu", dtype=torch.float32):
    return torch.randn(batch, 3, 7, 5, device=device, dtype=dtype)


def bottleneck():
    return nn.Sequential(nn.Linear(6, 2), nn.ReLU())


def with_workers(test):
    """Let a test use a data loader with worker processes."""
    test = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")(test)
    return pytest.mark.filterwarnings("ignore:No data was collected")(test)  # coverage in a worker that runs none of it


def assert_trains_alike_in_low_precision(model, device, columns, loss_of):
    """Check two epochs in bfloat16 autocast and channels_last, with two workers, against two epochs in float32.

    ``loss_of(model, *batch)`` is the loss of a batch of ``columns``.
    """
    losses = []
    for low in (False, True):
        layout = torch.channels_last if low else torch.contiguous_format
        trained = copy.deepcopy(model).to(device, memory_format=layout)
        optimizer = torch.optim.SGD(trained.parameters(), lr=0.05)
        loader = DataLoader(TensorDataset(*columns), 4, num_workers=2 if low else 0)
        losses.append([])
        for _ in range(2):
            for batch in loader:
                batch = [x.to(device, memory_format=layout) if x.dim() == 4 else x.to(device) for x in batch]
                with torch.autocast(device.type, torch.bfloat16, enabled=low):
                    loss = loss_of(trained, *batch)
                assert loss.dtype == torch.float32 and loss.dim() == 0
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses[-1].append(loss.detach())
        assert all(p.isfinite().all() for p in trained.parameters())
    torch.testing.assert_close(*map(torch.stack, losses), rtol=0.05, atol=0.05)

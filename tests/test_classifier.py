import copy
import inspect
import re

import numpy as np
import pytest
import torch
from classifier_support import Backbone, Vectors, bottleneck, images
from torch import nn

from talib_fast.finetune import bi_tuning, co_tuning, lwf
from talib_fast.finetune.classifier import Classifier, ImageClassifier

REQUIRED = inspect.Parameter.empty


def max_pool():
    return nn.Sequential(nn.AdaptiveMaxPool2d(1), nn.Flatten())


def test_signature_is_the_contracts():
    parameters = [(name, p.default) for name, p in inspect.signature(Classifier).parameters.items()]
    assert parameters == [
        ("backbone", REQUIRED),
        ("num_classes", REQUIRED),
        ("bottleneck", None),
        ("bottleneck_dim", -1),
        ("head", None),
        ("finetune", True),
        ("pool_layer", None),
    ]
    base_lr = inspect.signature(Classifier.get_parameters).parameters["base_lr"]
    assert base_lr.default == 1.0


def test_positional_and_keyword_calls_build_the_same():
    parts = (Backbone(), 5, bottleneck(), 2, nn.Linear(2, 5), False, max_pool())
    names = ("backbone", "num_classes", "bottleneck", "bottleneck_dim", "head", "finetune", "pool_layer")
    positional, keyword = Classifier(*parts), Classifier(**dict(zip(names, parts, strict=True)))
    assert repr(positional) == repr(keyword)
    for model in (positional, keyword):
        for name, part in zip(names, parts, strict=True):
            if name != "bottleneck_dim":
                assert getattr(model, name) is part
        assert model.features_dim == 2


def test_training_returns_predictions_and_features_evaluation_predictions(device):
    model = Classifier(Backbone(), 5).to(device)
    predictions, features = model(images(device=device))
    assert predictions.shape == (4, 5) and features.shape == (4, 6)
    predictions = model.eval()(images(device=device))
    assert isinstance(predictions, torch.Tensor) and predictions.shape == (4, 5)
    assert predictions.device.type == device.type


def test_values_are_mean_pooling_then_linear():
    model = Classifier(Vectors(), 4).double()
    x = images(dtype=torch.float64)
    weight, bias = model.head.weight.tolist(), model.head.bias.tolist()
    pooled = [[sum(map(sum, channel)) / 35 for channel in sample] for sample in x.tolist()]
    expected = [
        [b + sum(w * f for w, f in zip(row, features, strict=True)) for row, b in zip(weight, bias, strict=True)]
        for features in pooled
    ]
    predictions, features = model(x)
    torch.testing.assert_close(features, torch.tensor(pooled, dtype=torch.float64))
    torch.testing.assert_close(predictions, torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(model.eval()(x), predictions)


def test_features_are_taken_after_the_bottleneck():
    model = Classifier(Backbone(), 5, bottleneck(), 2)
    model.backbone.eval()
    x = images()
    predictions, features = model(x)
    pooled = model.backbone(x).mean((2, 3))
    torch.testing.assert_close(features, model.bottleneck(pooled))
    torch.testing.assert_close(predictions, model.head(features))
    assert (features >= 0).all() and model.features_dim == 2


def test_custom_pool_layer_and_head():
    head = nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 2))
    model = Classifier(Vectors(), 2, head=head, pool_layer=max_pool()).eval()
    x = images()
    torch.testing.assert_close(model(x), head[1](x.amax((2, 3))))


def test_backbone_of_vectors_with_identity_pooling():
    model = Classifier(Vectors(), 2, pool_layer=nn.Identity())
    x = torch.randn(4, 3)
    assert torch.equal(model(x)[1], x)


@pytest.mark.parametrize("finetune, backbone_lr", [(True, 0.1 * 0.3), (False, 0.3)])
def test_parameter_groups_and_rates(finetune, backbone_lr):
    model = Classifier(Backbone(), 5, bottleneck(), 2, finetune=finetune)
    groups = model.get_parameters(base_lr=0.3)
    assert [group["lr"] for group in groups] == [backbone_lr, 0.3, 0.3]
    for group, module in zip(groups, (model.backbone, model.bottleneck, model.head), strict=True):
        assert set(group) == {"params", "lr"}
        assert [id(p) for p in group["params"]] == [id(p) for p in module.parameters()]
    assert [group["lr"] for group in model.get_parameters()] == [0.1 if finetune else 1.0, 1.0, 1.0]
    assert [group["lr"] for group in model.get_parameters(2.0)] == [0.2 if finetune else 2.0, 2.0, 2.0]


def test_optimizer_takes_the_groups_without_a_bottleneck():
    model = Classifier(Backbone(), 5)
    optimizer = torch.optim.SGD(model.get_parameters(0.5), lr=0.5, momentum=0.9, nesterov=True)
    assert [len(group["params"]) for group in optimizer.param_groups] == [4, 0, 2]
    before = copy.deepcopy(model.state_dict())
    model(images())[0].square().sum().backward()
    optimizer.step()
    assert all(not torch.equal(before[name], p) for name, p in model.named_parameters() if name != "backbone.conv.bias")


def test_attributes_and_state_dict():
    model = Classifier(Backbone(), 5, bottleneck(), 2)
    assert model.num_classes == 5 and model.finetune is True and model.features_dim == 2
    assert isinstance(Classifier(Backbone(), 5).bottleneck, nn.Identity)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes == {
        "backbone.conv.weight": (6, 3, 3, 3),
        "backbone.conv.bias": (6,),
        "backbone.bn.weight": (6,),
        "backbone.bn.bias": (6,),
        "backbone.bn.running_mean": (6,),
        "backbone.bn.running_var": (6,),
        "backbone.bn.num_batches_tracked": (),
        "bottleneck.0.weight": (2, 6),
        "bottleneck.0.bias": (2,),
        "head.weight": (5, 2),
        "head.bias": (5,),
    }


def test_deepcopy_and_state_dict_round_trip():
    model, x = Classifier(Backbone(), 5).eval(), images()
    other = Classifier(Backbone(), 5).eval()
    assert not torch.equal(other(x), model(x))
    other.load_state_dict(model.state_dict())
    for twin in (other, copy.deepcopy(model)):
        assert torch.equal(twin(x), model(x))


def test_autocast_and_half_precision(device):
    model, x = Classifier(Backbone(), 5).to(device).eval(), images(device=device)
    exact = model(x)
    with torch.autocast(device.type, torch.bfloat16):
        torch.testing.assert_close(model(x).float(), exact, atol=0.05, rtol=0.05)
    halved = model.bfloat16()(x.bfloat16())
    assert halved.dtype == torch.bfloat16
    torch.testing.assert_close(halved.float(), exact, atol=0.05, rtol=0.05)


def test_numpy_integers_as_sizes():
    assert Classifier(Backbone(), np.int64(5)).eval()(images()).shape == (4, 5)
    backbone = Backbone()
    backbone.out_features = np.int64(6)
    model = Classifier(backbone, 5, bottleneck(), np.int32(2))
    assert model.eval()(images()).shape == (4, 5) and type(model.features_dim) is int
    with pytest.raises(ValueError, match=r"head with in_features = 6, got 7"):
        Classifier(backbone, 5, head=nn.Linear(7, 5))


@pytest.mark.parametrize("num_classes", [0, -3, 2.0, True, "5", None])
def test_bad_number_of_classes(num_classes):
    with pytest.raises(ValueError, match=rf"num_classes to be a positive integer, got {num_classes!r}"):
        Classifier(Backbone(), num_classes)


@pytest.mark.parametrize("dimension", [-1, 0, None, 2.0, "2"])
def test_bottleneck_without_its_dimension(dimension):
    with pytest.raises(ValueError, match=rf"bottleneck_dim, .*, to be a positive integer, got {dimension!r}"):
        Classifier(Backbone(), 5, bottleneck(), dimension)


def test_backbone_is_no_module():
    with pytest.raises(TypeError, match=r"backbone to be a torch.nn.Module, got function"):
        Classifier(images, 5)


@pytest.mark.parametrize("part", ["bottleneck", "pool_layer", "head"])
def test_part_is_no_module(part):
    with pytest.raises(TypeError, match=rf"{part} to be a torch.nn.Module, got str"):
        Classifier(Backbone(), 5, bottleneck_dim=2, **{part: "x"})


@pytest.mark.parametrize("out_features", [None, "6", 6.0])
def test_backbone_does_not_say_how_many_features(out_features):
    backbone = nn.Conv2d(3, 6, 3)
    has = "none"
    if out_features:
        backbone.out_features, has = out_features, f"out_features = {out_features!r}"
    with pytest.raises(ValueError, match=rf"integer out_features, .*, got Conv2d with {has}"):
        Classifier(backbone, 5)


@pytest.mark.parametrize(
    "head, message",
    [(nn.Linear(7, 5), r"head with in_features = 6, got 7"), (nn.Linear(6, 4), r"head with out_features = 5, got 4")],
)
def test_head_does_not_fit(head, message):
    with pytest.raises(ValueError, match=message):
        Classifier(Backbone(), 5, head=head)


ALL = {
    "classifier": Classifier,
    "lwf": lambda *args, **kwargs: lwf.Classifier(*args, nn.Linear(3, 5), **kwargs),
    "co_tuning": lambda *args, **kwargs: co_tuning.Classifier(*args, nn.Linear(3, 5), **kwargs),
    "bi_tuning": bi_tuning.Classifier,
}


@pytest.mark.parametrize("shape", [(4, 3), (4, 7, 3), (4, 3, 7), (4, 3, 2, 2, 2)])
@pytest.mark.parametrize("name", ALL)
def test_fault_features_that_are_no_maps_were_pooled(name, shape):
    model = ALL[name](Vectors(), 2)
    with pytest.raises(ValueError, match=rf"maps \[b, C, H, W\], .*, got {re.escape(str(list(shape)))}: pass a pool_"):
        model(torch.randn(shape))
    tokens = ALL[name](Vectors(), 2, pool_layer=lambda x: x.mean(1)).eval()
    assert tokens(torch.randn(4, 7, 3)).shape == (4, 2)


def test_output_that_is_no_tensor_is_named():
    with pytest.raises(ValueError, match=r"maps \[b, C, H, W\], .*, got dict: pass a pool_layer"):
        Classifier(Vectors(), 2)({"features": images()})


def test_default_pool_layer_is_a_sequential():
    model = Classifier(Vectors(), 2)
    assert repr(model.pool_layer) == repr(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    assert isinstance(model.pool_layer, nn.Sequential) and isinstance(model.pool_layer[0], nn.AdaptiveAvgPool2d)
    assert not any("pool" in name for name in model.state_dict())


def scaled(features):
    return 2 * features


def test_fault_functions_as_parts_were_refused():
    x = torch.randn(4, 3)
    model = Classifier(Vectors(), 3, scaled, 3, scaled, pool_layer=scaled)
    predictions, features = model(x)
    assert torch.equal(predictions, 8 * x) and torch.equal(features, 4 * x)
    assert [group["params"] for group in model.get_parameters()] == [[], [], []]
    assert torch.equal(copy.deepcopy(model)(x)[0], predictions)


@pytest.mark.parametrize("kind, groups", [(lwf.Classifier, 3), (co_tuning.Classifier, 4)])
def test_functions_as_heads(kind, groups):
    x, bottleneck = torch.randn(4, 3), nn.Linear(3, 3)
    model = kind(Vectors(), 3, scaled, head_target=scaled, bottleneck=bottleneck, bottleneck_dim=3, pool_layer=scaled)
    y_s, y_t = model(x)
    assert torch.equal(y_s, 4 * x) and torch.equal(y_t, 2 * bottleneck(2 * x))
    assert [len(group["params"]) for group in model.get_parameters()] == ([0, 2, 0] if groups == 3 else [0, 0, 2, 0])
    model.freeze_head_source()
    torch.optim.SGD(model.get_parameters(), lr=0.1)


def test_class_is_no_part():
    with pytest.raises(TypeError, match=r"pool_layer to be a torch.nn.Module, got type"):
        Classifier(Vectors(), 2, pool_layer=nn.Identity)


def test_features_in_evaluation_on_request():
    model, x = Classifier(Vectors(), 2).eval(), images()
    predictions, features = model(x, return_feat=True)
    assert torch.equal(predictions, model(x)) and torch.equal(features, x.mean((2, 3)))


def test_image_classifier_is_a_classifier():
    model = ImageClassifier(Backbone(), 5)
    assert isinstance(model, Classifier) and model.state_dict().keys() == Classifier(Backbone(), 5).state_dict().keys()


def test_star_import_of_lwf_brings_what_upstreams_does():
    namespace: dict = {}
    exec("from talib_fast.finetune.lwf import *", namespace)
    assert namespace["nn"] is nn and namespace["torch"] is torch and namespace["Classifier"] is lwf.Classifier
    assert {"Dict", "List", "Optional", "collect_pretrain_labels"} <= set(namespace)
    try:
        import tqdm
    except ImportError:
        tqdm = None
    assert namespace.get("tqdm") is tqdm

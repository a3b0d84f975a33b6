"""The frozen network: batch norms folded away, other dtypes, no further than the last layer asked for."""

import copy
import importlib
import pickle
import sys
import threading

import pytest
import torch
from compiler_support import needs_inductor
from cuda_support import capture, no_synchronisation
from network_support import library
from private_support import Lacking
from torch import nn
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrizations

from talib_fast import torch_private
from talib_fast.finetune import folding, packing
from talib_fast.finetune.co_tuning import Relationship
from talib_fast.finetune.delta import BehavioralRegularization, IntermediateLayerGetter, channel_attention
from talib_fast.finetune.fingerprint import Unknown, fingerprint
from talib_fast.finetune.folding import folded
from talib_fast.finetune.frozen import frozen
from talib_fast.finetune.lwf import collect_pretrain_labels
from talib_fast.finetune.prediction import evaluating
from talib_fast.finetune.stochnorm import (
    StochNorm1d,
    StochNorm3d,
    StochNormAct2d,
    SyncStochNorm,
    convert_model,
    fuse_activations,
)
from talib_fast.networks import MobileNetV2

RESNET_LAYERS = ["layer1.2.conv3", "layer2.3.conv3", "layer3.5.conv3", "layer4.2.conv3"]


def of_torchvision(name, **options):
    return lambda: library("torchvision").models.get_model(name, **options)


def of_timm(name, **options):
    return lambda: library("timm").create_model(name, **options)


# how to make the network, layers asked for, and how many of its batch norms can be folded
NETWORKS = {
    "resnet50": (of_torchvision("resnet50"), RESNET_LAYERS, 49),
    "mobilenet_v2": (MobileNetV2, ["features.6", "features.17", "features.13"], 52),
    "mobilenet_v2, inner layers": (MobileNetV2, ["features.3.conv.2", "features.3.conv.3", "features.5.conv.0.0"], 50),
    "efficientnet_b0": (of_timm("efficientnet_b0"), ["blocks.2", "blocks.4.1.bn2", "blocks.6"], 49),
    "efficientnet_b0 as TensorFlow pads": (of_timm("tf_efficientnet_b0"), ["blocks.6.0.conv_pw"], 48),
    "densenet121": (of_torchvision("densenet121"), ["features.denseblock2", "features.transition3"], 59),
    "regnet": (of_torchvision("regnet_y_400mf"), ["trunk_output.block2", "trunk_output.block4"], 53),
    "convnext": (of_timm("convnext_atto"), ["stages.1", "stages.3"], 0),
    "vit": (of_timm("vit_tiny_patch16_224", img_size=64), ["blocks.3", "blocks.8"], 0),
    "stochastic mobilenet_v2": (
        lambda: fuse_activations(convert_model(MobileNetV2(), 0.5)), ["features.6", "features.17"], 52,
    ),
    "stochastic efficientnet_b0": (
        lambda: fuse_activations(convert_model(of_timm("efficientnet_b0")(), 0.5)), ["blocks.2", "blocks.6"], 49,
    ),
}  # fmt: skip


def trained(network):
    """The network with statistics and weights of its norms as if it had learned some, in training mode."""
    torch.manual_seed(0)
    for module in network.modules():
        if hasattr(module, "running_mean") and module.running_mean is not None:
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
            for tensor, mean in ((module.weight, 1), (module.bias, 0)):
                if tensor is not None:
                    nn.init.normal_(tensor, mean, 0.2)
    return network.train()


def expected(network, layers, *args):
    with torch.no_grad():
        return IntermediateLayerGetter(copy.deepcopy(network).eval(), layers, keep_output=False)(*args)[0]


def error(found, right):
    """The largest relative error of a layer's output."""
    assert list(found) == list(right)
    return max((found[name].double() - value.double()).norm() / value.norm() for name, value in right.items())


def norms_of(network):
    return [module for module in network.modules() if isinstance(module, _BatchNorm)]


@pytest.mark.no_cover
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_give_what_they_gave(name):
    make, layers, number = NETWORKS[name]
    network, images = trained(make()), torch.randn(2, 3, 64, 64)
    before, right = copy.deepcopy(network.state_dict()), expected(network, layers, images)
    source = frozen(network, layers)
    first = source(images)
    assert error(first, right) < 1e-5
    assert source(images)[layers[0]].equal(first[layers[0]])
    assert len(source._folded) == number
    reduced = frozen(network, layers, torch.bfloat16)(images)
    assert all(value.dtype == torch.bfloat16 for value in reduced.values())
    assert error(reduced, right) < 0.03
    whole = frozen(network)(images)
    torch.testing.assert_close(whole, copy.deepcopy(network).eval()(images).detach(), rtol=1e-4, atol=1e-4)
    assert network.training and all(value.equal(before[name]) for name, value in network.state_dict().items())


class Net(nn.Module):
    """Convolution, norm and activation, twice, with a head."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)), inplace=True)
        return self.head(x.mean((2, 3)))


def check(network, number, *args, layers=()):
    """That so many batch norms are folded, and that the output is what it was."""
    right = copy.deepcopy(network).eval()(*args)
    source = frozen(network, layers)
    found = source(*args)
    if not layers:
        torch.testing.assert_close(found, right)
    assert len(source._folded) == number
    assert len(norms_of(source.module)) == len(norms_of(network)) - number
    return source


x = torch.randn(4, 3, 9, 9)


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"eps": 0.1}, {"momentum": None}], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("layer", "norm", "sizes"),
    [
        (nn.Linear, nn.BatchNorm1d, ()),
        (nn.Conv1d, nn.BatchNorm1d, (7,)),
        (nn.Conv2d, nn.BatchNorm2d, (6, 7)),
        (nn.Conv3d, nn.BatchNorm3d, (4, 5, 6)),
        (nn.ConvTranspose1d, nn.BatchNorm1d, (7,)),
        (nn.ConvTranspose2d, nn.BatchNorm2d, (6, 7)),
        (nn.Conv2d, nn.SyncBatchNorm, (6, 7)),
        (nn.Linear, StochNorm1d, ()),
        (nn.Conv3d, StochNorm3d, (4, 5, 6)),
        (nn.Conv1d, SyncStochNorm, (7,)),
    ],
)
def test_every_layer_takes_the_norm_behind_it(layer, norm, sizes, bias, options):
    first = layer(4, 6, bias=bias) if layer is nn.Linear else layer(4, 6, 3, bias=bias, stride=2)
    network = trained(nn.Sequential(first, norm(6, **options), nn.Tanh()))
    for dtype in (torch.float32, torch.float64):
        check(network.to(dtype), 1, torch.randn(5, 4, *sizes, dtype=dtype))


@pytest.mark.parametrize("kind", ["BatchNormAct2d", "SyncBatchNormAct", "FrozenBatchNormAct2d", "StochNormAct2d"])
@pytest.mark.parametrize("act", [nn.ReLU, nn.SiLU, None])
def test_timms_norms_leave_their_activation(kind, act):
    timms = library("timm").layers
    if kind == "StochNormAct2d":
        norm = StochNormAct2d(8, act_layer=act)
    elif kind == "SyncBatchNormAct":
        norm = timms.convert_sync_batchnorm(timms.BatchNormAct2d(8, act_layer=act))
    else:
        norm = getattr(timms, kind)(8, act_layer=act)
    assert type(norm).__name__ == kind
    network = trained(nn.Sequential(nn.Conv2d(3, 8, 3), norm))
    torch.testing.assert_close(frozen(network)(x), copy.deepcopy(network).eval()(x).detach())
    source = frozen(network, ["1", "1.act"])
    assert error(source(x), expected(network, ["1", "1.act"], x)) < 1e-6
    assert len(source._folded) == 1


def test_torchvisions_frozen_batch_norm_is_one():
    operations = library("torchvision").ops.misc
    network = trained(nn.Sequential(nn.Conv2d(3, 8, 3), operations.FrozenBatchNorm2d(8)))
    source = frozen(network)
    torch.testing.assert_close(source(x), network(x).detach())
    assert len(source._folded) == 1


def grouped_transposed():
    return nn.Sequential(nn.ConvTranspose2d(3, 6, 3, groups=3), nn.BatchNorm2d(6))


class Parts(nn.Module):
    """A network whose forward pass is a function of its modules; they are registered in another order."""

    def __init__(self, function, **modules):
        super().__init__()
        self.function = function
        for name, module in reversed(modules.items()):
            setattr(self, name, module)

    def forward(self, *args):
        return self.function(self, *args)


class BatchStatistics(nn.BatchNorm2d):
    """As in test-time adaptation."""

    def train(self, mode=True):
        return super().train(True)


class Scaled(nn.Conv2d):
    def _conv_forward(self, *args):
        return 2 * super()._conv_forward(*args)


class Squared(nn.BatchNorm2d):
    def forward(self, input):
        return super().forward(input * input)


def hooked(norm=False, pre=False):
    network = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6))
    module = network[1 if norm else 0]
    if pre:
        module.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    else:
        module.register_forward_hook(lambda module, args, output: output + 1)
    return network


def two_weights_in_one():
    network = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3))
    network[2].weight = network[0].weight
    return network


def with_own_forward(number):
    network = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6))
    forward = network[number].forward
    network[number].forward = lambda input: forward(input) * 2
    return network


CONV, NORM = {"conv": nn.Conv2d(3, 3, 3)}, {"norm": nn.BatchNorm2d(3)}
LEFT_ALONE = {
    "the output goes elsewhere, too": lambda: Parts(lambda m, x: m.norm(y := m.conv(x)) + y, **CONV, **NORM),
    "it is returned": lambda: Parts(lambda m, x: (m.norm(y := m.conv(x)), y)[0] + 0 * y, **CONV, **NORM),
    "it is changed in place after": lambda: Parts(lambda m, x: (m.norm(y := m.conv(x)), y.add_(1))[0], **CONV, **NORM),
    "it is read by a view": lambda: Parts(lambda m, x: m.norm(y := m.conv(x)) + y[:, :1], **CONV, **NORM),
    "something is between": lambda: Parts(lambda m, x: m.norm(m.conv(x) + 1), **CONV, **NORM),
    "an activation is between": lambda: Parts(lambda m, x: m.norm(m.conv(x).relu()), **CONV, **NORM),
    "the norm comes first": lambda: Parts(lambda m, x: m.conv(m.norm(x)), **CONV, **NORM),
    "two norms take it": lambda: Parts(
        lambda m, x: m.norm(y := m.conv(x)) + m.other(y), other=nn.BatchNorm2d(3), **CONV, **NORM
    ),
    "the layer runs twice": lambda: Parts(lambda m, x: m.norm(m.conv(m.conv(x))), **CONV, **NORM),
    "the norm runs twice": lambda: Parts(lambda m, x: m.norm(m.norm(m.conv(x))), **CONV, **NORM),
    "the weight is used elsewhere": lambda: Parts(
        lambda m, x: m.norm(m.conv(x)) + m.conv.weight.mean(), **CONV, **NORM
    ),
    "a statistic is used elsewhere": lambda: Parts(
        lambda m, x: m.norm(m.conv(x)) + m.norm.running_var.mean(), **CONV, **NORM
    ),
    "two layers share a weight": two_weights_in_one,
    "the weight is parametrised": lambda: nn.Sequential(
        parametrizations.weight_norm(nn.Conv2d(3, 6, 3)), nn.BatchNorm2d(6)
    ),
    "the norm takes the batch's statistics": lambda: nn.Sequential(nn.Conv2d(3, 6, 3), BatchStatistics(6)),
    "the norm has none": lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, track_running_stats=False)),
    "the layer does more": lambda: nn.Sequential(Scaled(3, 6, 3), nn.BatchNorm2d(6)),
    "the norm does more": lambda: nn.Sequential(nn.Conv2d(3, 6, 3), Squared(6)),
    "the layer's forward is its own": lambda: with_own_forward(0),
    "the norm's forward is its own": lambda: with_own_forward(1),
    "the layer has a hook": hooked,
    "the layer has a hook before it": lambda: hooked(pre=True),
    "the norm has a hook": lambda: hooked(norm=True),
    "the norm has a hook before it": lambda: hooked(norm=True, pre=True),
    "a transposed convolution has groups": grouped_transposed,
    "channels are elsewhere, of which there are as many": lambda: Parts(
        lambda m, x: m.norm(m.conv(x[:, :, 0])), conv=nn.Linear(9, 3), norm=nn.BatchNorm1d(3)
    ),
    "a layer norm": lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.GroupNorm(2, 6)),
}


@pytest.mark.parametrize("make", LEFT_ALONE.values(), ids=LEFT_ALONE)
def test_norms_that_can_not_be_folded_are_left_alone(make):
    check(trained(make()), 0, x)


def test_a_hook_on_what_only_passes_the_output_on_sees_what_it_saw():
    seen = []
    network = trained(nn.Sequential(nn.Sequential(nn.Conv2d(3, 6, 3)), nn.Identity(), nn.BatchNorm2d(6)))
    network[1].register_forward_hook(lambda module, args, output: seen.append(output))
    right = network.eval()[0](x)
    check(network, 0, x)
    assert all(output.equal(right) for output in seen)


def test_shared_modules_under_several_names_are_folded_once():
    network = Net()
    network.again = nn.ModuleList([network.conv1, network.bn1])
    check(trained(network), 2, x)


def test_what_is_asked_for_is_not_changed():
    network = trained(nn.Sequential(nn.Sequential(nn.Conv2d(3, 6, 3)), nn.Identity(), nn.BatchNorm2d(6), nn.ReLU(True)))
    for asked, number in (("0", 0), ("0.0", 0), ("1", 0), ("2", 1), ("3", 1)):
        source = frozen(network, [asked])
        assert error(source(x), expected(network, [asked], x)) < 1e-6
        assert error(source(x), expected(network, [asked], x)) < 1e-6
        assert len(source._folded) == number, asked


def test_nothing_runs_behind_the_last_layer_asked_for():
    network = trained(Net())
    source = frozen(network, ["conv2", "conv1"])
    source(x)

    def forward(*args):
        raise AssertionError("it ran")

    for name in ("bn2", "head"):
        getattr(source.module, name).forward = forward
    assert list(source(x)) == ["conv2", "conv1"]
    with pytest.raises(AssertionError, match="it ran"):
        source.module(x)


def test_layers_that_run_several_times_and_aliases():
    network = Parts(lambda m, x: m.conv(m.norm(m.conv(m.conv(x)))).mean(), **CONV, **NORM)
    right = expected(network, {"conv": "maps"}, x)["maps"]
    source = frozen(network, {"conv": "maps"})
    for _ in range(2):
        found = source(x)["maps"]
        assert len(found) == len(right) == 3
        torch.testing.assert_close(found, right)


def test_it_is_nobodys_and_moves_along():
    class Module(nn.Module):
        def __init__(self):
            super().__init__()
            self.source = frozen(trained(Net()), ["conv2"])

    module = Module()
    assert not list(module.parameters()) and not list(module.buffers())
    weights = list(module.source.module.parameters())
    assert weights and not any(weight.requires_grad for weight in weights)
    for _ in range(2):
        module.train()
        assert not module.source.training and not any(m.training for m in module.source.module.modules())
        module.double()
        assert module.source(x.double())["conv2"].dtype == torch.float64
        module.float()
        module.source(x)
    assert "2 batch norms" not in repr(module) and "1 batch norms folded" in repr(module)
    meta = copy.deepcopy(module).to("meta")
    assert meta.source(x.to("meta"))["conv2"].device.type == "meta"


def test_a_state_is_loaded_beside_the_network_that_it_was_saved_with():
    network = trained(Net())
    saved = nn.ModuleDict({"source": frozen(network, ["conv2"]), "head": nn.Linear(2, 2)})
    saved["source"](x)
    state = saved.state_dict()
    assert [(name, value.shape) for name, value in state.items() if "source" in name] == [
        ("source._extra_state", (32,))
    ]
    again = nn.ModuleDict({"source": frozen(network.to(memory_format=torch.channels_last)), "head": nn.Linear(2, 2)})
    again.load_state_dict(state)
    assert again["head"].weight.equal(saved["head"].weight)
    other = nn.ModuleDict({"source": frozen(Net()), "head": nn.Linear(2, 2)})
    with pytest.raises(RuntimeError, match=r"saved with another frozen network.*from the same pretrained weights"):
        other.load_state_dict(state)


def test_networks_whose_state_is_more_than_numbers(monkeypatch):
    class Counting(nn.Module):
        def get_extra_state(self):
            return (number for number in range(3))

        def forward(self, x):
            return x

    network = trained(nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), Counting()))
    first, second = frozen(network), frozen(network)
    torch.testing.assert_close(first(x), network.eval()(x).detach())
    assert first.get_extra_state().equal(second.get_extra_state())

    def unknown(value):
        if isinstance(value, dict):
            raise Unknown("a tensor of another class")
        return fingerprint(value)

    monkeypatch.setattr(importlib.import_module("talib_fast.finetune.frozen"), "fingerprint", unknown)
    assert frozen(network).get_extra_state().equal(frozen(network[:2]).get_extra_state())


def test_replicas_of_data_parallel_have_a_network_on_their_device():
    source = frozen(trained(Net()), {"conv2": "maps"})
    for _ in range(2):
        here, there = source._replicate_for_data_parallel(), source._replicate_for_data_parallel()
        assert here(x)["maps"].equal(source(x)["maps"])
        assert there(x.to("meta"))["maps"].device.type == "meta"
    assert len(source._folded) == 1 and source._replicas[x.device] is source and len(source._replicas) == 2
    copied = copy.deepcopy(source).double()
    assert copied(x.double())["maps"].dtype == torch.float64 and not copied._replicas


def test_another_dtype_stays():
    source = frozen(trained(Net()), ["conv2"], torch.bfloat16)
    assert source(x)["conv2"].dtype == torch.bfloat16
    source.double()
    assert source(x)["conv2"].dtype == torch.bfloat16
    assert source.module.bn2.running_var.dtype == torch.float32
    assert source(x.bfloat16())["conv2"].dtype == torch.bfloat16


def test_inputs_of_the_first_call_may_have_that_dtype():
    network = trained(Net())
    source = frozen(network, ["conv2"], torch.bfloat16)
    assert error(source(x.bfloat16()), expected(network, ["conv2"], x)) < 0.02


def test_inputs_may_be_changed_in_place():
    network = trained(Parts(lambda m, x: m.norm(m.conv(x.mul_(2).add_(1))), **CONV, **NORM))
    right = copy.deepcopy(network).eval()(x.clone()).detach()
    source = frozen(network)
    given = x.clone()
    torch.testing.assert_close(source(given), right)
    assert given.equal(2 * x + 1)
    with torch.inference_mode():
        torch.testing.assert_close(frozen(network)(x.clone()), right)


def test_structures_and_keywords_come_through():
    network = trained(Parts(lambda m, batch, scale=1: m.norm(m.conv(batch["x"])) * scale, **CONV, **NORM))
    network.forward = lambda batch, scale=1: network.function(network, batch, scale)
    right = network.eval()({"x": x}, scale=2).detach()
    source = frozen(nn.Sequential(network), dtype=torch.float64)
    source.module.forward = lambda batch, scale=1: network.function(source.module[0], batch, scale)
    found = source({"x": x}, scale=2)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found.float(), right)


@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("way", [copy.deepcopy, lambda source: pickle.loads(pickle.dumps(source))])
def test_copies(way, called):
    source = frozen(trained(Net()), ["conv2"], torch.bfloat16)
    if called:
        source(x)
    copied = way(source)
    right = source(x)["conv2"]
    assert copied(x)["conv2"].equal(right)
    assert copied.module is not source.module
    copied.module.conv2.weight.data.zero_()
    assert source(x)["conv2"].equal(right)


def test_getters_take_it():
    network = trained(Net())
    layers = {"conv2": "second", "bn1": "first"}
    source = frozen(network, layers)
    getter = IntermediateLayerGetter(source, layers)
    for _ in range(3):
        maps, output = getter(x)
        assert error(maps, expected(network, layers, x)) < 1e-6
        assert list(output) == ["second", "first"]
    with pytest.raises(RuntimeError, match="layer 'head' did not run"):
        IntermediateLayerGetter(source, ["head"])(x)


def test_a_getter_that_comes_first_is_seen():
    network = trained(Net())
    getter = IntermediateLayerGetter(frozen(network), ["conv1", "conv2"])
    for _ in range(2):
        maps, output = getter(x)
        assert error(maps, expected(network, ["conv1", "conv2"], x)) < 1e-6
        torch.testing.assert_close(output, copy.deepcopy(network).eval()(x))


def test_who_looks_at_a_layer_that_changed_is_told():
    source = frozen(trained(Net()))
    source(x)
    with pytest.raises(RuntimeError, match=r"the output of 'conv1' is not the network's.*request the layer"):
        IntermediateLayerGetter(source, ["conv1"])(x)
    source(x)


def test_distances_and_gradients_are_those_of_the_network():
    network = trained(Net())
    target = IntermediateLayerGetter(network, ["conv1", "conv2"])
    source = frozen(network, ["conv1", "conv2"])
    found = []
    for maps in (expected(network, ["conv1", "conv2"], x), source(x)):
        loss = BehavioralRegularization()(maps, target(x)[0])
        found.append([loss.detach(), *torch.autograd.grad(loss, [network.conv1.weight, network.conv2.weight])])
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


def test_inference_mode():
    source = frozen(trained(Net()), ["conv2"])
    with torch.inference_mode():
        right = source(x)["conv2"]
    maps = source(x)
    assert not maps["conv2"].is_inference() and not maps["conv2"].requires_grad
    target = maps["conv2"].clone().requires_grad_()
    BehavioralRegularization()([right], [target]).backward()
    assert not any(tensor.is_inference() for tensor in source.module.state_dict().values())


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float64])
def test_autocast(dtype):
    network = trained(Net())
    source = frozen(network, ["conv2"], dtype)
    right = expected(network, ["conv2"], x)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            found = source(x)
        assert {value.dtype for value in found.values()} == {dtype or torch.bfloat16}
        assert error(found, right) < (0.02 if dtype is None else 1e-6)
    assert len(source._folded) == 1


def test_compiled_and_scripted_parts():
    network = trained(Net())
    network.conv1 = torch.compile(network.conv1, backend="eager")
    compiled = torch.compile(network, backend="eager")
    source = frozen(compiled, ["conv2"])
    assert error(source(x), expected(network, ["conv2"], x)) < 1e-6
    scripted = nn.Sequential(nn.Conv2d(3, 6, 3), torch.jit.script(nn.ReLU()), nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6))
    check(trained(scripted), 1, x)


def test_threads_learn_once(monkeypatch):
    learned = []
    monkeypatch.setattr(folding._Watch, "run", _counting(folding._Watch.run, learned))
    source = frozen(trained(Net()), ["conv2"])
    right, found = frozen(trained(Net()), ["conv2"])(x)["conv2"], []
    barrier = threading.Barrier(4)

    def work():
        barrier.wait()
        found.append(source(x)["conv2"])

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(learned) == 2
    assert len(found) == 4 and all(value.equal(found[0]) for value in found)
    torch.testing.assert_close(found[0].shape, right.shape)


def _counting(method, calls):
    def counted(*args):
        calls.append(args)
        return method(*args)

    return counted


def test_an_error_of_the_networks_own_comes_through():
    source = frozen(trained(Net()), ["conv2"])
    with pytest.raises(RuntimeError, match="expected input"):
        source(x[:, :1])
    assert error(source(x), expected(source.module, ["conv2"], x)) < 1e-6


def test_arguments_are_checked():
    network = Net()
    with pytest.raises(AttributeError, match="Module conv3 not found in Net; did you mean"):
        frozen(network, ["conv3"])
    with pytest.raises(TypeError, match="expected return_layers to be a list of names, got the string"):
        frozen(network, "conv1")
    for dtype in (torch.int8, "bfloat16", torch.complex64):
        with pytest.raises(TypeError, match="expected dtype to be float16, bfloat16, float32, float64 or None, got"):
            frozen(network, (), dtype)
    with pytest.raises(TypeError, match=r"expected model to be a torch\.nn\.Module, got int"):
        frozen(3)
    with pytest.raises(TypeError, match="expected model to be an ordinary network, got a frozen one"):
        frozen(frozen(network))
    with pytest.raises(TypeError, match="expected model to be an ordinary network, got a scripted one"):
        frozen(torch.jit.script(network))


def test_without_torchs_watch_nothing_is_folded(monkeypatch):
    monkeypatch.setattr(folding, "watching_operators", lambda look: None)
    network = trained(Net())
    source = frozen(network, ["conv2"])
    assert error(source(x), expected(network, ["conv2"], x)) == 0
    assert not source._folded


def test_watching_operators_says_none_without_torchs_class(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils._python_dispatch", None)
    assert torch_private.watching_operators(print) is None


class TestCompiled:
    @pytest.mark.parametrize("dtype", [None, torch.bfloat16])
    @pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=needs_inductor)])
    def test_one_graph(self, backend, dtype):
        torch._dynamo.reset()
        source = frozen(trained(Net()), ["conv2", "bn1"], dtype)
        right = source(x)
        counter = CompileCounterWithBackend(backend)
        step = torch.compile(source, fullgraph=True, backend=counter)
        for _ in range(2):
            found = step(x)
            assert error(found, right) < (1e-5 if dtype is None else 0.01)
            assert all(value.dtype == right[name].dtype for name, value in found.items())
        assert counter.frame_count == 1

    def test_in_a_compiled_step(self):
        torch._dynamo.reset()
        network, regularization = trained(Net()), BehavioralRegularization()
        source, target = frozen(network, ["conv2"]), IntermediateLayerGetter(network, ["conv2"])
        source(x)

        def step(x):
            return regularization(source(x), target(x)[0])

        right = step(x)
        found = torch.compile(step, fullgraph=True, backend="aot_eager")(x)
        torch.testing.assert_close(found, right)

    def test_a_first_call_that_is_compiled_learns_outside_of_the_graph(self):
        torch._dynamo.reset()
        source = frozen(trained(Net()), ["conv2"])
        counter = CompileCounter()
        step = torch.compile(lambda x: source(x)["conv2"] + 1, backend=counter)
        first = step(x)
        assert len(source._folded) == 1
        counter.clear()
        found = [step(x) for _ in range(3)]
        assert counter.frame_count == 1
        assert all(value.equal(source(x)["conv2"] + 1) for value in (first, *found))

    def test_as_one_graph_it_has_to_be_called_before(self):
        torch._dynamo.reset()
        source = frozen(trained(Net()), ["conv2"])
        with pytest.raises(torch._dynamo.exc.Unsupported, match="make one before it's compiled as one graph"):
            torch.compile(source, fullgraph=True, backend="eager")(x)

    def test_exports(self):
        source = frozen(trained(Net()), dtype=torch.float32)
        right = source(x)
        torch.testing.assert_close(torch.export.export(source, (x,)).module()(x), right)


def test_transforms_of_functions_need_an_ordinary_call_before():
    source = frozen(trained(Net()), ["conv2"])
    with pytest.raises(RuntimeError, match=r"expected the first call of a frozen network.*transform of torch\.func"):
        torch.vmap(source)(x[:, None])
    right = source(x)["conv2"]
    torch.testing.assert_close(torch.vmap(source)(x[:, None])["conv2"][:, 0], right)


class TestPacked:
    """Convolutions with their weights in oneDNN's order."""

    @pytest.fixture(autouse=True)
    def counted(self, monkeypatch):
        self.packed, self.calls = [], []
        monkeypatch.setattr(packing, "pack_convolution_weight", _counting(packing.pack_convolution_weight, self.packed))
        monkeypatch.setattr(packing, "convolve_packed", _counting(packing.convolve_packed, self.calls))

    @staticmethod
    def convolution(dtype=torch.float32, **options):
        torch.manual_seed(2)
        convolution = nn.Conv2d(8, 16, 3, **options).to(dtype)
        packed = copy.deepcopy(convolution)
        undo = packing.pack(packed)
        assert type(packed) is packing.PackedConv2d
        return convolution, packed, undo

    @staticmethod
    def maps():
        return torch.randn(4, 8, 12, 12).contiguous(memory_format=torch.channels_last)

    @pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
    @pytest.mark.parametrize("weights", [torch.contiguous_format, torch.channels_last])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize(
        "options",
        [{}, {"bias": False}, {"stride": 2, "padding": (1, 2)}, {"groups": 8}, {"groups": 4, "dilation": 2}],
        ids=str,
    )
    def test_computes_what_the_plain_one_does(self, options, dtype, weights, layout):
        plain, packed, _ = self.convolution(dtype, **options)
        for size in (4, 1, 6):  # packed for the first
            y = torch.randn(size, 8, 12, 11, dtype=dtype).contiguous(memory_format=layout)
            with torch.no_grad():
                found, right = packed.to(memory_format=weights)(y), plain.to(memory_format=weights)(y)
            torch.testing.assert_close(found, right)
            assert found.is_contiguous(memory_format=torch.channels_last) == right.is_contiguous(
                memory_format=torch.channels_last
            )
        contiguous = torch.contiguous_format
        assert not self.calls or (layout, weights) != (contiguous, contiguous)

    def test_packs_once_and_anew_when_the_weight_is_another(self):
        plain, packed, undo = self.convolution()
        y = self.maps()
        with torch.no_grad():
            packed(y), packed(y)
            assert len(self.packed) == 1 and len(self.calls) == (2 if packed._packed[1] is not None else 0)
            for change in (
                lambda module: module.weight.mul_(2),
                lambda module: setattr(module, "weight", nn.Parameter(module.weight * 2)),
                lambda module: module.double().float(),
            ):
                change(plain), change(packed)
                torch.testing.assert_close(packed(y), plain(y))
            assert len(self.packed) == 4
            for other in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
                assert "_packed" not in vars(other)
                torch.testing.assert_close(other(y), plain(y))
        undo()
        assert type(packed) is nn.Conv2d and "_packed" not in vars(packed)
        torch.testing.assert_close(packed(y), plain(y))

    def test_whatever_looks_closer_meets_the_plain_one(self):
        plain, packed, _ = self.convolution()
        y = self.maps()
        ways = {
            "gradients": lambda module: module(y.clone().requires_grad_()),
            "autocast": lambda module: torch.autocast("cpu", torch.bfloat16)(torch.no_grad()(module))(y),
            "vmap": lambda module: torch.no_grad()(torch.vmap(module))(y[:, None]),
            "compiled": lambda module: torch.compile(torch.no_grad()(module), backend="eager", fullgraph=True)(y),
            "traced": lambda module: torch.no_grad()(torch.jit.trace)(
                copy.deepcopy(module).requires_grad_(False), y, check_trace=False
            )(y),
            "without a batch": lambda module: torch.no_grad()(module)(y[0]),
            "empty": lambda module: torch.no_grad()(module)(y[:0]),
            "on another device": lambda module: torch.no_grad()(copy.deepcopy(module).to("meta"))(y.to("meta")).shape,
        }
        for name, way in ways.items():
            found, right = way(packed), way(plain)
            assert not self.calls, name
            if isinstance(found, torch.Tensor):
                torch.testing.assert_close(found, right)
                assert found.requires_grad == right.requires_grad

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
    def test_other_dtypes_are_left_alone(self, dtype):
        plain, packed, _ = self.convolution(dtype)
        y = self.maps().to(dtype)
        with torch.no_grad():
            torch.testing.assert_close(packed(y), plain(y))
        assert self.packed and not self.calls

    def test_without_torchs_order_the_plain_one_serves(self, monkeypatch):
        y = self.maps()
        plain, packed, _ = self.convolution()
        enabled = torch.backends.mkldnn.enabled
        torch._C._set_mkldnn_enabled(False)
        try:
            with torch.no_grad():
                torch.testing.assert_close(packed(y), plain(y))
        finally:
            torch._C._set_mkldnn_enabled(enabled)
        monkeypatch.setattr(torch_private, "torch", Lacking(torch, "ops.mkldnn"))
        with torch.no_grad():
            plain, packed, _ = self.convolution()
            torch.testing.assert_close(packed(y), plain(y))
        assert len(self.packed) == 2 and not self.calls

    def test_convolutions_that_do_more_are_left_alone(self):
        model = nn.Sequential(Scaled(3, 6, 3), nn.Conv2d(6, 6, 3, padding="same"))
        model.append(nn.Conv2d(6, 6, 3, padding=1, padding_mode="reflect"))
        packing.pack(model)
        assert [type(module) for module in model] == [Scaled, nn.Conv2d, nn.Conv2d]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_cuda_graph(dtype):
    network, images = trained(of_torchvision("resnet50")()).cuda(), torch.randn(8, 3, 64, 64, device="cuda")
    source = frozen(network, RESNET_LAYERS, dtype)
    with (
        pytest.raises(RuntimeError, match="expected the first call of a frozen network"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        images.add(1)  # of an empty graph torch warns
        source(images)
    source(images)
    graph, filled = capture(lambda: source(images))
    images.copy_(torch.randn_like(images))
    graph.replay()
    right = source(images)
    assert error(filled, right) < (1e-5 if dtype is None else 0.01)
    with no_synchronisation():
        source(images)


class TestFolded:
    """What ``Relationship``, ``collect_pretrain_labels`` and ``channel_attention`` do to a network meanwhile."""

    def test_the_network_is_as_it_was_afterwards(self):
        network = trained(Net())
        before = dict(network.named_parameters()), dict(network.named_buffers()), repr(network)
        for fails in (False, True):
            try:
                with evaluating(network), folded(network) as call, torch.no_grad():
                    first, second = call(x), call(x)
                    assert not norms_of(network)
                    torch.testing.assert_close(first, second)
                    if fails:
                        raise KeyError
            except KeyError:
                pass
            assert network.training
            after = dict(network.named_parameters()), dict(network.named_buffers()), repr(network)
            assert after[2] == before[2]
            for now, then in zip(after[:2], before[:2], strict=True):
                assert list(now) == list(then) and all(now[name] is then[name] for name in then)

    def test_networks_in_use_as_they_are_are_left_alone(self):
        network = trained(Net()).eval()
        for model in (
            torch.compile(network, backend="eager"),
            nn.Sequential(torch.compile(network, backend="eager")),
            torch.jit.script(network),
        ):
            with folded(model) as call, torch.no_grad():
                call(x), call(x)
                assert len(norms_of(network)) == 2
        with folded(network) as call, torch.no_grad():
            with pytest.raises(RuntimeError, match="expected input"):
                call(x[:, :1])
            assert len(norms_of(network)) == 2

    @staticmethod
    def batches():
        generator = torch.Generator().manual_seed(1)
        images = torch.randn(24, 3, 9, 9, generator=generator)
        return [(images[i : i + 4], torch.arange(4) % 3) for i in range(0, 24, 4)]

    @staticmethod
    def counted(network):
        """The network, and what its norms were given."""
        seen = []
        for norm in norms_of(network):
            forward = norm._check_input_dim
            norm._check_input_dim = lambda input, forward=forward: seen.append(len(input)) or forward(input)
        return network, seen

    def test_labels_are_collected_without_norms_from_the_second_batch_on(self):
        network, seen = self.counted(trained(Net()))
        right = torch.cat([copy.deepcopy(network).eval()(images).detach() for images, _ in self.batches()])
        del seen[:]
        found = collect_pretrain_labels(self.batches(), network, "cpu", progress=False)
        torch.testing.assert_close(found, right)
        assert len(seen) == 2

    def test_relationships_are_learned_without_norms(self, tmp_path):
        network, seen = self.counted(trained(Net()))
        means = torch.zeros(3, 5, dtype=torch.float64)
        for images, labels in self.batches():
            probabilities = copy.deepcopy(network).eval()(images).softmax(1).detach().double()
            means.index_add_(0, labels, probabilities)
        means /= means.sum(1, keepdim=True)
        del seen[:]
        first = Relationship(self.batches(), network, "cpu", tmp_path / "cache", progress=False).relationship
        torch.testing.assert_close(torch.from_numpy(first), means.float())
        assert len(seen) == 2
        again = Relationship(self.batches(), network, "cpu", tmp_path / "cache", progress=False).relationship
        assert (again == first).all() and len(seen) == 2  # the fingerprint is the network's as it was

    @pytest.mark.parametrize("method", ["exact", "taylor"])
    def test_channel_attention_runs_without_norms(self, method):
        network, seen = self.counted(trained(Net()))
        found = channel_attention(network, self.batches(), ["conv1", "bn2"], progress=False, method=method)
        assert set(seen) == {4} and len(network.bn1._parameters) == 2
        runs = len(seen)
        for norm in (network.bn1, network.bn2):  # nothing to fold any more
            norm.register_forward_hook(lambda *args: None)
        right = channel_attention(network, self.batches(), ["conv1", "bn2"], progress=False, method=method)
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-6)
        assert len(seen) - runs > runs

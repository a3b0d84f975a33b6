"""Norms with an activation in one layer: by themselves, in timm's place, and in timm's networks."""

import contextlib
import copy
import functools
import importlib
import importlib.util
import inspect
import math
import pickle
import sys
import warnings

import pytest
import torch
from rank_support import needs_gloo, spawn_ranks
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel

from talib_fast import finetune
from talib_fast.finetune import norm_act
from talib_fast.finetune.norm_act import TIMMS_NORMS
from talib_fast.finetune.norms import activation_of
from talib_fast.finetune.stochnorm import (
    StochNorm1d,
    StochNorm2d,
    StochNormAct2d,
    SyncStochNorm,
    SyncStochNormAct,
    convert_model,
    convert_sync,
    restore_batch_norm,
)
from talib_fast.libraries import import_library
from talib_fast.ops.activation import Activation

FORMULAS = {
    "none": (nn.Identity, lambda z: z),
    "relu": (nn.ReLU, lambda z: torch.where(z > 0, z, 0)),
    "relu6": (nn.ReLU6, lambda z: z.clamp(0, 6)),
    "leaky_relu": (functools.partial(nn.LeakyReLU, 0.2), lambda z: torch.where(z < 0, 0.2 * z, z)),
    "silu": (nn.SiLU, lambda z: z / (1 + torch.exp(-z))),
    "hardswish": (nn.Hardswish, lambda z: z * (z + 3).clamp(0, 6) / 6),
    "gelu": (nn.GELU, lambda z: z * 0.5 * (1 + torch.erf(z / math.sqrt(2)))),
}
for_every_activation = pytest.mark.parametrize(("act_layer", "formula"), FORMULAS.values(), ids=FORMULAS)


def ready(layer, seed=0):
    """A layer whose parameters and statistics have moved away from what they start with."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in (layer.weight.data, layer.bias.data, layer.running_mean, layer.running_var):
        tensor.copy_(torch.rand(tensor.shape, generator=generator) * 1.5 + 0.5)
    layer.weight.data[::2].neg_()
    return layer


def images(shape=(4, 6, 5, 3), dtype=torch.float64):
    return (2 * torch.randn(shape, dtype=dtype) + 1).requires_grad_()


def drawn(call, *arguments):
    torch.manual_seed(5)
    return call(*arguments)


def derivatives(output, *leaves):
    """The gradients of a function of the output, and of a function of these."""
    first = torch.autograd.grad((output.sin() * output).sum(), leaves, create_graph=True)
    return *first, *torch.autograd.grad(sum(gradient.square().sum() for gradient in first), leaves)


def composed(x, layer, formula, mask):
    """Norm and activation in plain formulas, and the running statistics that follow."""
    shape, n = (1, -1, 1, 1), x.numel() // x.size(1)
    mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
    old_mean, old_var = layer.running_mean.clone(), layer.running_var.clone()
    used_mean, used_var = torch.where(mask, mean, old_mean), torch.where(mask, var, old_var)
    normalized = (x - used_mean.view(shape)) / (used_var.view(shape) + layer.eps).sqrt()
    output = formula(normalized * layer.weight.view(shape) + layer.bias.view(shape))
    moved = 0.9 * old_mean + 0.1 * mean.detach(), 0.9 * old_var + 0.1 * var.detach() * n / (n - 1)
    return output, moved


class TestLayer:
    @for_every_activation
    @pytest.mark.parametrize("kind", [StochNormAct2d, SyncStochNormAct])
    @pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
    def test_training_is_the_norm_and_then_the_activation(self, act_layer, formula, kind, layout):
        layer = ready(kind(6, act_layer=act_layer).double())
        x = images().detach().contiguous(memory_format=layout).requires_grad_()
        mask = drawn(torch.rand, 6) < 0.5
        leaves = x, layer.weight, layer.bias
        expected, moved = composed(x, layer, formula, mask)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda x: x):
            output = drawn(layer, x)
        torch.testing.assert_close(output, expected)
        assert output.is_contiguous(memory_format=layout)
        torch.testing.assert_close(derivatives(output, *leaves), derivatives(expected, *leaves))
        torch.testing.assert_close((layer.running_mean, layer.running_var), moved)
        assert layer.num_batches_tracked == 1
        assert all(tensor.data_ptr() == x.data_ptr() for tensor in saved if tensor.numel() >= x.numel())

    @for_every_activation
    def test_evaluation(self, act_layer, formula):
        layer, x = ready(StochNormAct2d(6, act_layer=act_layer).double()).eval(), images()
        expected, _ = composed(x, layer, formula, torch.zeros(6, dtype=torch.bool))
        torch.testing.assert_close(layer(x), expected)
        assert layer.num_batches_tracked == 0

    def test_without_running_statistics_it_is_the_batch_s(self):
        layer, x = StochNormAct2d(6, track_running_stats=False, p=0.0).double(), images()
        expected = nn.BatchNorm2d(6).double()(x).relu()
        for training in (True, False):
            torch.testing.assert_close(layer.train(training)(x), expected)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_autocast(self, dtype):
        net, x = nn.Sequential(nn.Conv2d(6, 6, 1), StochNormAct2d(6, act_layer=nn.SiLU)), images(dtype=torch.float32)
        with torch.autocast("cpu", dtype):
            output = net(x)
        assert output.dtype == dtype
        output.float().square().sum().backward()
        assert all(parameter.grad.isfinite().all() for parameter in net.parameters())

    def test_compiles_into_one_graph_for_all_shapes(self):
        kinds = nn.ReLU, nn.LeakyReLU, nn.GELU, nn.Softplus
        net = nn.Sequential(*[ready(StochNormAct2d(6, act_layer=kind)) for kind in kinds]).double()
        twin, x = copy.deepcopy(net), images()
        compiled = torch.compile(twin, fullgraph=True, dynamic=True, backend="aot_eager")
        outputs = drawn(net, x), drawn(compiled, x)
        torch.testing.assert_close(*outputs)
        torch.testing.assert_close(*[torch.autograd.grad(output.sin().sum(), x) for output in outputs])
        torch.testing.assert_close(dict(net.state_dict()), dict(twin.state_dict()))

    def test_constructor(self):
        layer = StochNormAct2d(6, 0.1, None, False, True, True, nn.LeakyReLU, {"negative_slope": 0.3}, False, p=0.25)
        assert (layer.eps, layer.momentum, layer.weight, layer.p) == (0.1, None, None, 0.25)
        assert layer.act.negative_slope == 0.3 and not layer.act.inplace and type(layer.drop) is nn.Identity
        assert StochNormAct2d(6).act.inplace and not StochNormAct2d(6, inplace=None).act.inplace
        assert StochNormAct2d(6, act_kwargs={"inplace": False}).act.inplace is False
        assert type(StochNormAct2d(6, act_layer=nn.Tanh).act) is nn.Tanh  # which can't work in place
        for options in ({"apply_act": False}, {"act_layer": None}):
            assert type(StochNormAct2d(6, **options).act) is nn.Identity
        assert StochNormAct2d(6, drop_layer=functools.partial(nn.Dropout2d, 0.25)).drop.p == 0.25
        assert SyncStochNormAct(6, act_layer=nn.SiLU, process_group=None, device="meta").weight.is_meta
        with pytest.raises(TypeError, match="unexpected keyword argument"):
            StochNormAct2d(6, act_layer=nn.ReLU, act_kwargs={"slope": 1})
        with pytest.raises(ValueError, match="expected p in"):
            StochNormAct2d(6, p=2)
        with pytest.raises(ValueError, match="expected 4D input"):
            StochNormAct2d(6)(torch.randn(2, 6))

    def test_representation(self):
        layer = StochNormAct2d(6, p=0.25)
        assert layer.extra_repr() == nn.BatchNorm2d(6).extra_repr() + ", p=0.25"
        assert [name for name, _ in layer.named_children()] == ["drop", "act"]

    @pytest.mark.parametrize("kind", [StochNormAct2d, SyncStochNormAct])
    def test_copies(self, kind):
        layer, x = kind(6, act_layer=nn.SiLU, p=0.25).double(), images()
        layer(x)
        twins = copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), AveragedModel(layer).module
        fresh = kind(6, act_layer=nn.SiLU, p=0.25).double()
        fresh.load_state_dict(layer.state_dict())
        expected = drawn(layer, x)
        for twin in (*twins, fresh):
            assert type(twin) is kind and twin.p == 0.25
            torch.testing.assert_close(drawn(twin, x), expected)
        assert [*layer.state_dict()] == [*nn.BatchNorm2d(6).state_dict()]

    def test_symbolic_graphs_take_it_whole(self):
        layer, x = ready(StochNormAct2d(6, act_layer=nn.SiLU).double()), images()
        twin, graph = copy.deepcopy(layer), torch.fx.symbolic_trace(nn.Sequential(layer))
        assert [node.op for node in graph.graph.nodes] == ["placeholder", "call_module", "output"]
        torch.testing.assert_close(drawn(graph, x), drawn(twin, x))
        with pytest.raises(RuntimeError, match="can't trace a StochNormAct2d alone in training mode"):
            torch.fx.symbolic_trace(layer)
        torch.testing.assert_close(torch.fx.symbolic_trace(layer.eval())(x), layer(x))

    def test_tracing_and_scripting(self):
        layer, x = ready(StochNormAct2d(6, act_layer=nn.SiLU)).eval(), torch.randn(2, 6, 3, 3)
        torch.testing.assert_close(torch.export.export(layer, (x,)).module()(x), layer(x))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.testing.assert_close(torch.jit.trace(layer, x)(x), layer(x))
            with pytest.raises(RuntimeError, match=r"torch.jit.script can't compile StochNormAct2d: .*restore_batch"):
                torch.jit.script(layer)

    @pytest.mark.parametrize("own", [nn.Identity, nn.ReLU, nn.Tanh])
    def test_what_follows_the_layer(self, own):
        layer, x, added = ready(StochNormAct2d(6, act_layer=own).double()), images(), torch.randn(4, 6, 5, 3).double()
        twin = copy.deepcopy(layer)
        torch.testing.assert_close(
            drawn(layer.followed_by, x, Activation("relu"), lambda: added),
            (drawn(twin, x) + added).relu(),
            rtol=0,
            atol=1e-14,
        )


class Loud(nn.ReLU):
    pass


def hook_of(register, part):
    def make():
        layer = StochNormAct2d(6, inplace=False)  # which a backward hook asks for
        getattr(getattr(layer, part), register)(lambda *_: layer.seen.append(part))
        return layer

    return make


def with_forward_of_its_own():
    layer = StochNormAct2d(6)
    layer.act.forward = lambda x: layer.seen.append("act") or nn.functional.relu(x)
    return layer


class TestFallbacks:
    """What the operation doesn't take along is called, by the same masks."""

    @pytest.mark.parametrize(
        ("make", "calls"),
        {
            "hook": (hook_of("register_forward_hook", "act"), ["act"]),
            "hook of drop": (hook_of("register_forward_hook", "drop"), ["drop"]),
            "pre-hook": (hook_of("register_forward_pre_hook", "drop"), ["drop"]),
            "backward hook": (hook_of("register_full_backward_hook", "act"), ["act"]),
            "backward pre-hook": (hook_of("register_full_backward_pre_hook", "act"), ["act"]),
            "forward of its own": (with_forward_of_its_own, ["act"]),
            "subclass": (lambda: StochNormAct2d(6, act_layer=Loud), []),
            "unknown": (lambda: StochNormAct2d(6, act_layer=nn.Softplus), []),
            "approximation": (lambda: StochNormAct2d(6, act_layer=nn.GELU, act_kwargs={"approximate": "tanh"}), []),
            "drop": (lambda: StochNormAct2d(6, drop_layer=functools.partial(nn.Dropout, 0.5)), []),
            "two activations": (lambda: StochNormAct2d(6, drop_layer=nn.SiLU), []),
        }.values(),
    )
    def test_equal_the_layers_one_by_one(self, make, calls):
        layer = ready(make().double())
        drop, act = copy.deepcopy(layer.drop), copy.deepcopy(layer.act)
        for part in (drop, act):
            part.__dict__.pop("forward", None)
            for hooks in (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks):
                hooks.clear()
        norm, x = ready(StochNorm2d(6).double()), images()
        layer.seen = []
        outputs = drawn(layer, x), drawn(lambda: act(drop(norm(x))))
        torch.testing.assert_close(*outputs, rtol=0, atol=0)
        torch.testing.assert_close(*[torch.autograd.grad(output.sin().sum(), x) for output in outputs])
        torch.testing.assert_close(layer.running_var, norm.running_var)
        assert layer.seen == calls

    def test_hooks_of_all_modules(self):
        layer, seen = StochNormAct2d(6).double(), []
        handle = register_module_forward_hook(lambda module, *_: seen.append(module))
        try:
            layer(images())
        finally:
            handle.remove()
        assert seen == [layer.drop, layer.act, layer]

    def test_a_removed_hook_is_gone(self):
        layer, seen = StochNormAct2d(6).double(), []
        handle = layer.act.register_forward_hook(lambda *_: seen.append(1))
        layer(images()), handle.remove(), layer(images())
        assert len(seen) == 1

    @pytest.mark.parametrize(
        "module", [nn.LeakyReLU(math.inf), nn.GELU("tanh"), nn.Hardtanh(0, 6), nn.PReLU(), Loud(), nn.ReLU6()]
    )
    def test_activations_are_known_by_their_settings(self, module):
        if type(module) is nn.ReLU6:
            module.max_val = 5
        assert activation_of(module) is None


def _train_a_rank(rank, folder):
    layer, x = torch.load(f"{folder}/layer.pt", weights_only=False), torch.load(f"{folder}/x.pt").chunk(2)[rank]
    x.requires_grad_()
    torch.manual_seed(rank)
    output = layer(x)
    output.sin().sum().backward()
    torch.distributed.all_reduce(layer.weight.grad)
    torch.save((output.detach(), x.grad, layer.weight.grad, layer.running_var), f"{folder}/{rank}.pt")


@needs_gloo
def test_ranks_equal_one_process_on_the_joined_batch(tmp_path):
    layer, x = ready(StochNormAct2d(6, act_layer=nn.SiLU).double()), images()
    torch.save(convert_sync(copy.deepcopy(layer)), tmp_path / "layer.pt")
    torch.save(x.detach(), tmp_path / "x.pt")
    spawn_ranks(2, _train_a_rank, tmp_path)
    torch.manual_seed(0)  # the first rank's mask
    output = layer(x)
    output.sin().sum().backward()
    outputs, gradients, weights, variances = zip(*[torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)], strict=True)
    torch.testing.assert_close(torch.cat(outputs), output.detach())
    torch.testing.assert_close(torch.cat(gradients), x.grad)
    torch.testing.assert_close(weights, (layer.weight.grad,) * 2)
    torch.testing.assert_close(variances, (layer.running_var,) * 2)


class TestWithoutTimm:
    @pytest.fixture
    def stochnorm(self, monkeypatch):
        """The public module as it is where timm is missing."""
        for name in ("timm", "timm.layers", TIMMS_NORMS):
            monkeypatch.setitem(sys.modules, name, None)
        for name in ("norm_act", "conversion", "stochnorm"):
            monkeypatch.delitem(sys.modules, f"talib_fast.finetune.{name}")
            monkeypatch.setattr(finetune, name, getattr(finetune, name))
        return importlib.import_module("talib_fast.finetune.stochnorm")

    def test_the_layer_works(self, stochnorm):
        layer, x = ready(stochnorm.StochNormAct2d(6, act_layer=nn.SiLU).double()), images()
        assert stochnorm.StochNormAct2d is not StochNormAct2d and isinstance(layer, nn.BatchNorm2d)
        norm = ready(StochNorm2d(6).double())
        torch.testing.assert_close(drawn(layer, x), nn.functional.silu(drawn(norm, x)))
        assert type(stochnorm.convert_sync(layer)) is stochnorm.SyncStochNormAct

    def test_names_of_activations_are_timm_s(self, stochnorm):
        with pytest.raises(
            ValueError, match="expected act_layer to be a class, since timm is not installed, got 'silu'"
        ):
            stochnorm.StochNormAct2d(6, act_layer="silu")

    def test_timm_that_does_not_fit_torch_is_none(self, monkeypatch):
        def fails(name):
            raise RuntimeError("operator torchvision::nms does not exist")

        monkeypatch.setattr(norm_act.importlib, "import_module", fails)
        assert norm_act.imported_from_timm("timm.layers") is None

    def test_conversion(self, stochnorm):
        net = nn.Sequential(nn.BatchNorm2d(6), stochnorm.StochNormAct2d(6))
        assert [layer.p for layer in stochnorm.convert_model(net, 0.25)] == [0.25] * 2
        with pytest.warns(UserWarning, match=r"^restore_batch_norm leaves .* 1 of .*StochNormAct2d \(1\)$"):
            stochnorm.restore_batch_norm(net)
        assert [type(layer) for layer in net] == [nn.BatchNorm2d, stochnorm.StochNormAct2d]


# Of each family with batch norms a small network, and the smallest images that it takes.
NETWORKS = {
    "efficientnet_b0": 32,
    "tf_efficientnetv2_b0": 32,
    "mobilenetv2_035": 32,
    "mobilenetv3_small_050": 32,
    "mobilenetv4_conv_small_035": 32,
    "regnetx_002": 32,
    "densenet121": 32,
    "resnetv2_18d": 32,
    "inception_v3": 96,
    "rexnet_100": 32,
    "dpn48b": 32,
    "cs3darknet_focus_s": 32,
    "tresnet_m": 32,
    "repvgg_a0": 32,
    "darknet17": 32,
    "ghostnet_050": 32,
    "skresnet18": 32,
    "mobilevit_xxs": 32,
    "resnet10t": 32,
    "resnest14d": 32,
    "hrnet_w18_small": 32,
    "dla46x_c": 32,
    "hgnetv2_b0": 32,
    "repvit_m0_9": 32,
    "ese_vovnet19b_dw": 32,
}
PAIRS = {nn.BatchNorm1d: StochNorm1d, nn.BatchNorm2d: StochNorm2d}


@pytest.fixture(scope="module")
def timm():
    if importlib.util.find_spec("timm") is None or importlib.util.find_spec("torchvision") is None:
        pytest.skip("needs timm and torchvision")
    import_library("torchvision")
    return import_library("timm")


@functools.cache
def network(name):
    """To be copied, since it takes longer to make one."""
    return sys.modules["timm"].create_model(name, num_classes=3)


def norms(net):
    return [module for module in net.modules() if isinstance(module, _BatchNorm)]


def train(net, x):
    """A step's loss, gradients and running statistics."""
    net.zero_grad()
    loss = net.train()(x).sin().sum()
    loss.backward()
    return loss, [parameter.grad.clone() for parameter in net.parameters()], dict(net.named_buffers())


class TestTimm:
    def test_one_constructor(self, timm):
        theirs = inspect.signature(timm.layers.BatchNormAct2d.__init__).parameters
        ours = inspect.signature(StochNormAct2d.__init__).parameters
        assert {name: value.default for name, value in theirs.items()} == {
            name: value.default for name, value in ours.items() if name != "p"
        }
        for options in ({}, {"act_layer": "hard_swish"}, {"act_layer": "gelu", "inplace": None}, {"apply_act": False}):
            layer, their = StochNormAct2d(6, **options), timm.layers.BatchNormAct2d(6, **options)
            assert isinstance(layer, timm.layers.BatchNormAct2d)
            assert repr(layer).replace("StochNorm", "BatchNorm").replace(", p=0.5", "") == repr(their)
            assert [*layer.state_dict()] == [*their.state_dict()]
        assert activation_of(timm.layers.activations.GELU()) == activation_of(nn.GELU())

    @pytest.mark.parametrize("name", NETWORKS)
    def test_every_batch_norm_of_a_network_converts(self, timm, name):
        kinds = {**PAIRS, timm.layers.BatchNormAct2d: StochNormAct2d}
        net, x = network(name).eval(), torch.randn(2, 3, NETWORKS[name], NETWORKS[name])
        layers, keys = [(module, type(module)) for module in net.modules()], [*net.state_dict()]
        with torch.no_grad():
            expected = net(x)
            assert convert_model(net, 0.25) is net
            torch.testing.assert_close(net(x), expected, rtol=0, atol=0)
        assert norms(net) and all(norm.p == 0.25 for norm in norms(net))
        assert [(module, type(module)) for module in net.modules()] == [
            (m, kinds.get(kind, kind)) for m, kind in layers
        ]
        assert [*net.state_dict()] == keys
        assert restore_batch_norm(net) is net
        assert [(module, type(module)) for module in net.modules()] == layers
        assert not any(hasattr(norm, "p") for norm in norms(net))

    @pytest.mark.parametrize("name", ["tinynet_e", "mobilenetv3_small_050", "regnetx_002", "cs3darknet_focus_s"])
    def test_networks_train_like_plain_ones_at_p_1(self, timm, name):
        plain, x = copy.deepcopy(network(name)).double(), torch.randn(4, 3, 64, 64, dtype=torch.float64)
        for module in plain.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        converted = convert_model(copy.deepcopy(plain), 1.0)
        torch.testing.assert_close(train(converted, x), train(plain, x))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("name", ["tinynet_e", "mobilenetv3_small_050", "regnetx_002"])
    def test_networks_train_in_channels_last(self, timm, name, dtype):
        net = convert_model(copy.deepcopy(network(name)), 0.5).to(memory_format=torch.channels_last)
        x = torch.randn(4, 3, 64, 64).to(memory_format=torch.channels_last)
        layouts = []
        for norm in norms(net):
            norm.register_forward_hook(
                lambda _, inputs, output: layouts.append([tensor.stride() for tensor in (*inputs, output)])
            )
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss, gradients, _ = train(net, x)
        assert loss.isfinite() and all(gradient.isfinite().all() for gradient in gradients)
        assert all(norm.num_batches_tracked == 1 for norm in norms(net))
        assert all(before == after for before, after in layouts)

    def test_checkpointing_repeats_the_masks(self, timm):
        net, x = convert_model(copy.deepcopy(network("tinynet_e")), 0.5).double(), images((4, 3, 64, 64))
        expected = drawn(train, copy.deepcopy(net), x)
        net.set_grad_checkpointing(True)
        torch.testing.assert_close(drawn(train, net, x), expected)

    def test_the_old_place(self, timm):
        with pytest.warns(FutureWarning) if "timm.models.layers" not in sys.modules else contextlib.nullcontext():
            layer = importlib.import_module("timm.models.layers").BatchNormAct2d(6)
        assert type(convert_model(layer, 0.5)) is StochNormAct2d

    @pytest.mark.parametrize("bare", [True, False])
    def test_synchronised_layers(self, timm, bare):
        if bare:
            layer = timm.layers.SyncBatchNormAct(6)
        else:
            layer = timm.layers.convert_sync_batchnorm(timm.layers.BatchNormAct2d(6, act_layer=nn.SiLU))
        kind, x = type(layer), torch.randn(3, 6, 4, 4)
        expected = layer.eval()(x)
        converted = convert_model(layer, 0.25)
        assert type(converted) is SyncStochNormAct and converted.p == 0.25 and converted is layer
        torch.testing.assert_close(layer(x), expected)
        norm = StochNorm2d(6, p=0.25)
        torch.testing.assert_close(
            drawn(layer.train(), x), (nn.Identity() if bare else nn.SiLU())(drawn(norm, x)), rtol=1e-5, atol=1e-5
        )
        assert type(restore_batch_norm(layer)) is kind is timm.layers.SyncBatchNormAct

    def test_convert_sync(self, timm):
        net = nn.Sequential(timm.layers.BatchNormAct2d(6), nn.BatchNorm2d(6))
        convert_sync(convert_model(net, 0.25))
        assert [(type(layer), layer.p) for layer in net] == [(SyncStochNormAct, 0.25), (SyncStochNorm, 0.25)]
        restore_batch_norm(net)
        assert [type(layer) for layer in net] == [timm.layers.SyncBatchNormAct, nn.SyncBatchNorm]

    def test_a_layer_that_was_made_stochastic_becomes_timm_s(self, timm):
        assert type(restore_batch_norm(StochNormAct2d(6))) is timm.layers.BatchNormAct2d

    def test_parametrised_layers(self, timm):
        layer = timm.layers.BatchNormAct2d(6)
        parametrize.register_parametrization(layer, "weight", nn.Identity())
        kind = type(layer)
        assert isinstance(convert_model(layer, 0.25), StochNormAct2d) and layer.p == 0.25
        layer(torch.randn(3, 6, 2, 2)).sum().backward()
        assert layer.parametrizations.weight.original.grad is not None
        assert type(restore_batch_norm(layer)) is kind
        assert isinstance(convert_sync(convert_model(layer, 0.25)), SyncStochNormAct)

    def test_what_does_more_is_left_alone(self, timm):
        class Louder(timm.layers.BatchNormAct2d):
            pass

        split = timm.layers.convert_splitbn_model(nn.Sequential(timm.layers.BatchNormAct2d(6)))
        net = nn.Sequential(Louder(6), split, timm.layers.GroupNormAct(6, 2), timm.layers.FrozenBatchNormAct2d(6))
        kinds = [type(module) for module in net.modules() if type(module) is not nn.BatchNorm2d]
        with pytest.warns(
            UserWarning,
            match=r"leaves unknown batch norms as they are: 1 of \S*Louder, 1 of \S*SplitBatchNorm2d \(0, 1.0\)$",
        ):
            convert_model(net, 0.5)
        assert [type(module) for module in net.modules() if type(module) is not StochNorm2d] == kinds

    def test_a_network_without_a_norm_that_converts(self, timm):
        with pytest.warns(UserWarning, match="^convert_model found no batch norm to convert$"):
            convert_model(nn.Sequential(timm.layers.EvoNorm2dS0(8), timm.layers.FrozenBatchNormAct2d(6)), 0.5)

    def test_its_tools_keep_the_activations(self, timm):
        net, x = convert_model(copy.deepcopy(network("tinynet_e")), 0.5).eval(), torch.randn(2, 3, 32, 32)
        expected = net(x)
        model = importlib.import_module("timm.utils.model")
        model.freeze(net)
        torch.testing.assert_close(net.train()(x), expected)
        model.unfreeze(net)
        assert {type(norm) for norm in norms(net)} == {timm.layers.BatchNormAct2d}
        convert_model(net, 0.5)
        with pytest.warns(
            UserWarning, match="SyncBatchNorm replaces a StochNormAct2d, which ends stochastic normalisation there"
        ):
            net = timm.layers.convert_sync_batchnorm(net)
        torch.testing.assert_close(net.eval()(x), expected)

    def test_reparametrised_branches(self, timm):
        net, x = convert_model(copy.deepcopy(network("repvgg_a0")), 0.5).eval(), torch.randn(2, 3, 32, 32)
        fused = importlib.import_module("timm.utils.model").reparameterize_model(net)
        torch.testing.assert_close(fused(x), net(x), rtol=1e-4, atol=1e-4)

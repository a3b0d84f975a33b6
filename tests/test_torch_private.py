"""What stands for a private part of torch where that is missing: something slower or an error, never another result."""

import copy
import sys

import pytest
import torch
from private_support import Lacking
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from talib_fast import torch_private
from talib_fast.finetune.stochnorm import StochNorm1d, StochNormAct2d

HOOKS = [
    "_C._current_graph_task_id",
    "_C._autograd._top_saved_tensors_default_hooks",
    "_C._are_functorch_transforms_active",
    "_C._functorch.get_interpreter_stack",
    "_C._functorch.CVmapInterpreterPtr",
    "_C._functorch.is_functorch_wrapped_tensor",
    "_foreach_copy_",
    "autograd.forward_ad._current_level",
]


@pytest.fixture
def lack(monkeypatch):
    """Have the module find no such parts of torch, and layers do what they do without autograd nodes in C++."""
    step = sys.modules["talib_fast.ops.stoch_norm_step"]
    monkeypatch.setattr(step, "_ordinary_step", step._quick_step)

    def take_away(*paths):
        lacking = torch
        for path in paths:
            lacking = Lacking(lacking, path)
        monkeypatch.setattr(torch_private, "torch", lacking)

    return take_away


def layer_and_input(momentum=0.1):
    layer = StochNorm1d(6, momentum=momentum).double()
    layer.running_mean.normal_()
    return layer, torch.randn(8, 6, dtype=torch.float64, requires_grad=True)


def trained(layer, x, call):
    """The gradient and the statistics of two steps."""
    layer, found = copy.deepcopy(layer), []
    for step in range(2):
        torch.manual_seed(step)
        found += torch.autograd.grad(call(layer)(x).pow(3).sum(), (x, layer.weight))
    return found, dict(layer.state_dict())


def reentrant(layer):
    return lambda x: checkpoint(layer, x * 1, use_reentrant=True)


def as_function(layer):
    parameters = {name: parameter.detach().clone() for name, parameter in layer.named_parameters()}

    def gradient(x):
        buffers = {name: buffer.clone() for name, buffer in layer.named_buffers()}
        return torch.func.grad(lambda p: functional_call(layer, (p, buffers), (x,)).pow(3).sum())(parameters)["weight"]

    return gradient


WAYS = {
    "plain": lambda layer: layer,
    "checkpoint": lambda layer: lambda x: checkpoint(layer, x, use_reentrant=False),
    "compiled": lambda layer: torch.compile(layer, backend="aot_eager"),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("hook", HOOKS)
def test_without_one_the_result_is_the_same(lack, hook, momentum, way):
    torch._dynamo.reset()
    layer, x = layer_and_input(momentum)
    expected = trained(layer, x, WAYS["plain"])
    lack(hook)
    torch.testing.assert_close(trained(layer, x, WAYS[way]), expected)


@pytest.mark.parametrize("hook", HOOKS)
def test_reentrant_checkpoints(lack, hook):
    layer, x = layer_and_input()
    found = []
    for way in (WAYS["plain"], reentrant):
        module, y = copy.deepcopy(layer), x.detach().clone().requires_grad_()
        torch.manual_seed(1)
        way(module)(y).pow(3).sum().backward()
        found.append((y.grad, module.weight.grad, dict(module.state_dict())))
        lack(hook)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("hook", HOOKS)
def test_gradients_of_functions(lack, hook):
    layer, x = layer_and_input()
    torch.manual_seed(1)
    expected = as_function(layer)(x.detach())
    lack(hook)
    torch.manual_seed(1)
    torch.testing.assert_close(as_function(layer)(x.detach()), expected)


def test_without_an_answer_whether_a_backward_pass_runs_nothing_is_trained(lack):
    layer, x = layer_and_input()
    lack("_C._current_graph_task_id", "_C._current_autograd_node")
    with pytest.raises(RuntimeError, match=r"StochNorm can't be trained by torch .* whether a backward pass runs"):
        layer(x)
    assert layer.eval()(x).shape == x.shape


def test_transforms_that_are_not_seen_raise(lack):
    layer, x = layer_and_input()
    x = x.detach()
    lack("_C._functorch.get_interpreter_stack", "autograd.forward_ad._current_level")
    with pytest.raises(RuntimeError, match="Functionalize"):
        torch.func.functionalize(layer)(x)
    with pytest.raises(RuntimeError, match="jvp"):
        torch.func.jvp(layer, (x,), (x,))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward"):
        layer(forward_ad.make_dual(x, x))


def test_random_numbers_in_a_map_that_is_not_seen_to_refuse_them_raise(lack):
    layer, x = layer_and_input()
    assert torch.func.jacfwd(layer)(x.detach()).shape == (8, 6, 8, 6)
    lack("_C._functorch.CVmapInterpreterPtr")
    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.jacfwd(layer)(x.detach())


def test_without_an_answer_about_hooks_of_all_modules_each_module_is_called(lack, monkeypatch):
    layer, x, called = StochNormAct2d(6), torch.randn(4, 6, 2, 2), []
    monkeypatch.setattr(nn.ReLU, "forward", lambda _, z: called.append(1) or z.relu())
    twin = copy.deepcopy(layer)
    torch.manual_seed(1)
    expected = layer(x)
    assert not called
    lack("nn.modules.module._has_any_global_hook")
    torch.manual_seed(1)
    torch.testing.assert_close(twin(x), expected)
    assert called


def test_without_tags_for_compiled_checkpoints_none_are_registered(monkeypatch):
    monkeypatch.delattr(torch.utils.checkpoint, "CheckpointPolicy")
    assert torch_private.keep_in_compiled_checkpoints(nn.Identity(), "no_such_operator", 0) is None

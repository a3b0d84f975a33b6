"""A layer's step in training: what the library of autograd nodes serves, and that Python does the same, bit by bit."""

import contextlib
import copy
import functools
import gc
import itertools
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.func import functional_call, functionalize, grad, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from talib_fast import ops
from talib_fast.finetune.stochnorm import StochNorm1d, StochNorm2d, StochNorm3d, StochNormAct2d, SyncStochNorm
from talib_fast.ops.activation import NAMES, NO_ACTIVATION, Activation

step = sys.modules["talib_fast.ops.stoch_norm_step"]
NODE = ops.library.node_function("stoch_norm_step")

needs_node = pytest.mark.skipif(NODE is None, reason=ops.compiled_nodes().status)


@pytest.fixture
def served(monkeypatch):
    """Whether the node's function served each step that asked it."""
    answers = []

    def ask(*args):
        outcome = NODE(*args)
        answers.append(outcome is not None)
        return outcome

    monkeypatch.setattr(step, "_ordinary_step", ask)
    return answers


@contextlib.contextmanager
def in_python():
    """Without the library of autograd nodes."""
    usual, step._ordinary_step = step._ordinary_step, step._quick_step
    try:
        yield
    finally:
        step._ordinary_step = usual


def filled(layer: nn.Module) -> nn.Module:
    for tensor in (*layer.parameters(), *layer.buffers()):
        if tensor.is_floating_point():
            tensor.data.uniform_(0.5, 1.5)
    return layer


def results(layer: nn.Module, call, *leaves: Tensor) -> list[Tensor | None]:
    """All that a step gives and changes: output, gradients, buffers, and the generators' states."""
    layer, leaves = copy.deepcopy(layer), [leaf.detach().clone().requires_grad_(leaf.requires_grad) for leaf in leaves]
    torch.manual_seed(5)
    output = call(layer, *leaves)
    wanted = [tensor for tensor in (*leaves, *layer.parameters()) if tensor.requires_grad]
    torch.manual_seed(6)
    gradients = torch.autograd.grad(output, wanted, torch.randn_like(output)) if wanted else ()
    states = [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]
    return [output.detach(), *gradients, *layer.buffers(), *states]


def assert_identical(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert a.dtype == b.dtype and a.stride() == b.stride()
        assert torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


def compared(layer, call, *leaves):
    """The results, which are the same in Python."""
    mine = results(layer, call, *leaves)
    with in_python():
        assert_identical(mine, results(layer, call, *leaves))
    return mine


def called(layer, x):
    return layer(x)


@needs_node
class TestSameBits:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided", "expanded"])
    def test_every_dtype_and_layout(self, served, dtype, layout, device):
        x = torch.randn(6, 5, 4, 3, device=device).to(dtype)
        x = {
            "contiguous": x,
            "channels_last": x.contiguous(memory_format=torch.channels_last),
            "strided": torch.randn(6, 5, 4, 7, device=device).to(dtype)[..., ::2][..., :3],
            "expanded": x[:, :, :1].expand(6, 5, 4, 3),
        }[layout]

        def laid_out(leaf):  # a clone of it is dense
            return torch.empty_strided(x.size(), x.stride(), dtype=dtype, device=device).copy_(leaf)

        for own in {torch.float32, dtype}:
            layer = filled(StochNorm2d(5, p=0.5, device=device, dtype=own))
            for follows, adds in itertools.product(map(Activation, NAMES), (False, True)):

                def call(layer, leaf, follows=follows, adds=adds):
                    y = leaf.expand_as(x) if layout == "expanded" else laid_out(leaf)
                    return layer.followed_by(y, follows, (lambda: y * 2) if adds else None)

                compared(
                    layer, call, x.detach()[:, :, :1].requires_grad_() if layout == "expanded" else x.requires_grad_()
                )
        assert served and all(served)

    @pytest.mark.parametrize(
        "layer",
        [
            StochNorm1d(6),
            StochNorm1d(6, affine=False),
            StochNorm1d(6, momentum=1.0),
            StochNorm1d(6, momentum=0.0),
            StochNorm1d(6, p=0.0),
            StochNorm1d(6, p=1.0),
            SyncStochNorm(6),
        ],
        ids=str,
    )
    def test_every_kind_of_layer(self, served, layer):
        for shape in ((8, 6), (3, 6, 5)):
            compared(filled(layer), called, torch.randn(shape, requires_grad=True))
        assert served == [True, True]

    def test_every_choice_of_what_is_differentiated(self, served):
        for of_input, of_weight, of_bias in itertools.product((False, True), repeat=3):
            layer, x = filled(StochNorm2d(4)), torch.randn(3, 4, 2, 2, requires_grad=of_input)
            layer.weight.requires_grad_(of_weight), layer.bias.requires_grad_(of_bias)
            for activation in (NO_ACTIVATION, Activation("relu"), Activation("silu")):
                compared(layer, lambda layer, x, a=activation: layer.followed_by(x, a), x)
        assert all(served)

    def test_a_parametrised_weight(self, served):
        layer = filled(StochNorm1d(3))
        parametrize.register_parametrization(layer, "weight", Doubled())
        compared(layer, called, torch.randn(4, 3, requires_grad=True))
        assert served == [True]

    def test_a_layer_without_a_counter_and_a_view_of_a_counter(self, served):
        x = torch.randn(4, 3, 2, requires_grad=True)
        layer = filled(StochNorm1d(3))
        layer.num_batches_tracked = None
        compared(layer, called, x)
        layer.num_batches_tracked = torch.zeros(3, dtype=torch.int64)[1]
        compared(layer, called, x)
        assert served == [True, True]

    def test_autocast(self, served):
        net = filled(nn.Sequential(nn.Conv2d(3, 4, 3), StochNorm2d(4), nn.Conv2d(4, 2, 3), StochNormAct2d(2)))

        def call(net, x):
            with torch.autocast("cpu", torch.bfloat16):
                return net(x)

        compared(net, call, torch.randn(2, 3, 8, 8, requires_grad=True))
        assert served == [True, True]

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_what_is_not_finite(self, served, value):
        x = torch.randn(4, 3, 2, 2)
        x[0, 0, 0, 0] = value
        compared(filled(StochNorm2d(3)), called, x.requires_grad_())
        assert served == [True]

    def test_several_steps_of_a_network(self, served):
        net = filled(nn.Sequential(nn.Linear(5, 6), StochNorm1d(6), nn.ReLU(), nn.Linear(6, 4), StochNorm1d(4)))
        data = [torch.randn(7, 5) for _ in range(5)]

        def trained():
            model = copy.deepcopy(net)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
            torch.manual_seed(0)
            for x in data:
                optimizer.zero_grad()
                model(x).square().sum().backward()
                optimizer.step()
            return list(model.state_dict().values())

        mine = trained()
        assert served == [True] * 10
        with in_python():
            assert_identical(mine, trained())


class Subclass(Tensor):
    pass


class Quiet(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class QuietFunctions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Doubled(nn.Module):
    def forward(self, weight):
        return weight * 2


def within(*contexts):
    """A call of the layer within them."""

    def call(layer, x):
        with contextlib.ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context())
            return layer(x)

    return call


def with_a_dual(layer, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(layer(forward_ad.make_dual(x, torch.ones_like(x)))).primal


def with_a_subclass(name):
    def call(layer, x):
        registered = layer._parameters if name in layer._parameters else layer._buffers
        registered[name] = registered[name].detach().as_subclass(Subclass)
        return layer(x).as_subclass(Tensor)

    return call


def setting(**attributes):
    def call(layer, x):
        for name, value in attributes.items():
            setattr(layer, name, value)
        return layer(x)

    return call


def as_function(layer, x):
    state = {name: tensor.detach().clone() for name, tensor in layer.state_dict().items()}
    return grad(lambda x: functional_call(layer, state, (x,)).square().sum())(x.detach()) * x


def mapped(layer, x):
    layers = [layer] * 2
    state = {
        name: torch.stack([member.state_dict()[name] for member in layers]).detach() for name in layer.state_dict()
    }
    call = functools.partial(functional_call, layer)
    return vmap(call, randomness="different")(state, (torch.stack([x, x]),)).sum(0)


def traced(layer, x):
    return torch.jit.trace(layer, x, check_trace=False)(x)


def compiled(layer, x):
    torch._dynamo.reset()
    return torch.compile(layer, backend="eager", fullgraph=True)(x)


def in_a_backward_pass(layer, x):
    checkpoint(layer, x, use_reentrant=True).sum().backward()
    return x.grad


# who calls, and how many of the layer's steps the node serves
DECLINED = {
    "gradients off": within(torch.no_grad),
    "inference mode": within(torch.inference_mode),
    "hooks for what is saved": within(lambda: saved_tensors_hooks(lambda t: t, lambda t: t)),
    "saved elsewhere": within(save_on_cpu),
    "a checkpoint": lambda layer, x: checkpoint(layer, x, use_reentrant=False),
    "a reentrant checkpoint": lambda layer, x: checkpoint(layer, x, use_reentrant=True),
    "a backward pass": in_a_backward_pass,
    "torch.func.grad": as_function,
    "torch.func.functionalize": lambda layer, x: functionalize(layer)(x),
    "torch.vmap": mapped,
    "a dispatch mode": within(Quiet),
    "a mode for functions": within(QuietFunctions),
    "a default device": within(lambda: torch.device("cpu")),
    "torch.jit.trace": traced,
    "make_fx": lambda layer, x: make_fx(layer)(x)(x),
    "a level of forward mode": within(forward_ad.dual_level),
    "a dual": with_a_dual,
    "a subclass": lambda layer, x: layer(x.as_subclass(Subclass)).as_subclass(Tensor),
    "a weight of a subclass": with_a_subclass("weight"),
    "a bias of a subclass": with_a_subclass("bias"),
    "statistics of a subclass": with_a_subclass("running_var"),
    "a negated view": lambda layer, x: layer(torch._neg_view(x)),
    "no momentum": setting(momentum=None),
    "a momentum that is no float": setting(momentum=1),
    "statistics that stay": setting(track_running_stats=False),
    "a counter of floats": lambda layer, x: layer.type(torch.float32)(x),
    "an empty batch": lambda layer, x: layer(x[:0]).sum() + x,
    "torch.compile": compiled,
}


@needs_node
class TestWhoServes:
    def test_ordinary_training(self, served):
        for layer in (StochNorm1d(3), StochNorm2d(3), StochNorm3d(3), SyncStochNorm(3), StochNormAct2d(3)):
            dims = {StochNorm1d: 2, StochNorm3d: 5}.get(type(layer), 4)
            layer(torch.randn(5, 3, *[2] * (dims - 2)))
        assert served == [True] * 5

    def test_evaluation_does_not_ask(self, served):
        StochNorm1d(3).eval()(torch.randn(5, 3))
        StochNorm1d(3, track_running_stats=False)(torch.randn(5, 3))
        assert not served

    @pytest.mark.filterwarnings("ignore:.*performance drop because we have not yet implemented the batching")
    @pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
    @pytest.mark.parametrize("call", DECLINED.values(), ids=DECLINED)
    def test_python_serves(self, served, call):
        layer = filled(StochNorm1d(3, p=0.5))
        x = torch.randn(4, 3, requires_grad=True)
        torch.manual_seed(1)
        mine = call(copy.deepcopy(layer), x.detach().clone().requires_grad_())
        assert not any(served) and (served or call is compiled)
        with in_python():
            torch.manual_seed(1)
            expected = call(copy.deepcopy(layer), x.detach().clone().requires_grad_())
        assert torch.equal(mine, expected)

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"x": torch.randn(4, 5)}, ValueError, r"expected 3 channels at dimension 1, got input of shape \[4, 5\]"),
            ({"x": torch.randn(1, 3)}, ValueError, "expected more than 1 value per channel when training"),
            ({"x": torch.randn(3)}, ValueError, r"expected 2D or 3D input \(got 1D input\)"),
            ({"x": torch.ones(4, 3, dtype=torch.int32)}, TypeError, r"floating-point tensor, got torch\.int32"),
            ({"x": [1.0]}, TypeError, "floating-point tensor, got list"),
            ({"eps": 0.0}, ValueError, r"expected eps to be positive during training, got 0\.0"),
        ],
    )
    def test_errors_are_python_s(self, served, change, error, message):
        layer, x = StochNorm1d(3, eps=change.get("eps", 1e-5)), change.get("x", torch.randn(4, 3))
        state = torch.get_rng_state()
        with pytest.raises(error, match=message):
            layer(x)
        assert not any(served) and layer.num_batches_tracked == 0 and torch.equal(layer.running_mean, torch.zeros(3))
        assert torch.equal(torch.get_rng_state(), state)

    @pytest.mark.parametrize("wrong", ["weight", "bias"])
    def test_the_operation_s_own_errors_are_the_same(self, served, wrong):
        messages = []
        for way in (contextlib.nullcontext, in_python):
            layer = StochNorm1d(3)
            setattr(layer, wrong, nn.Parameter(torch.ones(5)))
            with way(), pytest.raises(RuntimeError, match=f"expected {wrong} of shape \\[3\\]") as raised:
                layer(torch.randn(4, 3))
            messages.append(str(raised.value))
        assert messages[0] == messages[1]

    def test_other_devices_are_python_s(self, served):
        layer = StochNorm1d(3, device="meta")
        assert layer(torch.randn(4, 3, device="meta")).shape == (4, 3)
        with torch._subclasses.FakeTensorMode():
            fake = StochNorm1d(3)(torch.randn(4, 3))
        assert fake.shape == (4, 3) and not any(served)


@needs_node
class TestResidual:
    @pytest.mark.parametrize("residual", ["alike", "of another dtype", "of another shape", "of a subclass"])
    def test_what_is_taken_along_and_what_is_added_afterwards(self, served, residual):
        layer, x = filled(StochNorm2d(4)), torch.randn(3, 4, 2, 2, requires_grad=True)

        def call(layer, x):
            added = {
                "alike": lambda: x * 2,
                "of another dtype": lambda: (x * 2).double(),
                "of another shape": lambda: (x * 2)[:1],
                "of a subclass": lambda: (x * 2).as_subclass(Subclass),
            }[residual]
            return layer.followed_by(x, Activation("relu"), added).as_subclass(Tensor)

        output, of_x, *_ = compared(layer, call, x)
        assert served == [True]
        torch.manual_seed(5)
        twin = copy.deepcopy(layer)
        y = x.detach().clone().requires_grad_()
        expected = F.relu(twin(y) + (y * 2)[: 1 if residual == "of another shape" else None])
        torch.testing.assert_close(output.to(torch.float32), expected)
        torch.manual_seed(6)
        expected.backward(torch.randn_like(output).to(expected.dtype))
        torch.testing.assert_close(of_x, y.grad)

    def test_it_draws_after_the_norm(self, served):
        def call(layer, x):
            return layer.followed_by(x, NO_ACTIVATION, lambda: F.dropout(x) + layer.running_mean.view(-1, 1, 1))

        compared(filled(StochNorm2d(4)), call, torch.randn(3, 4, 2, 2, requires_grad=True))
        assert served == [True]

    def test_its_error_comes_through(self, served):
        layer = StochNorm2d(4)

        def fail():
            raise KeyError("a residual")

        with pytest.raises(KeyError, match="a residual"):
            layer.followed_by(torch.randn(3, 4, 2, 2), NO_ACTIVATION, fail)
        assert layer.num_batches_tracked == 0
        assert layer(torch.randn(3, 4, 2, 2)).grad_fn.name() == "StochNormBackward"

    def test_it_may_exchange_the_layer_s_statistics(self, served):
        layer, x = StochNorm2d(4), torch.randn(3, 4, 2, 2)
        old = layer.running_mean

        def exchange():
            layer.running_mean, layer.running_var = torch.full((4,), 7.0), torch.full((4,), 8.0)
            return x

        for way in (contextlib.nullcontext, in_python):
            layer.running_mean = old.zero_()
            with way():
                layer.followed_by(x, NO_ACTIVATION, exchange)
            assert layer.running_mean.eq(7).all() and layer.running_var.eq(8).all() and not old.eq(0).any()
        assert served == [True]


@needs_node
class TestNode:
    """As with BatchNorm's."""

    def test_its_place_in_the_graph(self):
        layer, x = StochNorm1d(3), torch.randn(4, 3, requires_grad=True)
        node = layer(x * 1).grad_fn
        assert node.name() == type(node).__name__ == "StochNormBackward"
        names = [edge.name() if edge else None for edge, _ in node.next_functions]
        assert names == ["MulBackward0", "torch::autograd::AccumulateGrad", "torch::autograd::AccumulateGrad", None]
        assert node.metadata == {}
        with pytest.raises(RuntimeError, match="by layers"):
            type(node)()

    def test_nothing_is_recorded_where_nothing_asks(self, served):
        layer = StochNorm1d(3).requires_grad_(False)
        output = layer(torch.randn(4, 3))
        assert served == [True] and output.grad_fn is None and not output.requires_grad

    @pytest.mark.parametrize(("activation", "adds"), [("none", False), ("silu", False), ("relu", True), ("none", True)])
    def test_gradients_and_their_gradients(self, served, activation, adds):
        layer = filled(StochNorm1d(3)).double()
        x, u = (torch.randn(5, 3, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))

        def call(x, weight, bias, u):
            torch.manual_seed(0)
            twin = copy.deepcopy(layer)
            twin._parameters = {"weight": weight, "bias": bias}
            return twin.followed_by(x, Activation(activation), (lambda: u) if adds else None)

        weight, bias = (torch.rand(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
        assert gradcheck(call, (x, weight, bias, u))
        assert gradgradcheck(call, (x, weight, bias, u))
        assert all(served)

    def test_a_graph_that_is_kept_and_one_that_is_not(self):
        layer, x = StochNorm1d(3), torch.randn(4, 3, requires_grad=True)
        loss = layer(x).square().sum()
        first = torch.autograd.grad(loss, x, retain_graph=True)
        assert torch.equal(*first, *torch.autograd.grad(loss, x))
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            torch.autograd.grad(loss, x)

    @pytest.mark.parametrize("changed", ["input", "weight", "bias"])
    def test_what_was_changed_in_place_is_noticed(self, changed):
        layer, leaf = StochNorm1d(3), torch.randn(4, 3, requires_grad=True)
        x = leaf * 1
        output = layer.followed_by(x, Activation("silu"))
        with torch.no_grad():
            {"input": x, "weight": layer.weight, "bias": layer.bias}[changed].mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()

    def test_the_output_may_be_changed_in_place(self):
        layer, x = StochNorm1d(3), torch.randn(4, 3, requires_grad=True)
        found = []
        for change in (Tensor.relu, Tensor.relu_):
            torch.manual_seed(0)
            found.append(torch.autograd.grad(change(copy.deepcopy(layer)(x)).square().sum(), x)[0])
        assert torch.equal(*found)

    def test_hooks(self):
        layer, x = StochNorm1d(3), torch.randn(4, 3, requires_grad=True)
        output, seen = layer(x), []
        output.register_hook(lambda g: seen.append("tensor") or g * 2)
        output.grad_fn.register_prehook(lambda grads: seen.append("before") or None)
        output.grad_fn.register_hook(lambda inputs, outputs: seen.append(("after", len(inputs), len(outputs))))
        (doubled,) = torch.autograd.grad(output.square().sum(), x, retain_graph=True)
        assert seen == ["tensor", "before", ("after", 4, 1)]
        torch.manual_seed(0)
        twins = [copy.deepcopy(layer) for _ in range(2)]
        assert doubled.isfinite().all() and all(twin(x).grad_fn for twin in twins)

    @pytest.mark.filterwarnings("ignore:.*performance drop because we have not yet implemented the batching")
    def test_gradients_in_a_batch(self, served):
        layer, x = filled(StochNorm1d(3)), torch.randn(4, 3, requires_grad=True)
        output = layer(x)
        directions = torch.randn(5, 4, 3)
        (together,) = torch.autograd.grad(output, x, directions, is_grads_batched=True, retain_graph=True)
        one_by_one = [torch.autograd.grad(output, x, direction, retain_graph=True)[0] for direction in directions]
        torch.testing.assert_close(together, torch.stack(one_by_one))
        assert served == [True]

    def test_anomalies_name_the_forward_call(self, served):
        layer, x = StochNorm1d(3), torch.randn(4, 3, requires_grad=True)
        with pytest.warns(UserWarning, match="Anomaly Detection"), torch.autograd.detect_anomaly():
            loss = (layer(x) * float("inf")).sum()
            with (
                pytest.warns(UserWarning, match="Error detected in StochNormBackward"),
                pytest.raises(RuntimeError, match="StochNormBackward' returned nan"),
            ):
                loss.backward()
        assert served == [True]

    @pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch asks for it
    def test_compiled_autograd(self, served):
        found = []
        for way in (contextlib.nullcontext, lambda: torch._dynamo.compiled_autograd._enable(compiler)):
            graphs = []

            def compiler(graph, graphs=graphs):
                graphs.append(graph)
                return torch.compile(graph, backend="eager")

            torch._dynamo.reset()
            torch.manual_seed(0)
            net = nn.Sequential(nn.Linear(3, 3), StochNorm1d(3), nn.Linear(3, 3), StochNorm1d(3, affine=False))
            for _ in range(2):
                x = torch.randn(4, 3)
                loss = net[1].followed_by(net[0](x), Activation("relu"), lambda x=x: x)
                loss = net[3].followed_by(net[2](loss), Activation("gelu")).square().sum()
                with way():
                    loss.backward()
            found.append([parameter.grad for parameter in net.parameters()])
            assert bool(graphs) == (way is not contextlib.nullcontext)
        torch.testing.assert_close(*found)
        assert served == [True] * 8

    def test_threads(self, served):
        data = torch.randn(20, 6, 5)

        def trained(_):
            layer, total = StochNorm1d(5, p=1.0), []
            for x in data.clone().requires_grad_():
                total.append(torch.autograd.grad(layer(x).pow(3).sum(), layer.weight)[0])
            return torch.stack(total)

        with ThreadPoolExecutor(4) as pool:
            first, *others = pool.map(trained, range(8))
        assert all(torch.equal(first, other) for other in others) and all(served)

    def test_a_deep_graph_is_freed_without_recursion(self, served):
        freed = []

        def build():
            layer, x = StochNorm1d(2), torch.randn(3, 2, requires_grad=True)
            y = x
            for _ in range(3000):
                y = layer(y)
            y.sum().backward()
            del y
            for keep in (True, False):  # and one without a backward pass
                y = middle = x * 1
                kept = weakref.ref(middle)
                del middle
                for _ in range(3000):
                    y = layer(y)
                if keep:
                    y.sum().backward(retain_graph=True)
                del y
                gc.collect()
                freed.append(kept() is None and x.grad is not None)

        before = threading.stack_size(256 * 1024)  # which 3,000 nested destructors would not fit
        try:
            thread = threading.Thread(target=build)
            thread.start()
            thread.join()
        finally:
            threading.stack_size(before)
        assert freed == [True, True] and all(served)

    def test_what_is_kept_goes_with_the_backward_pass(self):
        layer, x = StochNorm2d(3), torch.randn(4, 3, 8, 8, requires_grad=True)
        inner = x * 1
        kept = weakref.ref(inner)
        output = layer(inner)
        del inner
        gc.collect()
        output.sum().backward()
        assert kept() is None


def test_python_and_node_share_their_arguments():
    """One is called in the other's place."""
    if NODE is None:
        pytest.skip(ops.compiled_nodes().status)
    x, layer = torch.randn(4, 3), StochNorm1d(3)
    args = x, layer._parameters, layer._buffers, 0.1, 1e-5, 0.5, True, 0, 0.0, None
    outputs = []
    for function in (NODE, step._quick_step):
        torch.manual_seed(0)
        outputs.append(function(*args[:2], copy.deepcopy(layer)._buffers, *args[3:]).detach())
    assert torch.equal(*outputs)

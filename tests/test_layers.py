import inspect

import pytest
import torch
from network_support import Branching, small_net
from rank_support import in_group
from torch import nn

from talib_fast.finetune.delta import BehavioralRegularization, IntermediateLayerGetter, get_attribute


def in_place(net, **options):
    net.compile(**options)
    return net


class TestIntermediateLayerGetter:
    def test_fault_returned_execution_order(self):
        net = Branching()
        x = torch.randn(2, 3)
        outputs, output = IntermediateLayerGetter(net, ["late", "early"])(x, scale=2.0)
        assert list(outputs) == ["late", "early"]
        torch.testing.assert_close(outputs["early"], net.early(x))
        torch.testing.assert_close(output, net(x, 2.0))
        torch.testing.assert_close(outputs["late"] * 2, output)

    def test_signature(self):
        parameters = inspect.signature(IntermediateLayerGetter).parameters
        assert list(parameters) == ["model", "return_layers", "keep_output"]
        assert (
            IntermediateLayerGetter(Branching(), return_layers=["late"], keep_output=False)(torch.ones(1, 3))[1] is None
        )

    def test_a_layer_that_runs_twice_gives_a_list(self):
        outputs, _ = IntermediateLayerGetter(Branching(), ["twice"])(torch.randn(2, 3))
        assert len(outputs["twice"]) == 2

    def test_fault_hooks_leaked_when_forward_raised(self):
        net = Branching()
        with pytest.raises(RuntimeError):
            IntermediateLayerGetter(net, ["early"])(torch.randn(2, 7))
        assert not net.early._forward_hooks

    def test_fault_a_missing_name_never_showed_its_own_error(self):
        with pytest.raises(AttributeError, match="Module lat not found in Branching; did you mean late"):
            IntermediateLayerGetter(Branching(), ["lat"])
        with pytest.raises(AttributeError, match=r"Module late\.weight not found"):
            IntermediateLayerGetter(Branching(), ["late.weight"])

    def test_a_layer_that_does_not_run_is_named(self):
        with pytest.raises(RuntimeError, match="layer 'never' did not run"):
            IntermediateLayerGetter(Branching(), ["never"])(torch.randn(2, 3))

    def test_a_string_is_no_list_of_names(self):
        with pytest.raises(TypeError, match="the string 'late'"):
            IntermediateLayerGetter(Branching(), "late")

    def test_what_is_no_model_or_no_name_is_a_type_error(self):
        with pytest.raises(TypeError, match=r"expected model to be a torch\.nn\.Module, got str"):
            IntermediateLayerGetter("x", ["late"])
        with pytest.raises(TypeError, match="return_layers to be names, got int"):
            IntermediateLayerGetter(Branching(), [3])

    def test_a_name_given_twice_is_an_error(self):
        with pytest.raises(ValueError, match="every layer once in return_layers, got 'late' twice"):
            IntermediateLayerGetter(Branching(), ["late", "early", "late"])

    @pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
    def test_fault_in_place_operations_overwrote_the_outputs(self, mode):
        net = small_net().eval()
        getter = IntermediateLayerGetter(net, ["norm1", "conv2"])
        for _ in range(3):
            x = torch.randn(2, 3, 5, 5)
            with mode():
                outputs, _ = getter(x)
                expected = net.norm1(net.conv1(x))
            torch.testing.assert_close(outputs["norm1"], expected)
            assert (outputs["norm1"] < 0).any()

    def test_outputs_that_survive_are_not_copied_after_the_first_call(self):
        net = small_net()
        getter = IntermediateLayerGetter(net, ["conv1", "norm1"])
        seen = []
        net.conv1.register_forward_hook(lambda module, args, output: seen.append(output))
        net.norm1.register_forward_hook(lambda module, args, output: seen.append(output))
        for call in range(2):
            seen.clear()
            outputs, _ = getter(torch.randn(2, 3, 5, 5))
            assert (outputs["conv1"] is seen[0]) == (call == 1)
            assert outputs["norm1"] is not seen[1]

    def test_an_output_that_stops_surviving_is_an_error_not_a_wrong_value(self):
        net = small_net()
        getter = IntermediateLayerGetter(net, ["conv2"])
        x = torch.randn(2, 3, 5, 5)
        getter(x)
        net.norm2 = nn.ReLU(inplace=True)
        with pytest.raises(RuntimeError, match="'conv2' was overwritten in place, although it had survived"):
            getter(x)

    def test_gradients_flow_through_the_outputs(self):
        net = small_net()
        getter = IntermediateLayerGetter(net, ["norm1"])
        for _ in range(2):
            net.zero_grad()
            outputs, _ = getter(torch.randn(2, 3, 5, 5))
            outputs["norm1"].square().sum().backward()
            assert net.conv1.weight.grad.abs().sum() > 0 and net.conv2.weight.grad is None

    def test_names_inside_data_parallel(self, device):
        net, x = small_net().to(device), torch.ones(2, 3, 5, 5, device=device)
        wrapped = nn.DataParallel(net, [0] if device.type == "cuda" else None)
        outputs, _ = IntermediateLayerGetter(wrapped, ["conv1"])(x)
        torch.testing.assert_close(outputs["conv1"], net.conv1(x))

    def test_replicas_on_several_devices_are_refused(self):
        wrapped = nn.DataParallel(small_net())
        wrapped.device_ids = [0, 1]
        with pytest.raises(ValueError, match=r"DataParallel with one device, .* got 2: use DistributedDataParallel"):
            IntermediateLayerGetter(wrapped, ["conv1"])

    @pytest.mark.parametrize("wrap", [torch.compile, in_place], ids=["wrapped", "in place"])
    @pytest.mark.parametrize("order", ["getter first", "model first", "another model first"])
    def test_compiled_models(self, order, wrap):
        """Code that was compiled before the getter's hooks were there, or for another model, looks for no hooks."""
        torch.compiler.reset()
        net, x = small_net(), torch.randn(2, 3, 5, 5)
        model = wrap(net, backend="eager")
        if order == "getter first":
            IntermediateLayerGetter(model, ["conv1", "conv2"])(x)
        (wrap(small_net(), backend="eager") if order == "another model first" else model)(x)
        for _ in range(2):
            outputs, logits = IntermediateLayerGetter(model, ["conv1", "conv2"])(x)
            torch.testing.assert_close(outputs["conv1"], net.conv1(x))
        torch.testing.assert_close(logits, net(x))
        assert not any(module._forward_hooks for module in net.modules())

    def test_names_inside_a_distributed_model(self):
        def train():
            net = small_net()
            wrapped = nn.parallel.DistributedDataParallel(net)
            outputs, logits = IntermediateLayerGetter(wrapped, ["norm1"])(torch.randn(2, 3, 5, 5))
            (outputs["norm1"].square().sum() + logits.sum()).backward()
            assert net.conv1.weight.grad.abs().sum() > 0 and net.head.weight.grad.abs().sum() > 0

        in_group(train, store=torch.distributed.HashStore(), rank=0, world_size=1)

    def test_inside_a_compiled_function(self):
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 5, 3))
        source, target = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)

        def distance(getter):
            return BehavioralRegularization()(getter(source)[0], getter(target)[0])

        getters = [IntermediateLayerGetter(net, ["2", "0"]) for _ in range(2)]
        expected = distance(getters[0])
        compiled = torch.compile(distance, backend="aot_eager", fullgraph=True)
        for _ in range(2):
            got = compiled(getters[1])
            torch.testing.assert_close(got, expected)
        parameters = list(net.parameters())
        torch.testing.assert_close(torch.autograd.grad(got, parameters), torch.autograd.grad(expected, parameters))
        assert not any(module._forward_hooks for module in net.modules())

    def test_structured_outputs_are_copied(self):
        class Point(tuple):
            _fields = ("x", "y")

            def __new__(cls, x, y):
                return super().__new__(cls, (x, y))

        class Structured(nn.Module):
            def forward(self, x):
                return {"list": [x], "tuple": (x,), "point": Point(x, x), "text": "t"}

        class Overwriting(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = Structured()

            def forward(self, x):
                self.inner(x)
                return x.zero_()

        outputs, _ = IntermediateLayerGetter(Overwriting(), ["inner"])(torch.ones(2))
        inner = outputs["inner"]
        assert inner["text"] == "t" and isinstance(inner["point"], Point)
        for kept in (inner["list"][0], inner["tuple"][0], inner["point"][0]):
            assert kept.tolist() == [1, 1]


def test_get_attribute():
    net = nn.Sequential(nn.Sequential(nn.Linear(2, 3)))
    assert get_attribute(net, "0.0.out_features") == 3
    assert get_attribute(net, "0.7", None) is None
    with pytest.raises(AttributeError):
        get_attribute(net, "0.7")

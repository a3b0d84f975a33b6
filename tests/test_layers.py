import functools
import inspect
import threading
import warnings
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from network_support import Branching, small_net
from rank_support import in_group
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import checkpoint

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

    def test_a_name_given_twice_is_there_once(self):
        outputs, _ = IntermediateLayerGetter(Branching(), ["late", "early", "late"])(torch.randn(2, 3))
        assert list(outputs) == ["late", "early"]

    def test_a_mapping_gives_aliases(self):
        net, x = Branching(), torch.randn(2, 3)
        outputs, _ = IntermediateLayerGetter(net, {"late": "out", "early": "late"})(x)
        assert list(outputs) == ["out", "late"]
        torch.testing.assert_close(outputs["late"], net.early(x))
        with pytest.raises(ValueError, match="different aliases in return_layers, got 'out' twice"):
            IntermediateLayerGetter(net, {"late": "out", "early": "out"})
        with pytest.raises(TypeError, match="alias of layer 'late' to be a name, got int"):
            IntermediateLayerGetter(net, {"late": 1})

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

    def test_fault_the_way_a_layer_works_changes(self):
        """In place from a call on: a dropout that trains, a layer that is exchanged, an activation that is told so."""
        net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5, inplace=True), nn.Linear(4, 4), nn.Identity(), nn.ReLU())
        getter, x = IntermediateLayerGetter(net, ["0", "2", "3"]), torch.randn(2, 3)

        def check():
            for _ in range(2):
                outputs, _ = getter(x)
                torch.testing.assert_close(outputs["0"], net[0](x))
                torch.testing.assert_close(outputs["2"], outputs["3"].clone() if exchanged is None else exchanged)

        exchanged = None
        net.eval()
        check()
        net[1].train()
        check()
        net.eval()
        net[4].inplace = True
        check()
        exchanged = net[2](net[0](x))
        net[3] = nn.ReLU(inplace=True)
        check()

    def test_fault_in_place_operations_overwrote_the_outputs_under_function_transforms(self):
        net, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True)), torch.randn(5, 2, 3)
        getter = IntermediateLayerGetter(net, ["0"])
        for _ in range(2):
            mapped = torch.func.vmap(lambda part: getter(part)[0]["0"])(x)
            _, tangent = torch.func.jvp(lambda part: getter(part)[0]["0"], (x,), (x,))
            torch.testing.assert_close(mapped, net[0](x))
            torch.testing.assert_close(tangent, net[0](x) - net[0].bias)

    def test_what_is_overwritten_once_is_copied_from_then_on(self):
        class Moody(nn.Linear):
            def forward(self, x):
                return torch.relu_(x) if x.sum() > 100 else x

        net = nn.Sequential(nn.Identity(), nn.Linear(3, 3), Moody(3, 3))
        getter, calm = IntermediateLayerGetter(net, ["1"]), torch.randn(2, 3)
        with torch.no_grad():
            net[1].weight.copy_(torch.eye(3)), net[1].bias.zero_()
        moody = torch.tensor([[-1.0, 300, 1]])
        torch.testing.assert_close(getter(calm)[0]["1"], calm)
        with pytest.raises(RuntimeError, match="'1' was overwritten in place, which no earlier forward pass did"):
            getter(moody)
        for x in (moody, calm, calm, moody):
            torch.testing.assert_close(getter(x)[0]["1"], x)

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
        net[2].register_forward_hook(lambda module, inputs, output: output + 1)
        hooks = [module._forward_hooks.copy() for module in net.modules()]
        users = net[2]._forward_hooks
        expected = distance(getters[0])
        compiled = torch.compile(distance, backend="aot_eager", fullgraph=True)
        for _ in range(2):
            got = compiled(getters[1])
            torch.testing.assert_close(got, expected)
        parameters = list(net.parameters())
        torch.testing.assert_close(torch.autograd.grad(got, parameters), torch.autograd.grad(expected, parameters))
        assert hooks == [module._forward_hooks for module in net.modules()]
        assert net[2]._forward_hooks is users  # in which the user's handle finds the user's hook
        torch.testing.assert_close(distance(getters[1]), expected)  # uncompiled again

    def test_structured_outputs_are_copied(self):
        class Output(OrderedDict):
            h = property(lambda self: self["h"])

        class Structured(nn.Module):
            def forward(self, x):
                return Output(h=x, more=[SimpleNamespace(x=x)], text="t")

        class Overwriting(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = Structured()

            def forward(self, x):
                output = self.inner(x)
                x.zero_()
                output["text"] = "changed"
                return output

        getter = IntermediateLayerGetter(Overwriting(), ["inner"])
        for _ in range(2):
            outputs, output = getter(torch.ones(2))
            kept = outputs["inner"]
            assert type(kept) is Output and kept["text"] == "t"
            assert kept.h.tolist() == [1, 1] and kept["more"][0].x is kept.h
            assert output.h.tolist() == [0, 0]

    def test_scripted_modules_are_refused(self):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TorchScript is deprecated
            scripted = torch.jit.script(nn.Sequential(nn.Linear(3, 3)))
        with pytest.raises(TypeError, match="expected model to be an ordinary module, got a scripted one"):
            IntermediateLayerGetter(scripted, ["0"])
        with pytest.raises(TypeError, match=r"expected layer '0\.0' to be an ordinary module, got a scripted one"):
            IntermediateLayerGetter(nn.Sequential(scripted), ["0.0"])

    @pytest.mark.parametrize(
        "wrap",
        [functools.partial(torch.compile, backend="eager"), checkpoint_wrapper, nn.DataParallel],
        ids=["compile", "checkpoint_wrapper", "DataParallel"],
    )
    @pytest.mark.parametrize("name", ["block.0", "block._orig_mod.0", "module.block._checkpoint_wrapped_module.0"])
    def test_wrappers_anywhere_mean_nothing_in_names(self, wrap, name):
        net, x = (
            nn.Sequential(OrderedDict(block=nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True)))),
            torch.ones(2, 3),
        )
        plain = IntermediateLayerGetter(net, [name])(x)[0][name]
        net.block = wrap(net.block)
        wrapped = IntermediateLayerGetter(net, [name, "block"])(x)[0]
        torch.testing.assert_close(wrapped[name], plain)
        torch.testing.assert_close(wrapped["block"], plain.relu())


class Inside(nn.Module):
    """A network that runs its body in its own way."""

    def __init__(self, way):
        super().__init__()
        self.stem, self.head = nn.Linear(3, 3), nn.Linear(3, 3)
        self.body = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
        self.way = way

    def forward(self, x):
        return self.head(self.way(self.body, self.stem(x)))


def without_gradients(body, x):
    with torch.no_grad():
        return body(x)


def in_inference_mode(body, x):
    with torch.inference_mode():
        return body(x)


def checkpointed(body, x, reentrant=True):
    return checkpoint(body, x, use_reentrant=reentrant)


class TestFaultOutputsWithoutAGraph:
    """Their gradients were zero without a word."""

    x = torch.randn(2, 3)
    ways = pytest.mark.parametrize("way", [without_gradients, checkpointed])

    @ways
    @pytest.mark.parametrize("layer", ["body.0", "body.1", "body.2"])
    def test_they_are_an_error(self, way, layer):
        net = Inside(way)
        with pytest.raises(RuntimeError, match=f"layer '{layer}' ran with gradients disabled"):
            IntermediateLayerGetter(net, ["stem", layer])(self.x)
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())

    def test_in_inference_mode(self):
        net = Inside(in_inference_mode)
        net.head.requires_grad_(False)
        with pytest.raises(RuntimeError, match=r"layer 'body\.0' ran with gradients disabled"):
            IntermediateLayerGetter(net, ["body.0"])(self.x)

    def test_with_a_layer_that_disables_them_itself(self):
        net = Inside(lambda body, x: body(x))
        net.body[0].forward = torch.no_grad()(net.body[0].forward)
        with pytest.raises(RuntimeError, match=r"layer 'body\.0' ran with gradients disabled"):
            IntermediateLayerGetter(net, ["body.0"])(self.x)

    @pytest.mark.parametrize("make", [lambda y: (y, None), lambda y: {"y": [y]}], ids=["tuple", "dict"])
    def test_with_one_whose_output_is_a_structure(self, make):
        class Layer(nn.Linear):
            def forward(self, x):
                with torch.no_grad():
                    return make(super().forward(x))

        with pytest.raises(RuntimeError, match=r"layer '0' ran with gradients disabled"):
            IntermediateLayerGetter(nn.Sequential(Layer(3, 3)), ["0"])(self.x)

    def test_with_a_frozen_network_and_an_input_that_learns(self):
        getter = IntermediateLayerGetter(Inside(without_gradients).requires_grad_(False), ["body.0"])
        getter(self.x)
        with pytest.raises(RuntimeError, match=r"layer 'body\.0' ran with gradients disabled"):
            getter(self.x.clone().requires_grad_())

    def test_inside_a_compiled_function(self):
        net = Inside(without_gradients)
        getter = IntermediateLayerGetter(net, ["body.0"])
        compiled = torch.compile(lambda x: getter(x)[0]["body.0"], backend="eager", fullgraph=True)
        with pytest.raises(RuntimeError, match=r"'body\.0' ran with gradients disabled"):
            compiled(self.x)
        net.head.weight.requires_grad_(False), net.stem.requires_grad_(False), net.body.requires_grad_(False)
        torch.testing.assert_close(compiled(self.x), net.body[0](net.stem(self.x)))  # the head learns behind it
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
        for module in net.modules():
            module.register_forward_hook(print).remove(), module.register_forward_pre_hook(print).remove()

    def test_inside_a_compiled_function_with_a_layer_that_disables_them_itself(self):
        class Detached(nn.Linear):
            def forward(self, x):
                return super().forward(x).detach()

        getter = IntermediateLayerGetter(nn.Sequential(Detached(3, 3), nn.Linear(3, 3)), ["0"])
        with pytest.raises(RuntimeError, match="'0' ran with gradients disabled"):
            torch.compile(lambda x: getter(x)[0]["0"], backend="eager", fullgraph=True)(self.x)

    def test_not_where_none_are_wanted(self):
        net = Inside(without_gradients)
        with torch.no_grad():
            assert not IntermediateLayerGetter(net, ["body.0"])(self.x)[0]["body.0"].requires_grad
        with torch.inference_mode():
            assert not IntermediateLayerGetter(net, ["body.0"])(self.x)[0]["body.0"].requires_grad

    @pytest.mark.parametrize("way", [lambda body, x: body(x), without_gradients])
    def test_not_where_nothing_before_them_learns(self, way):
        net = Inside(way)
        net.stem.requires_grad_(False), net.body.requires_grad_(False)
        outputs, output = IntermediateLayerGetter(net, ["stem", "body.2"])(self.x)
        assert not any(found.requires_grad for found in outputs.values()) and output.requires_grad

    def test_not_where_an_attention_learns_behind_them(self):
        net = Inside(without_gradients)
        net.stem.requires_grad_(False), net.body.requires_grad_(False)
        net.head = nn.TransformerEncoderLayer(3, 1, 4, batch_first=True)
        outputs, output = IntermediateLayerGetter(net, ["body.2"])(self.x[None])
        assert not outputs["body.2"].requires_grad and output.requires_grad

    def test_not_of_a_layer_that_is_skipped(self):
        class Skipped(nn.Linear):
            def forward(self, x):
                return x

        net = nn.Sequential(Skipped(3, 3), nn.Linear(3, 3))
        assert IntermediateLayerGetter(net, ["0"])(self.x)[0]["0"].tolist() == self.x.tolist()

    def test_a_checkpoint_that_is_not_reentrant_keeps_them(self):
        net = Inside(functools.partial(checkpointed, reentrant=False))
        outputs, output = IntermediateLayerGetter(net, ["body.0"])(self.x)
        (outputs["body.0"].sum() + output.sum()).backward()
        torch.testing.assert_close(net.body[0].bias.grad, reference_gradient(net, self.x))


def reference_gradient(net, x):
    hidden = net.body[0](net.stem(x))
    loss = hidden.sum() + net.head(net.body[2](hidden.tanh())).sum()
    return torch.autograd.grad(loss, net.body[0].bias)[0]


@pytest.mark.parametrize("compiled", [False, True])
def test_fault_threads_mixed_their_outputs(compiled):
    """All are in the model at once, so that each one's hooks see what the others run."""
    together = threading.Barrier(3, timeout=60)

    class Meeting(nn.Module):
        def forward(self, x):
            together.wait()
            return x

    net = nn.Sequential(Meeting(), nn.Linear(3, 3), Meeting(), nn.Linear(3, 3), Meeting())
    getter = IntermediateLayerGetter(torch.compile(net, backend="eager") if compiled else net, ["1", "3"])
    inputs = [torch.randn(2, 3) for _ in range(3)]

    def call(x):
        return [getter(x) for _ in range(3)]

    with ThreadPoolExecutor(3) as pool:
        for x, results in zip(inputs, pool.map(call, inputs), strict=True):
            for outputs, output in results:
                torch.testing.assert_close(outputs["1"], net[1](x))
                torch.testing.assert_close(outputs["3"], net[3](net[1](x)))
                torch.testing.assert_close(output, outputs["3"])
    assert not any(module._forward_hooks for module in net.modules())
    graphs = []
    torch.compile(nn.Linear(3, 3), backend=lambda graph, _: graphs.append(graph) or graph)(inputs[0])
    assert graphs  # what is compiled runs compiled again


def test_get_attribute():
    net = nn.Sequential(nn.Sequential(nn.Linear(2, 3)))
    assert get_attribute(net, "0.0.out_features") == 3
    assert get_attribute(net, "0.7", None) is None
    with pytest.raises(AttributeError):
        get_attribute(net, "0.7")

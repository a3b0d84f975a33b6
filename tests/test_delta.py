import copy
import functools
import inspect
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from rank_support import in_group
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from talib_fast.finetune import attention, delta
from talib_fast.finetune.delta import (
    AttentionBehavioralRegularization,
    BehavioralRegularization,
    IntermediateLayerGetter,
    L2Regularization,
    SPRegularization,
    channel_attention,
    get_attribute,
)
from talib_fast.finetune.replay import Replay, _ForMapping


def small_net(classes=4):
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(3, 6, 3, padding=1),
            norm1=nn.BatchNorm2d(6),
            act1=nn.ReLU(inplace=True),
            conv2=nn.Conv2d(6, 8, 3, padding=1),
            norm2=nn.BatchNorm2d(8),
            act2=nn.ReLU(inplace=True),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            head=nn.Linear(8, classes),
        )
    )


def maps(requires_grad=False, dtype=torch.float64):
    shapes = {"a": (2, 3, 4, 4), "b": (2, 5, 2, 2)}
    return OrderedDict(
        (name, torch.randn(shape, dtype=dtype, requires_grad=requires_grad)) for name, shape in shapes.items()
    )


class TestL2Regularization:
    def test_is_half_the_squared_norm(self, device):
        model = small_net().to(device)
        loss = L2Regularization(model)()
        assert loss.dim() == 0 and loss.device.type == device.type
        torch.testing.assert_close(loss, sum(0.5 * p.square().sum() for p in model.parameters()))
        loss.backward()
        torch.testing.assert_close([p.grad for p in model.parameters()], [p.detach() for p in model.parameters()])

    def test_nothing_to_sum(self):
        assert L2Regularization(nn.ReLU())().item() == 0

    def test_owns_nothing(self):
        regularization = L2Regularization(small_net())
        assert not list(regularization.parameters()) and not regularization.state_dict()

    def test_follows_the_model(self):
        model = nn.Linear(2, 2)
        regularization = L2Regularization(nn.ModuleList([model, nn.Identity()]))
        with torch.no_grad():
            model.weight.fill_(1), model.bias.fill_(2)
        assert regularization() == 0.5 * (4 + 8)

    def test_rejects_what_is_no_module(self):
        with pytest.raises(TypeError, match=r"expected model to be a torch\.nn\.Module, got list"):
            L2Regularization([])


class TestSPRegularization:
    def test_is_half_the_squared_distance(self, device):
        source, target = small_net().to(device), small_net().to(device)
        loss = SPRegularization(source, target)()
        pairs = list(zip(source.parameters(), target.parameters(), strict=True))
        torch.testing.assert_close(loss, sum(0.5 * (t - s).square().sum() for s, t in pairs))
        loss.backward()
        assert all(s.grad is None for s, _ in pairs)
        torch.testing.assert_close([t.grad for _, t in pairs], [(t - s).detach() for s, t in pairs])

    def test_fault_of_a_model_and_itself_stayed_zero_for_ever(self):
        model = nn.Linear(3, 2)
        regularization = SPRegularization(model, model)
        assert regularization() == 0
        with torch.no_grad():
            model.weight.add_(1)
        assert regularization() == 3

    def test_fault_a_new_head_raised_key_error(self):
        source, target = nn.Sequential(nn.Linear(2, 3)), nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
        with pytest.warns(UserWarning, match=r"no such parameters: \['1.weight', '1.bias'\]"):
            warned = SPRegularization(source, target)
        ignored = SPRegularization(source, target, unmatched="ignore")
        penalized = SPRegularization(source, target, unmatched="penalize")
        assert warned() == ignored()
        torch.testing.assert_close(penalized() - ignored(), L2Regularization(target[1])())
        with pytest.raises(ValueError, match=r"the source model has no parameters for \['1.weight'"):
            SPRegularization(source, target, unmatched="error")

    def test_fault_a_shape_mismatch_was_no_clear_error(self):
        with pytest.raises(ValueError, match=r"'weight' of one shape in both models, got \[2, 2\].*\[2, 3\]"):
            SPRegularization(nn.Linear(2, 2), nn.Linear(3, 2))

    def test_matches_by_name_not_by_order(self):
        source = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
        target = nn.ModuleDict({"b": copy.deepcopy(source["b"]), "a": copy.deepcopy(source["a"])})
        assert SPRegularization(source, target)() == 0

    def test_the_start_moves_but_is_in_no_state_dict(self):
        model = nn.Linear(3, 2)
        regularization = SPRegularization(nn.Linear(3, 2), model)
        assert not regularization.state_dict() and not list(regularization.parameters())
        assert [b.dtype for b in regularization.double().buffers()] == [torch.float64] * 2

    @pytest.mark.parametrize("destination", ["cuda", "meta"])
    def test_the_start_follows_the_parameters(self, destination):
        if destination == "cuda" and not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        target = nn.Linear(3, 2)
        regularization = SPRegularization(nn.Linear(3, 2), target)
        expected = regularization()
        target.to(destination)
        assert regularization().device.type == destination
        assert all(start.device.type == destination for start in regularization.buffers())
        if destination == "cuda":
            torch.testing.assert_close(regularization().cpu(), expected)

    def test_wrapped_models_match(self):
        source, target = nn.Linear(3, 2), nn.DataParallel(nn.Linear(3, 2))
        expected = SPRegularization(source, target.module)()
        assert SPRegularization(source, target)() == expected
        assert SPRegularization(source, torch.compile(target.module))() == expected

    def test_deepcopy_watches_the_copied_model(self):
        pair = nn.ModuleDict({"model": nn.Linear(2, 2)})
        pair.regularization = SPRegularization(nn.Linear(2, 2), pair["model"])
        twin = copy.deepcopy(pair)
        assert twin.regularization.target_model is twin["model"]

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ((nn.Linear(2, 2), None), TypeError, "expected target_model to be a torch.nn.Module, got NoneType"),
            (({}, nn.Linear(2, 2)), TypeError, "expected source_model to be a torch.nn.Module, got dict"),
            ((nn.Linear(2, 2), nn.Linear(2, 2), "skip"), ValueError, "expected unmatched to be warn.*got 'skip'"),
            ((nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 2)), ValueError, "no parameter of the target has its name"),
        ],
    )
    def test_bad_input_is_named(self, arguments, error, message):
        with pytest.raises(error, match=message):
            SPRegularization(*arguments)

    def test_a_lost_parameter_is_named(self):
        model = nn.Linear(2, 2)
        regularization = SPRegularization(nn.Linear(2, 2), model)
        model.bias = None
        with pytest.raises(RuntimeError, match="has lost its parameter 'bias'"):
            regularization()


class TestBehavioralRegularization:
    def test_is_half_the_squared_distance_of_the_maps(self):
        source, target = maps(True), maps(True)
        loss = BehavioralRegularization()(source, target)
        torch.testing.assert_close(loss, sum(0.5 * (target[n] - source[n]).square().sum() for n in target))
        loss.backward()
        assert all(source[n].grad is None for n in source)
        torch.testing.assert_close([target[n].grad for n in target], [(target[n] - source[n]).detach() for n in target])

    def test_matches_by_name_and_sequences_by_position(self):
        source, target = maps(), maps()
        expected = BehavioralRegularization()(source, target)
        torch.testing.assert_close(BehavioralRegularization()(OrderedDict(reversed(source.items())), target), expected)
        torch.testing.assert_close(BehavioralRegularization()(list(source.values()), tuple(target.values())), expected)

    def test_nothing_to_sum(self):
        assert BehavioralRegularization()({}, {}).item() == 0

    def test_fault_missing_layers_were_truncated_silently(self):
        source, target = maps(), maps()
        del source["b"]
        with pytest.raises(ValueError, match=r"the source's outputs lack layers \['b'\]; there are \['a'\]"):
            BehavioralRegularization()(source, target)
        with pytest.raises(ValueError, match=r"the target's outputs lack layers \['b'\]"):
            BehavioralRegularization()(target, source)

    def test_fault_mismatched_shapes_broadcast_silently(self):
        source, target = maps(), maps()
        source["b"] = source["b"][:, :1]
        with pytest.raises(ValueError, match=r"layer 'b' of one shape.*\[2, 1, 2, 2\].*\[2, 5, 2, 2\]"):
            BehavioralRegularization()(source, target)

    def test_wrong_types_are_named(self):
        with pytest.raises(TypeError, match="layer 'a' of the source to be a tensor, got list"):
            BehavioralRegularization()({"a": [1]}, {"a": torch.ones(1)})
        with pytest.raises(TypeError, match="the target's layer outputs as a mapping, got Tensor"):
            BehavioralRegularization()({}, torch.ones(1))


class TestAttentionBehavioralRegularization:
    @property
    def attention(self):
        return OrderedDict(a=torch.arange(3.0).double() + 1, b=torch.arange(5.0).double() / 3)

    def expected(self, source, target):
        total = 0
        for name, t in target.items():
            b, c, h, w = t.shape
            for i in range(b):
                for j in range(c):
                    distance = (t[i, j] - source[name][i, j]).square().sum()
                    total = total + 0.5 * c * self.attention[name][j] / (h * w) * distance
        return total

    @pytest.mark.parametrize("as_list", [True, False])
    def test_weights_the_channels(self, as_list):
        source, target = maps(), maps(True)
        attention = list(self.attention.values()) if as_list else OrderedDict(reversed(self.attention.items()))
        loss = AttentionBehavioralRegularization(attention)(source, target)
        expected = self.expected(source, target)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(
            torch.autograd.grad(loss, list(target.values())), torch.autograd.grad(expected, list(target.values()))
        )

    def test_fault_attention_was_4d_only(self):
        attention = torch.rand(5)
        tokens = torch.randn(2, 7, 5), torch.randn(2, 7, 5)
        by_tokens = AttentionBehavioralRegularization([attention], channel_dim=-1)([tokens[0]], [tokens[1]])
        images = [token.mT.unflatten(2, (7, 1)) for token in tokens]
        torch.testing.assert_close(by_tokens, AttentionBehavioralRegularization([attention])(images[:1], images[1:]))
        vectors = AttentionBehavioralRegularization([attention])([tokens[0][:, 0]], [tokens[1][:, 0]])
        squares = (tokens[1][:, 0] - tokens[0][:, 0]).square()
        torch.testing.assert_close(vectors, 0.5 * 5 * (attention * squares).sum())

    def test_attention_moves_and_follows_but_is_in_no_state_dict(self):
        regularization = AttentionBehavioralRegularization(self.attention)
        assert not regularization.state_dict()
        assert regularization.float().channel_attention[0].dtype == torch.float32
        assert "layers=['a', 'b']" in repr(regularization)
        meta = OrderedDict((name, output.to("meta")) for name, output in maps().items())
        assert regularization(meta, meta).device.type == "meta"
        assert regularization.channel_attention[0].device.type == "meta"

    @pytest.mark.parametrize(
        ("attention", "names", "message"),
        [
            ([torch.rand(3)], "ab", r"expected outputs of 1 layers, as many as attentions, got 2: \['a', 'b'\]"),
            ({"a": torch.rand(3), "c": torch.rand(5)}, "ab", r"the layers \['a', 'c'\] that attention is there for"),
            ([torch.rand(3), torch.rand(4)], "ab", r"expected 4 channels in layer 'b', got \[2, 5, 2, 2\]"),
        ],
    )
    def test_what_does_not_fit_is_named(self, attention, names, message):
        source, target = maps(), maps()
        with pytest.raises(ValueError, match=message):
            AttentionBehavioralRegularization(attention)(source, target)

    def test_wrong_attention_is_named(self):
        with pytest.raises(TypeError, match=r"channel attention 0 to be a floating-point vector \[C\], got \[2, 2\]"):
            AttentionBehavioralRegularization([torch.ones(2, 2)])
        with pytest.raises(TypeError, match="got list"):
            AttentionBehavioralRegularization([[1.0]])

    def test_the_batch_is_no_channel(self):
        for dimension in (0, 1.0, "1"):
            with pytest.raises(ValueError, match=f"an integer other than 0, the batch's, got {dimension!r}"):
                AttentionBehavioralRegularization([torch.ones(3)], channel_dim=dimension)
        tokens = {"a": torch.randn(3, 2)}
        with pytest.raises(ValueError, match="layer 'a' has no batch and channel dimension -2"):
            AttentionBehavioralRegularization([torch.ones(3)], channel_dim=-2)(tokens, tokens)
        with pytest.raises(ValueError, match="layer '0' has no batch and channel dimension 1"):
            AttentionBehavioralRegularization([torch.ones(2)])([torch.ones(2)], [torch.ones(2)])


def in_place(net, **options):
    net.compile(**options)
    return net


class Branching(nn.Module):
    """Runs its layers in another order than they are declared, one of them twice, one never."""

    def __init__(self):
        super().__init__()
        self.late, self.early, self.twice, self.never = (nn.Linear(3, 3) for _ in range(4))

    def forward(self, x, scale=1.0):
        return self.late(self.twice(self.twice(self.early(x)))) * scale


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


class Residual(nn.Module):
    """Functional operations between modules, a skip connection round the layer, and in-place activations."""

    def __init__(self):
        super().__init__()
        self.stem, self.body, self.side = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 1)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        x = F.relu(self.stem(x), inplace=True)
        skip = x * 2
        x = self.body(x) + skip
        x = F.relu(self.side(x), inplace=True) + skip
        return self.head(x.mean((2, 3)))


class Unmappable(Residual):
    """Looks at its values, which a batched pass does not allow."""

    def forward(self, x):
        y = super().forward(x)
        return y if float(y.sum()) < 1e9 else -y


@torch.no_grad()
def brute_force(model, batches, names, temperature=5.0):
    """Upstream's way: zero one filter, and its bias, at a time and run everything."""
    attention = OrderedDict()
    model = copy.deepcopy(model).double().eval()
    for name in names:
        layer = model.get_submodule(name)
        increases = torch.zeros(layer.out_channels, dtype=torch.float64)
        for x, labels in batches:
            for c in range(layer.out_channels):
                kept = copy.deepcopy(layer.state_dict())
                base = F.cross_entropy(model(x.double()), labels)
                layer.weight.data[c] = 0
                layer.bias.data[c] = 0
                increases[c] += (F.cross_entropy(model(x.double()), labels) - base) / len(batches)
                layer.load_state_dict(kept)
        z = (increases - increases.mean()) / increases.std(correction=0)
        attention[name] = torch.softmax(z / temperature, 0).float()
    return attention


class TestChannelAttention:
    batches = tuple((torch.randn(5, 3, 8, 8), torch.randint(4, (5,))) for _ in range(3))

    @pytest.mark.parametrize(
        ("net", "names"),
        [(small_net, ["conv2", "conv1"]), (Residual, ["body", "stem", "side"]), (Unmappable, ["body"])],
    )
    @pytest.mark.parametrize("channels_per_pass", [1, 4, 16])
    def test_equals_brute_force(self, net, names, channels_per_pass):
        model = net()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(3)
        got = channel_attention(model, self.batches, names, progress=False, channels_per_pass=channels_per_pass)
        expected = brute_force(model, self.batches, names)
        assert list(got) == names
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
        for weights in got.values():
            torch.testing.assert_close(weights.sum(), torch.tensor(1.0))
            assert weights.std() > 0

    def test_loader_that_has_no_length(self):
        class Stream(IterableDataset):
            def __iter__(self):
                return iter(TestChannelAttention.batches)

        model, loader = small_net(), DataLoader(Stream(), batch_size=None)
        expected = channel_attention(model, self.batches, ["conv2"])
        torch.testing.assert_close(channel_attention(model, loader, ["conv2"]), expected, rtol=0, atol=0)

    def test_options(self):
        model = small_net()
        first = channel_attention(model, self.batches, ["conv2"], max_batches=1, temperature=1.0, progress=False)
        torch.testing.assert_close(first, brute_force(model, self.batches[:1], ["conv2"], 1.0), rtol=1e-4, atol=1e-6)
        everything = channel_attention(model, self.batches, ["conv2"], max_batches=None, progress=False)
        torch.testing.assert_close(everything, channel_attention(model, self.batches, ["conv2"]), rtol=0, atol=0)

    def test_no_more_batches_are_loaded_than_are_looked_at(self):
        loader = iter(self.batches)
        channel_attention(small_net(), loader, ["conv2"], max_batches=2, progress=False)
        assert len(list(loader)) == 1

    def test_a_criterion_of_ones_own(self):
        seen = []

        def criterion(logits, labels):
            seen.append(logits.shape)
            return F.cross_entropy(logits, labels, label_smoothing=0.1)

        channel_attention(small_net(), self.batches[:1], ["conv1"], criterion, progress=False)
        assert seen == [(5, 4)] * 7

    def test_fault_attention_ran_the_whole_network_for_every_filter(self):
        model = small_net()
        calls = {"conv1": 0, "conv2": 0, "head": 0}
        for name in calls:
            forward = type(model.get_submodule(name)).forward

            def counted(x, name=name, forward=forward):
                calls[name] += 1
                return forward(model.get_submodule(name), x)

            model.get_submodule(name).forward = counted
        channel_attention(model, self.batches[:1], ["conv2"], progress=False)
        assert calls == {"conv1": 1, "conv2": 1, "head": 2}

    @pytest.mark.parametrize("fails", [False, True])
    def test_the_model_is_left_as_it_was(self, fails):
        model = small_net()
        model.norm1.eval()
        model.conv1.forward = own = model.conv1.forward
        before = copy.deepcopy(model.state_dict())

        def criterion(logits, labels):
            if fails:
                raise KeyError("criterion")
            return F.cross_entropy(logits, labels)

        try:
            channel_attention(model, self.batches, ["conv2"], criterion, progress=False)
        except KeyError:
            assert fails
        torch.testing.assert_close(dict(model.state_dict()), dict(before))
        assert model.training and model.norm2.training and not model.norm1.training
        assert model.conv1.__dict__["forward"] is own and "forward" not in model.conv2.__dict__
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())

    def test_equal_increases_give_equal_attention(self):
        model = small_net()
        nn.init.zeros_(model.head.weight)
        attention = channel_attention(model, self.batches, ["conv2"], progress=False)["conv2"]
        torch.testing.assert_close(attention, torch.full((8,), 1 / 8))

    def test_serves_attention_behavioral_regularization(self):
        model = small_net()
        attention = channel_attention(model, self.batches, ["conv1", "conv2"], progress=True)
        getter = IntermediateLayerGetter(model, ["conv1", "conv2"])
        x = torch.randn(2, 3, 8, 8)
        source, _ = getter(x)
        target, _ = getter(x + 1)
        assert AttentionBehavioralRegularization(attention)(source, target) > 0

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            (dict(model="x"), TypeError, r"expected model to be a torch\.nn\.Module, got str"),
            (dict(return_layers=["conv9"]), AttributeError, "Module conv9 not found"),
            (dict(return_layers="conv1"), TypeError, "a list of names, got the string 'conv1'"),
            (dict(return_layers=["conv1", "conv2", "conv1"]), ValueError, "once in return_layers, got 'conv1' twice"),
            (dict(data_loader=[]), ValueError, "at least one batch"),
            (dict(temperature=0), ValueError, "temperature > 0, got 0"),
            (dict(max_batches=0), ValueError, "max_batches to be a positive integer, got 0"),
            (dict(channels_per_pass=0), ValueError, "channels_per_pass to be a positive integer, got 0"),
            (dict(data_loader=[torch.ones(2, 3, 8, 8)]), TypeError, r"batches \(x, labels, ...\), got Tensor"),
            (
                dict(data_loader=[(torch.ones(2, 3, 8, 8), torch.ones(2))]),
                TypeError,
                "integer labels, got torch.float32",
            ),
            (dict(data_loader=[(torch.ones(2, 3, 8, 8), [0])]), ValueError, r"one label per input, \[2\], got \[1\]"),
        ],
    )
    def test_bad_input_is_named(self, change, error, message):
        arguments = dict(model=small_net(), data_loader=self.batches, return_layers=["conv1"], progress=False)
        with pytest.raises(error, match=message):
            channel_attention(**{**arguments, **change})

    def test_layers_that_can_not_be_asked_are_named(self):
        x, labels = torch.randn(2, 3), torch.zeros(2, dtype=torch.long)
        with pytest.raises(ValueError, match="layer 'twice' to run once per forward pass, but it ran 2 times"):
            channel_attention(Branching(), [(x, labels)], ["twice"], progress=False)
        with pytest.raises(ValueError, match="layer 'never' to run once per forward pass, but it ran 0 times"):
            channel_attention(Branching(), [(x, labels)], ["never"], progress=False)

        class Tuple(nn.Module):
            def forward(self, x):
                return (x,)

        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = Tuple()

            def forward(self, x):
                return self.layer(x)[0]

        class Vector(Net):
            def forward(self, x):
                return super().forward(x) * self.scalar(x)

            def __init__(self):
                super().__init__()
                self.scalar = nn.Flatten(0)

        for method in ("exact", "taylor"):
            with pytest.raises(ValueError, match=r"layer 'layer' to return a tensor with .*, got tuple"):
                channel_attention(Net(), [(x, labels)], ["layer"], progress=False, method=method)
            with pytest.raises(ValueError, match=r"layer 'scalar' to return a tensor with .*, got \[6\]"):
                channel_attention(Vector(), [(x, labels)], ["scalar"], progress=False, method=method)

    @pytest.mark.parametrize("method", ["exact", "taylor"])
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_losses_that_are_not_finite_are_no_attention(self, value, method, tmp_path):
        model, path = small_net(), tmp_path / "attention.safetensors"
        batches = [self.batches[0], (torch.full((5, 3, 8, 8), value), self.batches[1][1])]
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match=r"in batch 1 the loss increase is not finite for 8 of 8 .* layer 'conv2'"):
            channel_attention(model, batches, ["conv2", "conv1"], progress=False, method=method, cache=path)
        assert load_file(path).keys() == {"conv2", "conv1"}  # of the first batch
        assert all(increases.isfinite().all() for increases in load_file(path).values())
        torch.testing.assert_close(dict(model.state_dict()), dict(before))
        assert model.training and not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())

    def test_compiled_models(self):
        model = small_net()
        expected = channel_attention(model, self.batches, ["conv2"], progress=False)
        model.eval()
        compiled = torch.compile(model, backend="eager")
        compiled(self.batches[0][0])  # code that looks for no hooks
        got = channel_attention(compiled, self.batches, ["conv2"], progress=False)
        torch.testing.assert_close(got, expected)


class TestTaylor:
    batches = TestChannelAttention.batches

    def test_is_exact_where_loss_and_network_are_linear(self):
        model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.AvgPool2d(2), nn.Conv2d(6, 5, 3), nn.Flatten(1)).double()
        batches = [(x.double(), labels) for x, labels in self.batches]

        def criterion(logits, labels):
            return logits.mean()

        exact, taylor = (
            channel_attention(model, batches, ["2", "0"], criterion, progress=False, method=method)
            for method in ("exact", "taylor")
        )
        assert list(taylor) == ["2", "0"]
        torch.testing.assert_close(taylor, exact)

    def test_is_the_first_order_term(self):
        model, (x, labels) = small_net().double().eval(), self.batches[0]
        maps = {}
        handle = model.conv2.register_forward_hook(lambda module, args, output: maps.update(t=output))
        loss = F.cross_entropy(model(x.double()), labels)
        handle.remove()
        (gradient,) = torch.autograd.grad(loss, maps["t"])
        increase = -(maps["t"] * gradient).sum((0, 2, 3)).detach()
        z = (increase - increase.mean()) / increase.std(correction=0)
        got = channel_attention(model, [(x.double(), labels)], ["conv2"], progress=False, method="taylor")["conv2"]
        torch.testing.assert_close(got, torch.softmax(z / 5, 0).float())

    @pytest.mark.parametrize("frozen", [False, True])
    def test_the_model_is_left_as_it_was(self, frozen):
        model = small_net()
        model.requires_grad_(not frozen)
        before = copy.deepcopy(model.state_dict())
        with torch.no_grad():
            attention = channel_attention(model, self.batches, ["conv1", "conv2"], progress=False, method="taylor")
        assert all(vector.std() > 0 and not vector.requires_grad for vector in attention.values())
        torch.testing.assert_close(dict(model.state_dict()), dict(before))
        assert model.training and all(p.grad is None and p.requires_grad != frozen for p in model.parameters())
        assert not any(m._forward_hooks for m in model.modules())

    def test_what_is_overwritten_in_place_is_asked_as_it_was(self):
        model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(1))
        kept = copy.deepcopy(model)
        kept[1].inplace = False
        got, expected = (
            channel_attention(net, self.batches, ["0"], progress=False, method="taylor") for net in (model, kept)
        )
        torch.testing.assert_close(got, expected)

    def test_bad_input_is_named(self):
        with pytest.raises(ValueError, match="method to be exact or taylor, got 'fast'"):
            channel_attention(small_net(), self.batches, ["conv1"], method="fast")
        x, labels = torch.randn(2, 3), torch.zeros(2, dtype=torch.long)
        with pytest.raises(ValueError, match="'twice' to run once per forward pass, but it ran 2 times"):
            channel_attention(Branching(), [(x, labels)], ["twice"], method="taylor")


class Counting:
    """A criterion that keeps its calls to itself: pickle would save the criterion alone."""

    def __init__(self, criterion, calls, stop_after):
        self.criterion, self.calls, self.stop_after = criterion, calls, stop_after

    def __getstate__(self):
        return self.criterion

    def __call__(self, logits, labels):
        self.calls.append(len(labels))
        if len(self.calls) == self.stop_after:
            raise KeyboardInterrupt
        return self.criterion(logits, labels)


def smoothed(by):
    return lambda logits, labels: F.cross_entropy(logits, labels, label_smoothing=by)


class TestCachedAttention:
    batches = TestChannelAttention.batches
    names = ("conv2", "conv1")

    def ask(self, model, path, **options):
        """The attention, and for how many outputs the criterion was called."""
        calls = []
        criterion = options.pop("criterion", F.cross_entropy)
        stop_after, batches = options.pop("stop_after", None), options.pop("batches", self.batches)
        try:
            return channel_attention(
                model, batches, self.names, Counting(criterion, calls, stop_after), progress=False, cache=path,
                **options,
            ), len(calls)  # fmt: skip
        except KeyboardInterrupt:
            return None, len(calls)

    def test_a_complete_one_takes_no_forward_pass(self, tmp_path):
        path, model = tmp_path / "new" / "attention.safetensors", small_net()
        first, calls = self.ask(model, path)
        assert calls == 3 * (6 + 8 + 2) and [file.name for file in path.parent.iterdir()] == [path.name]
        again, calls = self.ask(model, path)
        assert calls == 0
        torch.testing.assert_close(again, first, rtol=0, atol=0)
        assert self.ask(model, path, temperature=1.0)[0]["conv1"].std() > first["conv1"].std()

    @pytest.mark.parametrize("stop_after", [5, 9, 10, 17, 30, 47])
    def test_an_interrupted_one_goes_on(self, stop_after, tmp_path):
        path, model = tmp_path / "attention.safetensors", small_net()
        expected, whole = self.ask(model, None)
        assert self.ask(model, path, stop_after=stop_after) == (None, stop_after)
        got, calls = self.ask(model, path)
        assert whole - stop_after <= calls <= whole - stop_after + 9
        torch.testing.assert_close(got, expected, rtol=0, atol=0)

    @pytest.mark.parametrize(
        "change",
        [dict(criterion=F.multi_margin_loss), dict(max_batches=2), dict(method="taylor"), dict(batches=batches[:2])],
        ids=["criterion", "max_batches", "method", "data"],
    )
    def test_a_stale_one_is_computed_again(self, change, tmp_path):
        path, model = tmp_path / "attention.safetensors", small_net()
        self.ask(model, path)
        with pytest.warns(UserWarning, match="computed again: it was made from another model, data set, layers or opt"):
            assert self.ask(model, path, **change)[1] > 0
        with torch.no_grad():
            model.conv1.bias.add_(1)
        with pytest.warns(UserWarning, match="computed again: it was made from another model"):
            got, _ = self.ask(model, path)
        torch.testing.assert_close(got, self.ask(model, None)[0], rtol=0, atol=0)

    @pytest.mark.parametrize(
        "criterion",
        [
            lambda by: nn.CrossEntropyLoss(label_smoothing=by),
            lambda by: functools.partial(F.cross_entropy, label_smoothing=by),
            smoothed,
        ],
        ids=["module", "partial", "closure"],
    )
    def test_criteria_are_told_apart_by_what_they_compute(self, criterion, tmp_path):
        path, model = tmp_path / "attention.safetensors", small_net()
        first, _ = self.ask(model, path, criterion=criterion(0.0))
        assert self.ask(model, path, criterion=criterion(0.0))[1] == 0
        with pytest.warns(UserWarning, match="computed again"):
            other, _ = self.ask(model, path, criterion=criterion(0.9))
        assert not torch.equal(first["conv1"], other["conv1"])

    def test_other_batches_of_one_data_set_do_not_go_on(self, tmp_path):
        path, model = tmp_path / "attention.safetensors", small_net()
        data = TensorDataset(torch.randn(12, 3, 8, 8), torch.randint(4, (12,)))
        assert self.ask(model, path, batches=DataLoader(data, 4), stop_after=20) == (None, 20)
        with pytest.warns(UserWarning, match="computed again"):
            got, _ = self.ask(model, path, batches=DataLoader(data, 6))
        torch.testing.assert_close(got, self.ask(model, None, batches=DataLoader(data, 6))[0], rtol=0, atol=0)

    @pytest.mark.parametrize("keep", [0, 5, 200, -1])
    def test_a_damaged_one_is_computed_again(self, keep, tmp_path):
        path, model = tmp_path / "attention.safetensors", small_net()
        expected, whole = self.ask(model, path)
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.warns(UserWarning, match="computed again: it can't be read"):
            got, calls = self.ask(model, path)
        assert calls == whole
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


class SqueezeExcite(nn.Module):
    """Depthwise convolution, a gate of its own pooled channels, dropout, a skip connection added in place."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.depthwise, self.gate = nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.Conv2d(6, 6, 1)
        self.mix, self.head = nn.Conv2d(6, 6, 3, padding=1, stride=2), nn.Linear(6, 4)

    def forward(self, x):
        x = F.hardswish(self.norm(self.stem(x)))
        skip = x
        x = F.relu6(self.depthwise(F.max_pool2d(x, 3, 1, 1)), inplace=True)
        x += skip
        x = x * torch.sigmoid(self.gate(F.adaptive_avg_pool2d(x, 1)))
        x = self.mix(2 - x)
        return self.head(F.dropout(x.mean([-1, -2]), 0.5, self.training))


class Pooled(nn.Module):
    """The layer feeds nothing but a pooling head, behind a downsampled skip connection, as in a ResNet."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.side = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Conv2d(3, 5, 3)
        self.act, self.pool, self.head = nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Linear(5, 4)

    def forward(self, x):
        out = self.norm(self.conv(x))
        out += self.side(x)
        return self.head(torch.flatten(self.pool(self.act(out)), 1))


class Mixed(nn.Module):
    """Functions that mix channels, change shapes, reduce over channels, and square maps: C = H = W = b."""

    def __init__(self):
        super().__init__()
        self.conv, self.groups = nn.Conv2d(3, 5, 4), nn.Conv2d(10, 5, 1, groups=5)
        self.scale, self.head = nn.Parameter(torch.randn(5)), nn.Linear(5, 4)

    def forward(self, x):
        x = self.conv(x)
        assert x.shape == (5, 5, 5, 5) and x.size(1) == x.shape[1] == 5
        x = x + x.mean(1, keepdim=True) + F.softmax(x, 1) * self.scale + x.transpose(1, 2) + x.mean(0)
        x = self.groups(torch.cat([x, x.flip(1)], 1)) - F.max_pool2d(x.mean(1), 3, 1, 1).unsqueeze(1)
        return self.head(x.flatten(2).amax(-1) + x.mean(1).mean(1))


class Elsewhere(Pooled):
    """Writes the layer's output into another tensor, which no pair of tensors can stand for."""

    def forward(self, x):
        out = torch.zeros(5, 5, 6, 6, dtype=x.dtype)
        out = out + self.norm(self.conv(x))
        out[:, 0] = 1
        skip = self.side(x)
        skip += out
        return self.head(self.pool(skip).flatten(1))


@pytest.mark.parametrize(
    ("net", "layer", "separable"),
    [
        (SqueezeExcite, "stem", True), (SqueezeExcite, "depthwise", True), (SqueezeExcite, "mix", True),
        (Pooled, "conv", True), (Pooled, "side", False), (Mixed, "conv", True), (Mixed, "groups", True),
        (Elsewhere, "conv", False), (small_net, "conv1", True), (small_net, "conv2", True),
    ],
)  # fmt: skip
def test_channels_are_followed_separately_as_far_as_they_are_separate(net, layer, separable):
    model = net()
    with torch.no_grad():
        for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
            norm.running_mean.uniform_(-0.2, 0.2)
            norm.running_var.uniform_(0.1, 0.5)
    batches = TestChannelAttention.batches[:2]
    got = channel_attention(model, batches, [layer], progress=False)
    torch.testing.assert_close(got, brute_force(model, batches, [layer]), rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        replay = Replay(model.eval(), layer, batches[0][0])
        outputs = list(replay.without_channels(torch.arange(3)))
        kept = replay.original.clone()
        expected = []
        for channel in range(3):
            replay.original = kept.clone()
            replay.original[:, channel] = 0
            with replay._standing_in(replay.original, lambda tensor: tensor):
                expected.append(model(batches[0][0]))
    torch.testing.assert_close(outputs, expected)
    assert (len(replay._ways) == 2) is separable


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("affine", [True, False])
def test_a_batch_norm_as_a_scaling_is_the_batch_norm(dtype, affine):
    norm, x = nn.BatchNorm2d(5, affine=affine), torch.randn(4, 5, 3, 3).to(dtype)
    norm(torch.randn(4, 5, 3, 3) * 3 + 1)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.uniform_(0.5, 2)
    norm = norm.eval().to(dtype)
    with _ForMapping():
        scaled, map_scaled = norm(x), torch.func.vmap(norm)(x[None])[0]
    assert scaled.dtype == dtype
    for got in (scaled, map_scaled):
        torch.testing.assert_close(got, norm(x))
    with _ForMapping():
        from_the_batch = norm.train()(x)
    assert from_the_batch.float().mean().abs() < 2 and not torch.equal(from_the_batch, scaled)


@pytest.mark.parametrize(("dimensions", "size"), [(1, 1), (2, 1), (2, (1, 1)), (2, 2), (2, (1, None)), (3, 1)])
def test_a_global_pooling_as_a_mean_is_the_pooling(dimensions, size):
    pool = getattr(nn, f"AdaptiveAvgPool{dimensions}d")(size)
    x = torch.randn(3, 2, 5, *[4] * dimensions)
    with _ForMapping():
        got = torch.func.vmap(pool)(x)
    torch.testing.assert_close(got, torch.stack([pool(one) for one in x]))


def test_channels_last_is_mapped_over_without_a_warning():
    """Warnings are errors here: a function that vmap can only loop over would give one."""
    model, (x, labels) = small_net(), TestChannelAttention.batches[0]
    batches = [(x.contiguous(memory_format=torch.channels_last), labels)]
    got = channel_attention(model.to(memory_format=torch.channels_last), batches, ["conv1", "conv2"], progress=False)
    torch.testing.assert_close(got, brute_force(model, batches, ["conv1", "conv2"]), rtol=1e-4, atol=1e-6)


def test_large_outputs_take_few_channels_a_pass(monkeypatch):
    passes = []

    class Counting(Replay):
        def without_channels(self, channels):
            passes.append(len(channels))
            return super().without_channels(channels)

    monkeypatch.setattr(attention, "Replay", Counting)
    batches = TestChannelAttention.batches[:1]
    for size_in_outputs, expected in ((0.5, [1] * 5), (2.5, [2, 2, 1]), (9, [5])):
        passes.clear()
        monkeypatch.setitem(attention._PASS_BYTES, "cpu", int(size_in_outputs * 5 * 5 * 6 * 6 * 4))
        channel_attention(Pooled(), batches, ["conv"], progress=False)
        assert passes == expected


def test_what_goes_round_torch_functions_is_no_silent_error():
    class Opaque(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return torch.from_numpy(x.numpy() * 2)

        @staticmethod
        def backward(ctx, grad):
            return grad * 2

    class Net(Pooled):
        def forward(self, x):
            return self.head(self.pool(Opaque.apply(self.conv(x))).flatten(1))

    model, batches = Net(), TestChannelAttention.batches[:1]
    got = channel_attention(model, batches, ["conv"], progress=False)
    torch.testing.assert_close(got, brute_force(model, batches, ["conv"]), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("net", [SqueezeExcite, Pooled])
def test_a_mixing_layer_takes_the_weights_of_one_channel(net):
    def flops(way):
        model, (x, _) = net().eval(), TestChannelAttention.batches[0]
        with torch.no_grad():
            replay = Replay(model, next(model.named_children())[0], x)
            with FlopCounterMode(display=False) as counter:
                list(getattr(replay, way)(torch.arange(5)))
        return counter.get_total_flops()

    assert flops("_separately") < flops("_together")


def test_modules_that_run_again_after_the_layer_run_for_real():
    class Again(Residual):
        def forward(self, x):
            x = F.relu(self.side(F.relu(self.stem(x))))
            x = F.relu(self.side(self.body(x)))
            return self.head(x.mean((2, 3)))

    batches = TestChannelAttention.batches[:1]
    model = Again()
    got = channel_attention(model, batches, ["body"], progress=False)
    torch.testing.assert_close(got, brute_force(model, batches, ["body"]), rtol=1e-4, atol=1e-6)


def test_star_names_are_all_there():
    assert all(hasattr(delta, name) for name in delta.__all__)

import copy
import functools
import warnings
from collections import OrderedDict
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from network_support import Branching, small_net
from safetensors.torch import load_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from talib_fast.finetune import attention
from talib_fast.finetune.delta import (
    AttentionBehavioralRegularization,
    IntermediateLayerGetter,
    channel_attention,
)
from talib_fast.finetune.replay import Replay, _ForMapping
from talib_fast.libraries import import_library


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
        # a first pass shows what follows what, a second one records, and the head alone runs for all filters
        assert calls == {"conv1": 2, "conv2": 2, "head": 3}

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
            (
                dict(return_layers={"conv1": "a", "conv2": "a"}),
                ValueError,
                "different aliases in return_layers, got 'a' twice",
            ),
            (dict(channel_dim=0), ValueError, "channel_dim to be an integer other than 0, the batch's, got 0"),
            (dict(channel_dim=1.0), ValueError, "channel_dim to be an integer other than 0, the batch's, got 1.0"),
            (dict(channel_dim=4), ValueError, r"layer 'conv1' has no batch and channel dimension 4: \[2, 6, 8, 8\]"),
            (dict(channel_dim=-4), ValueError, r"layer 'conv1' has no batch and channel dimension -4"),
            (dict(criterion=lambda logits, labels: logits), ValueError, r"return a 0-dim loss, got \[2, 4\]"),
            (dict(criterion=lambda logits, labels: None), ValueError, r"return a 0-dim loss, got NoneType"),
            (dict(data_loader=[]), ValueError, "at least one batch"),
            (dict(temperature=0), ValueError, "temperature > 0, got 0"),
            (dict(max_batches=0), ValueError, "max_batches to be a positive integer, got 0"),
            (dict(channels_per_pass=0), ValueError, "channels_per_pass to be a positive integer, got 0"),
            (dict(data_loader=[torch.ones(2, 3, 8, 8)]), TypeError, r"batches \(x, labels, ...\), got Tensor"),
        ],
    )
    def test_bad_input_is_named(self, change, error, message):
        batches = [(torch.ones(2, 3, 8, 8), torch.zeros(2, dtype=torch.long))]
        arguments = dict(model=small_net(), data_loader=batches, return_layers=["conv1"], progress=False)
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

    def test_fault_a_checkpoint_behind_a_frozen_layer_repeated_something_else(self):
        class Net(nn.Sequential):
            def forward(self, x):
                return self[1](checkpoint(self[0], x, use_reentrant=False).mean((2, 3)))

        model = Net(nn.Sequential(nn.Conv2d(3, 6, 3), nn.Tanh(), nn.Conv2d(6, 6, 3), nn.Tanh()), nn.Linear(6, 4))
        model[0].requires_grad_(False)
        got = channel_attention(model, self.batches, ["0.0"], progress=False, method="taylor")["0.0"]
        model.requires_grad_()
        expected = by_hooks(model, self.batches, "0.0", method="taylor")
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)

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


class Strict(nn.Module):
    """Takes ordinary tensors alone, and refuses others by an error of its own."""

    def forward(self, x):
        if type(x) is not torch.Tensor or torch._C._are_functorch_transforms_active():
            raise TypeError("expected an ordinary tensor")
        return x.sin()


def test_fault_models_that_refuse_other_tensors():
    model = nn.Sequential(nn.Conv2d(3, 5, 3), Strict(), nn.AdaptiveAvgPool2d(1), nn.Flatten(1), nn.Linear(5, 4))
    batches = TestChannelAttention.batches[:1]
    got = channel_attention(model, batches, ["0"], progress=False)
    torch.testing.assert_close(got, brute_force(model, batches, ["0"]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("channel_dim", [1, -1])
def test_fault_a_model_that_keeps_what_it_computes_could_not_be_copied_any_more(channel_dim):
    class Keeping(nn.ReLU):
        def __init__(self):
            super().__init__()
            self.register_buffer("latest", torch.zeros(()))

        def forward(self, x):
            self.map = x
            self.latest = x.mean()
            return super().forward(x)

    model, batches = nn.Sequential(nn.Conv2d(3, 5, 3), Keeping(), nn.Flatten(1)), TestChannelAttention.batches[:1]
    channel_attention(model, batches, ["0"], progress=False, channel_dim=channel_dim)
    expected = model[0](batches[0][0])
    torch.testing.assert_close(copy.deepcopy(model)[1].map, expected.detach())
    torch.testing.assert_close(copy.deepcopy(model)[1].latest, expected.detach().mean())


def doubling(module, args, output):
    return output * 2 + 1


def doubling_in_place(module, args, output):
    output.mul_(2).add_(1)


@pytest.mark.parametrize("hook", [doubling, doubling_in_place])
@pytest.mark.parametrize("layer", ["stem", "body", "side"])
def test_fault_a_models_own_hooks_ran_twice(hook, layer):
    """What a layer returns is what comes out of its hooks; a module may also run before the layer and behind it."""

    class Again(Residual):
        def forward(self, x):
            y = self.body(self.stem(x)).relu()
            return self.head(self.side(y + self.stem(x)).mean((2, 3)))

    model, batches = Residual() if layer == "stem" else Again(), TestChannelAttention.batches[:1]
    for module in (model.stem, model.body, model.side, model.head):
        module.register_forward_hook(hook)
    before = [list(module._forward_hooks.values()) for module in model.modules()]
    got = channel_attention(model, batches, [layer], progress=False)
    torch.testing.assert_close(got[layer], by_hooks(model, batches, layer), rtol=1e-4, atol=1e-6)
    assert [list(module._forward_hooks.values()) for module in model.modules()] == before


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


def compiled(module):
    return torch.compile(module, backend="eager")


def patched(module):
    module.forward = functools.partial(type(module).forward, module)
    return module


@pytest.mark.parametrize("wrap", [compiled, checkpoint_wrapper, patched])
def test_wrapped_layers_and_modules(wrap):
    """Also where a module that ran before the layer runs again behind it, and so has to run for real."""
    torch.manual_seed(1)
    model, batches = Residual(), TestChannelAttention.batches[:1]
    expected = channel_attention(model, batches, ["body", "stem"], progress=False)
    again = nn.Sequential(model.side, model.body, model.side, nn.AdaptiveAvgPool2d(1), nn.Flatten(1))
    batches_again = [(torch.randn(5, 6, 4, 4), batches[0][1])]
    expected_again = channel_attention(again, batches_again, ["1"], progress=False)
    for name in ("stem", "body", "side"):
        setattr(model, name, wrap(getattr(model, name)))
    again[0] = again[2] = model.side
    torch.testing.assert_close(channel_attention(model, batches, ["body", "stem"], progress=False), expected)
    torch.testing.assert_close(channel_attention(again, batches_again, ["1"], progress=False), expected_again)


def by_hooks(model, batches, layer, criterion=F.cross_entropy, channel_dim=1, method="exact", temperature=5.0):
    """Every channel zeroed by a hook in a full pass in float64; or its first-order term, by autograd."""
    model = copy.deepcopy(model).double().eval()
    module, total = model.get_submodule(layer), 0
    double = functools.partial(
        tree_map, lambda part: part.double() if torch.is_tensor(part) and part.is_floating_point() else part
    )
    for x, labels in double(list(batches)):
        maps = []
        with module.register_forward_hook(lambda module, args, output, maps=maps: maps.append(output)):
            loss = criterion(model(x), labels)
        others = [dim for dim in range(maps[0].dim()) if dim != channel_dim % maps[0].dim()]
        if method == "taylor":
            total = total - (maps[0] * torch.autograd.grad(loss, maps)[0]).sum(others).detach()
            continue
        increases = []
        for channel in range(maps[0].size(channel_dim)):
            at = [slice(None)] * maps[0].dim()
            at[channel_dim] = channel

            def zero(module, args, output, at=tuple(at)):
                output = output.clone()
                output[at] = 0
                return output

            with torch.no_grad(), module.register_forward_hook(zero):
                increases.append(criterion(model(x), labels) - loss.detach())
        total = total + torch.stack(increases)
    z = (total - total.mean()) / total.std(correction=0)
    return torch.softmax(z / temperature, 0).float()


def small_transformer():
    timm = import_library("timm")
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=8, patch_size=4, embed_dim=12, depth=2, num_heads=2, num_classes=4
    )


def small_convnext():
    timm = import_library("timm")
    model = timm.create_model("convnext_tiny", depths=(1, 1, 1, 1), dims=(4, 6, 6, 8), patch_size=2, num_classes=4)
    for name, parameter in model.named_parameters():
        if name.endswith("gamma"):  # of each block's branch: next to nothing at first
            nn.init.ones_(parameter)
    return model


@pytest.mark.skipif(not find_spec("timm") or not find_spec("torchvision"), reason="needs timm and torchvision")
@pytest.mark.parametrize("method", ["exact", "taylor"])
@pytest.mark.parametrize(
    ("net", "layers", "channel_dim"),
    [
        (small_transformer, ["blocks.0", "blocks.1.norm1", "blocks.1.mlp.fc1", "patch_embed"], -1),
        (small_transformer, ["blocks.0.attn"], 2),
        (small_convnext, ["stages.1", "stages.2.blocks.0.conv_dw"], 1),
        (small_convnext, ["stages.1.blocks.0.norm", "stages.2.blocks.0.mlp.fc1"], -1),
    ],
)
def test_fault_tokens_got_a_weight_per_token(net, layers, channel_dim, method):
    model, size = net(), 8 if net is small_transformer else 32
    batches = [(torch.randn(3, 3, size, size), torch.tensor([0, 3, 1])) for _ in range(2)]
    got = channel_attention(model, batches, layers, progress=False, channel_dim=channel_dim, method=method)
    for layer in layers:
        expected = by_hooks(model, batches, layer, channel_dim=channel_dim, method=method)
        torch.testing.assert_close(got[layer], expected, rtol=2e-3, atol=1e-6)


def test_another_activation_is_another_attention(tmp_path):
    batches, path = [(torch.randn(4, 3), torch.arange(4) % 2)], tmp_path / "attention.safetensors"
    first = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    other = nn.Sequential(first[0], nn.Tanh(), first[2])
    channel_attention(first, batches, ["0"], progress=False, cache=path)
    expected = channel_attention(other, batches, ["0"], progress=False)
    with pytest.warns(UserWarning, match="computed again"):
        got = channel_attention(other, batches, ["0"], progress=False, cache=path)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_another_channel_dimension_is_another_attention(tmp_path):
    model, path = small_net(), tmp_path / "attention.safetensors"
    ask = functools.partial(channel_attention, model, TestChannelAttention.batches, ["conv2"], progress=False)
    torch.testing.assert_close(ask(channel_dim=-3, cache=path), ask(channel_dim=1), rtol=0, atol=0)
    with pytest.warns(UserWarning, match="computed again"):
        assert ask(channel_dim=-1, cache=path)["conv2"].shape == (8,)


@dataclass
class Prediction:
    logits: torch.Tensor
    loss: torch.Tensor | None = None
    name: str = "prediction"


class Anything(nn.Module):
    """Returns its logits in a structure that the criterion opens."""

    def __init__(self, pack):
        super().__init__()
        self.conv, self.mix = nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(5, 4, 1)
        self.pack = pack

    def forward(self, x):
        return self.pack(self.mix(F.gelu(self.conv(x))), x)


images = torch.randn(3, 3, 4, 4)
CRITERIA = {
    "dict": (
        lambda maps, x: {"out": maps, "aux": [maps.mean((2, 3)), None], "text": "t"},
        {"y": torch.randint(4, (3, 4, 4)), "aux": (torch.tensor([0, 1, 2]),)},
        lambda out, labels: F.cross_entropy(out["out"], labels["y"]) + F.cross_entropy(out["aux"][0], labels["aux"][0]),
    ),
    "tuple": (
        lambda maps, x: (maps, x),
        torch.rand(3, 3, 4, 4),
        lambda out, labels: F.mse_loss(out[0][:, :3] * out[1], labels),
    ),
    "dataclass": (
        lambda maps, x: Prediction(maps.mean((2, 3)), maps.sum()),
        torch.rand(3, 4),
        lambda out, labels: F.binary_cross_entropy_with_logits(out.logits, labels) + 0 * len(out.name),
    ),
    "tensor": (lambda maps, x: maps, torch.randint(4, (3, 4, 4)), F.cross_entropy),
    "none of the criterion's": (lambda maps, x: maps.mean((2, 3)), None, lambda out, labels: out.square().mean()),
    "text": (
        lambda maps, x: maps.mean((2, 3)),
        ["a", "bc"],
        lambda out, labels: out.square().mean() * len("".join(labels)),
    ),
}


@pytest.mark.parametrize("method", ["exact", "taylor"])
@pytest.mark.parametrize("kind", CRITERIA)
def test_fault_criteria_and_labels_of_other_kinds_were_refused(kind, method):
    pack, labels, criterion = CRITERIA[kind]
    model, batches = Anything(pack), [(images, labels)]
    got = channel_attention(model, batches, ["conv"], criterion, progress=False, method=method)["conv"]
    expected = by_hooks(model, batches, "conv", criterion, method=method)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-6)


def test_hugging_face_outputs():
    outputs = pytest.importorskip("transformers.modeling_outputs")

    def criterion(output, labels):
        assert type(output) is outputs.ImageClassifierOutput and output.logits is output["logits"]
        return F.cross_entropy(output.logits, labels)

    model = Anything(lambda maps, x: outputs.ImageClassifierOutput(logits=maps.mean((2, 3)), hidden_states=(x, maps)))
    batches = [(images, torch.tensor([3, 0, 1]))]
    got = channel_attention(model, batches, ["conv"], criterion, progress=False)["conv"]
    torch.testing.assert_close(got, by_hooks(model, batches, "conv", criterion), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    "labels", [[0, 3, 1], np.array([0, 3, 1], np.int32), torch.tensor([0, 3, 1], dtype=torch.uint8)]
)
def test_integers_of_any_kind_are_classes(labels):
    model = Anything(lambda maps, x: maps.mean((2, 3)))
    got, expected = (
        channel_attention(model, [(images, y)], ["conv"], progress=False) for y in (labels, torch.tensor([0, 3, 1]))
    )
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_a_criterion_may_give_a_number():
    model, batches = small_net(), TestChannelAttention.batches
    expected = channel_attention(model, batches, ["conv2"], progress=False)
    got = channel_attention(model, batches, ["conv2"], lambda *both: F.cross_entropy(*both).item(), progress=False)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("method", ["exact", "taylor"])
def test_fault_the_default_device_was_another(method, tmp_path):
    model = small_net()
    ask = functools.partial(channel_attention, model, TestChannelAttention.batches, ["conv1"], progress=False)
    expected, path = ask(method=method), tmp_path / "attention.safetensors"
    torch.set_default_device("meta")
    try:
        got, again = (ask(method=method, cache=path) for _ in range(2))
    finally:
        torch.set_default_device(None)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    torch.testing.assert_close(again, expected, rtol=0, atol=0)


@pytest.mark.parametrize("method", ["exact", "taylor"])
def test_fault_inference_mode(method):
    """Neither what is made in it, network and batches, nor a call in it gives tensors that autograd refuses."""
    with torch.inference_mode():
        model, batches = small_net(), [(torch.randn(5, 3, 8, 8), torch.randint(4, (5,)))]
        got = channel_attention(model, batches, ["conv2"], progress=False, method=method)["conv2"]
    assert not got.is_inference()
    (torch.ones(8, requires_grad=True) * got).sum().backward()
    ordinary = small_net()
    ordinary.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()})
    expected = by_hooks(ordinary, [[part.clone() for part in batch] for batch in batches], "conv2", method=method)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-6)
    again = channel_attention(model, batches, ["conv2"], progress=False, method=method)["conv2"]
    torch.testing.assert_close(again, got)


class TestFaultLayersWithoutAGraph:
    """Taylor's estimate of them was zero, or of a part of the network alone."""

    class Net(nn.Module):
        def __init__(self, around):
            super().__init__()
            self.conv, self.mix = nn.Conv2d(3, 5, 3), nn.Conv2d(5, 5, 1)
            self.around = around

        def forward(self, x):
            x = self.conv(x)
            with self.around():
                x = self.mix(x)
            return x.mean((2, 3))

    batches = ((torch.randn(3, 3, 4, 4), torch.tensor([0, 3, 1])),)

    @pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
    def test_they_are_an_error(self, around):
        with pytest.raises(RuntimeError, match="layer 'mix' ran with gradients disabled"):
            channel_attention(self.Net(around), self.batches, ["mix", "conv"], progress=False, method="taylor")
        with pytest.raises(RuntimeError, match="no gradient comes back from the loss to layer 'conv'"):
            channel_attention(self.Net(around), self.batches, ["conv"], progress=False, method="taylor")

    def test_the_exact_way_needs_none(self):
        model = self.Net(torch.no_grad)
        got = channel_attention(model, self.batches, ["conv"], progress=False)["conv"]
        torch.testing.assert_close(got, by_hooks(model, self.batches, "conv"), rtol=1e-3, atol=1e-6)


def test_scripted_modules():
    """A layer can't be one; beside the layer they run again in every pass."""
    batches = [(torch.randn(3, 3, 4, 4), torch.tensor([0, 3, 1]))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        stem = torch.jit.script(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()))
    model = nn.Sequential(stem, nn.Conv2d(4, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(1))
    with pytest.raises(TypeError, match="expected model to be an ordinary module, got a scripted one"):
        channel_attention(stem, batches, ["0"], progress=False)
    with pytest.raises(TypeError, match=r"expected layer '0\.0' to be an ordinary module, got a scripted one"):
        channel_attention(model, batches, ["0.0"], progress=False)
    plain = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()), *model[1:])
    plain[0].load_state_dict(stem.state_dict())
    got, expected = (channel_attention(net, batches, ["1"], progress=False) for net in (model, plain))
    torch.testing.assert_close(got, expected)


def test_aliases_and_layers_given_twice():
    model = small_net()
    ask = functools.partial(channel_attention, model, TestChannelAttention.batches, progress=False)
    expected = ask(["conv1", "conv2"])
    assert list(ask({"conv2": "b", "conv1": "a"})) == ["b", "a"]
    torch.testing.assert_close(ask(["conv1", "conv2", "conv1"]), expected, rtol=0, atol=0)


def test_inputs_alone_are_no_batch():
    """A packed sequence is a tuple too, whose second part is no label."""
    packed = nn.utils.rnn.pack_sequence([torch.randn(2, 3)])
    for batch in (torch.randn(2, 3), packed, [torch.randn(2, 3)]):
        with pytest.raises(TypeError, match=r"expected batches \(x, labels, ...\), got "):
            channel_attention(nn.Sequential(nn.Linear(3, 3)), [batch], ["0"], progress=False)

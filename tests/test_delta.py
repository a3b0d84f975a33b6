import copy
import functools
import pickle
from collections import OrderedDict

import pytest
import torch
from network_support import small_net
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel

from talib_fast.finetune import delta
from talib_fast.finetune.delta import (
    AttentionBehavioralRegularization,
    BehavioralRegularization,
    L2Regularization,
    SPRegularization,
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
        with pytest.raises(TypeError, match=r"expected model to be a torch\.nn\.Module, got NoneType"):
            L2Regularization(nn.ReLU()).model = None

    def test_a_tied_tensor_counts_once(self):
        assert L2Regularization(Tied(True))() == 0.5 * 15

    def test_another_model_is_not_owned_either(self):
        regularization = L2Regularization(nn.Linear(2, 2))
        regularization.model = nn.ParameterList([torch.full((3,), 2.0)])
        assert regularization() == 6 and not list(regularization.children())


class Tied(nn.Module):
    """An embedding of ones, and a head with the same weight, or with one of its own."""

    def __init__(self, tied):
        super().__init__()
        self.embedding, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
        for parameter in self.parameters():
            nn.init.ones_(parameter)
        self.tie() if tied else None

    def tie(self):
        self.head.weight = self.embedding.weight

    def untie(self):
        self.head.weight = nn.Parameter(self.embedding.weight.detach().clone())


class Holder(nn.Module):
    """A user's own wrapper, with a parameter beside what it wraps."""

    def __init__(self, module):
        super().__init__()
        self.module, self.scale = module, nn.Parameter(torch.ones(1))


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x

    def right_inverse(self, x):
        return x / 2


WRAPPERS = {
    "torch.compile": functools.partial(torch.compile, backend="eager"),
    "checkpoint_wrapper": checkpoint_wrapper,
    "DataParallel": nn.DataParallel,
    "AveragedModel": AveragedModel,
    "a user's": Holder,
}


def add(model, amount=1.0):
    with torch.no_grad():
        for parameter in set(model.parameters()):
            parameter.add_(amount)


@pytest.fixture
def kinds_of_numbers():
    """A model with a number of every kind: floats, frozen float8, complex ones, and frozen integers."""
    model = nn.Linear(2, 3, dtype=torch.bfloat16)
    model.register_parameter("tiny", nn.Parameter(torch.full((4,), 2.0).to(torch.float8_e4m3fn), requires_grad=False))
    model.register_parameter("wave", nn.Parameter(torch.full((2, 2), 3 + 4j)))
    model.register_parameter("still", nn.Parameter(torch.full((3,), 2j, dtype=torch.complex128), requires_grad=False))
    for name, dtype in (("packed", torch.uint8), ("mask", torch.bool)):
        model.register_parameter(name, nn.Parameter(torch.ones(9, dtype=dtype), requires_grad=False))
    return model


class TestParametersOfEveryKind:
    INTEGERS = r"not regularised, because they hold no floating-point numbers: \['packed', 'mask'\]"

    def test_l2(self, kinds_of_numbers):
        model = kinds_of_numbers
        with pytest.warns(UserWarning, match=self.INTEGERS):
            loss = L2Regularization(model)()
        linear = 0.5 * sum(p.detach().double().square().sum() for p in (model.weight, model.bias))
        torch.testing.assert_close(loss.double(), linear + 0.5 * (4 * 4 + 4 * 25 + 3 * 4), rtol=1e-6, atol=0)
        loss.backward()
        torch.testing.assert_close([model.wave.grad, model.bias.grad], [model.wave.detach(), model.bias.detach()])

    def test_l2_sp(self, kinds_of_numbers):
        model = kinds_of_numbers
        with pytest.warns(UserWarning, match=self.INTEGERS):
            regularization = SPRegularization(model, model)
        SPRegularization(model, model, unmatched="ignore")
        assert regularization() == 0
        add(nn.ParameterList([model.wave, model.still]), 1 - 1j)
        with torch.no_grad():
            model.tiny.copy_(torch.full((4,), 3.0))
        loss = regularization()
        assert loss == 0.5 * (4 * 2 + 3 * 2 + 4)
        loss.backward()
        assert (model.wave.grad == 1 - 1j).all() and not model.weight.grad.any()

    def test_fault_conjugates_were_refused(self):
        values = torch.tensor([[1 + 2j, 3 - 1j]])
        model = nn.ParameterDict({"wave": values.T.conj()})  # which is read as conjugate, but lies there as it was
        assert L2Regularization(model)() == 0.5 * 15
        distance = SPRegularization(model, model)
        add(model, 1j)
        distance().backward()
        assert distance() == 1 and (model["wave"].grad == 1j).all()

    def test_several_devices(self):
        """Summed on the first one's; meta tensors, which a machine without a GPU has, can't be copied from there."""
        devices = ("meta", "cpu") if not torch.cuda.is_available() else ("cpu", "cuda")
        source = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
        target = copy.deepcopy(source)
        regularizations = SPRegularization(source, target), L2Regularization(target)
        expected = [regularization() + 0 for regularization in regularizations]
        for part, device in zip(target, devices, strict=True):
            part.to(device)
        for regularization, value in zip(regularizations, expected, strict=True):
            loss = regularization()
            assert loss.device.type == devices[0]
            if devices[0] == "cpu":
                torch.testing.assert_close(loss, value)
                loss.backward()

    @pytest.mark.parametrize(
        ("weight", "message"),
        [
            (torch.ones(2, 2).to_sparse(), "expected parameter '0.weight' to be a dense tensor, got torch.sparse_coo"),
            (
                torch.ones(2, 2, dtype=torch.complex64),
                "'0.weight' of the source to fit the target's .*float32, got .*complex64",
            ),
            (torch.ones(2, 2).char(), "'0.weight' of the source to fit the target's .*float32, got torch.int8"),
        ],
    )
    def test_errors_name_the_parameter(self, weight, message):
        source, target = nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2))
        source[0].weight = nn.Parameter(weight, requires_grad=False)
        with pytest.raises(TypeError, match=message):
            SPRegularization(source, target)
        if weight.is_sparse:
            with pytest.raises(TypeError, match=message):
                L2Regularization(source)()


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

    def test_a_source_without_values_is_named(self):
        with pytest.raises(ValueError, match="'weight' of the source to have values, got one on the meta device"):
            SPRegularization(nn.Linear(2, 2, device="meta"), nn.Linear(2, 2))

    def test_matches_by_name_not_by_order(self):
        source = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
        target = nn.ModuleDict({"b": copy.deepcopy(source["b"]), "a": copy.deepcopy(source["a"])})
        assert SPRegularization(source, target)() == 0

    def test_the_start_moves_but_is_in_no_state_dict(self):
        model = nn.Linear(3, 2)
        regularization = SPRegularization(nn.Linear(3, 2), model)
        assert not regularization.state_dict() and not list(regularization.parameters())
        assert [start.dtype for start in regularization.double().source_weight.values()] == [torch.float64] * 2

    def test_fault_the_start_in_a_module_was_sent_at_every_step(self):
        """DistributedDataParallel broadcasts all buffers."""
        module = nn.ModuleDict({"model": nn.Linear(3, 2)})
        module.regularization = SPRegularization(nn.Linear(3, 2), module["model"])
        module.attention = AttentionBehavioralRegularization([torch.ones(2)])
        assert not list(module.buffers())
        module.half()
        tensors = [*module.regularization.source_weight.values(), *module.attention.channel_attention]
        assert [tensor.dtype for tensor in tensors] == [torch.float16] * 3
        again = pickle.loads(pickle.dumps(module))
        torch.testing.assert_close(again.regularization.source_weight, module.regularization.source_weight)
        assert again.regularization() == module.regularization()

    @pytest.mark.parametrize("destination", ["cuda", "meta"])
    def test_the_start_follows_the_parameters(self, destination):
        if destination == "cuda" and not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        target = nn.Linear(3, 2)
        regularization = SPRegularization(nn.Linear(3, 2), target)
        expected = regularization()
        target.to(destination)
        assert regularization().device.type == destination
        assert all(start.device.type == destination for start in regularization.source_weight.values())
        if destination == "cuda":
            torch.testing.assert_close(regularization().cpu(), expected)

    def test_wrapped_models_match(self):
        source, target = nn.Linear(3, 2), nn.DataParallel(nn.Linear(3, 2))
        expected = SPRegularization(source, target.module)()
        assert SPRegularization(source, target)() == expected
        assert SPRegularization(source, torch.compile(target.module))() == expected

    @pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
    @pytest.mark.parametrize("when", ["before", "after", "in both"])
    def test_fault_wrapped_parts_were_left_out(self, wrap, when):
        source = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4))
        target = copy.deepcopy(source)
        if when != "after":
            target[0] = wrap(target[0])
        if when == "in both":
            source[0] = wrap(source[0])
        regularization = SPRegularization(source, target, unmatched="ignore")
        if when == "after":
            target[0] = wrap(target[0])
        inner = target[0] if isinstance(target[0], nn.Linear) else next(iter(target[0].children()))
        add(nn.ModuleList([inner, target[1]]))
        assert regularization() == 0.5 * (6 + 3 + 12 + 4)
        assert {"1.weight", "1.bias"} < set(regularization.source_weight)

    @pytest.mark.parametrize("wrap", [Holder, nn.DataParallel])
    def test_wrapped_and_tied_parts_compile_into_one_graph(self, wrap):
        source = nn.ModuleDict({"a": nn.Linear(2, 3), "b": Tied(False)})
        target = copy.deepcopy(source)
        target["a"] = wrap(target["a"])
        regularization = SPRegularization(source, target, unmatched="ignore")
        target["b"].tie()
        add(target)
        loss = torch.compile(lambda: regularization(), fullgraph=True, backend="aot_eager")()
        assert loss == 0.5 * (9 + 15)
        loss.backward()
        assert (target["b"].head.weight.grad == 1).all() and (target["a"].module.bias.grad == 1).all()

    def test_a_parameter_s_own_module_called_module_is_none_of_a_wrapper(self):
        class Own(nn.Module):
            def __init__(self):
                super().__init__()
                self.module, self.weight = nn.Linear(2, 2, bias=False), nn.Parameter(torch.zeros(2, 2))

        source = Own()
        target = nn.DataParallel(copy.deepcopy(source))
        regularization = SPRegularization(source, target, unmatched="error")
        assert set(regularization.source_weight) == {"weight", "module.weight"} and regularization() == 0
        with pytest.warns(UserWarning, match=r"no such parameters: \['weight'\]"):
            assert SPRegularization(nn.ModuleDict({"module": source.module}), target)() == 0

    def test_a_parametrised_tensor_is_compared_by_its_original(self):
        source = nn.Sequential(nn.Linear(2, 3))
        target = copy.deepcopy(source)
        before = SPRegularization(source, target)
        parametrize.register_parametrization(target[0], "weight", Doubled())
        with torch.no_grad():
            target[0].parametrizations.weight.original.copy_(source[0].weight + 2)
        for regularization in (before, SPRegularization(source, target, unmatched="error")):
            assert set(regularization.source_weight) == {"0.weight", "0.bias"}
            torch.testing.assert_close(regularization(), torch.tensor(0.5 * 6 * 4))

    @pytest.mark.parametrize("target_tied", [True, False])
    @pytest.mark.parametrize("source_tied", [True, False])
    def test_fault_second_names_of_tied_weights_were_dropped(self, source_tied, target_tied):
        source, target = Tied(source_tied), Tied(target_tied)
        regularization = SPRegularization(source, target, unmatched="error")
        add(target)
        expected = [7.5 if target_tied else 15.0]
        found = [regularization()]
        target.untie() if target_tied else target.tie()  # both have the values that they had
        expected.append(15.0 if target_tied else 7.5)
        found.append(regularization())
        assert found == expected

    def test_a_tied_weight_without_a_counterpart_is_listed_once(self):
        source, target = nn.ModuleDict({"body": nn.Linear(1, 1)}), nn.ModuleDict({"body": nn.Linear(1, 1)})
        target["new"] = Tied(True)
        with pytest.warns(UserWarning, match=r"no such parameters: \['new.embedding.weight'\]"):
            SPRegularization(source, target)
        regularization = SPRegularization(source, target, unmatched="penalize")
        torch.testing.assert_close(
            regularization() - SPRegularization(source["body"], target["body"])(), torch.tensor(7.5)
        )

    def test_upstream_s_attribute_has_the_starts(self):
        source, target = nn.Linear(3, 2), nn.Linear(3, 2)
        regularization = SPRegularization(source, target)
        torch.testing.assert_close(regularization.source_weight, dict(source.named_parameters()), check_dtype=True)
        with pytest.raises(AttributeError):
            regularization.source_weight = {}
        other = copy.deepcopy(source)
        regularization.target_model = other
        assert regularization() == 0 and regularization.target_model is other and not list(regularization.children())

    @pytest.mark.parametrize("how", ["built", "called", "moved", "of a model made"])
    def test_fault_inference_mode_broke_it_for_good(self, how):
        source, target = nn.Linear(3, 2), nn.Linear(3, 2).double()
        with torch.inference_mode(how != "called"):
            source = copy.deepcopy(source) if how == "of a model made" else source
            regularization = SPRegularization(source, target)
        with torch.inference_mode():
            regularization() if how == "called" else regularization.double()
        regularization().backward()
        torch.testing.assert_close(target.weight.grad, target.weight.detach() - source.weight.detach())

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

    def test_a_parameter_of_another_shape_is_named(self):
        model = nn.Linear(2, 2)
        regularization = SPRegularization(nn.Linear(2, 2), model)
        model.weight = nn.Parameter(torch.ones(3, 2))
        with pytest.raises(ValueError, match=r"'weight' of shape \[2, 2\].*got \[3, 2\]"):
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

    def test_fault_maps_of_inference_mode_could_not_be_saved(self):
        target = maps(True)
        with torch.inference_mode():
            source, vectors = maps(), [torch.rand(3), torch.rand(5)]
        copied = {name: x.clone() for name, x in source.items()}
        moved = AttentionBehavioralRegularization([vector.clone() for vector in vectors])
        with torch.inference_mode():
            moved.double()
        for regularization in (BehavioralRegularization(), AttentionBehavioralRegularization(vectors), moved):
            losses = [regularization(given, target) for given in (source, copied)]
            gradients = [torch.autograd.grad(loss, list(target.values())) for loss in losses]
            assert losses[0] > 0 and torch.equal(*losses)
            torch.testing.assert_close(*gradients, rtol=0, atol=0)

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
            ({"a": torch.rand(3), "c": torch.rand(5)}, "ab", r"the layers \['a', 'c'\], which have attention"),
            ([torch.rand(3), torch.rand(4)], "ab", r"expected 4 channels in layer 'b', got \[2, 5, 2, 2\]"),
        ],
    )
    def test_what_does_not_fit_is_named(self, attention, names, message):
        source, target = maps(), maps()
        with pytest.raises(ValueError, match=message):
            AttentionBehavioralRegularization(attention)(source, target)

    def test_fault_rows_and_integers_were_refused(self):
        source, target = maps(), maps()
        vectors = [torch.tensor([0.0, 2, 1]), torch.tensor([1.0, 0, 3, 1, 1])]
        expected = AttentionBehavioralRegularization(vectors)(source, target)
        for change in (lambda x: x[None], lambda x: x.int(), lambda x: x[None, None].long()):
            changed = AttentionBehavioralRegularization([change(vector) for vector in vectors])
            torch.testing.assert_close(changed(source, target), expected)
            assert [vector.shape for vector in changed.channel_attention] == [(3,), (5,)]
        rows = torch.stack([vectors[0], 2 * vectors[0]])  # a layer each
        same = {"a": source["a"], "b": source["a"]}, {"a": target["a"], "b": target["a"]}
        listed = AttentionBehavioralRegularization(list(rows))(*same)
        torch.testing.assert_close(AttentionBehavioralRegularization(rows)(*same), listed)

    def test_fault_attention_could_not_be_assigned(self):
        source, target = maps(), maps()
        regularization = AttentionBehavioralRegularization([torch.ones(3)])
        for vectors in (self.attention, list(self.attention.values())):
            regularization.channel_attention = vectors
            torch.testing.assert_close(regularization(source, target), self.expected(source, target))
            torch.testing.assert_close(regularization.channel_attention, list(self.attention.values()))
        with pytest.raises(TypeError, match="got list"):
            regularization.channel_attention = [[1.0]]

    def test_wrong_attention_is_named(self):
        with pytest.raises(TypeError, match=r"channel attention 0 to be a vector \[C\] of .*shape \[2, 2\]"):
            AttentionBehavioralRegularization([torch.ones(2, 2)])
        with pytest.raises(TypeError, match=r"got torch.complex64 of shape \[2\]"):
            AttentionBehavioralRegularization([torch.ones(2, dtype=torch.complex64)])
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


def test_integers_alone_are_zero_on_their_device_whatever_the_default():
    model = nn.Module()
    model.packed = nn.Parameter(torch.ones(2, dtype=torch.int8), requires_grad=False)
    with torch.device("meta"), pytest.warns(UserWarning, match="packed"):
        value = L2Regularization(model)()
    assert value.device.type == "cpu" and value.item() == 0


def test_star_names_are_all_there():
    assert all(hasattr(delta, name) for name in delta.__all__)

import copy
from collections import OrderedDict

import pytest
import torch
from network_support import small_net
from torch import nn

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


def test_star_names_are_all_there():
    assert all(hasattr(delta, name) for name in delta.__all__)

"""What is around a model, or a part of it, does not change its parameters' names."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.optim.swa_utils import AveragedModel

from talib_fast.finetune import bi_tuning, delta
from talib_fast.finetune.names import by_plain_name, parameters_by_name, plain_name


def make_net():
    return nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.BatchNorm1d(3), nn.ReLU()), nn.Linear(3, 2, bias=False))


def test_without_wrappers_names_and_order_are_the_model_s_own():
    net = make_net()
    assert list(parameters_by_name(net).items()) == list(net.named_parameters())
    net.register_parameter("second", net[0].weight)
    assert list(parameters_by_name(net).items()) == list(net.named_parameters(remove_duplicate=False))


def test_wrappers_within_wrappers():
    net = make_net()
    expected = dict(net.named_parameters())
    net[1] = torch.compile(nn.DataParallel(net[1]), backend="eager")
    found = parameters_by_name(nn.DataParallel(torch.compile(net, backend="eager")))
    assert list(found) == list(expected) and all(found[name] is expected[name] for name in found)
    assert list(parameters_by_name(AveragedModel(net))) == list(expected)


class FabricModule(nn.Module):
    """Has its children under the names that Lightning Fabric's has them under."""

    def __init__(self, module):
        super().__init__()
        self._forward_module, self._original_module = nn.DataParallel(module), module


class Tuner(nn.Module):
    """Has what PEFT's tuners have: their model, and a method that puts adapters into it."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def inject_adapter(self):
        pass


class PeftModel(nn.Module):
    """Has PEFT's model: in a tuner, or for prompts as it is."""

    def __init__(self, base_model):
        super().__init__()
        self.base_model = base_model

    def get_base_model(self):
        return getattr(self.base_model, "model", self.base_model)


@pytest.mark.parametrize(
    "wrap",
    [FabricModule, Tuner, PeftModel, lambda net: PeftModel(Tuner(net)), lambda net: nn.DataParallel(FabricModule(net))],
    ids=["Fabric", "PEFT's tuner", "PEFT for prompts", "PEFT", "DataParallel of Fabric's"],
)
def test_other_libraries_wrappers(wrap):
    own = {"model": make_net(), "base_model": nn.Linear(2, 2), "module": nn.Linear(2, 2)}
    net = nn.ModuleDict(own)  # a user's names, which stay
    assert parameters_by_name(wrap(net)) == dict(net.named_parameters())
    distance = delta.SPRegularization(copy.deepcopy(net), wrap(net), unmatched="error")
    assert torch.compile(lambda: distance(), fullgraph=True, backend="eager")() == 0


def test_parametrised_tensors():
    net = parametrizations.spectral_norm(nn.Linear(2, 3))
    assert parameters_by_name(net) == {"bias": net.bias, "weight": net.parametrizations.weight.original}
    pair = parametrizations.weight_norm(nn.Linear(2, 3))  # of a length and a direction: none of them is the weight
    assert "weight" not in parameters_by_name(pair)


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("module.layer.weight", "layer.weight"),
        ("layer.module.module.weight", "layer.weight"),
        ("q.base_layer.weight", "q.weight"),
        ("head.modules_to_save.default.weight", "head.weight"),
        ("q.lora_A.default.weight", "q.lora_A.default.weight"),
        ("modules.weight", "modules.weight"),
    ],
)
def test_plain_names(name, plain):
    assert plain_name(name) == plain


def test_names_that_several_would_have_are_left_out():
    a, b, c = (nn.Parameter(torch.ones(1)) for _ in range(3))
    assert by_plain_name({"module.x": a, "x": b, "module.y": c, "y": c}) == {"y": c}


class Backbone(nn.Sequential):
    out_features = 4

    def __init__(self):
        super().__init__(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


@pytest.mark.parametrize("wrapped", ["encoder", "part", "key encoder"])
def test_fault_bi_tuning_refused_a_wrapped_encoder(wrapped):
    query, key = (bi_tuning.Classifier(Backbone(), 3, 5) for _ in range(2))
    encoders = [query, key]
    if wrapped == "part":
        query.backbone[0] = torch.compile(query.backbone[0], backend="eager")
    else:
        encoders[wrapped == "key encoder"] = torch.compile(encoders[wrapped == "key encoder"], backend="eager")
    model = bi_tuning.BiTuning(*encoders, 3, K=2, m=0.5, key_buffers="copy")
    pairs = list(zip(query.parameters(), key.parameters(), strict=True))
    assert all(torch.equal(q, k) for q, k in pairs)
    with torch.no_grad():
        for number, (q, _) in enumerate(pairs):
            q.add_(number + 1)
    before = [k.clone() for _, k in pairs]
    images = torch.randn(2, 4, 3, 5, 5)
    y_q, logits_z, _, labels_c = model(*images, torch.tensor([0, 2, 1, 1]))
    assert logits_z.shape == labels_c.shape == (4, 7) and y_q.shape == (4, 3)
    torch.testing.assert_close([k for _, k in pairs], [b + (j + 1) / 2 for j, b in enumerate(before)])
    twin = copy.deepcopy(key)
    twin.projector = nn.Linear(4, 6)
    with pytest.raises(ValueError, match="their parameters differ in name or shape"):
        bi_tuning.BiTuning(encoders[0], twin, 3)

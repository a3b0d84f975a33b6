"""Upstream's own code beside ours: losses and gradients of every method over ten steps, and its example scripts.

``TALIB_FAST_UPSTREAM`` names a checkout of the Transfer-Learning-Library, of ``tllib`` or of ``talib`` as it was called
before; docs/contributing.md says how to get one. Everything is in float64 and from one seed. What is done about
upstream's faults, so that nothing else differs, stands in :func:`faults_mended`.
"""

import copy
import importlib
import os
import random
import runpy
import sys
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from upstream_support import ATTRIBUTES, METHODS, SIGNATURES, STAR_IMPORTED

from talib_fast import finetune, patch, unpatch

ROOT = Path(os.environ.get("TALIB_FAST_UPSTREAM", "")).absolute()
LAYOUT = "talib" if ROOT.joinpath("talib", "finetune").is_dir() and not ROOT.joinpath("tllib").is_dir() else "tllib"
MODULES = METHODS
if LAYOUT == "talib":
    MODULES = {method: f"talib.finetune.{method}" for method in METHODS}
    MODULES |= {"classifier": "common.modules.classifier", "knowledge_distillation": "common.loss"}
SCRIPTS = ROOT / "examples" / "task_adaptation" / "image_classification"
CLASSES = 3

pytestmark = [
    pytest.mark.skipif(
        not os.environ.get("TALIB_FAST_UPSTREAM"),
        reason="TALIB_FAST_UPSTREAM names no checkout of the Transfer-Learning-Library: see docs/contributing.md",
    ),
    pytest.mark.filterwarnings("ignore"),  # upstream's own
]


def forget():
    for name in [name for name in sys.modules if name.partition(".")[0] in ("tllib", "talib", "common")]:
        del sys.modules[name]


def given_masks(n, p, size):
    """What ours draws for a layer's channels, in place of numpy's draws."""
    assert n == 1
    return (torch.rand(size, dtype=torch.float32) < p).numpy().astype(int)


def faults_mended(monkeypatch):
    """Mend what else would tell upstream apart from ours.

    - StochNorm draws its masks by numpy: they are given. ``convert_model`` loses p, which is 0.5 whatever is asked for,
      so 0.5 is asked for. Weights start at random, which ``convert_model`` overwrites, but torch's generator has moved:
      they start at 1. The channels on running statistics are differentiated with those after the step, which
      batch_norm has overwritten in place by then: it gets copies.
    - ``.cuda()`` is hard-coded: it does nothing.
    """
    stochnorm = importlib.import_module(MODULES["stochnorm"])

    def batch_norm(input, mean, var, weight, bias, training, momentum, eps):
        mean, var = (mean, var) if training else (mean.clone(), var.clone())
        return F.batch_norm(input, mean, var, weight, bias, training, momentum, eps)

    def start_at_one(layer):
        nn.init.ones_(layer.weight), nn.init.zeros_(layer.bias)

    monkeypatch.setattr(stochnorm, "F", SimpleNamespace(batch_norm=batch_norm))
    monkeypatch.setattr(stochnorm._StochNorm, "reset_parameters", start_at_one)
    monkeypatch.setattr(np.random, "binomial", given_masks)


@contextmanager
def checkout(patched):
    """Upstream's modules, its own or with ``patch()`` in the first line, before they can be imported."""
    forget()
    path = sys.path.copy()
    try:
        with pytest.MonkeyPatch.context() as monkeypatch:
            if patched:
                patch()
            sys.path.append(str(ROOT))
            # the package's own __init__ imports the whole library, and what that needs
            package = ModuleType(LAYOUT)
            package.__path__ = [str(ROOT / LAYOUT)]
            sys.modules[LAYOUT] = package
            if not patched:
                faults_mended(monkeypatch)
            yield SimpleNamespace(**{method: importlib.import_module(name) for method, name in MODULES.items()})
    finally:
        unpatch()
        sys.path[:] = path
        forget()


@pytest.fixture(autouse=True)
def _double_precision_on_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self, *_, **__: self)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Block(nn.Module):
    def __init__(self, channels, out_channels):
        super().__init__()
        self.conv3 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.bn3 = nn.BatchNorm2d(out_channels)

    def forward(self, x):
        return F.relu(self.bn3(self.conv3(x)))


class Backbone(nn.Sequential):
    """With the names of ResNet-50's blocks, which upstream's script for DELTA asks for."""

    out_features = 6

    def __init__(self):
        super().__init__()
        for layer, (blocks, channels) in enumerate(zip((3, 4, 6, 3), (3, 4, 4, 5), strict=True), 1):
            widths = [channels] * blocks + [(4, 4, 5, 6)[layer - 1]]
            self.add_module(f"layer{layer}", nn.Sequential(*map(Block, widths, widths[1:])))
        self.__dict__["fc"] = nn.Linear(self.out_features, 5)

    def copy_head(self):
        return copy.deepcopy(self.fc)


LAYERS = [f"backbone.layer{layer}.{block}.conv3" for layer, block in ((1, 2), (2, 3), (3, 5), (4, 2))]
DATA = TensorDataset(torch.randn(80, 3, 6, 6, dtype=torch.float64), torch.arange(80) % CLASSES)


def train(model, loss_of):
    """Ten steps: each one's loss and gradients, and the state in the end."""
    optimizer = torch.optim.SGD(model.get_parameters(0.05), momentum=0.9, weight_decay=5e-4, nesterov=True)
    seen = []
    for x, labels in DataLoader(DATA, 8):
        optimizer.zero_grad()
        loss = loss_of(x, labels)
        loss.backward()
        optimizer.step()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        seen.append({"loss": loss.detach(), **gradients})
    return [*seen, model.state_dict()]


def plain(library):
    model = library.classifier.Classifier(Backbone(), CLASSES, nn.Linear(6, 4), 4)
    return train(model, lambda x, labels: F.cross_entropy(model(x)[0], labels))


def stochnorm(library):
    model = library.classifier.Classifier(Backbone(), CLASSES)
    model = library.stochnorm.convert_model(model, p=0.5)
    return train(model, lambda x, labels: F.cross_entropy(model(x)[0], labels))


def delta(library, regularization):
    source = library.classifier.Classifier(Backbone(), 5)
    model = library.classifier.Classifier(copy.deepcopy(source.backbone), CLASSES)
    source.requires_grad_(False).eval()
    getters = [library.delta.IntermediateLayerGetter(each, LAYERS) for each in (source, model)]
    head = library.delta.L2Regularization(nn.ModuleList([model.head, model.bottleneck]))
    penalty = regularization(library.delta, source.backbone, model.backbone)

    def loss_of(x, labels):
        (source_maps, _), (target_maps, (y, _)) = [getter(x) for getter in getters]
        maps = () if isinstance(penalty, library.delta.SPRegularization) else (source_maps, target_maps)
        return F.cross_entropy(y, labels) + 0.01 * penalty(*maps) + 0.01 * head()

    return train(model, loss_of)


def l2_sp(library):
    return delta(library, lambda methods, source, target: methods.SPRegularization(source, target))


def behavioral(library):
    return delta(library, lambda methods, source, target: methods.BehavioralRegularization())


def attention(library):
    weights = [torch.rand(channels).softmax(0) for channels in (4, 4, 5, 6)]
    return delta(library, lambda methods, source, target: methods.AttentionBehavioralRegularization(weights))


def bss(library):
    model, shrinkage = library.classifier.Classifier(Backbone(), CLASSES), library.bss.BatchSpectralShrinkage(k=2)

    def loss_of(x, labels):
        y, f = model(x)
        return F.cross_entropy(y, labels) + 0.1 * shrinkage(f)

    return train(model, loss_of)


def source_classifier(model):
    return nn.Sequential(model.backbone, model.pool_layer, model.head_source)


def co_tuning(library):
    model = library.co_tuning.Classifier(Backbone(), CLASSES, head_source=nn.Linear(6, 5))
    relationship = library.co_tuning.Relationship(DataLoader(DATA, 16), source_classifier(model), "cpu")
    criterion = library.co_tuning.CoTuningLoss()
    model.train()  # upstream leaves it in evaluation mode

    def loss_of(x, labels):
        y_s, y_t = model(x)
        # a float32 table here, of the classifier's dtype upstream; its script makes it float32
        return F.cross_entropy(y_t, labels) + 2.3 * criterion(y_s, torch.from_numpy(relationship[labels]).float())

    return train(model, loss_of)


def lwf(library):
    model = library.lwf.Classifier(
        Backbone(), CLASSES, head_source=nn.Linear(6, 5), bottleneck=nn.Identity(), bottleneck_dim=6
    )
    kept = library.lwf.collect_pretrain_labels(DataLoader(DATA, 16), source_classifier(model), "cpu")
    distillation = library.knowledge_distillation.KnowledgeDistillationLoss(3)
    model.train()
    batches = iter(kept.split(8))

    def loss_of(x, labels):
        y_s, y_t = model(x)
        return F.cross_entropy(y_t, labels) + 4 * distillation(y_s, next(batches))

    return train(model, loss_of)


def bi_tuning(library):
    methods = library.bi_tuning
    model, key = [methods.Classifier(Backbone(), CLASSES, projection_dim=4) for _ in range(2)]
    tuning = getattr(methods, "BiTuning", None) or methods.Bituning
    tuning = tuning(model, key, CLASSES, K=4, m=0.9)
    divergence = nn.KLDivLoss(reduction="batchmean")

    def loss_of(x, labels):
        y, logits_z, logits_y, labels_c = tuning(x, x.flip(-1), labels)
        return F.cross_entropy(y, labels) + divergence(logits_z, labels_c) + divergence(logits_y, labels_c)

    return [*train(model, loss_of), {f"after.{name}": value for name, value in tuning.named_buffers()}]


def assert_equal(seen, expected):
    assert len(seen) == len(expected)
    for got, right in zip(seen, expected, strict=True):
        got, right = [
            {name: value.double() for name, value in each.items() if not name.endswith("num_batches_tracked")}
            for each in (got, right)
        ]
        torch.testing.assert_close(got, right, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("way", ["imports", "patch"])
@pytest.mark.parametrize(
    "method", [plain, stochnorm, l2_sp, behavioral, attention, bss, co_tuning, lwf, bi_tuning], ids=lambda m: m.__name__
)
def test_losses_and_gradients_of_ten_steps(method, way):
    with checkout(patched=False) as library:
        torch.manual_seed(1)
        expected = method(library)
    with checkout(patched=True) as library:
        torch.manual_seed(1)
        seen = method(library if way == "patch" else finetune)
    assert_equal(seen, expected)


def stand_in_modules(tmp_path, seen):
    """What the scripts import beside the library's methods: their utils and the data sets."""

    class Images(torch.utils.data.Dataset):
        num_classes = CLASSES

        def __init__(self, *_, transform=None, **__):
            self.transform = transform

        def __len__(self):
            return 24

        def __getitem__(self, index):
            x, label = DATA[index]
            return ([x, x.flip(-1)] if self.transform == "twice" else x), label

    def validate(val_loader, model, args, device):
        model.eval()
        with torch.no_grad():
            logits = torch.cat([model(x) for x, _ in val_loader])
        seen.append({"logits": logits, **copy.deepcopy(model.state_dict())})
        return 0.0

    package = "tllib.vision" if LAYOUT == "tllib" else "common.vision"
    names = ("utils", package, f"{package}.datasets", f"{package}.transforms")
    utils, vision, datasets, transforms = modules = [ModuleType(name) for name in names]
    utils.get_train_transform = utils.get_val_transform = lambda *_: None
    utils.get_dataset = lambda data, root, transform, *_: (Images(transform=transform), Images(), CLASSES)
    utils.get_model_names = lambda: ["resnet50"]
    utils.get_model = lambda *_: Backbone()
    utils.validate = validate
    datasets.StandIn, transforms.MultipleApply, vision.__path__ = Images, lambda _: "twice", []
    return dict(zip(names, modules, strict=True))


def run_script(name, arguments, patched, folder, monkeypatch):
    seen = []
    folder.mkdir()
    torch.save([torch.full((channels,), 1 / channels) for channels in (4, 4, 5, 6)], folder / "channel_attention.pt")
    with checkout(patched), monkeypatch.context() as context:
        for module_name, module in stand_in_modules(folder, seen).items():
            context.setitem(sys.modules, module_name, module)
        options = [
            "-d",
            "StandIn",
            "-b",
            "8",
            "-j",
            "0",
            "--epochs",
            "2",
            "-i",
            "5",
            "--seed",
            "0",
            "--log",
            str(folder),
        ]
        context.setattr(sys, "argv", [name, "anywhere", *options, *arguments])
        context.setattr(sys, "stdout", sys.stdout)  # upstream's logger puts itself there
        for flag in ("benchmark", "deterministic"):
            context.setattr(torch.backends.cudnn, flag, getattr(torch.backends.cudnn, flag))
        torch.manual_seed(2), np.random.seed(2), random.seed(2)
        try:
            runpy.run_path(str(SCRIPTS / f"{name}.py"), run_name="__main__")
        except ModuleNotFoundError as error:
            pytest.skip(f"upstream's {name}.py needs {error.name}")
    return seen


@pytest.mark.parametrize(
    "name, arguments",
    [
        ("erm", ()),
        ("bss", ("-k", "2")),
        ("delta", ("--regularization-type", "l2_sp")),
        ("delta", ("--regularization-type", "feature_map")),
        ("delta", ("--regularization-type", "attention_feature_map")),
        ("lwf", ()),
        ("co_tuning", ()),
        ("stochnorm", ()),
        ("bi_tuning", ("--K", "8")),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value[1:]),
)
def test_upstreams_scripts_train_alike_with_patch_in_their_first_line(name, arguments, tmp_path, monkeypatch):
    if not SCRIPTS.joinpath(f"{name}.py").exists():
        pytest.skip(f"this checkout has no {name}.py")
    expected = run_script(name, arguments, False, tmp_path / "upstreams", monkeypatch)
    seen = run_script(name, arguments, True, tmp_path / "ours", monkeypatch)
    assert len(seen) == 2
    assert_equal(seen, expected)


tllib_only = pytest.mark.skipif(LAYOUT != "tllib", reason="the names are those of tllib")


@tllib_only
@pytest.mark.parametrize("method", METHODS)
def test_the_recorded_names_are_upstreams(method):
    with checkout(patched=False) as library:
        module, script = getattr(library, method), {}
        exec(f"from {METHODS[method]} import *", script)
        assert sorted(script.keys() - {"__builtins__"}) == sorted(STAR_IMPORTED[method].split())
        defined = [
            name
            for name, value in vars(module).items()
            if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
        ]
        recorded = {name.split(".")[1] for name in {*SIGNATURES, *ATTRIBUTES} if name.startswith(f"{method}.")}
        assert set(defined) == recorded


@tllib_only
def test_classes_that_derive_from_the_plain_classifier_derive_from_ours():
    with checkout(patched=True) as library:
        found = 0
        for name in ("alignment.dann", "alignment.cdan", "alignment.afn", "alignment.dan", "self_training.self_tuning"):
            try:
                module = importlib.import_module(f"tllib.{name}")
            except ModuleNotFoundError:  # what upstream needs is not there, or this checkout has no such module
                continue
            kind = getattr(module, "ImageClassifier", None) or module.Classifier
            model = kind(Backbone(), CLASSES)
            assert isinstance(model, library.classifier.Classifier) and len(model(DATA[:4][0])) == 2
            found += 1
        assert found

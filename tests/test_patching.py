import copy
import importlib
import inspect
import io
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from process_support import PATIENCE
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from upstream_support import ATTRIBUTES, SIGNATURES, STAR_IMPORTED

import talib_fast
from talib_fast import finetune, patch, patching, unpatch

METHODS = ["stochnorm", "delta", "bss", "co_tuning", "lwf", "bi_tuning", "knowledge_distillation", "classifier"]
REGULARIZATION = METHODS[1:7]

# Stand-ins for upstream's modules. As there, a class reaches its base by its own name.
STOCHNORM = """
import torch
from torch import nn

class _StochNorm(nn.Module):
    def __init__(self, num_features, eps=1e-5, momentum=0.1, affine=True, track_running_stats=True, p=0.5):
        super(_StochNorm, self).__init__()
        self.num_features, self.eps, self.momentum = num_features, eps, momentum
        self.affine, self.track_running_stats, self.p = affine, track_running_stats, p
        for name in ("weight", "bias"):
            self.register_parameter(name, nn.Parameter(torch.rand(num_features)) if affine else None)
        if track_running_stats:
            self.register_buffer("running_mean", torch.zeros(num_features))
            self.register_buffer("running_var", torch.ones(num_features))
        else:
            self.register_parameter("running_mean", None)
            self.register_parameter("running_var", None)

    def forward(self, input):
        arguments = (self.running_mean, self.running_var, self.weight, self.bias, self.training)
        return nn.functional.batch_norm(input, *arguments, self.momentum, self.eps)

class StochNorm1d(_StochNorm):
    pass

class StochNorm2d(_StochNorm):
    pass

class StochNorm3d(_StochNorm):
    pass

def convert_model(module, p):
    result = module
    if isinstance(module, nn.BatchNorm2d):
        result = StochNorm2d(module.num_features, module.eps, module.momentum, module.affine, p)
    for name, child in module.named_children():
        result.add_module(name, convert_model(child, p))
    return result
"""
DELTA = """
import torch
import torch.nn as nn

def get_attribute(obj, attr, *args):
    raise NotImplementedError

class L2Regularization(nn.Module):
    pass

class SPRegularization(nn.Module):
    def __init__(self, source_model, target_model):
        super(SPRegularization, self).__init__()

class BehavioralRegularization(nn.Module):
    pass

class Helper:
    pass
"""
MODULES = {
    "stochnorm": STOCHNORM,
    "delta": DELTA,
    "bss": "import torch.nn as nn\nclass BatchSpectralShrinkage(nn.Module): pass",
    "lwf": """
import torch.nn as nn

class Classifier(nn.Module):
    def __init__(self):
        super(Classifier, self).__init__()

def collect_pretrain_labels():
    pass
""",
    "co_tuning": """
from .lwf import Classifier as ClassifierBase

__all__ = ["Classifier", "CoTuningLoss", "Relationship"]

class CoTuningLoss: pass
class Relationship: pass
class Classifier(ClassifierBase):
    def __init__(self):
        super(Classifier, self).__init__()
""",
    "bi_tuning": "class Classifier: pass\nclass BiTuning: pass\nBituning = BiTuning",
    "knowledge_distillation": "class KnowledgeDistillationLoss: pass",
    "classifier": """
import torch.nn as nn

__all__ = ["Classifier"]

class Classifier(nn.Module):
    def __init__(self, backbone, num_classes, bottleneck=None, bottleneck_dim=-1, head=None, finetune=True,
                 pool_layer=None):
        super(Classifier, self).__init__()
        self.backbone = backbone

class ImageClassifier(Classifier):
    pass
""",
    "dann": """
import torch.nn as nn
from tllib.modules.classifier import Classifier as ClassifierBase

class ImageClassifier(ClassifierBase):
    def __init__(self, backbone, num_classes, bottleneck_dim=256, **kwargs):
        bottleneck = nn.Linear(backbone.out_features, bottleneck_dim)
        super(ImageClassifier, self).__init__(backbone, num_classes, bottleneck, bottleneck_dim, **kwargs)
""",
}
STARS = ["bss", "co_tuning", "delta", "bi_tuning"]
PURGED = ("tllib", "talib", "upstream_script")


def write(folder, package, methods, stars=()):
    folder = folder.joinpath(*package.split("."))
    folder.mkdir(parents=True)
    for parent in (folder, folder.parent):
        parent.joinpath("__init__.py").touch()
    folder.joinpath("__init__.py").write_text("".join(f"from .{method} import *\n" for method in stars))
    for method in methods:
        folder.joinpath(f"{method}.py").write_text(MODULES[method])


def write_tllib(folder):
    write(folder, "tllib.regularization", REGULARIZATION, [*STARS, "knowledge_distillation"])
    write(folder, "tllib.modules", ["classifier"], ["classifier"])
    write(folder, "tllib.alignment", ["dann"])
    write(folder, "tllib.normalization", ["stochnorm"])
    (folder / "tllib" / "normalization" / "__init__.py").unlink()  # upstream's has none


def write_talib(folder):
    write(folder, "talib.finetune", METHODS[:6], ["stochnorm", *STARS])


def loaded(name):
    return name.partition(".")[0] in PURGED


@pytest.fixture
def site(tmp_path, monkeypatch):
    """An empty folder to import from. Neither package is there, and nothing stays loaded afterwards."""
    for name in filter(loaded, list(sys.modules)):
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    unpatch()
    for name in filter(loaded, list(sys.modules)):
        del sys.modules[name]


@pytest.fixture
def tllib(site):
    write_tllib(site)


@pytest.fixture
def talib(site):
    write_talib(site)


def module(name):
    return importlib.import_module(name)


def tllib_name(method):
    package = {"stochnorm": "normalization", "classifier": "modules"}.get(method, "regularization")
    return f"tllib.{package}.{method}"


def everything(*packages):
    """The attributes of all modules of the packages."""
    names = [name for name in sys.modules if name.startswith(packages)]
    return {f"{name}.{key}": value for name in names for key, value in vars(sys.modules[name]).items()}


def test_signatures():
    parameters = inspect.signature(patch).parameters
    assert list(parameters) == ["model", *METHODS]
    assert parameters["model"].default is None and all(parameters[name].default is True for name in METHODS)
    assert not inspect.signature(unpatch).parameters
    assert {"patch", "unpatch"} <= set(talib_fast.__all__)


def is_fused(sequential):
    return type(sequential) is not nn.Sequential and repr(sequential).startswith("Sequential(")


def ours(method):
    """What the library gets of ours in the place of one of its modules' names."""
    home = getattr(finetune, method)
    more = {"convert_model": patching.convert_model} if method == "stochnorm" else {}
    return {name: getattr(home, name) for name in home.__all__} | more


def test_tllib_is_replaced_module_by_module(tllib):
    replaced = patch()
    for method in METHODS:
        upstream = vars(module(tllib_name(method)))
        shared = [name for name in ours(method) if name in upstream]
        assert shared and all(upstream[name] is ours(method)[name] for name in shared)
        for name in set(shared) - {"torch", "nn"}:
            home = "patching" if name == "convert_model" else f"finetune.{method}"
            assert replaced[f"{tllib_name(method)}.{name}"] == f"talib_fast.{home}.{name}"
    regularization = module("tllib.regularization")
    assert regularization.Classifier is finetune.bi_tuning.Classifier
    assert regularization.SPRegularization is finetune.delta.SPRegularization
    assert replaced["tllib.regularization.Classifier"] == "talib_fast.finetune.bi_tuning.Classifier"
    assert replaced["tllib.modules.Classifier"] == "talib_fast.finetune.classifier.Classifier"
    assert all(name.startswith("tllib.") for name in replaced)


def test_talib_and_its_re_exports_are_replaced(talib):
    replaced = patch()
    package = module("talib.finetune")
    assert package.Classifier is finetune.bi_tuning.Classifier
    assert package.convert_model is patching.convert_model
    assert package.lwf.Classifier is finetune.lwf.Classifier
    assert package.co_tuning.Classifier is finetune.co_tuning.Classifier
    assert package.Bituning is package.BiTuning is finetune.bi_tuning.BiTuning
    assert {name for name in replaced if name.count(".") == 2} == {
        f"talib.finetune.{name}"
        for method in ["stochnorm", *STARS]
        for name in getattr(finetune, method).__all__
        if name in vars(package) and not inspect.ismodule(vars(package)[name])
    }


def test_both_packages_at_once(tllib, talib):
    assert {name.partition(".")[0] for name in patch()} == {"tllib", "talib"}


def test_what_is_not_ours_stays(tllib):
    before = module("tllib.regularization.delta")
    helper, names = before.Helper, set(vars(before))
    patch()
    assert before.Helper is helper and before.torch is torch and before.nn is nn and set(vars(before)) == names
    assert not hasattr(module("tllib.normalization.stochnorm"), "SyncStochNorm")
    assert module("tllib.normalization.stochnorm")._StochNorm.__module__ == "tllib.normalization.stochnorm"
    base = vars(module("tllib.regularization.co_tuning"))["ClassifierBase"]
    assert base.__module__ == "tllib.regularization.lwf"


def test_unpatch_restores_exactly_the_originals(tllib, talib):
    for name in ("tllib.regularization.lwf", "tllib.normalization.stochnorm", "tllib.alignment.dann", "talib.finetune"):
        module(name)
    module("tllib.modules.classifier")
    before = everything("tllib.", "talib.")
    bases = sys.modules["tllib.alignment.dann"].ImageClassifier.__bases__
    replaced = patch()
    changed = [name for name, value in everything("tllib.", "talib.").items() if before[name] is not value]
    assert "tllib.alignment.dann.ImageClassifier.__bases__" in replaced
    assert sorted(changed) == sorted(name for name in replaced if not name.endswith("__bases__"))
    assert unpatch() == sorted(replaced)
    after = everything("tllib.", "talib.")
    assert after.keys() == before.keys() and all(after[name] is before[name] for name in before)
    assert sys.modules["tllib.alignment.dann"].ImageClassifier.__bases__ == bases and unpatch() == []
    assert patch() == replaced


@pytest.mark.parametrize("method", METHODS)
def test_a_method_can_be_left_out(tllib, method):
    left_out = {method, "lwf"} if method == "co_tuning" else {method}  # LWF's class is the base of Co-Tuning's
    replaced = patch(**dict.fromkeys(left_out, False))
    assert replaced and not any(f".{method}." in name for name in replaced)
    upstream = module(tllib_name(method))
    names = [name for name in getattr(finetune, method).__all__ if isinstance(vars(upstream).get(name), type)]
    assert names and all(getattr(upstream, name).__module__ == upstream.__name__ for name in names)


def test_a_single_method(tllib):
    others = dict.fromkeys(METHODS, False) | {"bss": True}
    name = "BatchSpectralShrinkage"
    assert list(patch(**others)) == [f"tllib.regularization.bss.{name}", f"tllib.regularization.{name}"]
    assert "tllib.normalization.stochnorm" not in sys.modules
    assert patch(**dict.fromkeys(METHODS, False)) == {}


def test_a_base_class_is_not_replaced_under_a_class_that_stays(talib):
    lwf = module("talib.finetune.lwf").Classifier
    with pytest.raises(ValueError, match=r"co_tuning\.Classifier to be replaced along with talib\.finetune\.lwf\.Cl"):
        patch(co_tuning=False)
    assert module("talib.finetune.lwf").Classifier is lwf
    patch(lwf=False)
    assert patch(bss=False).keys() == {"talib.finetune.lwf.Classifier", "talib.finetune.lwf.collect_pretrain_labels"}
    unpatch()
    patch(lwf=False, co_tuning=False)
    module("talib.finetune.co_tuning").Classifier()


def test_patching_twice_is_harmless(tllib):
    original = module("tllib.regularization.bss").BatchSpectralShrinkage
    first = patch()
    assert first and patch() == {} and patch(delta=False) == {}
    assert unpatch() == sorted(first)
    assert module("tllib.regularization.bss").BatchSpectralShrinkage is original


def test_patches_add_up_and_unpatch_takes_all_back(tllib):
    bss, delta = module("tllib.regularization.bss"), module("tllib.regularization.delta")
    originals = bss.BatchSpectralShrinkage, delta.SPRegularization
    first = patch(bss=False)
    assert bss.BatchSpectralShrinkage is originals[0] and delta.SPRegularization is finetune.delta.SPRegularization
    second = patch()
    assert all("BatchSpectralShrinkage" in name for name in second)
    assert unpatch() == sorted([*first, *second])
    assert (bss.BatchSpectralShrinkage, delta.SPRegularization) == originals


def test_a_reloaded_module_stays_patched_and_keeps_its_new_originals(tllib, site):
    patch()
    reloaded = importlib.reload(module("tllib.regularization.bss"))
    assert reloaded.BatchSpectralShrinkage is finetune.bss.BatchSpectralShrinkage and patch() == {}
    path = site / "tllib" / "regularization" / "bss.py"
    path.write_text(path.read_text() + "\nraise RuntimeError('no GPU')")
    with pytest.raises(RuntimeError, match="no GPU"):
        importlib.reload(reloaded)
    assert reloaded.BatchSpectralShrinkage is finetune.bss.BatchSpectralShrinkage
    unpatch()
    assert reloaded.BatchSpectralShrinkage.__module__ == "tllib.regularization.bss"


def test_unpatch_leaves_what_someone_else_has_set_since(tllib):
    replaced = patch()
    bss = module("tllib.regularization.bss")
    bss.BatchSpectralShrinkage = theirs = object()
    assert "tllib.regularization.bss.BatchSpectralShrinkage" in replaced
    assert "tllib.regularization.bss.BatchSpectralShrinkage" not in unpatch()
    assert bss.BatchSpectralShrinkage is theirs


def test_script_with_a_star_import(tllib, site):
    patch()
    site.joinpath("upstream_script.py").write_text(
        "from tllib.regularization.delta import *\n"
        "from tllib.normalization.stochnorm import convert_model, StochNorm2d\n"
        "model = convert_model(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()), 0.25)\n"
        "regularization = SPRegularization(model, model)\n"
        "with torch.no_grad():\n"
        "    model[0].bias += 1\n"
        "distance = regularization().item()\n"
        "helper = Helper()\n"
    )
    script = module("upstream_script")
    assert isinstance(script.regularization, finetune.delta.SPRegularization) and script.distance == pytest.approx(2.0)
    assert isinstance(script.model[1], script.StochNorm2d) and script.StochNorm2d is finetune.stochnorm.StochNorm2d
    assert script.model[1].p == 0.25 and is_fused(script.model)
    unpatch()
    assert script.regularization().item() == pytest.approx(2.0)


def test_names_bound_before_keep_upstreams_classes(tllib):
    early = module("tllib.regularization.delta").L2Regularization
    patch()
    assert early.__module__ == "tllib.regularization.delta"


def as_upstreams_examples_do(site):
    """patch() in a script's first line, before the path that leads to the library is known."""
    site.joinpath("library").mkdir()
    assert patch() == {}
    write_tllib(site / "library")
    sys.path.append(str(site / "library"))


@pytest.fixture
def patched_first(site, monkeypatch):
    monkeypatch.setattr(sys, "path", sys.path.copy())
    as_upstreams_examples_do(site)


def test_a_library_that_is_found_later_is_patched_as_it_is_imported(patched_first):
    script = {}
    exec("from tllib.regularization.delta import *\nfrom tllib.modules import Classifier", script)
    assert script["SPRegularization"] is finetune.delta.SPRegularization and script["nn"] is nn
    assert script["Classifier"] is finetune.classifier.Classifier
    for method in METHODS:
        upstream = vars(module(tllib_name(method)))
        assert all(upstream[name] is value for name, value in ours(method).items() if name in upstream)
        loader = upstream["__loader__"]
        assert loader is upstream["__spec__"].loader and "talib_fast" not in repr(loader)
    assert module("tllib.regularization").SPRegularization is finetune.delta.SPRegularization
    assert patch() == {}


def test_unpatch_restores_what_was_replaced_as_it_was_imported(patched_first):
    finders = sys.meta_path.copy()
    dann, package = module("tllib.alignment.dann"), module("tllib.regularization")
    classifier, co_tuning = module("tllib.modules.classifier"), module("tllib.regularization.co_tuning")
    assert dann.ClassifierBase is finetune.classifier.Classifier
    restored = unpatch()
    names = [
        "alignment.dann.ClassifierBase",
        "modules.classifier.Classifier",
        "regularization.bss.BatchSpectralShrinkage",
    ]
    assert {f"tllib.{name}" for name in [*names, "regularization.BatchSpectralShrinkage"]} < set(restored)
    assert not any(
        value is ours
        for value in everything("tllib.").values()
        for ours in vars(finetune.lwf).values()
        if getattr(ours, "__module__", "").startswith("talib_fast.")
    )
    assert dann.ClassifierBase is classifier.Classifier and dann.ImageClassifier.__bases__ == (classifier.Classifier,)
    assert co_tuning.Classifier.__bases__ == (co_tuning.ClassifierBase,)
    assert package.BatchSpectralShrinkage.__module__ == "tllib.regularization.bss"
    co_tuning.Classifier(), dann.ImageClassifier(backbone(), 3)
    assert len(sys.meta_path) == len(finders) - 1
    module("tllib.normalization.stochnorm")
    assert sys.modules["tllib.normalization.stochnorm"].StochNorm2d.__module__ == "tllib.normalization.stochnorm"
    assert unpatch() == []


def test_only_the_chosen_methods_are_patched_later(site):
    assert patch(bss=False, classifier=False) == {} and patch(**dict.fromkeys(METHODS, False)) == {}
    write_tllib(site)
    importlib.invalidate_caches()
    assert module("tllib.regularization.bss").BatchSpectralShrinkage.__module__ == "tllib.regularization.bss"
    assert module("tllib.regularization.delta").SPRegularization is finetune.delta.SPRegularization
    replaced = patch().keys()
    assert {"tllib.modules.Classifier", "tllib.regularization.BatchSpectralShrinkage"} < replaced
    assert not any("delta" in name for name in replaced)


@pytest.mark.parametrize("imports", [["tllib.alignment.dann"], ["tllib.regularization.lwf", "tllib.modules"]])
def test_the_hook_imports_nothing(patched_first, imports):
    for name in imports:
        module(name)
    assert "tllib.normalization" not in sys.modules


def test_an_import_that_fails_leaves_the_hook_and_nothing_replaced(patched_first, site):
    path = site / "library" / "tllib" / "regularization" / "lwf.py"
    source = path.read_text()
    path.write_text(source + "\nraise RuntimeError('no GPU')")
    with pytest.raises(RuntimeError, match="no GPU"):
        module("tllib.regularization.lwf")
    assert "tllib.regularization.lwf" not in sys.modules
    path.write_text(source + "# mended\n")
    importlib.invalidate_caches()
    assert module("tllib.regularization.lwf").Classifier is finetune.lwf.Classifier
    assert module("tllib.regularization.bss").BatchSpectralShrinkage is finetune.bss.BatchSpectralShrinkage


def test_a_patch_that_fails_leaves_what_the_hook_has_replaced(patched_first, site):
    unpatch()
    patch(lwf=False, co_tuning=False)
    bss = module("tllib.regularization.bss")
    site.joinpath("library", "tllib", "regularization", "lwf.py").write_text("raise RuntimeError('no GPU')")
    sys.modules.pop("tllib.regularization.lwf"), sys.modules.pop("tllib.regularization.co_tuning")
    with pytest.raises(ImportError, match=r"found tllib\.regularization\.\w+, but importing it failed: no GPU"):
        patch()
    assert bss.BatchSpectralShrinkage is module("tllib.regularization").BatchSpectralShrinkage
    assert bss.BatchSpectralShrinkage is finetune.bss.BatchSpectralShrinkage


def test_modules_that_import_each_other_are_patched(patched_first, site):
    folder = site / "library" / "tllib" / "modules"
    source = folder.joinpath("classifier.py").read_text()
    folder.joinpath("classifier.py").write_text(source + "\nfrom . import derived\n")
    folder.joinpath("derived.py").write_text(
        "from .classifier import Classifier\n\nclass Derived(Classifier):\n"
        "    def __init__(self, *args):\n        super(Derived, self).__init__(*args)\n"
    )
    derived = module("tllib.modules.derived")
    assert derived.Classifier is finetune.classifier.Classifier
    assert isinstance(derived.Derived(backbone(), 3), finetune.classifier.Classifier)
    unpatch()
    assert derived.Derived.__bases__ == (derived.Classifier,) == (module("tllib.modules.classifier").Classifier,)


def test_threads_import_at_once(patched_first):
    names = [tllib_name(method) for method in METHODS] * 4
    with ThreadPoolExecutor(len(names)) as pool:
        modules = list(pool.map(module, names))
        patched = list(pool.map(lambda _: patch(), range(4)))
    assert all(upstream is sys.modules[name] for upstream, name in zip(modules, names, strict=True))
    for method in METHODS:
        upstream = vars(module(tllib_name(method)))
        assert all(upstream[name] is value for name, value in ours(method).items() if name in upstream)
    assert not any(patched[1:]) and unpatch() and unpatch() == []


def test_two_hooks_and_a_library_of_other_loaders(patched_first, site, monkeypatch):
    """Another copy of talib_fast may have a hook, too, and the library may lie in an archive."""
    finder = next(finder for finder in sys.meta_path if type(finder).__module__ == "talib_fast.patching.library")
    monkeypatch.setattr(sys, "meta_path", [finder, type(finder)(), *sys.meta_path[1:]])
    archive = shutil.make_archive(str(site / "archive"), "zip", site / "library")
    sys.path[:] = [archive, *(path for path in sys.path if path != str(site / "library"))]
    delta = module("tllib.regularization.delta")
    assert archive in delta.__file__ and delta.SPRegularization is finetune.delta.SPRegularization
    assert "class SPRegularization" in delta.__loader__.get_source("tllib.regularization.delta")
    importlib.reload(delta)
    assert delta.SPRegularization is finetune.delta.SPRegularization


def test_a_library_that_never_comes(site, monkeypatch):
    monkeypatch.setitem(sys.modules, "tllib", None)
    assert patch() == {} and unpatch() == []
    assert patch(**dict.fromkeys(METHODS, False)) == {}
    assert not any(type(finder).__module__ == "talib_fast.patching.library" for finder in sys.meta_path)
    with pytest.raises(ImportError):
        module("tllib.regularization")


def backbone():
    layers = nn.Sequential(nn.Conv2d(3, 4, 1))
    layers.out_features = 4
    return layers


@pytest.mark.parametrize("before", [False, True])
def test_classifiers_of_the_rest_of_the_library_derive_from_ours(tllib, before):
    if before:
        module("tllib.alignment.dann")
    replaced = patch()
    kind, image_classifier = (
        module("tllib.modules.classifier").Classifier,
        module("tllib.alignment.dann").ImageClassifier,
    )
    assert kind is finetune.classifier.Classifier is module("tllib.alignment.dann").ClassifierBase
    assert ("tllib.alignment.dann.ImageClassifier.__bases__" in replaced) == before
    model = image_classifier(backbone(), 3, bottleneck_dim=2, finetune=False)
    predictions, features = model(torch.randn(2, 3, 4, 4))
    assert isinstance(model, kind) and predictions.shape == (2, 3) and features.shape == (2, 2)
    assert model.features_dim == 2 and [group["lr"] for group in model.get_parameters()] == [1.0] * 3
    unpatch()
    assert image_classifier.__bases__ == (module("tllib.modules.classifier").Classifier,)
    image_classifier(backbone(), 3)


def test_instance_checks_are_upstreams(tllib):
    patch()
    kind = module("tllib.modules.classifier").Classifier
    regularization = {method: module(tllib_name(method)).Classifier for method in ("lwf", "co_tuning", "bi_tuning")}
    head = nn.Linear(4, 5)
    assert isinstance(regularization["bi_tuning"](backbone(), 3), kind)
    assert isinstance(regularization["co_tuning"](backbone(), 3, head), regularization["lwf"])
    assert not isinstance(regularization["lwf"](backbone(), 3, head), kind)


@pytest.mark.parametrize("layout", ["talib.py", "talib/__init__.py"])
@pytest.mark.parametrize("imported", [False, True])
def test_ta_lib_is_left_alone(site, layout, imported):
    path = site / layout
    path.parent.mkdir(exist_ok=True)
    path.write_text("def SMA(): pass")
    site.joinpath("finetune.py").write_text("raise AssertionError")
    before = dict(vars(module("talib"))) if imported else None
    assert patch() == {}
    assert ("talib" in sys.modules) == imported and module("talib").SMA() is None
    if not imported:
        del sys.modules["talib"]
    write_tllib(site)
    importlib.invalidate_caches()
    assert {name.partition(".")[0] for name in patch()} == {"tllib"}
    assert ("talib" in sys.modules) == imported and (not imported or dict(vars(sys.modules["talib"])) == before)


def test_a_module_that_fails_to_be_imported_leaves_nothing_replaced(tllib, talib, site):
    finetune_package = module("talib.finetune")
    original = finetune_package.BatchSpectralShrinkage
    site.joinpath("tllib", "regularization", "lwf.py").write_text("raise RuntimeError('no GPU')")
    bss = module("tllib.normalization.stochnorm").StochNorm2d
    with pytest.raises(ImportError, match=r"patch\(\) found tllib\.regularization, but importing it failed: no GPU"):
        patch()
    assert module("tllib.normalization.stochnorm").StochNorm2d is bss
    assert finetune_package.BatchSpectralShrinkage is original and unpatch() == []


def test_a_failure_in_the_middle_restores(tllib):
    class Stubborn(type(sys)):
        def __setattr__(self, name, value):
            if name == "SPRegularization":
                raise KeyboardInterrupt
            super().__setattr__(name, value)

    module("tllib.normalization.stochnorm"), module("tllib.regularization")
    before = everything("tllib.")
    module("tllib.regularization.delta").__class__ = Stubborn
    with pytest.raises(KeyboardInterrupt):
        patch()
    after = everything("tllib.")
    assert all(after[name] is before[name] for name in before)
    assert unpatch() == []


@pytest.mark.parametrize("arguments, got", [({"bss": 1}, "bss to be True or False, got 1"), ({"dealt": True}, "dealt")])
def test_bad_choices(tllib, arguments, got):
    with pytest.raises(TypeError, match=got):
        patch(**arguments)
    assert unpatch() == []


@pytest.mark.parametrize("model, got", [(nn.Linear, "type"), ("model", "str"), (True, "bool")])
def test_bad_model(model, got):
    with pytest.raises(TypeError, match=rf"expected model to be a torch\.nn\.Module, got {got}"):
        patch(model)


def test_a_model_takes_no_choice_of_methods():
    with pytest.raises(ValueError, match="a model or a choice of methods, got a model and bss, lwf left out"):
        patch(nn.Linear(1, 1), bss=False, lwf=False)


def upstream_model(name="tllib.normalization.stochnorm"):
    upstream = module(name)
    shared = upstream.StochNorm2d(4, p=0.25)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        shared,
        nn.ReLU(),
        shared,
        nn.Sequential(nn.Conv2d(4, 2, 3), upstream.StochNorm2d(2, eps=1e-3, momentum=0.2, affine=False)),
        nn.Flatten(),
        upstream.StochNorm1d(32),
    )


@pytest.mark.parametrize("library", ["tllib", "talib"])
def test_model_is_changed_in_place(library, request):
    request.getfixturevalue(library)
    name = "talib.finetune.stochnorm" if library == "talib" else "tllib.normalization.stochnorm"
    upstream = module(name)
    model = upstream_model(name)
    model[4].eval()
    model[1].weight.requires_grad_(False)
    model(torch.randn(4, 3, 8, 8))
    calls = []
    model[1].register_forward_hook(lambda *_: calls.append(1))
    modules, tensors = list(model.modules()), copy.deepcopy(model.state_dict())
    parameters, training = list(model.parameters()), [layer.training for layer in model.modules()]
    assert patch(model) == {
        "1": "talib_fast.finetune.stochnorm.StochNorm2d",
        "4.1": "talib_fast.finetune.stochnorm.StochNorm2d",
        "6": "talib_fast.finetune.stochnorm.StochNorm1d",
    }
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True)) and model[1] is model[3]
    assert is_fused(model) and not is_fused(model[4])  # a norm with nothing behind it
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert [layer.training for layer in model.modules()] == training
    assert [layer.p for layer in (model[1], model[4][1], model[6])] == [0.25, 0.5, 0.5]
    assert not model[1].weight.requires_grad and model[1].bias.requires_grad
    for key, tensor in tensors.items():
        assert torch.equal(model.state_dict()[key], tensor)
    assert type(model[4][1]) is finetune.stochnorm.StochNorm2d and model[4][1].eps == 1e-3
    model(torch.randn(4, 3, 8, 8))
    assert len(calls) == 2 and model[1].num_batches_tracked == 2 and model[4][1].num_batches_tracked == 0
    assert patch(model) == {} and unpatch() == []
    assert upstream.StochNorm2d.__module__ == name


def test_model_state_dict_is_batch_norms(tllib):
    model = upstream_model()
    patch(model)

    def as_batch_norm(layer):
        kind = nn.BatchNorm1d if isinstance(layer, finetune.stochnorm.StochNorm1d) else nn.BatchNorm2d
        return kind(layer.num_features, affine=layer.affine)

    for name in ("1", "4.1", "6"):
        layer = model.get_submodule(name)
        assert list(layer.state_dict()) == list(as_batch_norm(layer).state_dict())
        layer.load_state_dict(as_batch_norm(layer).state_dict(), strict=True)
        assert layer.num_batches_tracked.dtype == torch.int64
    repr(model), copy.deepcopy(model)(torch.randn(4, 3, 8, 8))


def test_training_goes_on_with_the_same_optimizer(tllib):
    model = upstream_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def step():
        optimizer.zero_grad()
        model(torch.randn(4, 3, 8, 8)).square().sum().backward()
        optimizer.step()

    step()
    statistics, weight = model[1].running_mean.clone(), model[1].weight.clone()
    momentum = optimizer.state[model[1].weight]["momentum_buffer"]
    patch(model)
    assert torch.equal(model[1].running_mean, statistics)
    step()
    assert not torch.equal(model[1].running_mean, statistics) and not torch.equal(model[1].weight, weight)
    assert optimizer.state[model[1].weight]["momentum_buffer"] is momentum


def test_fault_p_that_convert_model_lost_is_found_again(tllib):
    batch_norm = nn.Sequential(nn.BatchNorm2d(3))
    model = module("tllib.normalization.stochnorm").convert_model(batch_norm, 0.125)
    assert model[0].p == 0.5 and model[0].track_running_stats == 0.125
    patch(model)
    assert model[0].p == 0.125 and model[0].track_running_stats is True


def test_model_without_running_statistics(tllib):
    layer = module("tllib.normalization.stochnorm").StochNorm2d(3, track_running_stats=False)
    assert patch(layer) == {"model": "talib_fast.finetune.stochnorm.StochNorm2d"}
    x = torch.randn(4, 3, 2, 2)
    expected = nn.functional.batch_norm(x, None, None, layer.weight, layer.bias, True)
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer.eval()(x), expected)
    fresh = finetune.stochnorm.StochNorm2d(3, track_running_stats=False)
    assert vars(layer)["_buffers"] == vars(fresh)["_buffers"] and vars(layer).keys() == vars(fresh).keys()
    assert list(layer._parameters) == list(fresh._parameters)


def test_model_loaded_by_pickle_while_patched_is_completed(tllib):
    model, file = upstream_model(), io.BytesIO()
    torch.save(model, file)
    patch()
    file.seek(0)
    model = torch.load(file, weights_only=False)
    assert isinstance(model[1], finetune.stochnorm.StochNorm2d)
    assert list(patch(model)) == ["1", "4.1", "6"]
    model(torch.randn(4, 3, 8, 8))
    assert model[6].num_batches_tracked == 1 and patch(model) == {}


def test_subclasses_of_upstreams_layers_are_left_alone(tllib):
    upstream = module("tllib.normalization.stochnorm").StochNorm2d

    class Own(upstream):
        pass

    model = nn.Sequential(Own(3), upstream(3))
    with pytest.warns(UserWarning, match=r"unknown subclasses of StochNorm as they are: 0 \(test_patching\..*Own\)"):
        assert list(patch(model)) == ["1"]
    assert type(model[0]) is Own


def test_other_models_and_other_peoples_stoch_norms_are_left_alone():
    StochNorm2d = type("StochNorm2d", (nn.BatchNorm2d,), {})
    model = nn.Sequential(StochNorm2d(3), nn.BatchNorm2d(3), finetune.stochnorm.StochNorm2d(3))
    kinds = [type(layer) for layer in model]
    assert patch(model=model) == {} and [type(layer) for layer in model] == kinds


def test_model_stays_as_it_is_after_a_bad_probability(tllib):
    upstream = module("tllib.normalization.stochnorm")
    model = nn.Sequential(upstream.StochNorm2d(3), upstream.StochNorm2d(3, p=1.5))
    with pytest.raises(ValueError, match=r"p in \[0, 1\], got 1\.5"):
        patch(model)
    assert all(type(layer) is upstream.StochNorm2d and len(layer.state_dict()) == 4 for layer in model)


def test_model_stays_as_it_is_after_a_failure_in_the_middle(tllib):
    upstream = module("tllib.normalization.stochnorm")
    slotted = type("StochNorm2d", (upstream.StochNorm2d,), {"__slots__": ("x",), "__module__": upstream.__name__})
    model = nn.Sequential(upstream.StochNorm2d(3), slotted(3))
    with pytest.raises(TypeError, match="layout"):
        patch(model)
    assert [type(layer) for layer in model] == [upstream.StochNorm2d, slotted]
    assert all(len(layer.state_dict()) == 4 for layer in model)


def test_importing_talib_fast_imports_neither_package(tllib, talib, site):
    code = "import sys, talib_fast; assert not {'tllib', 'talib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=site, check=True, timeout=PATIENCE)


@pytest.mark.parametrize("method", STAR_IMPORTED)
def test_star_imports_give_every_name_of_upstreams(method):
    script = {}
    exec(f"from talib_fast.finetune.{method} import *", script)
    assert set(STAR_IMPORTED[method].split()) <= script.keys()
    for name in {"torch", "nn", "F", "functools", "tqdm"} & set(STAR_IMPORTED[method].split()):
        assert inspect.ismodule(script[name])


def test_the_package_exports_every_name_of_upstreams():
    names = {
        name for method, names in STAR_IMPORTED.items() if method not in ("lwf", "classifier") for name in names.split()
    }
    assert not {name for name in names if not hasattr(finetune, name)}


def public(name):
    found = finetune
    for part in name.split("."):
        found = getattr(found, part)
    return found


@pytest.mark.parametrize("name", SIGNATURES)
def test_everything_takes_upstreams_arguments(name):
    parameters, expected = list(inspect.signature(public(name)).parameters), SIGNATURES[name].split()
    assert parameters[: len(expected)] == expected


def built(name):
    """An instance of one of the classes."""
    kind, model, head = public(name), nn.Linear(2, 2), nn.Linear(4, 5)
    match name.split("."):
        case "stochnorm", _:
            return kind(3)
        case "classifier", _:
            return kind(backbone(), 3)
        case "lwf" | "co_tuning", "Classifier":
            return kind(backbone(), 3, head)
        case "co_tuning", "Relationship":
            loader = DataLoader(TensorDataset(torch.randn(4, 2), torch.arange(4) % 2), 2)
            return kind(loader, model, "cpu", progress=False)
        case "bi_tuning", "Classifier":
            return kind(backbone(), 3)
        case "bi_tuning", "BiTuning":
            encoder = finetune.bi_tuning.Classifier(backbone(), 3)
            return kind(encoder, copy.deepcopy(encoder), 3, K=2)
        case _, "L2Regularization":
            return kind(model)
        case _, "SPRegularization":
            return kind(copy.deepcopy(model), model)
        case _, "IntermediateLayerGetter":
            return kind(nn.Sequential(model), ["0"])
        case _, "AttentionBehavioralRegularization":
            return kind([torch.ones(3)])
    return kind()


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_every_instance_has_upstreams_attributes(name):
    instance = built(name)
    assert [attribute for attribute in ATTRIBUTES[name].split() if not hasattr(instance, attribute)] == []

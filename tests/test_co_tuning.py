import copy
import importlib.util
import inspect
import math
import os
import re
import sys
import zipfile

import numpy as np
import pytest
import torch
from classifier_support import assert_trains_alike_in_low_precision, images, with_workers
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset

from talib_fast.finetune import lwf
from talib_fast.finetune.co_tuning import Classifier, CoTuningLoss, Relationship, calibrate_temperature

needs_sklearn = pytest.mark.skipif(importlib.util.find_spec("sklearn") is None, reason="no scikit-learn")
both_methods = pytest.mark.parametrize("method", ["direct", pytest.param("reverse", marks=needs_sklearn)])

REQUIRED = inspect.Parameter.empty
SOURCE_CLASSES = 5


def softmax(row, temperature=1.0):
    exponentials = [math.exp((x - max(row)) / temperature) for x in row]
    return [e / sum(exponentials) for e in exponentials]


def cross_entropies(logits, target):
    """−Σ target·log_softmax(input) of each sample, in plain loops."""
    rows = zip(logits.tolist(), target.tolist(), strict=True)
    return [-sum(p * math.log(q) for p, q in zip(t, softmax(row), strict=True)) for row, t in rows]


def batch(size=5, classes=7, device="cpu", dtype=torch.float64):
    logits = torch.randn(size, classes, dtype=torch.float64) * 3
    target = torch.rand(size, classes, dtype=torch.float64)
    return logits.to(device, dtype), (target / target.sum(1, keepdim=True)).to(device, dtype)


def source_classifier():
    return nn.Sequential(nn.Linear(3, SOURCE_CLASSES), nn.BatchNorm1d(SOURCE_CLASSES), nn.Dropout(0.5))


def samples(labels=(0, 1, 2, 0, 2, 2, 1, 0, 0)):
    return torch.randn(len(labels), 3) * 2, torch.tensor(labels)


def batches(x, labels, size=4):
    return list(zip(x.split(size), labels.split(size), strict=True))


def table(x, labels, classifier, num_classes=3, temperature=1.0):
    """The mean softmax of every class, sample by sample, in plain loops."""
    classifier = copy.deepcopy(classifier).cpu().eval()
    sums, counts = [[0.0] * SOURCE_CLASSES for _ in range(num_classes)], [0] * num_classes
    for sample, label in zip(x, labels.tolist(), strict=True):
        row = softmax(classifier(sample[None])[0].tolist(), temperature)
        sums[label] = [a + b for a, b in zip(sums[label], row, strict=True)]
        counts[label] += 1
    return np.array([[total / count for total in row] for row, count in zip(sums, counts, strict=True)])


class Uncalled(nn.Module):
    """A classifier with the weights of another, which must not be called."""

    def __init__(self, classifier):
        super().__init__()
        self.classifier = classifier

    def state_dict(self, *args, **kwargs):
        return self.classifier.state_dict(*args, **kwargs)

    def forward(self, x):
        raise AssertionError("the cache was not used")


# --- CoTuningLoss


def test_signatures_are_the_contracts():
    assert list(inspect.signature(CoTuningLoss.forward).parameters) == ["self", "input", "target"]
    positional, keyword_only = [], []
    for name, p in inspect.signature(Relationship).parameters.items():
        (keyword_only if p.kind is p.KEYWORD_ONLY else positional).append((name, p.default))
    assert positional == [("data_loader", REQUIRED), ("classifier", REQUIRED), ("device", REQUIRED), ("cache", None)]
    assert keyword_only == [
        ("num_classes", None),
        ("absent", "error"),
        ("method", "direct"),
        ("temperature", 1.0),
        ("C", (0.01, 0.1, 1.0, 10.0, 100.0, 1000.0, 10000.0)),
        ("progress", True),
        ("process_group", None),
    ]
    parameters = inspect.signature(Classifier).parameters
    assert [(name, p.default) for name, p in parameters.items() if name != "kwargs"] == [
        ("backbone", REQUIRED),
        ("num_classes", REQUIRED),
        ("head_source", REQUIRED),
    ]
    assert parameters["kwargs"].kind is inspect.Parameter.VAR_KEYWORD


def test_loss_is_the_mean_cross_entropy_with_soft_labels(device):
    logits, target = batch(device=device)
    loss = CoTuningLoss()(logits, target)
    expected = sum(cross_entropies(logits, target)) / 5
    torch.testing.assert_close(loss, torch.tensor(expected, dtype=torch.float64, device=device))
    assert CoTuningLoss()(target=target, input=logits) == loss


def test_loss_with_targets_that_do_not_sum_to_one():
    logits, target = batch()
    assert CoTuningLoss()(logits, 3 * target).item() == pytest.approx(3 * sum(cross_entropies(logits, target)) / 5)


def test_gradient_of_the_logits(device):
    logits, target = batch(device=device)
    CoTuningLoss()(logits.requires_grad_(), target).backward()
    rows = zip(logits.tolist(), target.tolist(), strict=True)
    expected = [[(q - p) / 5 for q, p in zip(softmax(row), t, strict=True)] for row, t in rows]
    torch.testing.assert_close(logits.grad, torch.tensor(expected, dtype=torch.float64, device=device))


def test_gradcheck():
    logits, target = batch(3, 4)
    assert torch.autograd.gradcheck(lambda x: CoTuningLoss()(x, target), logits.requires_grad_())


@pytest.mark.parametrize("target_dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_loss_is_a_scalar_in_float32_at_least(dtype, target_dtype, device):
    logits, target = batch(device=device)
    logits, target = logits.to(dtype).requires_grad_(), target.to(target_dtype)
    loss = CoTuningLoss()(logits, target)
    assert loss.shape == () and loss.device == logits.device
    assert loss.dtype == (torch.float64 if torch.float64 in (dtype, target_dtype) else torch.float32)
    assert loss.item() == pytest.approx(sum(cross_entropies(logits.detach(), target)) / 5, rel=1e-5)
    loss.backward()
    assert logits.grad.dtype == dtype and logits.grad.abs().sum() > 0


def test_loss_under_autocast(device):
    logits, target = batch(device=device, dtype=torch.float32)
    with torch.autocast(device.type, torch.bfloat16):
        loss = CoTuningLoss()(logits.bfloat16(), target)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(sum(cross_entropies(logits.bfloat16(), target)) / 5, rel=1e-5)


def test_loss_of_an_empty_batch_is_a_scalar(device):
    loss = CoTuningLoss()(torch.zeros(0, 3, device=device), torch.zeros(0, 3, device=device))
    assert loss.shape == () and loss.device.type == device.type
    loss.item()


def test_loss_compiles_without_a_graph_break():
    logits, target = batch(dtype=torch.float32)
    eager_logits = logits.clone().requires_grad_()
    compiled = torch.compile(CoTuningLoss(), fullgraph=True, backend="aot_eager")
    compiled_value, value = compiled(logits.requires_grad_(), target), CoTuningLoss()(eager_logits, target)
    compiled_value.backward()
    value.backward()
    torch.testing.assert_close(compiled_value, value)
    torch.testing.assert_close(logits.grad, eager_logits.grad)


def test_loss_has_no_state_and_copies():
    logits, target = batch()
    assert CoTuningLoss().state_dict() == {}
    assert copy.deepcopy(CoTuningLoss())(logits, target) == CoTuningLoss()(logits, target)


@pytest.mark.parametrize(
    "target, error, message",
    [
        (torch.zeros(2, dtype=torch.long), TypeError, r"target to be a floating-point tensor, got torch.int64"),
        (np.zeros((2, 3)), TypeError, r"target to be a floating-point tensor, got ndarray"),
        (torch.zeros(2, 4), ValueError, r"one shape \[b, N_p\], got \[2, 3\] and \[2, 4\]"),
        (torch.zeros(3, 3), ValueError, r"one shape \[b, N_p\], got \[2, 3\] and \[3, 3\]"),
        (torch.zeros(2, 1, 3), ValueError, r"one shape \[b, N_p\], got \[2, 3\] and \[2, 1, 3\]"),
    ],
)
def test_loss_of_bad_targets(target, error, message):
    with pytest.raises(error, match=message):
        CoTuningLoss()(torch.zeros(2, 3), target)


def test_loss_of_bad_logits():
    with pytest.raises(TypeError, match=r"input to be a floating-point tensor, got list"):
        CoTuningLoss()([[0.0] * 3] * 2, torch.zeros(2, 3))


def test_loss_of_logits_of_another_rank():
    with pytest.raises(ValueError, match=r"one shape \[b, N_p\], got \[3\] and \[3\]"):
        CoTuningLoss()(torch.zeros(3), torch.zeros(3))


def upstream_loss(input, target):
    return torch.mean(torch.sum(-target * nn.functional.log_softmax(input, dim=-1), dim=-1))


@pytest.mark.parametrize(
    "input, target",
    [
        ((4, 5, 7), (4, 5, 7)),
        ((2, 3, 4, 7), (2, 3, 4, 7)),
        ((4, 5, 7), (4, 1, 7)),
        ((4, 5, 7), (5, 7)),
        ((4, 7), (7,)),
        ((4, 7), (1, 7)),
        ((4, 7), (4, 1)),
        ((1, 7), (4, 7)),
    ],
)
def test_fault_shapes_that_upstream_takes_were_refused(input, target):
    input, target = torch.randn(input, dtype=torch.float64, requires_grad=True), torch.rand(target, dtype=torch.float64)
    loss, expected = CoTuningLoss()(input, target), upstream_loss(input, target)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(value, input) for value in (loss, expected)))


@pytest.mark.parametrize("call", ["eager", "compiled", "vmap"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_fault_masked_classes_gave_nan(dtype, call, device):
    logits = torch.tensor([[0, 1, -math.inf]], device=device, dtype=dtype, requires_grad=True)
    target = torch.tensor([[math.e, 1, 0]], device=device) / (1 + math.e)
    loss = CoTuningLoss()
    if call == "compiled":
        torch._dynamo.reset()
        loss = torch.compile(loss, fullgraph=True, backend="aot_eager")
    value = torch.vmap(loss)(logits[None], target[None])[0] if call == "vmap" else loss(logits, target)
    q = torch.tensor([1, math.e, 0]) / (1 + math.e)
    expected = -(target.cpu()[0, :2] * q[:2].log()).sum().item()
    assert value.item() == pytest.approx(expected, rel=1e-5) == pytest.approx(1.0443, abs=1e-4)
    value.backward()
    torch.testing.assert_close(logits.grad.cpu().float(), q - target.cpu(), rtol=1e-2, atol=0)


def test_second_derivative_with_masked_classes():
    logits, q = torch.tensor([[0, 1, -math.inf]]).double(), torch.tensor([1, math.e, 0]).double() / (1 + math.e)
    hessian = torch.func.hessian(lambda x: CoTuningLoss()(x, torch.tensor([[0.7, 0.3, 0]]).double()))(logits)[0, :, 0]
    torch.testing.assert_close(hessian, torch.diag(q) - q[:, None] * q)


@pytest.mark.parametrize(
    "input, target, expected",
    [
        ([[0, -math.inf, 1], [0, 1, 2]], [[0.5, 0.5, 0], [1, 0, 0]], math.inf),
        ([[0, math.nan, 1], [0, 1, 2]], [[0, 0, 0], [1, 0, 0]], math.nan),
        ([[-math.inf] * 3, [0, 1, 2]], [[0, 0, 0], [1, 0, 0]], math.nan),
        ([[-math.inf, 0, 1], [0, 1, 2]], [[math.nan, 0, 1], [1, 0, 0]], math.nan),
    ],
)
def test_loss_of_what_is_not_finite(input, target, expected):
    loss = CoTuningLoss()(torch.tensor(input), torch.tensor(target, dtype=torch.float32)).item()
    assert loss == expected or (math.isnan(loss) and math.isnan(expected))


def test_targets_made_under_inference_mode():
    logits, target = batch()
    with torch.inference_mode():
        constant = target.clone()
    gradients = [
        torch.autograd.grad(CoTuningLoss()(leaf, its), leaf)[0]
        for leaf, its in ((logits.clone().requires_grad_(), its) for its in (target, constant))
    ]
    assert torch.equal(*gradients)
    with torch.inference_mode():
        assert torch.equal(CoTuningLoss()(logits, constant), CoTuningLoss()(logits, target))


# --- Classifier


class Backbone(nn.Module):
    out_features = 6

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)

    def forward(self, x):
        return self.conv(x)


def make(**options):
    return Classifier(Backbone(), 4, nn.Linear(6, SOURCE_CLASSES), **options)


@pytest.mark.parametrize("finetune, pretrained_lr", [(True, 0.1 * 0.3), (False, 0.3)])
def test_classifier_has_four_parameter_groups(finetune, pretrained_lr):
    model = make(bottleneck=nn.Linear(6, 2), bottleneck_dim=2, finetune=finetune)
    groups = model.get_parameters(base_lr=0.3)
    assert [group["lr"] for group in groups] == [pretrained_lr, pretrained_lr, 0.3, 0.3]
    modules = (model.backbone, model.head_source, model.bottleneck, model.head_target)
    for group, module in zip(groups, modules, strict=True):
        assert set(group) == {"params", "lr"}
        assert [id(p) for p in group["params"]] == [id(p) for p in module.parameters()]
    rate = 0.1 if finetune else 1.0
    assert [group["lr"] for group in model.get_parameters()] == [rate, rate, 1.0, 1.0]


def test_classifier_is_lwfs_otherwise(device):
    model = make(bottleneck=nn.Linear(6, 2), bottleneck_dim=2, head_target=nn.Linear(2, 4)).to(device)
    assert isinstance(model, lwf.Classifier) and model.features_dim == 2
    x = torch.randn(3, 3, 5, 5, device=device)
    y_s, y_t = model(x)
    pooled = model.backbone(x).mean((2, 3))
    torch.testing.assert_close(y_s, model.head_source(pooled))
    torch.testing.assert_close(y_t, model.head_target(model.bottleneck(pooled)))
    torch.testing.assert_close(model.eval()(x), y_t)
    assert list(model.state_dict()) == [
        f"{module}.{name}"
        for module in ("backbone.conv", "bottleneck", "head_source", "head_target")
        for name in ("weight", "bias")
    ]


def test_classifier_training_step_moves_both_heads():
    model, relationship = make(), torch.rand(4, SOURCE_CLASSES).softmax(1)
    optimizer = torch.optim.SGD(model.get_parameters(0.5), lr=0.5, momentum=0.9, nesterov=True)
    x, labels, before = torch.randn(8, 3, 5, 5), torch.arange(8) % 4, copy.deepcopy(model.state_dict())
    y_s, y_t = model(x)
    (nn.functional.cross_entropy(y_t, labels) + 2.3 * CoTuningLoss()(y_s, relationship[labels])).backward()
    optimizer.step()
    assert all(not torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


# --- Relationship


def test_direct_relationship_is_the_mean_softmax_of_each_class(device):
    x, labels = samples()
    classifier = source_classifier().to(device)
    relationship = Relationship(batches(x, labels), classifier, device)
    assert isinstance(relationship.relationship, np.ndarray) and relationship.relationship.dtype == np.float32
    np.testing.assert_allclose(relationship.relationship, table(x, labels, classifier), rtol=1e-5)
    np.testing.assert_allclose(relationship.relationship.sum(1), 1, rtol=1e-6)


def test_positional_and_keyword_calls_agree(tmp_path):
    x, labels = samples()
    loader, classifier = batches(x, labels), source_classifier()
    positional = Relationship(loader, classifier, "cpu", str(tmp_path / "a"))
    keyword = Relationship(cache=tmp_path / "b", device="cpu", classifier=classifier, data_loader=loader)
    np.testing.assert_array_equal(positional.relationship, keyword.relationship)


@pytest.mark.parametrize("temperature", [0.3, 2, 10.0])
def test_temperature_divides_the_logits(temperature):
    x, labels = samples()
    classifier = source_classifier()
    relationship = Relationship(batches(x, labels), classifier, "cpu", temperature=temperature)
    expected = table(x, labels, classifier, temperature=temperature)
    np.testing.assert_allclose(relationship.relationship, expected, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_classifier_of_another_precision(dtype):
    x, labels = samples()
    classifier = source_classifier()
    relationship = Relationship(batches(x.to(dtype), labels), copy.deepcopy(classifier).to(dtype), "cpu")
    assert relationship.relationship.dtype == np.float32
    tolerance = 0.05 if dtype == torch.bfloat16 else 1e-5
    np.testing.assert_allclose(relationship.relationship, table(x, labels, classifier), atol=tolerance)
    np.testing.assert_allclose(relationship.relationship.sum(1), 1, rtol=1e-6)


def test_sums_do_not_drift_over_many_samples():
    x, labels = torch.randn(20_000, 3), torch.zeros(20_000, dtype=torch.long)
    classifier = nn.Linear(3, SOURCE_CLASSES)
    expected = classifier(x).double().softmax(1).mean(0).detach()
    relationship = Relationship(batches(x, labels, 1000), classifier, "cpu")
    np.testing.assert_allclose(relationship.relationship[0], expected, rtol=2e-7)


@pytest.mark.parametrize("order", ["ascending", "descending"])
def test_classes_appear_one_after_the_other(order):
    x, labels = samples((0, 0, 1, 1, 2, 2))
    if order == "descending":
        x, labels = x.flip(0), labels.flip(0)
    classifier = source_classifier()
    relationship = Relationship(batches(x, labels, 2), classifier, "cpu")
    np.testing.assert_allclose(relationship.relationship, table(x, labels, classifier), rtol=1e-5)


def with_extra_fields(x, labels):
    return [(*pair, ["path"] * len(pair[1]), {}) for pair in batches(x, labels)]


def with_labels_in_lists(x, labels):
    return [[x, labels.tolist()] for x, labels in batches(x, labels)]


def with_numpy_labels(x, labels):
    return [(x, labels.numpy()) for x, labels in batches(x, labels)]


def with_small_labels(x, labels):
    return [(x, labels.to(torch.uint8)) for x, labels in batches(x, labels)]


def in_a_data_loader(x, labels):
    return DataLoader(TensorDataset(x, labels, torch.zeros(len(x))), 4)


def without_a_length(x, labels):
    return iter(batches(x, labels))


@pytest.mark.parametrize(
    "loader",
    [
        with_extra_fields,
        with_labels_in_lists,
        with_numpy_labels,
        with_small_labels,
        in_a_data_loader,
        without_a_length,
    ],
)
def test_loaders_of_every_kind(loader):
    x, labels = samples()
    classifier = source_classifier()
    relationship = Relationship(loader(x, labels), classifier, "cpu")
    np.testing.assert_allclose(relationship.relationship, table(x, labels, classifier), rtol=1e-5)


@with_workers
def test_data_loader_with_workers_and_a_cache(tmp_path):
    x, labels = samples()
    classifier, dataset = source_classifier(), TensorDataset(x, labels)
    relationship = Relationship(DataLoader(dataset, 2, num_workers=2), classifier, "cpu", tmp_path / "table")
    np.testing.assert_allclose(relationship.relationship, table(x, labels, classifier), rtol=1e-5)
    again = Relationship(DataLoader(dataset, 5), Uncalled(classifier), "cpu", tmp_path / "table")
    np.testing.assert_array_equal(again.relationship, relationship.relationship)


def test_empty_batch_among_others():
    x, labels = samples()
    classifier = source_classifier()
    loader = [(x[:4], labels[:4]), (x[:0], labels[:0]), (x[4:], labels[4:])]
    relationship = Relationship(loader, classifier, "cpu")
    np.testing.assert_allclose(relationship.relationship, table(x, labels, classifier), rtol=1e-5)


def test_fault_classifier_was_left_in_eval():
    classifier = source_classifier().train()
    classifier[2].eval()
    before = copy.deepcopy(classifier.state_dict())
    Relationship(batches(*samples()), classifier, "cpu")
    with pytest.raises(ValueError, match="labels in"):
        Relationship(batches(*samples((0, 2))), classifier, "cpu", num_classes=2)
    with pytest.raises(TypeError, match="integer") as _caught:  # whose traceback holds what was at work
        Relationship([(samples()[0], torch.rand(len(samples()[0])))], classifier, "cpu")
    assert [module.training for module in classifier.modules()] == [True, True, True, False]
    assert all(torch.equal(before[name], tensor) for name, tensor in classifier.state_dict().items())


def test_fault_every_batch_was_copied_to_the_host(monkeypatch):
    copied = []
    for name in ("cpu", "numpy", "tolist"):
        real = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor,
            name,
            lambda x, *a, real=real, **k: (x.dim() > 1 and copied.append(x.shape), real(x, *a, **k))[1],
        )
    Relationship(batches(*samples(), size=1), source_classifier(), "cpu")
    assert 1 <= len(copied) <= 2 and set(copied) == {(3, SOURCE_CLASSES)}


@both_methods
def test_relationship_of_a_classifier_on_the_device(device, method):
    x, labels = noisy_samples()
    classifier = source_classifier()
    expected = Relationship(batches(x, labels), classifier, "cpu", method=method).relationship
    relationship = Relationship(batches(x, labels), classifier.to(device), device, method=method).relationship
    np.testing.assert_allclose(relationship, expected, atol=1e-4)


@with_workers
def test_training_with_workers_autocast_and_channels_last(device):
    model, x, labels = make(), images(12), torch.arange(12) % 4
    source = nn.Sequential(model.backbone, model.pool_layer, model.head_source)
    relationship = Relationship(DataLoader(TensorDataset(x, labels), 4, num_workers=2), source, "cpu")

    def loss_of(model, x, labels):
        y_s, y_t = model(x)
        return nn.functional.cross_entropy(y_t, labels) + 2.3 * CoTuningLoss()(y_s, relationship.lookup(labels))

    assert_trains_alike_in_low_precision(model, device, (x, labels), loss_of)


# --- absent classes


def test_fault_absent_class_gave_a_nan_row_and_a_short_table():
    x, labels = samples((0, 3, 3, 0))
    classifier = source_classifier()
    relationship = Relationship(batches(x, labels), classifier, "cpu", num_classes=6)
    assert np.isnan(relationship.relationship).any(1).tolist() == [False, True, True, False, True, True]
    expected = relationship.relationship[[3, 0]]
    np.testing.assert_array_equal(relationship[[3, 0]], expected)
    np.testing.assert_array_equal(relationship.lookup(torch.tensor([3, 0])), expected)
    for missing in ([1], [4, 0, 4, 2]):
        message = re.escape(f"classes with samples, but {sorted({*missing} - {0})} had none")
        for look_up in (relationship.lookup, relationship.__getitem__):
            with pytest.raises(ValueError, match=message):
                look_up(torch.tensor(missing))
        with pytest.raises(ValueError, match=message):
            relationship[missing]
    with pytest.raises(ValueError, match=r"but \[1, 2, 4, 5\] had none"):
        relationship[:]
    assert relationship.lookup(torch.tensor([1, 0], device="meta")).shape == (2, SOURCE_CLASSES)
    for absent in ("mean", "uniform"):
        relationship = Relationship(batches(x, labels), classifier, "cpu", num_classes=6, absent=absent)
        assert relationship.relationship.shape == (6, SOURCE_CLASSES)
        assert np.isfinite(relationship.relationship).all()
        np.testing.assert_allclose(relationship.relationship.sum(1), 1, rtol=1e-6)


@pytest.mark.parametrize("method", ["direct", "reverse"])
@pytest.mark.parametrize("absent", ["mean", "uniform"])
def test_rows_of_absent_classes(absent, method):
    if method == "reverse":
        pytest.importorskip("sklearn")
    x, labels = samples((0, 3, 3, 0, 0))
    classifier = source_classifier()
    relationship = Relationship(
        batches(x, labels), classifier, "cpu", num_classes=5, absent=absent, method=method
    ).relationship
    mean_over_samples = table(x, torch.zeros(5, dtype=torch.long), classifier, num_classes=1)[0]
    expected = mean_over_samples if absent == "mean" else np.full(SOURCE_CLASSES, 1 / SOURCE_CLASSES)
    for row in (1, 2, 4):
        np.testing.assert_allclose(relationship[row], expected, rtol=1e-5)
    if method == "direct":
        present = table(x, labels.clamp_max(1), classifier, num_classes=2)
        np.testing.assert_allclose(relationship[[0, 3]], present, rtol=1e-5)


def test_absent_is_ignored_where_every_class_has_samples():
    loader, classifier = batches(*samples()), source_classifier()
    tables = [Relationship(loader, classifier, "cpu", absent=a).relationship for a in ("error", "mean", "uniform")]
    np.testing.assert_array_equal(tables[0], tables[1])
    np.testing.assert_array_equal(tables[0], tables[2])


# --- reverse


def logistic_regression(features, labels, C):
    """Newton's method for C·Σ cross entropy + ½‖W‖²; gives the logits of a feature."""
    f, classes = features.shape[1], int(labels.max()) + 1
    targets, weights = np.eye(classes)[labels], np.zeros((classes, f))
    for _ in range(50):
        scores = np.exp(features @ weights.T)
        p = scores / scores.sum(1, keepdims=True)
        gradient = C * (p - targets).T @ features + weights
        hessian = np.zeros((classes, f, classes, f))
        for a in range(classes):
            for b in range(classes):
                curvature = p[:, a] * ((a == b) - p[:, b])
                hessian[a, :, b, :] = C * (features * curvature[:, None]).T @ features + (a == b) * np.eye(f)
        size = classes * f
        weights -= np.linalg.solve(hessian.reshape(size, size), gradient.ravel()).reshape(weights.shape)
    return lambda x: x @ weights.T


def noisy_samples(size=60, noise=0.8):
    x = torch.randn(size, 3) * 2
    return x, (x + noise * torch.randn(size, 3)).argmax(1)


def source_probabilities(classifier, x, temperature=1.0):
    return np.array([softmax(row, temperature) for row in copy.deepcopy(classifier).eval()(x).tolist()])


def turned_round(p_target, p_source):
    """p(y_s | y_t) of every target class from p(y_t | y_s) ``[N_p, N_t]``, in plain loops."""
    rows = [[p_target[s, t] * p_source[s] for s in range(len(p_source))] for t in range(p_target.shape[1])]
    return np.array([[joint / sum(row) for joint in row] for row in rows])


@pytest.mark.parametrize("C, temperature", [(1.0, 1.0), (0.3, 2.0), ([0.001, 1e4, 3.0], 1.0)])
def test_reverse_relationship_is_a_calibrated_logistic_regression_turned_round(C, temperature):
    model_selection = pytest.importorskip("sklearn.model_selection")
    x, labels = noisy_samples()
    classifier = source_classifier()
    relationship = Relationship(
        batches(x, labels), classifier, "cpu", method="reverse", C=C, temperature=temperature
    ).relationship

    probabilities, labels = source_probabilities(classifier, x, temperature), labels.numpy()
    folds = model_selection.StratifiedKFold(5, shuffle=True, random_state=0)
    smoothed = np.eye(3)[labels] * (1 - 1 / 62) + 1 / 62 / 3
    found = []
    for strength in np.atleast_1d(C):
        logits = np.empty((60, 3))
        for rest, fold in folds.split(probabilities, labels):
            logits[fold] = logistic_regression(probabilities[rest], labels[rest], strength)(probabilities[fold])
        for t in np.geomspace(0.02, 20, 2000):
            log_p = torch.log_softmax(torch.from_numpy(logits / t), 1).numpy()
            found.append((-(smoothed * log_p).sum(), strength, t))
    _, strength, t = min(found)
    logits = logistic_regression(probabilities, labels, strength)(np.eye(SOURCE_CLASSES))
    p_target = np.array([softmax(row, t) for row in logits])
    np.testing.assert_allclose(relationship, turned_round(p_target, probabilities.mean(0)), atol=3e-3)
    assert relationship.dtype == np.float32
    assert strength == (1e4 if np.ndim(C) else C)


def test_reverse_relationship_of_two_classes():
    linear_model = pytest.importorskip("sklearn.linear_model")
    x = torch.randn(40, 3) * 2
    labels = (x[:, 0] + torch.randn(40) > 0).long()
    classifier = source_classifier()
    relationship = Relationship(batches(x, labels), classifier, "cpu", method="reverse", C=2.0).relationship
    probabilities = source_probabilities(classifier, x)
    regression = linear_model.LogisticRegression(C=2.0, fit_intercept=False).fit(probabilities, labels.numpy())
    score = regression.decision_function(np.eye(SOURCE_CLASSES))
    distances = []
    for t in np.geomspace(0.02, 50, 500):  # some temperature explains both rows
        positive = 1 / (1 + np.exp(-score / t))
        expected = turned_round(np.stack([1 - positive, positive], 1), probabilities.mean(0))
        distances.append(np.abs(relationship - expected).max())
    assert min(distances) < 3e-3 < max(distances)


def test_reverse_relationship_is_not_certain_where_few_samples_are_all_predicted():
    pytest.importorskip("sklearn")
    x, labels = 5 * torch.eye(3).repeat(4, 1), torch.arange(3).repeat(4)
    classifier = nn.Linear(3, SOURCE_CLASSES)
    relationship = Relationship(batches(x, labels), classifier, "cpu", method="reverse").relationship
    assert (relationship > 0).all() and np.allclose(relationship.sum(1), 1)


@pytest.mark.parametrize("labels", [(0, 1, 2), (0, 0, 0, 1, 2), (0, 0, 1, 1, 1, 2)])
def test_reverse_relationship_of_classes_with_one_sample(labels):
    pytest.importorskip("sklearn")
    x, labels = samples(labels)
    classifier = source_classifier()
    relationship = Relationship(batches(x, labels), classifier, "cpu", method="reverse", C=2.0).relationship
    assert relationship.shape == (3, SOURCE_CLASSES) and np.isfinite(relationship).all()
    if labels.bincount().gt(1).sum() < 2:  # nothing to calibrate with
        probabilities = source_probabilities(classifier, x)
        logits = logistic_regression(probabilities, labels.numpy(), 2.0)(np.eye(SOURCE_CLASSES))
        p_target = np.array([softmax(row) for row in logits])
        np.testing.assert_allclose(relationship, turned_round(p_target, probabilities.mean(0)), atol=1e-3)


def test_reverse_relationship_where_a_source_class_is_never_seen():
    pytest.importorskip("sklearn")
    x, labels = noisy_samples()
    classifier = nn.Linear(3, 3)
    nn.init.eye_(classifier.weight)
    classifier.bias = nn.Parameter(torch.tensor([0.0, 0.0, -1e4]))
    relationship = Relationship(batches(x, labels), classifier, "cpu", method="reverse").relationship
    assert np.isfinite(relationship).all() and not relationship[:, 2].any()


def test_reverse_relationship_of_one_class():
    pytest.importorskip("sklearn")
    x, labels = samples((0, 0, 0))
    classifier = source_classifier()
    relationship = Relationship(batches(x, labels), classifier, "cpu", method="reverse")
    np.testing.assert_allclose(relationship.relationship, table(x, labels, classifier, 1), rtol=1e-5)


def test_reverse_needs_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    unused = Uncalled(source_classifier())  # it is said before the data is gone through
    with pytest.raises(ImportError, match="needs scikit-learn: pip install scikit-learn"):
        Relationship(batches(*samples()), unused, "cpu", method="reverse")


# --- indexing


def test_indexing_gives_numpy_rows():
    relationship = Relationship(batches(*samples()), source_classifier(), "cpu")
    rows = relationship.relationship
    indices = (1, [2, 0], np.array([1, 1]), slice(0, 2), torch.tensor([2, 0, 0]), torch.tensor(1))
    for index in indices:
        got = relationship[index]
        assert isinstance(got, np.ndarray) and got.dtype == np.float32
        plain = index.tolist() if isinstance(index, torch.Tensor) else index
        np.testing.assert_array_equal(got, rows[plain])
    assert relationship[1].shape == (SOURCE_CLASSES,) and relationship[[2, 0]].shape == (2, SOURCE_CLASSES)


def test_rows_become_a_tensor_as_upstreams_script_does(device):
    relationship = Relationship(batches(*samples()), source_classifier(), "cpu")
    label_t = torch.tensor([2, 0, 1, 1])
    target = torch.from_numpy(relationship[label_t]).to(device).float()
    assert target.shape == (4, SOURCE_CLASSES)
    assert CoTuningLoss()(torch.randn(4, SOURCE_CLASSES, device=device), target).isfinite()


def test_indexing_with_labels_on_the_device(device):
    relationship = Relationship(batches(*samples()), source_classifier(), "cpu")
    np.testing.assert_array_equal(relationship[torch.tensor([2, 0], device=device)], relationship.relationship[[2, 0]])


@pytest.mark.parametrize("dtype", [torch.long, torch.int32, torch.uint8])
def test_lookup_gives_rows_on_the_labels_device(device, dtype):
    relationship = Relationship(batches(*samples()), source_classifier(), "cpu")
    labels = torch.tensor([2, 0, 1, 1], device=device, dtype=dtype)
    for _ in range(2):
        rows = relationship.lookup(labels)
        assert rows.dtype == torch.float32 and rows.device == labels.device
        np.testing.assert_array_equal(rows.cpu(), relationship.relationship[[2, 0, 1, 1]])


def test_lookup_takes_labels_of_any_shape():
    relationship = Relationship(batches(*samples()), source_classifier(), "cpu")
    for labels in (torch.tensor(2), torch.tensor([[0, 1, 2], [2, 2, 0]]), torch.zeros(0, dtype=torch.long)):
        np.testing.assert_array_equal(relationship.lookup(labels), relationship.relationship[labels.numpy()])


@pytest.mark.parametrize(
    "labels, error, message",
    [
        ([0, 3], ValueError, r"labels in \[0, 3\), got labels from 0 to 3"),
        ([0, -1], ValueError, r"labels in \[0, 3\), got labels from -1 to 0"),
        ([0.0, 1.0], TypeError, r"expected integer labels, got torch.float32"),
        ([True, False, False], TypeError, r"expected integer labels, got torch.bool"),
    ],
)
def test_bad_labels_for_rows(labels, error, message):
    relationship = Relationship(batches(*samples()), source_classifier(), "cpu")
    for rows in (relationship.lookup, relationship.__getitem__):
        with pytest.raises(error, match=message):
            rows(torch.tensor(labels))


def test_lookup_compiles_without_a_graph_break():
    relationship, labels = Relationship(batches(*samples()), source_classifier(), "cpu"), torch.tensor([2, 0])
    expected = relationship.lookup(labels)
    assert torch.equal(torch.compile(relationship.lookup, backend="aot_eager", fullgraph=True)(labels), expected)
    with pytest.raises(RuntimeError, match="out of bounds"):
        torch.compile(relationship.lookup, backend="aot_eager", fullgraph=True)(torch.tensor([2, -1]))


def test_lookup_keeps_a_table_for_every_device():
    relationship = Relationship(batches(*samples()), source_classifier(), "cpu")
    for name in ("cpu", "meta", "cpu"):
        rows = relationship.lookup(torch.tensor([2, 0], device=name))
        assert rows.device.type == name and rows.shape == (2, SOURCE_CLASSES)


def test_lookup_follows_an_assigned_relationship(device):
    relationship = Relationship(batches(*samples()), source_classifier(), "cpu")
    labels = torch.tensor([0, 2], device=device)
    relationship.lookup(labels)
    relationship.relationship = np.flip(relationship.relationship.astype(np.float64), 0)
    assert isinstance(relationship.relationship, np.ndarray) and relationship.relationship.dtype == np.float32
    torch.testing.assert_close(relationship.lookup(labels).cpu(), torch.from_numpy(relationship[[0, 2]]))


def test_lookup_gives_a_copy():
    relationship = Relationship(batches(*samples()), source_classifier(), "cpu")
    before = relationship.relationship.copy()
    relationship.lookup(torch.tensor([0, 1])).zero_()
    np.testing.assert_array_equal(relationship.relationship, before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_lookup_does_not_synchronise():
    relationship, labels = Relationship(batches(*samples()), source_classifier(), "cpu"), torch.tensor([2, 0]).cuda()
    relationship.lookup(labels)
    torch.cuda.set_sync_debug_mode("error")
    try:
        relationship.lookup(labels)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@both_methods
def test_a_relationship_of_inference_mode_can_be_trained_with(method):
    x, labels = samples()
    classifier = source_classifier()
    expected = Relationship(batches(x, labels), classifier, "cpu", method=method).relationship
    with torch.inference_mode():
        relationship = Relationship(batches(x, labels), classifier, "cpu", method=method)
        relationship.lookup(torch.tensor([0, 1]))  # as a validation before the training would
    np.testing.assert_array_equal(relationship.relationship, expected)
    logits = torch.randn(2, SOURCE_CLASSES, requires_grad=True)
    rows = relationship.lookup(torch.tensor([1, 2]))
    (logits * rows).sum().backward()
    assert torch.equal(logits.grad, torch.from_numpy(expected[[1, 2]]))


@both_methods
def test_the_default_device_is_not_the_tensors(method, tmp_path):
    x, labels = samples()
    classifier, options = source_classifier(), {"method": method, "C": 1.0, "num_classes": 5, "absent": "mean"}
    for loader in (batches(x, labels), with_numpy_labels(x, labels), with_labels_in_lists(x, labels)):
        expected = Relationship(loader, classifier, "cpu", **options)
        with torch.device("meta"):
            found = Relationship(loader, classifier, "cpu", tmp_path / "table", **options)
            got = found.lookup(torch.tensor([2, 4, 0], device="cpu"))
            row = found[[2]]
        np.testing.assert_array_equal(found.relationship, expected.relationship)
        assert torch.equal(got, expected.lookup(torch.tensor([2, 4, 0])))
        np.testing.assert_array_equal(row, expected[[2]])
        os.unlink(tmp_path / "table.npz")


# --- upstream's own methods


@both_methods
def test_collected_labels_make_the_relationship(method):
    x, labels = samples()
    classifier = source_classifier()
    relationship = Relationship(batches(x, labels), classifier, "cpu", method=method)
    probabilities, collected = relationship.collect_labels()
    assert isinstance(probabilities, np.ndarray) and isinstance(collected, np.ndarray)
    np.testing.assert_array_equal(collected, labels)
    np.testing.assert_allclose(probabilities, source_probabilities(classifier, x), rtol=1e-5)
    table = relationship.get_category_relationship(probabilities, collected)
    assert isinstance(table, np.ndarray)
    np.testing.assert_allclose(table, relationship.relationship, rtol=1e-5)


@pytest.mark.parametrize("changed", ["samples", "rows", "both"])
@both_methods
def test_fault_methods_of_a_subclass_were_ignored(changed, method):

    def collect_labels(self):
        probabilities, labels = super(kind, self).collect_labels()
        return probabilities[:5], labels[:5]  # as a script may leave some out

    def get_category_relationship(self, source_probabilities, target_labels):
        return super(kind, self).get_category_relationship(source_probabilities, target_labels)[::-1]

    members = {"samples": [collect_labels], "rows": [get_category_relationship]}
    members["both"] = members["samples"] + members["rows"]
    kind = type("Kind", (Relationship,), {member.__name__: member for member in members[changed]})
    x, labels = samples()
    classifier, options = source_classifier(), {"method": method, "C": 1.0}
    kept = 9 if changed == "rows" else 5
    expected = Relationship(batches(x[:kept], labels[:kept]), classifier, "cpu", **options).relationship
    got = kind(batches(x, labels), classifier, "cpu", **options).relationship
    np.testing.assert_allclose(got, expected if changed == "samples" else expected[::-1], rtol=1e-5)


def test_a_subclass_has_a_cache_of_its_own(tmp_path):
    class Uniform(Relationship):
        def get_category_relationship(self, source_probabilities, target_labels):
            return np.full((3, SOURCE_CLASSES), 1 / SOURCE_CLASSES)

    loader, classifier, path = batches(*samples()), source_classifier(), tmp_path / "table.npz"
    Relationship(loader, classifier, "cpu", path)
    with pytest.warns(UserWarning, match="is computed again: it was made from another"):
        got = Uniform(loader, classifier, "cpu", path)
    assert (got.relationship == np.float32(1 / SOURCE_CLASSES)).all()
    np.testing.assert_array_equal(Uniform(loader, Uncalled(classifier), "cpu", path).relationship, got.relationship)


def test_an_assigned_table_with_a_row_of_nan_raises_at_look_up():
    relationship = Relationship(batches(*samples()), source_classifier(), "cpu")
    rows = relationship.relationship.copy()
    rows[1] = np.nan  # as upstream's files have them
    relationship.relationship = rows
    for look_up in (relationship.lookup, relationship.__getitem__):
        with pytest.raises(ValueError, match=r"\[1\] had none"):
            look_up(torch.tensor([0, 1]))
    np.testing.assert_array_equal(relationship[[0, 2]], rows[[0, 2]])


@pytest.mark.parametrize(
    "shapes, labels, message",
    [
        ((4,), 4, r"source_probabilities \[N, N_p\] and target_labels \[N\], got \[4\] and \[4\]"),
        ((4, 3), 3, r"got \[4, 3\] and \[3\]"),
        ((0, 3), 0, r"got \[0, 3\] and \[0\]"),
    ],
)
def test_bad_samples_for_a_relationship(shapes, labels, message):
    relationship = Relationship(batches(*samples()), source_classifier(), "cpu")
    with pytest.raises(ValueError, match=message):
        relationship.get_category_relationship(np.zeros(shapes), np.zeros(labels, int))


# --- cache


def test_fault_cache_path_without_npy_was_never_found_again(tmp_path):
    x, labels = samples()
    classifier, loader = source_classifier(), batches(x, labels)
    for kind in (str, lambda path: path):
        for name in ("table", "table2.npy", "table3.npz", "new/folder/table"):
            relationship = Relationship(loader, classifier, "cpu", kind(tmp_path / name))
            again = Relationship(loader, Uncalled(classifier), "cpu", kind(tmp_path / name))
            np.testing.assert_array_equal(again.relationship, relationship.relationship)
            np.testing.assert_allclose(again.relationship, table(x, labels, classifier), rtol=1e-5)


def test_cache_names_that_differ_after_a_dot_are_two_files(tmp_path):
    x, labels = samples()
    classifier, loader = source_classifier(), batches(x, labels)
    tables = [Relationship(loader, classifier, "cpu", tmp_path / f"T{t}", temperature=t) for t in (0.1, 0.5)]
    again = [Relationship(loader, Uncalled(classifier), "cpu", tmp_path / f"T{t}", temperature=t) for t in (0.1, 0.5)]
    for a, b in zip(tables, again, strict=True):
        np.testing.assert_array_equal(a.relationship, b.relationship)


def test_cached_rows_become_tensors_without_a_warning(tmp_path):
    loader, classifier = batches(*samples()), source_classifier()
    for _ in range(2):
        relationship = Relationship(loader, classifier, "cpu", tmp_path / "table")
        assert relationship.relationship.dtype == np.float32
        torch.from_numpy(relationship[0])
        torch.from_numpy(relationship.relationship)
        relationship.lookup(torch.tensor([0]))


def test_no_cache_writes_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Relationship(batches(*samples()), source_classifier(), "cpu")
    assert os.listdir(tmp_path) == []


def recomputed(loader, classifier, path, **options):
    with pytest.warns(UserWarning, match=re.escape(str(path)) + " is computed again: it") as caught:
        relationship = Relationship(loader, classifier, "cpu", path, **options)
    assert [warning.filename for warning in caught] == [__file__]
    again = Relationship(loader, Uncalled(classifier), "cpu", path, **options)
    np.testing.assert_array_equal(again.relationship, relationship.relationship)
    return relationship.relationship


def test_fault_stale_cache_was_loaded_blindly(tmp_path):
    x, labels = samples()
    path, classifier, other = tmp_path / "table.npz", source_classifier(), source_classifier()
    loader = in_a_data_loader(x, labels)
    Relationship(loader, classifier, "cpu", path)
    np.testing.assert_allclose(recomputed(loader, other, path), table(x, labels, other), rtol=1e-5)
    flipped = in_a_data_loader(x, 2 - labels)
    np.testing.assert_allclose(recomputed(flipped, other, path), table(x, 2 - labels, other), rtol=1e-5)
    hotter = recomputed(flipped, other, path, temperature=2.0)
    np.testing.assert_allclose(hotter, table(x, 2 - labels, other, temperature=2.0), rtol=1e-5)


@pytest.mark.parametrize(
    "options", [{"num_classes": 4, "absent": "mean"}, {"absent": "uniform"}, {"temperature": 0.5}, {"C": 2.0}]
)
def test_cache_made_with_other_options(tmp_path, options):
    loader, classifier, path = batches(*samples()), source_classifier(), tmp_path / "table.npz"
    Relationship(loader, classifier, "cpu", path)
    expected = Relationship(loader, classifier, "cpu", **options).relationship
    np.testing.assert_array_equal(recomputed(loader, classifier, path, **options), expected)


def test_cache_made_by_the_other_method(tmp_path):
    pytest.importorskip("sklearn")
    loader, classifier, path = batches(*samples()), source_classifier(), tmp_path / "table.npz"
    direct = Relationship(loader, classifier, "cpu", path).relationship
    assert not np.allclose(recomputed(loader, classifier, path, method="reverse"), direct)


@pytest.mark.parametrize("name", ["0.weight", "0.bias", "1.running_var", "1.num_batches_tracked"])
def test_cache_made_with_other_weights_or_buffers(tmp_path, name):
    loader, classifier, path = batches(*samples()), source_classifier(), tmp_path / "table.npz"
    Relationship(loader, classifier, "cpu", path)
    classifier.state_dict()[name].flatten()[:1].add_(1)
    recomputed(loader, classifier, path)


@pytest.mark.parametrize(
    "layer, other",
    [
        (nn.AdaptiveAvgPool1d(1), nn.AdaptiveMaxPool1d(1)),
        (nn.Identity(), nn.ReLU()),
        (nn.LeakyReLU(0.1), nn.LeakyReLU(0.5)),
        (nn.BatchNorm1d(2), nn.BatchNorm1d(2, eps=1.0)),
    ],
)
def test_cache_made_with_other_layers_of_the_same_weights(tmp_path, layer, other):
    loader, path = [(torch.randn(6, 2, 5), torch.arange(6) % 3)], tmp_path / "table.npz"
    before, after = nn.Sequential(layer, nn.Flatten()), nn.Sequential(other, nn.Flatten())
    Relationship(loader, before, "cpu", path)
    np.testing.assert_array_equal(recomputed(loader, after, path), Relationship(loader, after, "cpu").relationship)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_fingerprint_of_any_precision(tmp_path, dtype):
    x, labels = samples()
    classifier, loader = source_classifier().to(dtype), batches(x.to(dtype), labels)
    first = Relationship(loader, classifier, "cpu", tmp_path / "table").relationship
    again = Relationship(loader, Uncalled(classifier), "cpu", tmp_path / "table").relationship
    np.testing.assert_array_equal(first, again)


class Pictures(Dataset):
    """As an image folder: it shows its classes, files and labels, not its pixels."""

    def __init__(self, labels, classes=("cat", "dog", "owl"), prefix="a", targets=np.asarray):
        self.classes = list(classes)
        self.targets = targets(labels)
        self.samples = [(f"{prefix}{i}.jpg", label) for i, label in enumerate(labels)]

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return torch.full((3,), float(index)), self.samples[index][1]


def tensors(seed, labels=(0, 1, 2, 0, 2, 2)):
    return TensorDataset(torch.randn(6, 3, generator=torch.Generator().manual_seed(seed)), torch.tensor(labels))


DATA_SETS = {
    "tensors": (tensors(0), tensors(1)),
    "labels": (tensors(0), tensors(0, (0, 1, 2, 0, 2, 1))),
    "length": (tensors(0), Subset(tensors(0), range(5))),
    "subset": (Subset(tensors(0), [0, 1, 2, 3]), Subset(tensors(0), [0, 1, 2, 4])),
    "subset of other tensors": (Subset(tensors(0), [0, 1, 2]), Subset(tensors(1), [0, 1, 2])),
    "concatenation": (ConcatDataset([tensors(0), tensors(1)]), ConcatDataset([tensors(0), tensors(2)])),
    "class names": (Pictures([0, 1, 2]), Pictures([0, 1, 2], ("cat", "dog", "yak"))),
    "files": (Pictures([0, 1, 2]), Pictures([0, 1, 2], prefix="b")),
    "targets": (Pictures([0, 1, 2, 2]), Pictures([0, 1, 2, 1])),
    "list": (list(tensors(0)), list(tensors(1))),
    "objects": tuple(
        Pictures([0, 1, 2], targets=lambda _, middle=middle: np.array([0] * 1000 + [middle] + [0] * 1000, dtype=object))
        for middle in (1, 2)
    ),
}


@pytest.mark.parametrize("name", DATA_SETS)
def test_cache_made_from_another_data_set(tmp_path, name):
    classifier, path = source_classifier(), tmp_path / "table.npz"
    first, second = DATA_SETS[name]
    Relationship(DataLoader(first, 2), Uncalled(classifier).classifier, "cpu", path)
    again = Relationship(DataLoader(copy.deepcopy(first), 3), Uncalled(classifier), "cpu", path)
    expected = Relationship(DataLoader(second, 2), classifier, "cpu").relationship
    np.testing.assert_array_equal(recomputed(DataLoader(second, 2), classifier, path), expected)
    assert again.relationship.shape == (3, SOURCE_CLASSES)


def test_cache_made_from_another_list_of_batches(tmp_path):
    classifier, path = source_classifier(), tmp_path / "table.npz"
    x, labels = samples()
    Relationship(batches(x, labels), classifier, "cpu", path)
    got = recomputed(batches(x, 2 - labels), classifier, path)
    np.testing.assert_allclose(got, table(x, 2 - labels, classifier), rtol=1e-5)


def flip_a_bit(name, offset):
    """Damage the zip archive's central directory at ``offset`` of the entry of ``name``."""

    def damage(path):
        content = bytearray(path.read_bytes())
        entry = content.index(b"PK\x01\x02", content.rindex(b"PK\x01\x02") if name == "fingerprint" else 0)
        content[entry + offset] ^= 0x01 if offset == 8 else 0x40
        path.write_bytes(content)

    return damage


def keep_half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def save(array):
    def write(path):
        with path.open("wb") as file:
            np.save(file, array)

    return write


def change_a_value(path):
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        start = content.index(archive.read("relationship.npy")) + 130
    path.write_bytes(content[:start] + bytes([content[start] ^ 1]) + content[start + 1 :])


DAMAGES = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_bytes(b"not an archive"),
    "half": keep_half,
    "a changed value": change_a_value,
    "another archive": lambda path: np.savez(path, other=np.zeros(3)),
    "an array": save(np.zeros((3, SOURCE_CLASSES), np.float32)),
    "a pickle": save(np.array([None])),
    "an encryption flag": flip_a_bit("fingerprint", 8),
    "an unknown compression": flip_a_bit("fingerprint", 10),
    "a damaged entry of the table": flip_a_bit("relationship", 10),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_cache_is_computed_again(tmp_path, name):
    x, labels = samples()
    classifier, path = source_classifier(), tmp_path / "table.npz"
    Relationship(batches(x, labels), classifier, "cpu", path)
    DAMAGES[name](path)
    got = recomputed(batches(x, labels), classifier, path)
    np.testing.assert_allclose(got, table(x, labels, classifier), rtol=1e-5)


@pytest.mark.parametrize(
    "wrong", [np.zeros((3, SOURCE_CLASSES, 1), np.float32), np.zeros((2, SOURCE_CLASSES), np.float32)]
)
def test_cached_table_of_another_shape_is_computed_again(tmp_path, wrong):
    x, labels = samples()
    classifier, path = source_classifier(), tmp_path / "table.npz"
    Relationship(batches(x, labels), classifier, "cpu", path, num_classes=3)
    with np.load(path) as stored:
        fingerprint = stored["fingerprint"]
    np.savez(path, relationship=wrong, fingerprint=fingerprint)
    got = recomputed(batches(x, labels), classifier, path, num_classes=3)
    np.testing.assert_allclose(got, table(x, labels, classifier), rtol=1e-5)


def test_cache_is_written_in_one_step(tmp_path, monkeypatch):
    loader, classifier, path = batches(*samples()), source_classifier(), tmp_path / "table.npz"
    first = Relationship(loader, classifier, "cpu", path).relationship
    content = path.read_bytes()

    def fail(file, **arrays):
        file.write(b"half")
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", fail)
        with pytest.raises(OSError, match="disk full"), pytest.warns(UserWarning, match="computed again"):
            Relationship(loader, classifier, "cpu", path, temperature=2.0)
    assert path.read_bytes() == content and os.listdir(tmp_path) == ["table.npz"]
    again = Relationship(loader, Uncalled(classifier), "cpu", path).relationship
    np.testing.assert_array_equal(again, first)


def test_failed_computation_leaves_no_file(tmp_path):
    with pytest.raises(ValueError, match="labels in"):
        Relationship(batches(*samples((0, 2))), source_classifier(), "cpu", tmp_path / "table", num_classes=2)
    assert os.listdir(tmp_path) == []


# --- bad input


@pytest.mark.parametrize(
    "options, message",
    [
        ({"absent": "nan"}, r"absent to be error, mean or uniform, got 'nan'"),
        ({"method": "bayes"}, r"method to be direct or reverse, got 'bayes'"),
        ({"temperature": 0}, r"temperature > 0, got 0"),
        ({"temperature": math.nan}, r"temperature > 0, got nan"),
        ({"num_classes": 0}, r"num_classes to be a positive integer, got 0"),
        ({"num_classes": 3.0}, r"num_classes to be a positive integer, got 3.0"),
        ({"C": "1"}, r"C > 0, or several of them, got 1"),
        ({"C": None}, r"C > 0, or several of them, got None"),
        ({"C": 0}, r"C > 0, or several of them, got 0"),
        ({"C": (1.0, math.nan)}, r"C > 0, or several of them, got \(1.0, nan\)"),
        ({"C": []}, r"C > 0, or several of them, got \[\]"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        Relationship(batches(*samples()), source_classifier(), "cpu", **options)


def test_options_of_another_type():
    with pytest.raises(TypeError, match="expected temperature to be a number, got '2'"):
        Relationship(batches(*samples()), source_classifier(), "cpu", temperature="2")
    with pytest.raises(TypeError, match=r"classifier to be a torch\.nn\.Module, got str"):
        Relationship(batches(*samples()), "x", "cpu")


@pytest.mark.parametrize("C", [np.array([0.1, 1.0]), torch.tensor([0.5, 2.0]), np.float32(2), 3, [1, 10.0]], ids=str)
def test_strengths_of_any_kind(C):
    relationship = Relationship(batches(*samples()), source_classifier(), "cpu", C=C)
    assert list(relationship.C) == np.ravel(C).tolist()


@pytest.mark.parametrize("method", ["direct", "reverse"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_no_relationship(value, method, tmp_path):
    x, labels = samples()
    x[1] = value
    classifier = nn.Identity().train()
    with pytest.raises(ValueError, match=rf"finite logits, got others .* target classes \[{labels[1]}\]"):
        Relationship(batches(x, labels), classifier, "cpu", tmp_path / "relationship.npz", method=method)
    assert classifier.training and not list(tmp_path.iterdir())


def test_logits_of_minus_infinity_leave_source_classes_out():
    x, labels = samples()
    x[:, 1] = -math.inf
    assert (Relationship(batches(x, labels), nn.Identity(), "cpu").relationship[:, 1] == 0).all()


@pytest.mark.parametrize("shown", [True, False])
def test_progress_is_shown_on_request(shown, capsys, monkeypatch):
    pytest.importorskip("tqdm")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    Relationship(batches(*samples()), source_classifier(), "cpu", progress=shown)
    assert ("Collecting labels" in capsys.readouterr().err) == shown


@pytest.mark.parametrize(
    "labels, num_classes, message",
    [
        ([0, 1, 3], 3, r"labels in \[0, 3\), got labels from 0 to 3"),
        ([0, -1, 1], None, r"labels in \[0, 2\), got labels from -1 to 1"),
        ([0, -1, 1], 3, r"labels in \[0, 3\), got labels from -1 to 1"),
        ([0, 1], None, r"one label per input, \[3\], got \[2\]"),
        ([[0], [1], [2]], None, r"one label per input, \[3\], got \[3, 1\]"),
    ],
)
def test_bad_labels(labels, num_classes, message):
    with pytest.raises(ValueError, match=message):
        Relationship([(torch.randn(3, 3), torch.tensor(labels))], source_classifier(), "cpu", num_classes=num_classes)


@pytest.mark.parametrize(
    "loader, message",
    [
        ([torch.zeros(2, 3)], r"batches \(x, labels, ...\), got Tensor"),
        ([(torch.zeros(2, 3),)], r"batches \(x, labels, ...\), got tuple"),
        ([{"x": torch.zeros(2, 3)}], r"batches that are a tensor or start with one, got dict"),
        ([(torch.zeros(2, 3), torch.zeros(2))], r"integer labels, got torch.float32"),
        ([(torch.zeros(2, 3), torch.zeros(2, dtype=torch.bool))], r"integer labels, got torch.bool"),
    ],
)
def test_bad_batches(loader, message):
    with pytest.raises(TypeError, match=message):
        Relationship(loader, source_classifier(), "cpu")


def test_empty_loader():
    with pytest.raises(ValueError, match=r"at least one batch, got an empty one"):
        Relationship([], source_classifier(), "cpu")


def test_classifier_does_not_return_logits():
    with pytest.raises(ValueError, match=r"logits of shape \[b, N\] in eval mode, got \[2, 3, 1\]"):
        Relationship([(torch.zeros(2, 3, 1), torch.tensor([0, 1]))], nn.Identity(), "cpu")


# --- calibration


def mean_cross_entropy(logits, labels, temperature):
    rows = zip(logits.tolist(), labels.tolist(), strict=True)
    return -sum(math.log(softmax(row, temperature)[label]) for row, label in rows) / len(labels)


@pytest.mark.parametrize("scale", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_calibrated_temperature_is_the_best_of_a_grid(scale, dtype):
    true_logits = torch.randn(200, 4, dtype=torch.float64) * 2
    labels = torch.distributions.Categorical(logits=true_logits).sample()
    logits = (true_logits * scale).to(dtype)
    grid = np.geomspace(scale / 3, scale * 3, 61)
    losses = [mean_cross_entropy(logits, labels, t) for t in grid]
    best = int(np.argmin(losses))
    temperature = calibrate_temperature(logits, labels)
    assert isinstance(temperature, float)
    assert grid[best - 1] < temperature < grid[best + 1]
    assert mean_cross_entropy(logits, labels, temperature) <= losses[best]
    for nearby in (0.999, 1.001):
        assert mean_cross_entropy(logits, labels, temperature) < mean_cross_entropy(
            logits, labels, temperature * nearby
        )


@pytest.mark.parametrize("smoothing", [0.01, 0.3])
def test_calibrated_temperature_of_smoothed_labels_is_the_best_of_a_grid(smoothing):
    logits = torch.randn(50, 4, dtype=torch.float64) * 3
    labels = logits.argmax(1)  # without smoothing the best temperature were 0
    grid = np.geomspace(0.01, 100, 2001)
    losses = [nn.functional.cross_entropy(logits / t, labels, label_smoothing=smoothing).item() for t in grid]
    temperature = calibrate_temperature(logits, labels, smoothing)
    assert temperature == pytest.approx(grid[int(np.argmin(losses))], rel=0.01)


@pytest.mark.parametrize("smoothing", [-0.1, 1, math.nan])
def test_calibration_with_a_bad_label_smoothing(smoothing):
    with pytest.raises(ValueError, match=rf"label_smoothing in \[0, 1\), got {smoothing}"):
        calibrate_temperature(torch.zeros(2, 3), torch.tensor([0, 1]), smoothing)


def test_calibration_with_bad_logits():
    with pytest.raises(TypeError, match=r"logits to be a floating-point tensor, got list"):
        calibrate_temperature([[1.0]], torch.tensor([0]))


def test_calibration_leaves_masked_classes_out():
    logits, labels = torch.randn(100, 4, dtype=torch.float64) * 3, torch.randint(4, (100,))
    masked = torch.cat([logits, torch.full((100, 2), -math.inf)], 1)
    assert calibrate_temperature(masked, labels) == pytest.approx(calibrate_temperature(logits, labels))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_calibration_with_logits_that_are_not_finite(value):
    with pytest.raises(ValueError, match=r"logits that are finite, or -inf for a class that is left out"):
        calibrate_temperature(torch.tensor([[0.0, value], [1.0, 0.0]]), torch.tensor([0, 0]))


@pytest.mark.parametrize("label, smoothing", [(1, 0.0), (0, 0.1)])
def test_calibration_with_labels_of_a_masked_class(label, smoothing):
    with pytest.raises(ValueError, match=r"labels of classes that are not left out by a logit of -inf"):
        calibrate_temperature(torch.tensor([[0.0, -math.inf, 1.0]]), torch.tensor([label]), smoothing)


def test_calibration_with_bad_labels():
    with pytest.raises(ValueError, match=r"labels in \[0, 3\), got labels from 0 to 3"):
        calibrate_temperature(torch.zeros(2, 3), torch.tensor([0, 3]))
    with pytest.raises(TypeError, match=r"expected integer labels, got torch\.float32"):
        calibrate_temperature(torch.zeros(2, 3), torch.zeros(2))


def test_calibration_undoes_a_scale():
    logits, labels = torch.randn(300, 4, dtype=torch.float64) * 2, torch.randint(4, (300,))
    labels = torch.where(torch.rand(300) < 0.8, logits.argmax(1), labels)
    assert calibrate_temperature(7 * logits, labels) == pytest.approx(7 * calibrate_temperature(logits, labels))


@pytest.mark.parametrize("sign", [1, -1])
def test_calibration_without_a_minimum_is_finite(sign):
    logits = sign * 10 * torch.eye(3)
    assert 0 < calibrate_temperature(logits, torch.arange(3)) < math.inf


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_calibration_without_gradients(mode):
    logits, labels = torch.randn(20, 4, requires_grad=True), torch.randint(4, (20,))
    expected = calibrate_temperature(logits, labels)
    with mode():
        assert calibrate_temperature(logits, labels) == expected
        assert calibrate_temperature(logits.clone(), labels.clone()) == expected
    assert logits.grad is None


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_calibration_with_labels_of_any_integer_type(dtype):
    logits, labels = torch.randn(20, 4), torch.randint(4, (20,))
    assert calibrate_temperature(logits, labels.to(dtype)) == calibrate_temperature(logits, labels)


@pytest.mark.parametrize("logits, labels", [((4,), (4,)), ((4, 3), (3,)), ((4, 3), (4, 1)), ((0, 3), (0,))], ids=str)
def test_calibration_of_bad_shapes(logits, labels):
    message = (
        rf"logits \[N, N_p\] and labels \[N\], got {re.escape(str(list(logits)))} and {re.escape(str(list(labels)))}"
    )
    with pytest.raises(ValueError, match=message):
        calibrate_temperature(torch.zeros(logits), torch.zeros(labels, dtype=torch.long))

import contextlib
import copy
import inspect
import sys
import warnings
from collections import UserDict

import pytest
import torch
from classifier_support import (
    Backbone,
    Vectors,
    assert_trains_alike_in_low_precision,
    bottleneck,
    images,
    with_workers,
)
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from talib_fast.finetune.co_tuning import Relationship
from talib_fast.finetune.knowledge_distillation import KnowledgeDistillationLoss
from talib_fast.finetune.lwf import Classifier, collect_pretrain_labels
from talib_fast.finetune.prediction import evaluating, predictions
from talib_fast.progress import progress

REQUIRED = inspect.Parameter.empty


def make(**options):
    return Classifier(Backbone(), 5, nn.Linear(6, 9), **options)


def affine(rows, linear):
    """A linear layer in plain loops."""
    pairs = list(zip(linear.weight.tolist(), linear.bias.tolist(), strict=True))
    return [[b + sum(w * x for w, x in zip(weight, row, strict=True)) for weight, b in pairs] for row in rows]


def source_classifier():
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))


def test_signatures_are_the_contracts():
    assert [(name, p.default) for name, p in inspect.signature(Classifier).parameters.items()] == [
        ("backbone", REQUIRED),
        ("num_classes", REQUIRED),
        ("head_source", REQUIRED),
        ("head_target", None),
        ("bottleneck", None),
        ("bottleneck_dim", -1),
        ("finetune", True),
        ("pool_layer", None),
    ]
    parameters = inspect.signature(collect_pretrain_labels).parameters
    assert [(name, p.default) for name, p in parameters.items()] == [
        ("data_loader", REQUIRED),
        ("classifier", REQUIRED),
        ("device", REQUIRED),
        ("progress", True),
        ("process_group", None),
    ]


def test_positional_and_keyword_calls_build_the_same():
    pool = nn.Sequential(nn.AdaptiveMaxPool2d(1), nn.Flatten())
    parts = (Backbone(), 5, nn.Linear(6, 9), nn.Linear(2, 5), bottleneck(), 2, False, pool)
    names = tuple(inspect.signature(Classifier).parameters)
    positional, keyword = Classifier(*parts), Classifier(**dict(zip(names, parts, strict=True)))
    assert repr(positional) == repr(keyword)
    for model in (positional, keyword):
        for name, part in zip(names, parts, strict=True):
            if name != "bottleneck_dim":
                assert getattr(model, name) is part
        assert model.features_dim == 2


def test_training_returns_both_predictions_evaluation_the_targets(device):
    model = make().to(device)
    y_s, y_t = model(images(device=device))
    assert y_s.shape == (4, 9) and y_t.shape == (4, 5)
    y_t = model.eval()(images(device=device))
    assert isinstance(y_t, torch.Tensor) and y_t.shape == (4, 5) and y_t.device.type == device.type


def test_source_head_sees_the_pooled_feature_target_head_the_bottlenecks():
    narrow = nn.Linear(3, 2)
    model = Classifier(Vectors(), 4, nn.Linear(3, 9), bottleneck=narrow, bottleneck_dim=2).double()
    x = images(dtype=torch.float64)
    pooled = [[sum(map(sum, channel)) / 35 for channel in sample] for sample in x.tolist()]
    y_s, y_t = model(x)
    torch.testing.assert_close(y_s, torch.tensor(affine(pooled, model.head_source), dtype=torch.float64))
    expected = torch.tensor(affine(affine(pooled, narrow), model.head_target), dtype=torch.float64)
    torch.testing.assert_close(y_t, expected)
    torch.testing.assert_close(model.eval()(x), expected)


def test_custom_pool_layer_and_target_head():
    pool, head = nn.Sequential(nn.AdaptiveMaxPool2d(1), nn.Flatten()), nn.Linear(3, 2, bias=False)
    model = Classifier(Vectors(), 2, nn.Linear(3, 9), head, pool_layer=pool)
    x = images()
    y_s, y_t = model(x)
    torch.testing.assert_close(y_t, x.amax((2, 3)) @ head.weight.T)
    torch.testing.assert_close(y_s, model.head_source(x.amax((2, 3))))


@pytest.mark.parametrize("finetune, backbone_lr", [(True, 0.1 * 0.3), (False, 0.3)])
def test_parameter_groups_leave_the_source_head_out(finetune, backbone_lr):
    model = make(bottleneck=bottleneck(), bottleneck_dim=2, finetune=finetune)
    groups = model.get_parameters(base_lr=0.3)
    assert [group["lr"] for group in groups] == [backbone_lr, 0.3, 0.3]
    for group, module in zip(groups, (model.backbone, model.bottleneck, model.head_target), strict=True):
        assert set(group) == {"params", "lr"}
        assert [id(p) for p in group["params"]] == [id(p) for p in module.parameters()]
    assert [group["lr"] for group in model.get_parameters()] == [0.1 if finetune else 1.0, 1.0, 1.0]


def test_attributes_and_state_dict():
    model = make(bottleneck=bottleneck(), bottleneck_dim=2)
    assert model.num_classes == 5 and model.finetune is True and model.features_dim == 2
    assert make().features_dim == 6 and isinstance(make().bottleneck, nn.Identity)
    shapes = {n: tuple(t.shape) for n, t in model.state_dict().items() if not n.startswith("backbone.")}
    assert shapes == {
        "head_source.weight": (9, 6),
        "head_source.bias": (9,),
        "bottleneck.0.weight": (2, 6),
        "bottleneck.0.bias": (2,),
        "head_target.weight": (5, 2),
        "head_target.bias": (5,),
    }
    assert sum(n.startswith("backbone.") for n in model.state_dict()) == 7


def test_deepcopy_and_state_dict_round_trip():
    model, x = make().eval(), images()
    other = make().eval()
    assert not torch.equal(other(x), model(x))
    other.load_state_dict(model.state_dict())
    for twin in (other, copy.deepcopy(model)):
        assert torch.equal(twin(x), model(x))


def test_autocast_and_half_precision(device):
    model, x = make().to(device), images(device=device)
    model.backbone.eval()
    exact = model(x)
    with torch.autocast(device.type, torch.bfloat16):
        mixed = model(x)
    halved = model.bfloat16()(x.bfloat16())
    for outputs in (mixed, halved):
        for got, expected in zip(outputs, exact, strict=True):
            torch.testing.assert_close(got.float(), expected, atol=0.05, rtol=0.05)
    assert {y.dtype for y in halved} == {torch.bfloat16}


def test_fault_source_head_gradient_accumulated_for_ever():
    x = images()

    def train(model, steps=3):
        optimizer = torch.optim.SGD(model.get_parameters(0.1), lr=0.1)
        norms = []
        for _ in range(steps):
            optimizer.zero_grad()
            sum(y.square().sum() for y in model(x)).backward()
            grad = model.head_source.weight.grad
            norms.append(0.0 if grad is None else grad.norm().item())
            optimizer.step()
        return norms

    left_alone, frozen = make(), make()
    frozen.load_state_dict(left_alone.state_dict())
    source = copy.deepcopy(left_alone.head_source.state_dict())
    frozen.freeze_head_source()
    assert min(train(left_alone)) > 0 and train(frozen) == [0.0, 0.0, 0.0]
    assert frozen.head_source.weight.grad is None and frozen.head_source.bias.grad is None
    for name, parameter in frozen.state_dict().items():
        torch.testing.assert_close(parameter, left_alone.state_dict()[name])
    for name, parameter in frozen.head_source.state_dict().items():
        assert torch.equal(parameter, source[name])

    left_alone.zero_grad()
    assert left_alone.head_source.weight.grad is None
    frozen.freeze_head_source(False)
    assert frozen.head_source.weight.requires_grad and min(train(frozen, 1)) > 0


@with_workers
def test_training_with_workers_autocast_and_channels_last(device):
    model, x, labels = make(), images(12), torch.randint(5, (12,))
    source = nn.Sequential(model.backbone, model.pool_layer, model.head_source)
    remembered = collect_pretrain_labels(DataLoader(TensorDataset(x, labels), 4, num_workers=2), source, "cpu")
    distillation = KnowledgeDistillationLoss(T=3)

    def loss_of(model, x, labels, remembered):
        y_s, y_t = model(x)
        return nn.functional.cross_entropy(y_t, labels) + 4 * distillation(y_s, remembered)

    assert_trains_alike_in_low_precision(model, device, (x, labels, remembered), loss_of)


def test_source_head_trains_in_a_group_of_its_own():
    model = make()
    optimizer = torch.optim.SGD(model.get_parameters(0.1), lr=0.1)
    optimizer.add_param_group({"params": model.head_source.parameters(), "lr": 0.01})
    before = copy.deepcopy(model.head_source.weight)
    model(images())[0].square().sum().backward()
    optimizer.step()
    assert not torch.equal(model.head_source.weight, before)


def test_distillation_brings_the_source_predictions_back():
    model, x = make(), images(8)
    model.freeze_head_source()
    model.backbone.eval()
    teacher = copy.deepcopy(model)(x)[0].detach()
    with torch.no_grad():
        model.backbone.conv.weight.add_(torch.randn_like(model.backbone.conv.weight))
    optimizer = torch.optim.SGD(model.get_parameters(20.0), lr=20.0)
    losses = []
    for _ in range(20):
        loss = KnowledgeDistillationLoss(T=3.0)(model(x)[0], teacher)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((None, 5, nn.Linear(6, 9)), TypeError, r"backbone to be a torch.nn.Module, got NoneType"),
        ((Backbone(), 5, None), TypeError, r"head_source to be a torch.nn.Module, got NoneType"),
        ((Backbone(), 0, nn.Linear(6, 9)), ValueError, r"num_classes to be a positive integer, got 0"),
        ((Backbone(), 5, nn.Linear(7, 9)), ValueError, r"head_source with in_features = 6, got 7"),
        ((Backbone(), 5, nn.Linear(6, 9), nn.Linear(7, 5)), ValueError, r"head_target with in_features = 6, got 7"),
        ((Backbone(), 5, nn.Linear(6, 9), nn.Linear(6, 4)), ValueError, r"head_target with out_features = 5, got 4"),
        (
            (Backbone(), 5, nn.Linear(6, 9), None, bottleneck()),
            ValueError,
            r"bottleneck_dim, .* integer, got -1",
        ),
        ((Backbone(), 5, nn.Linear(6, 9), "x"), TypeError, r"head_target to be a torch.nn.Module, got str"),
    ],
)
def test_bad_parts(arguments, error, message):
    with pytest.raises(error, match=message):
        Classifier(*arguments)


def test_pretrain_labels_are_the_logits_in_the_loaders_order(device):
    classifier, x = source_classifier().to(device), images(7)[..., :2, :2]
    batches = [(x[:3], torch.arange(3)), (x[3:5], torch.arange(2)), (x[5:], torch.arange(2))]
    logits = collect_pretrain_labels(batches, classifier, device)
    assert logits.device.type == "cpu" and logits.shape == (7, 4) and not logits.requires_grad
    classifier.eval()
    for row, sample in zip(logits, x, strict=True):
        torch.testing.assert_close(row, classifier(sample[None].to(device))[0].cpu())


def test_pretrain_labels_by_keyword_and_device_name():
    classifier, x = source_classifier(), images()[..., :2, :2]
    logits = collect_pretrain_labels(data_loader=[(x, None)], classifier=classifier, device="cpu")
    assert torch.equal(logits, classifier.eval()(x))


@pytest.mark.parametrize(
    "batch",
    [lambda x: x, lambda x: (x,), lambda x: [x, torch.arange(4)], lambda x: (x, torch.arange(4), "paths", {})],
    ids=["tensor", "one-tuple", "list", "extra fields"],
)
def test_batches_of_any_length(batch):
    classifier, x = source_classifier().eval(), images()[..., :2, :2]
    assert torch.equal(collect_pretrain_labels([batch(x)], classifier, "cpu"), classifier(x))


@with_workers
@pytest.mark.parametrize("workers", [0, 2])
def test_data_loader(workers):
    classifier, x = source_classifier(), images(9)[..., :2, :2]
    loader = DataLoader(TensorDataset(x, torch.arange(9), torch.zeros(9)), 4, num_workers=workers)
    logits = collect_pretrain_labels(loader, classifier, torch.device("cpu"))
    torch.testing.assert_close(logits, classifier.eval()(x))


class Stream(IterableDataset):
    def __iter__(self):
        return iter(images(6)[..., :2, :2])


@pytest.mark.parametrize(
    "loader", [lambda: (x for x in images(6)[..., :2, :2].split(2)), lambda: DataLoader(Stream(), 2)]
)
def test_loader_without_a_length(loader):
    assert collect_pretrain_labels(loader(), source_classifier(), "cpu").shape == (6, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_pretrain_labels_keep_the_dtype(dtype):
    x = images(dtype=dtype)[..., :2, :2]
    assert collect_pretrain_labels([x], source_classifier().to(dtype), "cpu").dtype == dtype


def test_fault_classifier_was_left_in_eval():
    classifier = source_classifier().train()
    classifier[2].eval()
    before = copy.deepcopy(classifier.state_dict())
    collect_pretrain_labels([images()[..., :2, :2]], classifier, "cpu")
    assert [module.training for module in classifier.modules()] == [True, True, True, False, True]
    assert all(torch.equal(before[name], tensor) for name, tensor in classifier.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in classifier.parameters())


@pytest.mark.parametrize("training", [True, False])
def test_mode_is_restored_after_a_failure(training):
    classifier = source_classifier().train(training)
    with pytest.raises(RuntimeError):
        collect_pretrain_labels([images()], classifier, "cpu")
    assert all(module.training is training for module in classifier.modules())
    with pytest.raises(KeyError), evaluating(classifier):
        assert not any(module.training for module in classifier.modules())
        raise KeyError
    assert all(module.training is training for module in classifier.modules())


def test_predictions_leave_the_callers_gradient_mode_alone():
    x = images()[..., :2, :2]
    for batch, logits in predictions([(x, "extra")], source_classifier(), "cpu", "description"):
        assert torch.is_grad_enabled() and not logits.requires_grad
        assert batch[0] is x and batch[1] == "extra"


def test_empty_loader():
    with pytest.raises(ValueError, match=r"at least one batch, got an empty one"):
        collect_pretrain_labels([], source_classifier(), "cpu")


@pytest.mark.parametrize("batch, got", [({"x": torch.zeros(1)}, "dict"), (["path"], "list"), ((), "tuple")])
def test_batch_without_a_tensor(batch, got):
    with pytest.raises(TypeError, match=rf"batches that are a tensor or start with one, got {got}"):
        collect_pretrain_labels([batch], source_classifier(), "cpu")


@pytest.mark.parametrize(
    "output, got", [((1, 2), "tuple"), (torch.zeros(3), r"\[3\]"), (torch.zeros(3, 2, 1), r"\[3, 2, 1\]")]
)
def test_classifier_does_not_return_logits(output, got):
    class Wrong(nn.Module):
        def forward(self, x):
            return output

    with pytest.raises(ValueError, match=rf"logits of shape \[b, N\] in eval mode, got {got}"):
        collect_pretrain_labels([images()], Wrong(), "cpu")


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_bar_shows_the_description_on_a_terminal(capsys, monkeypatch, terminal):
    pytest.importorskip("tqdm")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    assert list(progress([1, 2], "Counting", 2)) == [1, 2]
    assert ("Counting" in capsys.readouterr().err) == terminal


@pytest.mark.parametrize("shown", [True, False])
def test_progress_of_pretrain_labels_is_shown_on_request(shown, capsys, monkeypatch):
    pytest.importorskip("tqdm")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    collect_pretrain_labels([images()[..., :2, :2]], source_classifier(), "cpu", progress=shown)
    assert ("Collecting pretrain labels" in capsys.readouterr().err) == shown


def test_what_is_no_classifier_is_named():
    with pytest.raises(TypeError, match=r"classifier to be a torch\.nn\.Module, got str"):
        collect_pretrain_labels([images()], "x", "cpu")


class Counting:
    """A loader that counts how often it is begun."""

    def __init__(self, batches):
        self.batches, self.begun = batches, 0

    def __iter__(self):
        self.begun += 1
        return iter(self.batches)


@pytest.mark.parametrize(
    "order",
    [
        lambda data: {"shuffle": True},
        lambda data: {"sampler": SubsetRandomSampler([3, 1, 2])},
        lambda data: {"sampler": WeightedRandomSampler([1.0] * 6, 6)},
        lambda data: {"batch_sampler": BatchSampler(RandomSampler(data), 2, False)},
    ],
)
def test_a_random_order_of_labels_is_told(order):
    data = TensorDataset(torch.randn(6, 3))
    with pytest.warns(UserWarning, match=r"in the loader's order, which is drawn anew every time: .* shuffle=False"):
        collect_pretrain_labels(DataLoader(data, **order(data)), nn.Linear(3, 2), "cpu", progress=False)


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("shown", [True, False])
def test_fault_a_loader_was_begun_twice(shown, terminal, monkeypatch):
    """And drew one random number more than the loop of a script does."""
    pytest.importorskip("tqdm")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    x, labels = images(6)[..., :2, :2], torch.arange(6) % 3
    counting = Counting([(x, labels)])
    warnings.filterwarnings("ignore", message="the logits of collect_pretrain_labels come in the loader's order")
    loader = DataLoader(TensorDataset(x, labels), 4, shuffle=True)
    torch.manual_seed(1)
    for _ in loader:
        pass
    expected = torch.rand(1)
    classifier = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
    for learn in (collect_pretrain_labels, Relationship):
        torch.manual_seed(1)
        learn(loader, classifier, "cpu", progress=shown)
        assert torch.rand(1) == expected
        learn(counting, classifier, "cpu", progress=shown)
    assert counting.begun == 2


@pytest.mark.parametrize("end", ["an error of the loader", "an error", "a break", "nothing"])
def test_a_progress_bar_is_closed_at_whatever_end(end, monkeypatch, capsys):
    tqdm = pytest.importorskip("tqdm.auto").tqdm
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)

    def batches():
        yield from range(3)
        if end == "an error of the loader":
            raise KeyError

    with contextlib.suppress(KeyError):
        for number in progress(batches(), "Counting", 4):
            assert len(tqdm._instances) == 1
            if number and end == "a break":
                break
            if number and end == "an error":
                raise KeyError
    assert not tqdm._instances


def test_a_progress_bar_knows_the_length_of_what_it_counts(monkeypatch, capsys):
    pytest.importorskip("tqdm")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    for counted in ([1, 2, 3], iter([1, 2, 3]), DataLoader([1, 2, 3])):
        assert len(list(progress(counted, "Counting"))) == 3
        assert "0/3" in capsys.readouterr().err
    assert len(list(progress(DataLoader(Stream()), "Counting"))) == 6


class Words(UserDict):
    """What a tokenizer gives: it moves, and is no tensor."""

    def to(self, device):
        return Words({name: tensor.to(device) for name, tensor in self.items()})


class Embedding(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(9, 4)

    def forward(self, words):
        if isinstance(words, PackedSequence):
            words, _ = pad_packed_sequence(words, batch_first=True)
            return self.table(words).mean(1)
        return self.table(words["input_ids"]).mean(1)


def test_inputs_that_move_and_are_no_tensors(device):
    ids, classifier = torch.tensor([[1, 2], [3, 4], [5, 8]]), Embedding().to(device)
    expected = classifier.table.weight.detach().cpu()[ids].mean(1)
    packed = pack_padded_sequence(ids, [2, 2, 2], batch_first=True)
    for x in (Words(input_ids=ids), packed):
        for batch in (x, (x,), [x, torch.arange(3)]):
            torch.testing.assert_close(collect_pretrain_labels([batch], classifier, device), expected)
        relationship = Relationship([(x, torch.arange(3))], classifier, device).relationship
        torch.testing.assert_close(torch.from_numpy(relationship), expected.softmax(1))
        with pytest.raises(ValueError, match=r"one label per input, \[3\], got \[2\]"):
            Relationship([(x, torch.arange(2))], classifier, device)


@pytest.mark.parametrize("shape", [(), (3,), (3, 2, 2)])
def test_maps_of_any_shape_are_collected(shape):
    class Maps(nn.Module):
        def forward(self, x):
            return x.mean((1, 2, 3)).view(-1, *[1] * len(shape)).expand(-1, *shape)

    x = images(5)
    expected = x.mean((1, 2, 3)).view(-1, *[1] * len(shape)).expand(-1, *shape)
    torch.testing.assert_close(collect_pretrain_labels(x.split(2), Maps(), "cpu"), expected)


@pytest.mark.parametrize("inside", [True, False])
def test_pretrain_labels_of_inference_mode_can_be_trained_with(inside):
    class Inferring(nn.Linear):
        @torch.inference_mode()
        def forward(self, x):
            return super().forward(x)

    x = torch.randn(4, 3)
    for batches in ([x], [x[:1], x[1:]]):
        with torch.inference_mode() if inside else contextlib.nullcontext():
            logits = collect_pretrain_labels(batches, nn.Linear(3, 2) if inside else Inferring(3, 2), "cpu")
        assert not logits.is_inference()
        student = torch.randn(4, 2, requires_grad=True)
        (student * logits).sum().backward()
        assert torch.equal(student.grad, logits)


def test_the_default_device_is_not_the_tensors():
    classifier, x = source_classifier(), images()[..., :2, :2]
    expected = classifier.eval()(x)
    with torch.device("meta"):
        logits = collect_pretrain_labels([x[:3], x[3:]], classifier, "cpu")
    torch.testing.assert_close(logits, expected)


def test_progress_is_silent_without_tqdm_and_on_request(capsys, monkeypatch):
    assert list(progress(iter([1, 2]), "Counting", show=False)) == [1, 2]
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    assert list(progress([1, 2], "Counting")) == [1, 2]
    assert capsys.readouterr().err == ""

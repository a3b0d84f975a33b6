"""What PyTorch's users expect of a layer or a loss: a test for every column of docs/support.md, a case for every part
behind its rows."""

import copy
import io
import pickle
from pathlib import Path

import pytest
import torch
from compiler_support import needs_inductor
from cuda_support import capture
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad, gradgradcheck
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from talib_fast.finetune import bi_tuning, classifier, co_tuning, lwf
from talib_fast.finetune.bss import BatchSpectralShrinkage
from talib_fast.finetune.co_tuning import CoTuningLoss
from talib_fast.finetune.delta import (
    AttentionBehavioralRegularization,
    BehavioralRegularization,
    IntermediateLayerGetter,
    L2Regularization,
    SPRegularization,
)
from talib_fast.finetune.frozen import frozen
from talib_fast.finetune.knowledge_distillation import KnowledgeDistillationLoss
from talib_fast.finetune.stochnorm import (
    StochNorm1d,
    StochNorm2d,
    StochNorm3d,
    StochNormAct2d,
    SyncStochNorm,
    convert_model,
)

pytestmark = pytest.mark.no_cover  # coverage would follow torch.compile's own Python: half as much time again

PAGE = Path(__file__).parent.parent / "docs" / "support.md"
CLASSES = 4


class Backbone(nn.Module):
    out_features = 6

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)

    def forward(self, x):
        return self.norm(self.conv(x)).tanh()


class Regularized(nn.Module):
    """A small network with a regulariser on its parameters."""

    def __init__(self, make):
        super().__init__()
        self.network = nn.Linear(4, 3)
        self.regularization = make(self.network)

    def forward(self, x):
        return self.network(x).square().mean() + self.regularization()


class Distance(nn.Module):
    """DELTA's step: the target's and the source's maps, and their distance."""

    def __init__(self, regularization):
        super().__init__()
        self.target = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 5, 3))
        norm = nn.BatchNorm2d(4).requires_grad_(False)
        pretrained = nn.Sequential(self.target[0], norm, *self.target[1:])
        self.source = frozen(pretrained, {"3": "2", "1": "0"})
        self.regularization = regularization
        self.target_maps = IntermediateLayerGetter(self.target, ["2", "0"])
        # what the source sees: a constant, so that derivatives are those of the target
        self.register_buffer("shown", images())
        self.source(self.shown)  # a first call that is not compiled

    def __deepcopy__(self, memo):
        copied = Distance(copy.deepcopy(self.regularization, memo))
        copied.source = copy.deepcopy(self.source, memo)
        copied.to(self.shown).load_state_dict(self.state_dict())
        return copied.train(self.training)

    def forward(self, x):
        maps, output = self.target_maps(x)
        return output, self.regularization(self.source(self.shown[: len(x)]), maps)


def start_of(network):
    return SPRegularization(nn.Linear(4, 3), network)


def norm(kind, *size):
    return lambda: kind(4), lambda: (torch.randn(6, 4, *size),)


def images(count=5):
    return torch.randn(count, 3, 5, 5)


def features():
    return torch.randn(5, 9), torch.rand(5, 9).softmax(1)


def bi_tuning_model():
    encoders = [bi_tuning.Classifier(Backbone(), CLASSES, 5) for _ in range(2)]
    return bi_tuning.BiTuning(*encoders, CLASSES, K=2, m=0.9, T=0.5)


# by row of the matrix, and then by what is behind it: how to make it, and its inputs
SUBJECTS = {
    "StochNorm": {
        "StochNorm1d": norm(StochNorm1d),
        "StochNorm1d of sequences": norm(StochNorm1d, 7),
        "StochNorm2d": norm(StochNorm2d, 3, 5),
        "StochNorm3d": norm(StochNorm3d, 2, 3, 2),
        "StochNormAct2d": norm(lambda channels: StochNormAct2d(channels, act_layer=nn.SiLU), 3, 5),
        "SyncStochNorm": norm(SyncStochNorm, 3, 5),
        "convert_model": (lambda: convert_model(Backbone(), 0.5), lambda: (images(),)),
    },
    "L2, L2-SP, DELTA": {
        "L2Regularization": (lambda: Regularized(L2Regularization), lambda: (torch.randn(5, 4),)),
        "SPRegularization": (lambda: Regularized(start_of), lambda: (torch.randn(5, 4),)),
        "BehavioralRegularization": (lambda: Distance(BehavioralRegularization()), lambda: (images(),)),
        "AttentionBehavioralRegularization": (
            lambda: Distance(AttentionBehavioralRegularization([torch.rand(5), torch.rand(4)])),
            lambda: (images(),),
        ),
    },
    "BSS": {"BatchSpectralShrinkage": (lambda: BatchSpectralShrinkage(1), lambda: (torch.randn(5, 9),))},
    "the losses of Co-Tuning and LWF": {
        "CoTuningLoss": (CoTuningLoss, features),
        "KnowledgeDistillationLoss": (lambda: KnowledgeDistillationLoss(T=3), features),
    },
    "classifiers": {
        "classifier.Classifier": (lambda: classifier.Classifier(Backbone(), CLASSES), lambda: (images(),)),
        "lwf.Classifier": (lambda: lwf.Classifier(Backbone(), CLASSES, nn.Linear(6, 7)), lambda: (images(),)),
        "co_tuning.Classifier": (
            lambda: co_tuning.Classifier(Backbone(), CLASSES, nn.Linear(6, 7)),
            lambda: (images(),),
        ),
        "bi_tuning.Classifier": (lambda: bi_tuning.Classifier(Backbone(), CLASSES, 5), lambda: (images(),)),
    },
    "Bi-Tuning": {
        "BiTuning": (bi_tuning_model, lambda: (images(), images(), torch.tensor([0, 3, 1, 1, 2]))),
    },
}

# by column of the matrix: its test, and the rows that have it; a column that only a network needs is left to networks
NETWORKS = ("StochNorm", "classifiers", "Bi-Tuning")
ALL = tuple(SUBJECTS)
SUPPORT = {
    "compile": ("test_compiles_into_one_graph", ALL),
    "dynamic shapes": ("test_compiles_once_for_all_batch_sizes", ALL),
    "AMP": ("test_mixed_precision", ALL),
    "export, ONNX": ("test_exports_in_evaluation", NETWORKS),
    "copy, pickle, state dict": ("test_copies_pickles_and_loads", ALL),
    "activation checkpointing": ("test_activation_checkpointing", NETWORKS[:2]),
    "double backward": ("test_double_backward", ALL),
    "`torch.func`": ("test_function_transforms", ALL[:-1]),
    "determinism": ("test_deterministic_algorithms", ALL),
    "CUDA graphs": ("test_cuda_graph", ALL),
    "side streams": ("test_side_stream", ALL),
    "`cuda:1`, DataParallel": ("test_second_gpu", ALL),
}
ON_GPUS = ("CUDA graphs", "side streams", "`cuda:1`, DataParallel")


# the same in compiled code
COMPILED = {
    "AMP": "test_compiled_mixed_precision",
    "copy, pickle, state dict": "test_compiled_models_copy_and_load",
    "activation checkpointing": "test_compiled_activation_checkpointing",
    "double backward": "test_compiled_double_backward_is_refused",
    "`torch.func`": "test_compiled_function_transforms",
    "determinism": "test_compiled_deterministic_algorithms",
}


def subjects(test):
    """Parametrize a test over what is behind the rows that have its column."""
    tests = {**SUPPORT, **{f"compiled {name}": (its, SUPPORT[name][1]) for name, its in COMPILED.items()}}
    (rows,) = (having for name, having in tests.values() if name == test.__name__)
    cases = [pytest.param(*subject, id=name) for row in rows for name, subject in SUBJECTS[row].items()]
    return pytest.mark.parametrize(("make", "inputs"), cases)(test)


def tensors(outputs):
    return outputs if isinstance(outputs, tuple) else (outputs,)


def leaves_of(inputs):
    return [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]


def loss_of(outputs):
    """A number that depends on every value of the outputs, in different ways."""
    dual = [forward_ad.unpack_dual(output).tangent is not None for output in tensors(outputs)]
    differentiable = [o for o, is_dual in zip(tensors(outputs), dual, strict=True) if o.requires_grad or is_dual]
    weights = (torch.linspace(-1, 2, o.numel(), device=o.device, dtype=torch.float32) for o in differentiable)
    return sum((o.float() * w.view_as(o)).sum() for o, w in zip(differentiable, weights, strict=True))


def step(module, call, inputs, seed=1):
    """Everything that a training step of ``module``, called by ``call``, gives and changes."""
    leaves = leaves_of(inputs)
    module.zero_grad()
    torch.manual_seed(seed)
    outputs = tensors(call(*leaves))
    loss_of(outputs).backward()
    given = [*outputs, *(leaf.grad for leaf in leaves), *(p.grad for p in module.parameters()), *module.buffers()]
    return [None if value is None else value.detach().clone() for value in given]


def compiled(model):
    torch._dynamo.reset()
    return torch.compile(model, backend="aot_eager", fullgraph=True)


def assert_alike(got, expected, **tolerance):
    for a, b in zip(got, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, **tolerance)


@needs_inductor
@subjects
def test_compiles_into_one_graph(make, inputs):
    torch._dynamo.reset()
    model = make()
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True)
    for seed, stance in ((0, "default"), (1, "default"), (2, "fail_on_recompile")):
        arguments = inputs()
        with torch.compiler.set_stance(stance):
            got = step(model, compiled, arguments, seed)
        assert_alike(got, step(twin, twin, arguments, seed), rtol=1e-4, atol=1e-5)
    if type(model) not in (Regularized, Distance, BatchSpectralShrinkage, CoTuningLoss, KnowledgeDistillationLoss):
        twin.load_state_dict(model.state_dict())
        model.eval()
        twin.eval()
        arguments = inputs()
        with torch.no_grad():
            assert_alike(tensors(compiled(*arguments)), tensors(twin(*arguments)), rtol=1e-4, atol=1e-5)


@subjects
def test_compiles_once_for_all_batch_sizes(make, inputs):
    torch._dynamo.reset()
    model = make()
    twin, graphs = copy.deepcopy(model), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    whole = inputs()
    for batch in (5, 4, 3, 5):
        arguments = [x[:batch] for x in whole]
        assert_alike(step(model, compiled, arguments), step(twin, twin, arguments), rtol=1e-4, atol=1e-5)
    assert graphs.frame_count <= 2  # one for the first size, and one for all


@subjects
def test_mixed_precision(make, inputs, device):
    model, arguments = make().to(device), [x.to(device) for x in inputs()]
    twin = copy.deepcopy(model)
    leaves = leaves_of(arguments)
    optimizer = torch.optim.SGD([*model.parameters(), *(leaf for leaf in leaves if leaf.requires_grad)], lr=0.01)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10)
    torch.manual_seed(1)
    with torch.autocast(device.type, torch.bfloat16):
        outputs = tensors(model(*leaves))
        loss = loss_of(outputs)
    assert loss.dtype == torch.float32
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**10  # no step was skipped
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    torch.manual_seed(1)
    for got, expected in zip(outputs, tensors(twin(*arguments)), strict=True):
        torch.testing.assert_close(got.float(), expected.float(), rtol=0.05, atol=0.1)
    if isinstance(model, (StochNorm1d, StochNorm2d, StochNorm3d, SyncStochNorm)):
        for dtype in (torch.bfloat16, torch.float16):
            assert model(arguments[0].to(dtype)).dtype == dtype and model.running_var.dtype == torch.float32


@subjects
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # of torch's exporter itself
def test_exports_in_evaluation(make, inputs):
    model, arguments = make().eval(), inputs()[:1]
    with torch.no_grad():
        expected = model(*arguments)
        program = torch.export.export(model, arguments, dynamic_shapes=({0: torch.export.Dim("b", min=2)},))
        torch.testing.assert_close(program.module()(*arguments), expected)
        assert program.module()(arguments[0][:3]).shape == (3, *expected.shape[1:])
    pytest.importorskip("onnxscript")
    reference = pytest.importorskip("onnx.reference")
    onnx = torch.onnx.export(model, arguments, dynamo=True, verbose=False).model_proto
    (output,) = reference.ReferenceEvaluator(onnx).run(None, {onnx.graph.input[0].name: arguments[0].numpy()})
    torch.testing.assert_close(torch.from_numpy(output), expected, rtol=1e-4, atol=1e-5)


@subjects
def test_copies_pickles_and_loads(make, inputs):
    model, arguments = make(), inputs()
    step(model, model, inputs())
    copied = [copy.deepcopy(model)]
    if not isinstance(model, (Regularized, Distance)):  # these look at a model of somebody else's
        copied.append(pickle.loads(pickle.dumps(model)))
    loaded = make()
    if isinstance(model, Distance):  # a state has the pretrained network's fingerprint, not its weights
        loaded.source = copy.deepcopy(model.source)
    saved = io.BytesIO()
    torch.save(model.state_dict(), saved)
    saved.seek(0)
    loaded.load_state_dict(torch.load(saved, weights_only=True), strict=True)
    if not hasattr(getattr(model, "regularization", None), "source_weight"):  # a start is no state
        copied.append(loaded)
    if isinstance(model, Distance):
        loaded.regularization = copy.deepcopy(model.regularization)
    expected = step(model, model, arguments)
    for other in copied:
        assert_alike(step(other, other, arguments), expected)


def without_batch_norms(model, values):
    """What a step gave, without the statistics of PyTorch's own batch norms: a checkpoint moves those twice."""
    norms = [module for module in model.modules() if type(module) is nn.BatchNorm2d]
    statistics = {id(buffer) for norm in norms for buffer in norm.buffers()}
    buffers = list(model.buffers())
    given, statistic_values = values[: -len(buffers) or None], values[len(values) - len(buffers) :]
    return given + [v for b, v in zip(buffers, statistic_values, strict=True) if id(b) not in statistics]


@subjects
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(make, inputs, reentrant):
    model, arguments = make(), inputs()
    twin = copy.deepcopy(model)
    got = step(model, lambda x: checkpoint(model, x, use_reentrant=reentrant), arguments)
    expected = step(twin, twin, arguments)
    assert_alike(*(without_batch_norms(model, values) for values in (got, expected)))


@subjects
def test_double_backward(make, inputs):
    model, (x, *others) = make().double(), [x.double() if x.is_floating_point() else x for x in inputs()]

    def outputs(x):
        torch.manual_seed(1)  # the same mask for every difference
        given = tensors(copy.deepcopy(model)(x, *others))
        return tuple(output for output in given if output.requires_grad)

    assert gradgradcheck(outputs, (x.requires_grad_(),), fast_mode=True)  # along random directions


@subjects
def test_function_transforms(make, inputs):
    model, arguments = make(), inputs()
    twin = copy.deepcopy(model)
    parameters = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    buffers = {name: b.clone() for name, b in model.named_buffers()}

    def loss(parameters, buffers, x):
        torch.manual_seed(1)
        return loss_of(functional_call(model, (parameters, buffers), (x, *arguments[1:])))

    of_parameters, of_input = torch.func.grad(loss, (0, 2))(parameters, buffers, arguments[0])

    # along any direction the derivative in forward mode is that of reverse mode
    directions = {name: torch.randn_like(p) for name, p in parameters.items()}, torch.randn_like(arguments[0])
    with forward_ad.dual_level():
        duals = {name: forward_ad.make_dual(p, directions[0][name]) for name, p in parameters.items()}
        state = {name: b.clone() for name, b in model.named_buffers()}
        tangent = forward_ad.unpack_dual(loss(duals, state, forward_ad.make_dual(arguments[0], directions[1]))).tangent
    slopes = [(of_parameters[name] * direction).sum() for name, direction in directions[0].items()]
    torch.testing.assert_close(tangent, sum(slopes) + (of_input * directions[1]).sum(), rtol=1e-4, atol=1e-4)

    x = arguments[0].clone().requires_grad_()
    torch.manual_seed(1)
    loss_of(twin(x, *arguments[1:])).backward()
    torch.testing.assert_close(of_input, x.grad)
    for name, parameter in twin.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(of_parameters[name], parameter.grad)
    for name, buffer in twin.named_buffers():
        torch.testing.assert_close(buffers[name], buffer)


@subjects
def test_compiled_mixed_precision(make, inputs):
    model, arguments = make(), inputs()
    twin, call = copy.deepcopy(model), compiled(model)
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = step(model, call, arguments), step(twin, twin, arguments)
    # a rounding of bfloat16 may fall otherwise
    assert_alike(got, expected, rtol=0.02, atol=0.02)


@subjects
def test_compiled_models_copy_and_load(make, inputs):
    model = make()
    call = compiled(model)
    step(model, call, inputs())
    arguments = inputs()
    copied, loaded = copy.deepcopy(model), make()
    if isinstance(model, Distance):
        loaded.source = copy.deepcopy(model.source)
    loaded.load_state_dict(copied.state_dict())
    others = [copied] if isinstance(model, (Regularized, Distance)) else [copied, loaded]  # a start is no state
    expected = step(model, call, arguments)
    for other in others:
        assert_alike(step(other, compiled(other), arguments), expected, rtol=1e-4, atol=1e-5)


@subjects
@pytest.mark.parametrize("way", ["inside", "around", "around, reentrant"])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # of dynamo
def test_compiled_activation_checkpointing(make, inputs, way):
    model, arguments = make(), inputs()
    twin = copy.deepcopy(model)
    if way == "inside":
        call = compiled(lambda x: checkpoint(model, x, use_reentrant=False))
    else:
        inner = compiled(model)
        call = lambda x: checkpoint(inner, x, use_reentrant="reentrant" in way)  # noqa: E731
    for seed in (1, 2):
        got, expected = step(model, call, arguments, seed), step(twin, twin, arguments, seed)
        assert_alike(*(without_batch_norms(model, values) for values in (got, expected)), rtol=1e-4, atol=1e-5)


@subjects
def test_compiled_double_backward_is_refused(make, inputs):
    model, leaves = make(), leaves_of(inputs())
    loss = loss_of(compiled(model)(*leaves))
    (gradient,) = torch.autograd.grad(loss, leaves[0], create_graph=True)
    # the latter is what torch 2.10 says of a constant
    with pytest.raises(RuntimeError, match=r"double backward|does not require grad"):
        gradient.square().sum().backward()


@subjects
def test_compiled_function_transforms(make, inputs):
    model, arguments = make(), inputs()
    parameters = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    def loss(parameters, buffers, x):
        return loss_of(functional_call(model, (parameters, buffers), (x, *arguments[1:])))

    gradients = torch.func.grad(loss, (0, 2))
    found = []
    for call in (gradients, compiled(gradients)):
        buffers = {name: b.clone() for name, b in model.named_buffers()}
        torch.manual_seed(1)
        found.append((call(parameters, buffers, arguments[0]), buffers))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@subjects
def test_compiled_deterministic_algorithms(make, inputs):
    model, arguments = make(), inputs()
    twin = copy.deepcopy(model)
    torch.use_deterministic_algorithms(True)
    try:
        for a, b in zip(*(step(m, compiled(m), arguments) for m in (model, twin)), strict=True):
            assert a is b is None or torch.equal(a, b)
    finally:
        torch.use_deterministic_algorithms(False)


@subjects
def test_deterministic_algorithms(make, inputs, device, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    model, arguments = make().to(device), [x.to(device) for x in inputs()]
    twin = copy.deepcopy(model)
    torch.use_deterministic_algorithms(True)
    try:
        for a, b in zip(step(model, model, arguments), step(twin, twin, arguments), strict=True):
            assert a is b is None or torch.equal(a, b)
    finally:
        torch.use_deterministic_algorithms(False)


@subjects
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_graph(make, inputs):
    model, leaves = make().cuda(), leaves_of([x.cuda() for x in inputs()])
    state = copy.deepcopy(model.state_dict())

    def gradients():
        wanted = [t for t in (*leaves, *model.parameters()) if t.requires_grad]
        outputs = tensors(model(*leaves))
        return [*outputs, *torch.autograd.grad(loss_of(outputs), wanted, allow_unused=True)]

    graph, filled = capture(gradients)
    model.load_state_dict(state)
    torch.manual_seed(1)
    graph.replay()
    replayed = [None if value is None else value.detach().clone() for value in filled]
    model.load_state_dict(state)
    torch.manual_seed(1)
    assert_alike(replayed, [None if value is None else value.detach() for value in gradients()])


@subjects
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_side_stream(make, inputs):
    model, arguments = make().cuda(), [x.cuda() for x in inputs()]
    twin = copy.deepcopy(model)
    expected = step(twin, twin, arguments)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(10_000_000)  # on another stream a kernel would come before its inputs are there
        late = [x * 1 for x in arguments]
        got = step(model, model, late)
    torch.cuda.current_stream().wait_stream(side)
    assert_alike(got, expected)


@subjects
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_second_gpu(make, inputs):
    model, arguments = make(), inputs()
    twin, x = copy.deepcopy(model).to("cuda:1"), [x.to("cuda:1") for x in arguments]
    other = copy.deepcopy(model).to("cuda:0")
    masks = [torch.cuda.default_generators[i] for i in (0, 1)]
    results = []
    for generator, module, given in ((masks[0], other, [x.to("cuda:0") for x in arguments]), (masks[1], twin, x)):
        generator.manual_seed(1)
        results.append([None if value is None else value.cpu() for value in step(module, module, given)])
    assert_alike(*results)
    if len(arguments) == 1:
        parallel = nn.DataParallel(model.to("cuda:0"), [0, 1])
        loss_of(parallel(arguments[0].to("cuda:0"))).backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_the_page_says_what_is_tested():
    lines = PAGE.read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    matrix, tests = rows[: len(SUBJECTS) + 2], rows[len(SUBJECTS) + 2 :]
    columns = {column: having for column, (_, having) in SUPPORT.items() if column not in ON_GPUS}
    assert matrix[0] == ["", *columns]
    assert matrix[2:] == [[row, *("✓" if row in having else "–" for having in columns.values())] for row in SUBJECTS]
    compiled = {column: f"`{test}`" for column, test in COMPILED.items()}
    assert tests[2:] == [[column, f"`{test}`", compiled.get(column, "")] for column, (test, _) in SUPPORT.items()]
    assert {test for test, _ in SUPPORT.values()} | set(COMPILED.values()) <= set(globals())

import copy
import importlib
import importlib.util
import io
import pickle
from collections import Counter

import pytest
import torch
import torch.distributed as dist
from network_support import library
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from talib_fast.finetune.delta import IntermediateLayerGetter, channel_attention
from talib_fast.finetune.stochnorm import (
    StochNorm2d,
    StochNormAct2d,
    SyncStochNorm,
    convert_model,
    convert_sync,
    fuse_activations,
    restore_batch_norm,
)
from talib_fast.networks import InvertedResidual, MobileNetV2, conv_bn_relu
from talib_fast.ops.activation import NAMES


class Operations(TorchDispatchMode):
    """How often a norm was computed in training, by what it took along."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.talib_fast.stoch_norm_forward.default:
            given = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)}
            activation = NAMES[given.get("activation", 0)]
            self.counts["add " * (given.get("residual") is not None) + activation] += 1
        return func(*args, **(kwargs or {}))


def trained(model, x, seed=3):
    """What a training step makes of a copy of the model: the output, the gradients, the statistics; and the norms."""
    model = copy.deepcopy(model)
    x = x.clone().requires_grad_()
    torch.manual_seed(seed)
    with Operations() as operations:
        output = model(x)
    output = output if isinstance(output, torch.Tensor) else output[0]
    output.square().sum().backward()
    gradients = [x.grad, *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)]
    return [output, *gradients, *model.buffers()], operations.counts


def assert_same(first, second):
    assert len(first) == len(second) and all(map(torch.equal, first, second))


def unfused_and_fused(model, p=0.5):
    torch.manual_seed(0)
    model = convert_model(model, p).train()
    return model, fuse_activations(copy.deepcopy(model))


def torchvision(name, **options):
    return lambda: library("torchvision").models.get_model(name, num_classes=4, **options)


def timm(name, **options):
    return lambda: library("timm").create_model(name, num_classes=4, **options)


def hugging_face_resnet(layer_type):
    transformers = library("transformers")
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type=layer_type, num_labels=4
    )
    return transformers.ResNetForImageClassification(config)


def hugging_face_mobilenet():
    transformers = library("transformers")
    config = transformers.MobileNetV2Config(depth_multiplier=0.25, num_labels=4, classifier_dropout_prob=0)
    return transformers.MobileNetV2ForImageClassification(config)


NETWORKS = {
    "torchvision resnet18": (torchvision("resnet18"), {"none": 3, "relu": 9, "add relu": 8}),
    "torchvision resnet50": (torchvision("resnet50"), {"none": 4, "relu": 33, "add relu": 16}),
    "torchvision mobilenet_v2": (
        torchvision("mobilenet_v2", width_mult=0.25),
        {"none": 6, "relu6": 35, "add none": 11},
    ),
    "torchvision mobilenet_v3_small": (
        torchvision("mobilenet_v3_small", width_mult=0.25),
        {"none": 4, "relu": 5, "hardswish": 18, "add none": 7},
    ),
    "torchvision regnet_x_400mf": (torchvision("regnet_x_400mf"), {"none": 4, "relu": 45, "add relu": 22}),
    "timm resnet10t": (timm("resnet10t"), {"none": 3, "relu": 7, "add relu": 4}),
    "timm hrnet": (timm("hrnet_w18_small"), {"none": 27, "relu": 41, "add relu": 23}),
    "timm mobilenetv2": (timm("mobilenetv2_035"), {"none": 7, "relu6": 35, "add none": 10}),
    "transformers resnet, basic": (
        lambda: hugging_face_resnet("basic"),
        {"none": 1, "relu": 4, "add relu": 3},
    ),
    "transformers resnet, bottleneck": (
        lambda: hugging_face_resnet("bottleneck"),
        {"none": 1, "relu": 7, "add relu": 3},
    ),
    "transformers mobilenet_v2": (hugging_face_mobilenet, {"none": 7, "relu6": 35, "add none": 10}),
    "mobilenet_v2": (MobileNetV2, {"none": 7, "relu6": 35, "add none": 10}),
}


@pytest.mark.parametrize(("build", "counts"), NETWORKS.values(), ids=NETWORKS)
def test_networks_compute_what_they_did(build, counts):
    exact = "hardswish" not in counts
    unfused, fused = unfused_and_fused(build().to(torch.float32 if exact else torch.float64))
    x = torch.randn(2, 3, 32, 32, dtype=next(fused.parameters()).dtype)
    before, one_by_one = trained(unfused, x)
    after, operations = trained(fused, x)
    assert operations == counts and operations.total() == one_by_one.total()
    if exact:
        assert_same(after, before)
    else:
        torch.testing.assert_close(after, before)
    assert repr(fused) == repr(unfused) and list(fused.state_dict()) == list(unfused.state_dict())
    kinds = [[type(module) for module in model.modules() if not list(model.children())] for model in (fused, unfused)]
    assert kinds[0] == kinds[1]
    assert all(isinstance(ours, type(its)) for ours, its in zip(fused.modules(), unfused.modules(), strict=True))
    assert torch.equal(fused.eval()(x)[0], unfused.eval()(x)[0])


def own_blocks():
    return nn.Sequential(conv_bn_relu(6, 8, 3), InvertedResidual(8, 8, 1, 2), nn.Conv2d(8, 8, 1))


def torchvision_blocks():
    kind = library("torchvision").models.resnet.Bottleneck
    downsample = nn.Sequential(nn.Conv2d(6, 16, 1), nn.BatchNorm2d(16))
    return nn.Sequential(kind(6, 4, downsample=downsample), kind(16, 4))


def timm_blocks(basic=False, **options):
    library("timm")
    resnet = importlib.import_module("timm.models.resnet")
    kind = resnet.BasicBlock if basic else resnet.Bottleneck
    width = 16 // kind.expansion
    downsample = nn.Sequential(nn.Conv2d(6, 16, 1), nn.BatchNorm2d(16))
    return nn.Sequential(kind(6, width, downsample=downsample, **options), kind(16, width, **options))


blocks = pytest.mark.parametrize("build", [own_blocks, torchvision_blocks, timm_blocks])
IMAGES = torch.randn(3, 6, 5, 5, generator=torch.Generator().manual_seed(0))


def first(kind, model):
    return next(module for module in model.modules() if isinstance(module, kind))


def activation_and_norm(model):
    acts = [module for module in model[0].modules() if isinstance(module, (nn.ReLU, nn.ReLU6))]
    return acts[-1], first(StochNorm2d, model[0])


HOOKS = {
    "forward": lambda module, call: module.register_forward_hook(call),
    "forward pre": lambda module, call: module.register_forward_pre_hook(call),
    "backward": lambda module, call: module.register_full_backward_hook(call),
    "backward pre": lambda module, call: module.register_full_backward_pre_hook(call),
}


@pytest.mark.parametrize("of", [0, 1], ids=["activation", "norm"])
@pytest.mark.parametrize("register", HOOKS.values(), ids=HOOKS)
@blocks
def test_hooks_are_called_as_before(build, register, of):
    calls, results = [], []
    for model in unfused_and_fused(build()):
        for module in model.modules():  # hooks of backward passes and activations in place don't go together
            module.inplace = False
        register(activation_and_norm(model)[of], lambda *_: calls.append(1))
        results.append(trained(model, IMAGES))
    assert_same(results[0][0], results[1][0])
    assert len(calls) % 2 == 0 and len(calls) > 0
    if of == 0 and build is torchvision_blocks:  # which calls one activation everywhere
        assert results[1][1] == {"none": 4, "relu": 2, "add relu": 1}


def test_what_every_module_calls_and_what_stands_in_for_one_is_called_as_before():
    unfused, fused = unfused_and_fused(torchvision_blocks())
    calls = []
    handle = register_module_forward_hook(lambda module, *_: calls.append(type(module).__name__))
    try:
        before, _ = trained(unfused, IMAGES)
        expected = calls.copy()
        calls.clear()
        after, operations = trained(fused, IMAGES)
    finally:
        handle.remove()
    assert_same(after, before)
    assert calls == expected and set(operations) == {"none"}
    for model in (unfused, fused):
        model[0].relu.forward = torch.tanh
    assert_same(trained(fused, IMAGES)[0], trained(unfused, IMAGES)[0])


BETWEEN = {
    "drop_path": ({"drop_path": nn.Dropout(0.5)}, {"none": 3, "relu": 4}),
    "idle drop_path": ({"drop_path": nn.Identity()}, {"none": 1, "relu": 4, "add relu": 2}),
    "drop_block": ({"drop_block": lambda: nn.Dropout(0.5)}, {"none": 3, "relu": 2, "add relu": 2}),
    "attention": ({"attn_layer": "se"}, {"none": 3, "relu": 4}),
    "unknown activation": ({"act_layer": nn.Softplus}, {"none": 7}),
}


@pytest.mark.parametrize(("options", "counts"), BETWEEN.values(), ids=BETWEEN)
def test_what_is_between_norm_and_activation_is_called(options, counts):
    if options.get("act_layer"):
        options = {"act_layer": lambda inplace: nn.Softplus()}
    unfused, fused = unfused_and_fused(timm_blocks(**options))
    before, _ = trained(unfused, IMAGES)
    after, operations = trained(fused, IMAGES)
    assert operations == counts
    assert_same(after, before)


ACTIVATIONS = [
    *(nn.ReLU(), nn.ReLU6(), nn.LeakyReLU(0.2), nn.SiLU(), nn.Hardswish(), nn.GELU()),
    *(nn.Softplus(), nn.ReLU(True)),
]


@pytest.mark.parametrize("act", ACTIVATIONS, ids=repr)
def test_activations_behind_a_norm(act):
    model = nn.Sequential(nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4), act, nn.ReLU(), nn.BatchNorm2d(4), nn.ReLU())
    unfused, fused = unfused_and_fused(model.double())
    before, _ = trained(unfused, IMAGES.double())
    after, operations = trained(fused, IMAGES.double())
    torch.testing.assert_close(after, before)
    assert operations["none"] == isinstance(act, nn.Softplus) and operations.total() == 2


@pytest.mark.filterwarnings("ignore:fuse_activations found no")
def test_norms_that_are_not_followed_by_an_activation():
    class Backwards(nn.Sequential):
        def forward(self, x):
            for module in reversed(self):
                x = module(x)
            return x

    x = torch.randn(3, 4, 5, 5)
    for model in (
        Backwards(nn.BatchNorm2d(4), nn.ReLU()),
        nn.Sequential(nn.BatchNorm2d(4), nn.Identity(), nn.ReLU()),
        nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4)),
        nn.ModuleList([nn.BatchNorm2d(4), nn.ReLU()]),
        nn.Sequential(nn.GroupNorm(2, 4), nn.ReLU()),
        nn.Sequential(),
    ):
        kind = type(model)
        model.append(nn.Sequential(nn.BatchNorm2d(4)))
        assert type(fuse_activations(convert_model(model, 0.5))) is kind
        if kind is not nn.ModuleList:
            assert set(trained(model, x)[1]) == {"none"}


class Residual(nn.Module):
    def __init__(self, change):
        super().__init__()
        self.change = change

    def forward(self, x):
        return self.change(x.mean(1, keepdim=True).expand(-1, 4, -1, -1))


@pytest.mark.parametrize(
    "change",
    [lambda x: x.double(), lambda x: x.bfloat16(), lambda x: x[:, :, :1], lambda x: x[0, :, 0, 0].view(4, 1, 1)],
    ids=["float64", "bfloat16", "row", "vector"],
)
def test_residuals_of_another_shape_or_dtype(change):
    kind = library("torchvision").models.resnet.BasicBlock
    unfused, fused = unfused_and_fused(kind(6, 4, downsample=Residual(change)))
    assert_same(trained(fused, IMAGES)[0], trained(unfused, IMAGES)[0])


@blocks
def test_residual_that_is_too_large(build):
    if build is own_blocks:
        unfused, fused = unfused_and_fused(InvertedResidual(6, 6, 1, 2))
        for model in (unfused, fused):
            model.conv[0].insert(0, nn.AdaptiveAvgPool2d(1))
        assert_same(trained(fused, IMAGES)[0], trained(unfused, IMAGES)[0])  # it adds out of place
        return
    unfused, fused = unfused_and_fused(build())
    for model in (unfused, fused):
        model[1].conv1 = nn.Sequential(nn.AdaptiveAvgPool2d(1), model[1].conv1)
        with pytest.raises(RuntimeError, match="output with shape"):
            model(IMAGES)


def test_shortcut_of_another_dtype_that_is_added_out_of_place():
    unfused, fused = unfused_and_fused(InvertedResidual(6, 6, 1, 2))
    with torch.autocast("cpu", torch.bfloat16):
        before, after = trained(unfused, IMAGES)[0], trained(fused, IMAGES)[0]
    assert after[0].dtype == before[0].dtype == torch.float32
    torch.testing.assert_close(after, before, rtol=2e-2, atol=2e-2)


@blocks
def test_mixed_precision_and_channels_last(build):
    unfused, fused = unfused_and_fused(build().to(memory_format=torch.channels_last))
    x = IMAGES.to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        (before, _), (after, operations) = trained(unfused, x), trained(fused, x)
    assert any(name.startswith("add") for name in operations) and after[0].dtype == torch.bfloat16
    assert after[0].stride() == before[0].stride()
    torch.testing.assert_close(after[0], before[0], rtol=0.05, atol=0.1)
    assert_same(trained(fused, x)[0], trained(unfused, x)[0])


@blocks
def test_frozen_norms_and_evaluation(build):
    unfused, fused = unfused_and_fused(build())
    for model in (unfused, fused):
        first(StochNorm2d, model).eval()
    after, operations = trained(fused, IMAGES)
    assert_same(after, trained(unfused, IMAGES)[0])
    assert operations.total() == sum(isinstance(module, StochNorm2d) for module in fused.modules()) - 1
    called = []
    activation_and_norm(fused.eval())[0].register_forward_hook(lambda *_: called.append(1))
    with Operations() as operations:
        assert torch.equal(fused(IMAGES), unfused.eval()(IMAGES))
    assert called and not operations.counts


@pytest.mark.parametrize("training", [True, False])
@blocks
def test_traces_of_fx_are_as_before(build, training):
    graphs = [
        [(node.op, node.target) for node in torch.fx.symbolic_trace(model.train(training)).graph.nodes]
        for model in unfused_and_fused(build())
    ]
    assert graphs[0] == graphs[1]


def blocks_of_every_kind():
    return nn.Sequential(torchvision_blocks()[0], InvertedResidual(16, 16, 1, 2))


@pytest.mark.no_cover
def test_traces_of_the_jit_and_of_export_are_as_before():
    unfused, fused = (model.eval() for model in unfused_and_fused(blocks_of_every_kind()))
    assert torch.equal(torch.jit.trace(fused, IMAGES)(IMAGES), unfused(IMAGES))
    graphs = [str(torch.export.export(model, (IMAGES,)).graph) for model in (unfused, fused)]
    assert graphs[0] == graphs[1]
    assert torch.jit.trace(fused.train(), IMAGES, check_trace=False)(IMAGES).shape == (3, 16, 5, 5)


@pytest.mark.no_cover  # coverage would follow torch.compile's own Python
def test_compiled():
    unfused, fused = unfused_and_fused(blocks_of_every_kind())
    results = []
    for model in (unfused, torch.compile(fused, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(3)
        output = model(IMAGES)
        output.square().sum().backward()
        results.append([output, *(parameter.grad for parameter in model.parameters()), *model.buffers()])
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("reentrant", [True, False])
@blocks
def test_checkpointed(build, reentrant):
    unfused, fused = unfused_and_fused(build())

    class Checkpointed(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            for block in self.model:
                x = checkpoint(block, x, use_reentrant=reentrant)
            return x

    assert_same(trained(Checkpointed(fused), IMAGES)[0], trained(unfused, IMAGES)[0])


def test_checkpointed_by_timm():
    unfused, fused = unfused_and_fused(library("timm").create_model("resnet18", num_classes=3))
    fused.set_grad_checkpointing()
    x = torch.randn(2, 3, 32, 32)
    after, operations = trained(fused, x)
    assert_same(after, trained(unfused, x)[0])
    assert operations["add relu"] == 8


def through_pickle(model):
    return pickle.loads(pickle.dumps(model))


def through_a_file(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, through_pickle, through_a_file, lambda model: torch.optim.swa_utils.AveragedModel(model).module],
    ids=["deepcopy", "pickle", "torch.save", "AveragedModel"],
)
@blocks
def test_copies(build, duplicate):
    _, fused = unfused_and_fused(build())
    copied = duplicate(fused)
    assert [type(module) for module in copied.modules()] == [type(module) for module in fused.modules()]
    before, after = trained(fused, IMAGES), trained(copied, IMAGES)
    assert_same(after[0], before[0])
    assert after[1] == before[1]


@blocks
def test_back_and_forth(build):
    original = build()
    kinds = [type(module) for module in original.modules()]
    unfused, fused = unfused_and_fused(original)
    fused_kinds = [type(module) for module in fused.modules()]
    assert fused_kinds != [type(module) for module in unfused.modules()]
    assert [type(module) for module in fuse_activations(fused).modules()] == fused_kinds
    assert_same(trained(convert_model(fused, 1.0), IMAGES)[0], trained(convert_model(unfused, 1.0), IMAGES)[0])
    convert_sync(fused)
    assert isinstance(first(SyncStochNorm, fused), SyncStochNorm)
    assert_same(trained(fused, IMAGES)[0], trained(unfused, IMAGES)[0])
    convert_sync(fused)
    for model in (fused, unfused):
        restore_batch_norm(model)
    assert [type(module) for module in unfused.modules()] == kinds
    assert not any(type(module) in fused_kinds and type(module) not in kinds for module in fused.modules())


def test_converted_after_it_was_fused():
    model = fuse_activations(convert_model(torchvision_blocks(), 0.5))
    first(StochNorm2d, model).__class__ = nn.BatchNorm2d
    assert trained(model, IMAGES)[1].total() == 6
    assert trained(convert_model(model, 0.5), IMAGES)[1].total() == 7


def test_sequentials_are_cut_and_joined():
    _, fused = unfused_and_fused(nn.Sequential(nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)))
    assert trained(fused[1:3], torch.randn(2, 4, 3, 3))[1] == {"relu": 1}
    fused.insert(2, nn.Tanh())
    assert trained(fused, IMAGES)[1] == {"none": 1}


def test_modules_that_are_there_twice():
    block = InvertedResidual(6, 6, 1, 2)
    act = nn.ReLU()
    norm, conv = nn.BatchNorm2d(6), nn.Conv2d(6, 6, 1)
    block.conv = nn.Sequential(conv, norm, act, conv, nn.Sequential(act, norm, act, conv, norm))
    unfused, fused = unfused_and_fused(nn.Sequential(block, act, norm, act))
    after, operations = trained(fused, IMAGES)
    assert_same(after, trained(unfused, IMAGES)[0])
    assert operations == {"relu": 3, "add none": 1}


def test_calls_by_keyword():
    unfused, fused = unfused_and_fused(torchvision_blocks())
    outputs = []
    for model in (unfused, fused):
        torch.manual_seed(2)
        outputs.append(model[0](x=IMAGES))
    assert torch.equal(*outputs)
    with pytest.raises(TypeError, match="forward"):
        fused[0]()


def test_classes_that_other_versions_of_a_library_may_have_are_left_alone():
    class BasicBlock(nn.Module):
        __module__, __qualname__ = "torchvision.models.resnet", "BasicBlock"

        def __init__(self):
            super().__init__()
            self.conv1, self.bn1, self.relu = nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4), nn.ReLU()

        def forward(self, x):
            return self.relu(self.conv1(x).mean() + self.bn1(self.conv1(x)))

    with pytest.warns(UserWarning, match="fuse_activations found no stochastic norm"):
        assert type(fuse_activations(convert_model(BasicBlock(), 0.5))) is BasicBlock


def test_delta_and_its_attention_on_a_fused_network():
    kind = library("torchvision").models.resnet
    models = unfused_and_fused(kind.ResNet(kind.Bottleneck, [1, 1, 1, 1], num_classes=3))
    layers = ["layer1.0.conv3", "layer2.0", "layer3.0.bn2", "layer4.0.relu"]
    x = torch.randn(2, 3, 32, 32)
    seen = []
    for model in models:
        torch.manual_seed(2)
        outputs, result = IntermediateLayerGetter(model, layers[:2])(x)
        seen.append([*outputs.values(), result])
    assert_same(*seen)
    loader = [(x, torch.tensor([0, 1]))]
    layers = ["layer2.0.conv3", "layer4.0.conv3"]
    attentions = [
        channel_attention(copy.deepcopy(model), loader, layers, device=torch.device("cpu"), progress=False)
        for model in models
    ]
    for name in layers:
        torch.testing.assert_close(attentions[0][name], attentions[1][name])


def test_under_ddp():
    unfused, fused = unfused_and_fused(torchvision_blocks())
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        torch.manual_seed(3)
        output = nn.parallel.DistributedDataParallel(fused)(IMAGES)
        output.square().sum().backward()
    finally:
        dist.destroy_process_group()
    _, _, *expected = trained(unfused, IMAGES)[0]
    torch.testing.assert_close([*(parameter.grad for parameter in fused.parameters()), *fused.buffers()], expected)


def test_no_module():
    with pytest.raises(TypeError, match=r"expected model to be a torch\.nn\.Module, got list"):
        fuse_activations([nn.Linear(1, 1)])


def test_nothing_to_fuse():
    with pytest.warns(UserWarning, match="found no stochastic norm with .* after it: call convert_model first"):
        fuse_activations(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()))
    fuse_activations(nn.ModuleList([StochNormAct2d(3)]))  # which fuses by itself

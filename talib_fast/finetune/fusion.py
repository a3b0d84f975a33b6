"""Fuse stochastic norms with the activation and the residual connection after them, in the networks that hold them.

A network calls its norms and activations one by one. The modules that hold both, an ``nn.Sequential`` or a block of a
ResNet, change their class. In training their forward pass then calls one operation for the norm and what follows it.
The norms and activations themselves stay as they are. Each call checks whether the operation may replace them.
"""

import functools
import operator
import warnings
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..checks import check_module, is_ordinary
from ..ops.activation import NO_ACTIVATION, Activation
from .norm_act import StochNormAct2d, SyncStochNormAct
from .norms import StochNorm1d, StochNorm2d, StochNorm3d, SyncStochNorm, activation_of, runs_its_forward_alone

_NORMS = (StochNorm1d, StochNorm2d, StochNorm3d, SyncStochNorm, StochNormAct2d, SyncStochNormAct)


def _activation(
    norm: Any, act: nn.Module | None, input: Tensor, between: tuple[nn.Module | None, ...] = ()
) -> Activation | None:
    """The activation that ``norm`` can fuse in this call. None where the modules have to be called one by one."""
    if type(norm) not in _NORMS or not norm.training or not is_ordinary(input) or torch.jit.is_tracing():
        return None
    passing = [module for module in between if module is not None]
    called = [norm, *passing] if act is None else [norm, *passing, act]
    if not runs_its_forward_alone(*called) or any(type(module) is not nn.Identity for module in passing):
        return None
    return NO_ACTIVATION if act is None else activation_of(act)


def _norm_act(
    norm: Any,
    act: nn.Module | None,
    input: Tensor,
    residual: Callable[[], Tensor] | None = None,
    between: tuple[nn.Module | None, ...] = (),
    in_place: bool = True,
) -> Tensor:
    """Compute ``act(norm(input) + residual())``.

    Args:
        norm: a stochastic norm, or any other module.
        act: the activation. None where the network has none.
        input: what ``norm`` gets.
        residual: returns what is added. It is called after the norm has drawn its mask, as where the network calls its
            modules one by one.
        between: the modules between the norm and the addition. None stands for a module that the network lacks.
        in_place: whether the network adds in place. Otherwise the sum may have another dtype or shape, and ``residual``
            only returns a tensor that exists already.
    """
    activation = _activation(norm, act, input, between)
    if activation is not None and (residual is None or in_place or _are_alike(input, residual())):
        return norm.followed_by(input, activation, residual)
    output = norm(input)
    for module in between:
        output = output if module is None else module(output)
    if residual is not None:
        output = operator.iadd(output, residual()) if in_place else output + residual()
    return output if act is None else act(output)


def _are_alike(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors have the same shape and dtype."""
    return first.shape == second.shape and first.dtype == second.dtype


def _in_turn(modules: Iterable[Any], input: Tensor) -> Tensor:
    """Call ``modules`` one after the other, each norm together with the activation right after it."""
    remaining = list(modules)
    while remaining:
        module = remaining.pop(0)
        activation = _activation(module, remaining[0], input) if remaining else None
        if activation is None:
            input = module(input)
        else:
            input = module.followed_by(input, activation)
            remaining.pop(0)
    return input


class _Fusion(NamedTuple):
    """How a class that is known by name is fused.

    Attributes:
        forward: replaces the method. It returns NotImplemented where it can't.
        method: the name of the method.
        reads: the names that the method's code uses. A version of the library that uses other names is not fused.
    """

    forward: Callable[[Any, Any], Any]
    method: str
    reads: str


_FUSIONS: dict[str, _Fusion] = {}
_originals: dict[type, type] = {}  # by fused class


def _fuses(*classes: str, method: str = "forward", reads: str) -> Callable[[Callable[[Any, Any], Any]], Any]:
    """Register a fused forward pass for classes, by name."""

    def register(forward: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        _FUSIONS.update(dict.fromkeys(classes, _Fusion(forward, method, reads)))
        return forward

    return register


def _name(kind: type) -> str:
    """The full name of a class."""
    return f"{kind.__module__}.{kind.__qualname__}"


def _fusion_of(kind: type) -> _Fusion | None:
    """How a class is fused. None for one that is not known, or known in another version."""
    if getattr(kind, "forward", None) is nn.Sequential.forward:
        return _Fusion(_in_turn, "forward", "")
    fusion = _FUSIONS.get(_name(kind))
    code = getattr(getattr(kind, fusion.method, None), "__code__", None) if fusion else None
    return fusion if fusion and code and {*code.co_names} == {*fusion.reads.split()} else None


def _instance(kind: type) -> nn.Module:
    """An empty object of the fused class of ``kind``. Pickle stores a call of this, since it can't import the class."""
    fused = _fused_class(kind) or kind
    return object.__new__(fused)


@functools.cache
def _fused_class(kind: type) -> type | None:
    """The class that a module of class ``kind`` gets, with one method replaced. None if ``kind`` is not known."""
    fusion = _fusion_of(kind)
    if fusion is None or kind in _originals:
        return None
    original = getattr(kind, fusion.method)

    @functools.wraps(original)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        usual = self.training and len(args) == 1 and not kwargs
        output = fusion.forward(self, *args) if usual else NotImplemented
        return original(self, *args, **kwargs) if output is NotImplemented else output

    def reduce(self: nn.Module, protocol: int) -> tuple[Any, ...]:
        parts: Any = object.__reduce_ex__(self, max(protocol, 2))
        return _instance, (kind,), *parts[2:]

    contents = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    fused = type(kind)(kind.__name__, (kind,), {**contents, fusion.method: forward, "__reduce_ex__": reduce})
    _originals[fused] = kind
    return fused


def _calls_in_turn(module: nn.Module) -> bool:
    """Whether calling the module only calls its children one after the other."""
    kind = _originals.get(type(module), type(module))
    return getattr(kind, "forward", None) is nn.Sequential.forward and runs_its_forward_alone(module)


def _to_the_last(module: nn.Module) -> list[Any]:
    """The modules that calling ``module`` calls in order. A container in last place is replaced by its children."""
    modules: list[Any] = [module]
    while _calls_in_turn(modules[-1]) and len(modules[-1]):
        modules[-1:] = modules[-1]
    return modules


def _shortcut(downsample: nn.Module | None, input: Tensor) -> Tensor:
    """The output of a block's residual connection."""
    return input if downsample is None else downsample(input)


@_fuses("torchvision.models.resnet.BasicBlock", reads="conv1 bn1 relu conv2 bn2 downsample")
def _torchvision_basic_block(block: Any, x: Any) -> Any:
    out = _norm_act(block.bn1, block.relu, block.conv1(x))
    return _norm_act(block.bn2, block.relu, block.conv2(out), lambda: _shortcut(block.downsample, x))


@_fuses("torchvision.models.resnet.Bottleneck", reads="conv1 bn1 relu conv2 bn2 conv3 bn3 downsample")
def _torchvision_bottleneck(block: Any, x: Any) -> Any:
    out = _norm_act(block.bn1, block.relu, block.conv1(x))
    out = _norm_act(block.bn2, block.relu, block.conv2(out))
    return _norm_act(block.bn3, block.relu, block.conv3(out), lambda: _shortcut(block.downsample, x))


@_fuses("tllib.vision.models.resnet.ResNet", reads="conv1 bn1 relu maxpool layer1 layer2 layer3 layer4")
def _tllib_resnet(net: Any, x: Any) -> Any:
    x = net.maxpool(_norm_act(net.bn1, net.relu, net.conv1(x)))
    return net.layer4(net.layer3(net.layer2(net.layer1(x))))


@_fuses(
    "torchvision.models.resnet.ResNet",
    method="_forward_impl",
    reads="conv1 bn1 relu maxpool layer1 layer2 layer3 layer4 avgpool torch flatten fc",
)
def _torchvision_resnet(net: Any, x: Any) -> Any:
    return net.fc(torch.flatten(net.avgpool(_tllib_resnet(net, x)), 1))


@_fuses(
    "torchvision.models.mobilenetv2.InvertedResidual",
    "talib_fast.networks.mobilenet_v2.InvertedResidual",
    reads="use_res_connect conv",
)
def _mobilenet_v2_block(block: Any, x: Any) -> Any:
    *modules, norm = _to_the_last(block.conv)
    if not block.use_res_connect or not modules:
        return NotImplemented
    return _norm_act(norm, None, _in_turn(modules, x), lambda: x, in_place=False)


@_fuses("torchvision.models.mobilenetv3.InvertedResidual", reads="block use_res_connect")
def _mobilenet_v3_block(block: Any, x: Any) -> Any:
    *modules, norm = _to_the_last(block.block)
    if not block.use_res_connect or not modules:
        return NotImplemented
    return _norm_act(norm, None, _in_turn(modules, x), lambda: x)


@_fuses("torchvision.models.regnet.ResBottleneckBlock", reads="proj f activation")
def _regnet_block(block: Any, x: Any) -> Any:
    *modules, norm = _to_the_last(block.f)
    if not modules:
        return NotImplemented
    shortcut = _shortcut(block.proj, x)
    return _norm_act(norm, block.activation, _in_turn(modules, x), lambda: shortcut, in_place=False)


@_fuses(
    "timm.models.resnet.BasicBlock",
    reads="conv1 bn1 drop_block act1 aa conv2 bn2 se drop_path downsample act2",
)
def _timm_basic_block(block: Any, x: Any) -> Any:
    out = _norm_act(block.bn1, block.act1, block.conv1(x), between=(block.drop_block,))
    out = block.conv2(block.aa(out))
    between = block.se, block.drop_path
    return _norm_act(block.bn2, block.act2, out, lambda: _shortcut(block.downsample, x), between)


@_fuses(
    "timm.models.resnet.Bottleneck",
    reads="conv1 bn1 act1 conv2 bn2 drop_block act2 aa conv3 bn3 se drop_path downsample act3",
)
def _timm_bottleneck(block: Any, x: Any) -> Any:
    out = _norm_act(block.bn1, block.act1, block.conv1(x))
    out = _norm_act(block.bn2, block.act2, block.conv2(out), between=(block.drop_block,))
    out = block.conv3(block.aa(out))
    between = block.se, block.drop_path
    return _norm_act(block.bn3, block.act3, out, lambda: _shortcut(block.downsample, x), between)


@_fuses(
    "timm.models.resnet.ResNet",
    method="forward_features",
    reads="conv1 bn1 act1 maxpool grad_checkpointing torch jit is_scripting checkpoint_seq layer1 layer2 layer3 layer4",
)
def _timm_resnet(net: Any, x: Any) -> Any:
    if net.grad_checkpointing:
        return NotImplemented
    x = net.maxpool(_norm_act(net.bn1, net.act1, net.conv1(x)))
    return net.layer4(net.layer3(net.layer2(net.layer1(x))))


@_fuses(
    "timm.models._efficientnet_blocks.DepthwiseSeparableConv",
    reads="conv_s2d bn_s2d conv_dw bn1 aa se conv_pw bn2 has_skip drop_path",
)
def _timm_separable_block(block: Any, x: Any) -> Any:
    if not block.has_skip or block.conv_s2d is not None:
        return NotImplemented
    out = block.conv_pw(block.se(block.aa(block.bn1(block.conv_dw(x)))))
    return _norm_act(block.bn2, None, out, lambda: x, (block.drop_path,), in_place=False)


@_fuses(
    "timm.models._efficientnet_blocks.InvertedResidual",
    reads="conv_s2d bn_s2d conv_pw bn1 conv_dw bn2 aa se conv_pwl bn3 has_skip drop_path",
)
def _timm_inverted_block(block: Any, x: Any) -> Any:
    if not block.has_skip or block.conv_s2d is not None:
        return NotImplemented
    out = block.bn2(block.conv_dw(block.bn1(block.conv_pw(x))))
    out = block.conv_pwl(block.se(block.aa(out)))
    return _norm_act(block.bn3, None, out, lambda: x, (block.drop_path,), in_place=False)


_HF_RESNET = "transformers.models.resnet.modeling_resnet"
_HF_MOBILENET_V2 = "transformers.models.mobilenet_v2.modeling_mobilenet_v2"


def _is_fused(layer: nn.Module, name: str) -> bool:
    """Whether ``layer`` is of a fused class with that name, and has no hook."""
    return type(layer) in _originals and _name(type(layer)) == name and runs_its_forward_alone(layer)


@_fuses(f"{_HF_RESNET}.ResNetConvLayer", reads="convolution normalization activation")
def _hf_resnet_layer(layer: Any, x: Any) -> Any:
    return _norm_act(layer.normalization, layer.activation, layer.convolution(x))


@_fuses(f"{_HF_RESNET}.ResNetBasicLayer", f"{_HF_RESNET}.ResNetBottleNeckLayer", reads="layer shortcut activation")
def _hf_resnet_block(block: Any, x: Any) -> Any:
    *layers, last = _to_the_last(block.layer)
    if not _is_fused(last, f"{_HF_RESNET}.ResNetConvLayer"):
        return NotImplemented
    out = last.convolution(_in_turn(layers, x))
    return _norm_act(last.normalization, block.activation, out, lambda: block.shortcut(x), (last.activation,))


def _hf_convolution(layer: Any, x: Any) -> Any:
    """The convolution of a Hugging Face MobileNetV2 layer, with its padding."""
    if layer.config.tf_padding:
        from transformers.models.mobilenet_v2.modeling_mobilenet_v2 import apply_tf_padding

        x = apply_tf_padding(x, layer.convolution)
    return layer.convolution(x)


@_fuses(
    f"{_HF_MOBILENET_V2}.MobileNetV2ConvLayer",
    reads="config tf_padding apply_tf_padding convolution normalization activation",
)
def _hf_mobilenet_v2_layer(layer: Any, x: Any) -> Any:
    if layer.normalization is None:
        return NotImplemented
    return _norm_act(layer.normalization, layer.activation, _hf_convolution(layer, x))


@_fuses(f"{_HF_MOBILENET_V2}.MobileNetV2InvertedResidual", reads="expand_1x1 conv_3x3 reduce_1x1 use_residual")
def _hf_mobilenet_v2_block(block: Any, x: Any) -> Any:
    last = block.reduce_1x1
    if not block.use_residual or not _is_fused(last, f"{_HF_MOBILENET_V2}.MobileNetV2ConvLayer"):
        return NotImplemented
    if last.normalization is None or last.activation is not None:
        return NotImplemented
    out = _hf_convolution(last, block.conv_3x3(block.expand_1x1(x)))
    return _norm_act(last.normalization, None, out, lambda: x, in_place=False)


def _has_a_pair(module: Any) -> bool:
    """Whether ``module`` holds a stochastic norm that its fused class may call together with what follows."""
    if _calls_in_turn(module):
        return any(
            type(norm) in _NORMS and activation_of(act) not in (None, NO_ACTIVATION) for norm, act in pairwise(module)
        )
    return any(type(norm) in _NORMS for norm in module.modules())


def fuse(model: nn.Module) -> bool:
    """``fuse_activations`` without a warning. Returns whether anything in the model is fused."""
    for module in model.modules():
        kind: type = type(module)
        fused = _fused_class(kind)
        if fused is not None and _has_a_pair(module):
            module.__class__ = fused
    return any(type(module) in _originals or isinstance(module, StochNormAct2d) for module in model.modules())


def separate(model: nn.Module) -> None:
    """Give the modules that ``fuse_activations`` changed their own class again."""
    for module in model.modules():
        if type(module) in _originals:
            module.__class__ = _originals[type(module)]


def fuse_activations(model: nn.Module) -> nn.Module:
    """Fuse the stochastic norms in ``model`` with the activation and the residual connection after them, in place.

    In training one operation then computes ``act(norm(x) + residual)``. It reads and writes less memory, and keeps less
    for the backward pass. With one seed the model draws the same masks and computes the same as before, to rounding. In
    float32 with ReLU it computes the same bits. Call :func:`~talib_fast.finetune.stochnorm.convert_model` first.

    These are fused:

    - ``nn.Sequential``, and subclasses with its ``forward`` such as ``Conv2dNormActivation``: a norm and the activation
      right after it;
    - blocks of torchvision's ResNet, RegNet, MobileNetV2 and MobileNetV3;
    - blocks of timm's ResNet, the blocks that HRNet shares with it, and the residual connections of timm's
      EfficientNet;
    - blocks of Hugging Face's ResNet and MobileNetV2.

    The activation must be a module of one that :func:`~talib_fast.ops.stoch_norm` supports. After a residual connection
    it must be piecewise linear, or there is none.

    The modules that hold a norm and what follows it get a class of the same name. Norms, activations, parameters, names
    and the state dict stay. In evaluation the model computes as before. A call computes as before too if something else
    happens at or between norm, residual connection and activation: a hook, an attention, a drop path, a frozen norm.
    :func:`~talib_fast.finetune.stochnorm.restore_batch_norm` undoes it.

    Args:
        model: the model, or a part of it.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is no module.

    Example:

        >>> import torch
        >>> from torch import nn
        >>> from talib_fast.finetune.stochnorm import convert_model, fuse_activations
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> model = fuse_activations(convert_model(model, p=0.5))
        >>> model(torch.randn(2, 3, 8, 8)).shape
        torch.Size([2, 8, 6, 6])
    """
    check_module(model, "model")
    if not fuse(model):
        warnings.warn(
            "fuse_activations found no stochastic norm with an activation or a residual connection after it: call "
            "convert_model first",
            stacklevel=2,
        )
    return model

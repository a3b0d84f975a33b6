"""Channel attention: the weights of DELTA with attention (https://openreview.net/forum?id=rkgbwsAcYm)."""

import functools
import itertools
import operator
import os
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from numbers import Number
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..checks import check_positive_integer
from ..progress import progress as progress_bar
from ..storage import write_atomically
from .fingerprint import Unknown, fingerprint, model_parts
from .folding import folded
from .layers import (
    check_channel_dim,
    check_output,
    check_runs,
    find_layer,
    layer_names,
    uncompiled,
    without_gradients,
)
from .loader import loader_parts, warn_of_share
from .logits import check_temperature
from .prediction import evaluating, inputs_of, labels_of
from .replay import Replay
from .structures import map_tensors, moved

# bytes of a layer's outputs in one pass, by device; on a CPU about its cache, which its allocator keeps for reuse
_PASS_BYTES = defaultdict(lambda: 512 * 2**20, cpu=32 * 2**20)
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32)


def channel_attention(
    model: nn.Module,
    data_loader: Iterable,
    return_layers: Iterable[str] | Mapping[str, str],
    criterion: Callable[[Any, Any], Tensor] = F.cross_entropy,
    max_batches: int | None = 10,
    temperature: float = 5.0,
    device: torch.device | str | None = None,
    progress: bool = True,
    channels_per_pass: int | None = None,
    method: str = "exact",
    cache: str | os.PathLike | None = None,
    channel_dim: int = 1,
) -> OrderedDict[str, Tensor]:
    """DELTA's attention: how much the source network's loss depends on each channel of each layer.

    For every channel: the increase of the loss when the channel's output is zero, averaged over the batches. For every
    layer: the increases of its channels are standardised to z (with the population deviation; equal increases give
    equal attention), and the attention is softmax(z / temperature).

    ``method="exact"`` gives the numbers of a full forward pass per channel. It does not compute again what comes before
    the layer, and ``channels_per_pass`` channels share a pass. ``method="taylor"`` estimates the increase from one
    backward pass per batch, to first order: −Σ t·∂L/∂t over a channel's values t. Where the exact increases are small,
    it ranks the channels much as they do. The numbers differ.

    While it works, batch norms are folded as by :func:`~talib_fast.finetune.frozen.frozen`. Afterwards the model is as
    it was, also after an error.

    A cache keeps the increases in a safetensors file. The file is replaced in one step after every layer of every
    batch. A later call continues with the next batch of the loader. A complete cache takes no pass over the data, and
    the temperature may change. A cache is used only if its fingerprint fits. The fingerprint covers the model's weights
    and layers, the criterion, the method, the number of batches, and everything that decides the loader's samples,
    their order and their batches; no sample is loaded for it. Criterion, data set and ``collate_fn`` count by the code
    of their functions and by what :mod:`pickle` would save of them. A random order counts by the state of its
    generator. If the fingerprint does not fit, a warning says so and everything is computed again. The same happens on
    every call where the fingerprint can't be known, as with a generator or a sampler of your own, or where an object
    changes by being used.

    Paper: Li et al., `DELTA: DEep Learning Transfer using Feature Map with Attention for Convolutional Networks (ICLR
    2019) <https://openreview.net/forum?id=rkgbwsAcYm>`__.

    Args:
        model: the source backbone with a head for the target's classes. It runs in evaluation mode, and its output goes
            to the criterion.
        data_loader: batches ``(x, labels, ...)``. The labels go to the criterion: tensors of any dtype and shape, or a
            structure of them such as a dict. Arrays and lists of numbers become tensors.
        return_layers: names of layers, or a mapping from names to aliases, as
            :class:`~talib_fast.finetune.delta.IntermediateLayerGetter` takes them. Each layer runs once per pass and
            returns a tensor with a batch and a channel dimension.
        criterion: maps the model's output and the labels to a 0-dim loss. With ``method="exact"`` the loss may also be
            a number.
        max_batches: how many batches to use. None uses all.
        temperature: temperature of the softmax.
        device: where to compute. The model must be there. By default the model's device.
        progress: show a progress bar of the batches, and one of the channels of the current layer.
        channels_per_pass: how many channels share a pass. More channels take more memory, and are slower on a CPU. By
            default as many as fill 32 MiB with the layer's outputs, or 512 MiB on a GPU.
        method: ``"exact"`` or ``"taylor"``.
        cache: file to keep the increases in.
        channel_dim: dimension of the channels. 1 for images, -1 for tokens ``[b, t, C]`` and for images with their
            channels last. Not 0, the batch dimension.

    Returns:
        float32 vectors ``[C]`` that sum to 1, by layer name or alias, in the order of ``return_layers``.

    Raises:
        AttributeError: the model has no layer of that name.
        TypeError: an argument or a batch has the wrong type, or the model or a layer is scripted.
        ValueError: an argument is out of range, the loader is empty, a layer does not run once or has no such channel
            dimension, or a loss is not finite.
        RuntimeError: with ``method="taylor"`` a layer runs with gradients disabled, or gets no gradient.

    Example:

        >>> import torch
        >>> from torch import nn
        >>> from talib_fast.finetune.delta import channel_attention
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
        >>> batches = [(torch.randn(8, 1, 6, 6), torch.arange(8) % 2)]
        >>> attention = channel_attention(model, batches, ["0"], progress=False)
        >>> attention["0"].shape, round(attention["0"].sum().item(), 3)
        (torch.Size([4]), 1.0)
    """
    aliases = layer_names(model, return_layers)
    names = list(aliases)
    layers = {name: find_layer(model, name) for name in names}
    check_temperature(temperature)
    for name, number in (("max_batches", max_batches), ("channels_per_pass", channels_per_pass)):
        if number is not None:
            check_positive_integer(number, name)
    if method not in ("exact", "taylor"):
        raise ValueError(f"expected method to be exact or taylor, got {method!r}")
    check_channel_dim(channel_dim)
    warn_of_share(data_loader, "channel_attention")
    if device is None:
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    increases = _Increases(names)
    if cache is not None:
        options = (method, max_batches, criterion, channel_dim, model_parts(model))
        increases.keep_in(Path(cache), options, data_loader)
    if not increases.complete:
        # not len(): a DataLoader of an IterableDataset has one that may raise
        total = min(filter(None, (operator.length_hint(data_loader), max_batches)), default=None)
        batches, first = itertools.islice(data_loader, max_batches), True
        with evaluating(model), uncompiled(), _outside_inference_mode(), folded(model, layers.values()) as run:
            for number, batch in enumerate(progress_bar(batches, "Channel attention", total, progress)):
                wanted = {name: layer for name, layer in layers.items() if increases.batches(name) == number}
                if not wanted:
                    continue
                x, labels = _ordinary(inputs_of(batch).to(device)), _ordinary(_on_device(labels_of(batch), device))
                if first:
                    first = False
                    with torch.no_grad(), suppress(Exception):  # an error of the model is raised with more detail below
                        run(x)
                if method == "taylor":
                    estimated = _estimated_increases(model, wanted, x, labels, criterion, channel_dim)
                    for name, increase in estimated.items():
                        increases.add(name, increase)
                    continue
                for name in wanted:
                    with torch.no_grad():
                        replay = Replay(model, name, x, channel_dim)
                        increase = _loss_increases(replay, labels, criterion, channels_per_pass, progress)
                    increases.add(name, increase)
        increases.finish()
    attention = OrderedDict()
    with _outside_inference_mode():
        for name, alias in aliases.items():
            increase = increases.mean(name)
            centred = increase - increase.mean()
            deviation = centred.square().mean().sqrt()
            standardized = torch.where(deviation > 0, centred / deviation, 0)
            attention[alias] = F.softmax(standardized / temperature, dim=0).float().to(device)
    return attention


@contextmanager
def _outside_inference_mode() -> Iterator[None]:
    """A context in which new tensors are ordinary ones, which autograd accepts."""
    gradients = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.set_grad_enabled(gradients):
        yield


def _ordinary(value: Any) -> Any:
    """The same structure with copies of its inference tensors."""
    return map_tensors(lambda tensor: tensor.clone() if tensor.is_inference() else tensor, value)


def _on_device(labels: Any, device: torch.device | str) -> Any:
    """Labels of any kind on ``device``. Arrays and lists of numbers become tensors, and integers become int64."""
    if isinstance(labels, np.ndarray) or (isinstance(labels, list) and all(isinstance(y, Number) for y in labels)):
        labels = torch.as_tensor(labels, device=device)
    if isinstance(labels, Tensor) and labels.dtype in _INTEGERS:
        labels = labels.long()
    return moved(labels, device)


class _Increases:
    """Sums over batches of each layer's loss increases, float64 ``[C]``, in memory and, if wanted, in a file."""

    def __init__(self, names: list[str]) -> None:
        self._names = names
        self._sums: dict[str, Tensor] = {}
        self._batches = dict.fromkeys(names, 0)
        self._path: Path | None = None
        self._fingerprint = ""
        self.complete = False

    def keep_in(self, path: Path, options: Iterable[Any], data_loader: Iterable) -> None:
        """Continue from what ``path`` holds, if it fits, and write to it from now on."""
        try:
            self._fingerprint = fingerprint(*options, *loader_parts(data_loader, ordered=True))
        except Unknown as error:
            message = f"the cached channel attention {path} is computed again every time: it depends on {error}"
            warnings.warn(message, stacklevel=3)
            return
        self._path = path
        if not path.exists():
            return
        try:
            with safe_open(path, "pt") as stored:
                said = stored.metadata() or {}
                sums = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
            batches = {name: int(said[f"batches of {name}"]) for name in sums}
        except (SafetensorError, KeyError, ValueError, OSError) as error:
            reason = f"it can't be read ({error})"
        else:
            if said.get("fingerprint") == self._fingerprint and sums.keys() <= set(self._names):
                self._sums, self.complete = sums, said.get("complete") == "yes" and sums.keys() == set(self._names)
                self._batches |= batches
                return
            reason = "it was made from another model, data set, layers or options"
        warnings.warn(f"the cached channel attention {path} is computed again: {reason}", stacklevel=3)

    def batches(self, name: str) -> int:
        """How many batches of a layer are summed."""
        return self._batches[name]

    def add(self, name: str, increase: Tensor) -> None:
        """Add the increases of one batch, and write the file."""
        if not increase.isfinite().all():
            raise ValueError(
                f"expected finite losses, but in batch {self._batches[name]} the loss increase is not finite for "
                f"{int((~increase.isfinite()).sum())} of {len(increase)} channels of layer {name!r}"
            )
        self._sums[name] = self._sums[name] + increase if name in self._sums else increase
        self._batches[name] += 1
        self._write()

    def finish(self) -> None:
        """Mark all layers as complete, and write the file."""
        if not all(self._batches.values()):
            raise ValueError("expected a data loader with at least one batch, got an empty one")
        self.complete = True
        self._write()

    def mean(self, name: str) -> Tensor:
        """The mean over the batches, ``[C]``."""
        return self._sums[name] / self._batches[name]

    def _write(self) -> None:
        if self._path is None:
            return
        said = {f"batches of {name}": str(count) for name, count in self._batches.items()}
        said |= {"fingerprint": self._fingerprint, "complete": "yes" if self.complete else "no"}
        contents = save({name: tensor.contiguous() for name, tensor in self._sums.items()}, said)
        write_atomically(self._path, lambda file: file.write(contents))


def _loss_increases(
    replay: Replay, labels: Any, criterion: Callable[[Any, Any], Tensor], channels_per_pass: int | None, show: bool
) -> Tensor:
    """By how much the batch's loss rises when a channel is zeroed, float64 ``[C]`` on the CPU."""
    assert replay.original is not None
    original = replay.original
    channels_per_pass = channels_per_pass or max(1, _PASS_BYTES[original.device.type] // max(1, original.nbytes))
    channels = torch.arange(original.size(replay.channel_dim), device=original.device)
    chunks = channels.split(channels_per_pass)
    losses = [
        _loss(criterion(output, labels), original.device)
        for chunk in progress_bar(chunks, replay.name, len(chunks), show)
        for output in replay.without_channels(chunk)
    ]
    with_all = _loss(criterion(replay.output, labels), original.device)
    return torch.stack(losses).cpu().double() - with_all.cpu().double()


def _loss(loss: Any, device: torch.device) -> Tensor:
    """The criterion's result as a 0-dim tensor."""
    if isinstance(loss, Tensor) and loss.dim() == 0:
        return loss
    if isinstance(loss, Number):
        loss = torch.tensor(loss, dtype=torch.float64, device=device)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"expected the criterion to return a 0-dim loss, got {got}")
    return loss.reshape(())


def _estimated_increases(
    model: nn.Module,
    layers: dict[str, nn.Module],
    x: Any,
    labels: Any,
    criterion: Callable[[Any, Any], Tensor],
    channel_dim: int,
) -> dict[str, Tensor]:
    """The first-order estimate of the loss increases for all ``layers``, from one backward pass."""
    outputs: dict[str, list[Tensor]] = {name: [] for name in layers}

    def hook(_module: nn.Module, _args: Any, output: Any, *, name: str) -> Tensor:
        if not torch.is_grad_enabled():
            raise without_gradients(name)
        output = check_output(name, output, channel_dim)
        if not output.requires_grad:
            output.requires_grad_()
        outputs[name].append(output)
        return output.clone()  # so that no later operation in place changes the layer's output

    handles = [layer.register_forward_hook(functools.partial(hook, name=name)) for name, layer in layers.items()]
    try:
        with torch.enable_grad():
            loss = _loss(criterion(_with_ordinary_weights(model, x), labels), torch.device("cpu"))
        for name, found in outputs.items():
            check_runs(name, len(found))
        maps = [found[0] for found in outputs.values()]
        gradients: Sequence[Tensor | None] = [None] * len(maps)
        if loss.requires_grad:  # the hooks are still there, because an activation checkpoint runs the layers again
            gradients = torch.autograd.grad(loss, maps, allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    increases = {}
    for name, output, gradient in zip(outputs, maps, gradients, strict=True):
        if gradient is None:
            raise RuntimeError(
                f"no gradient comes back from the loss to layer {name!r}: the loss does not depend on it, or something "
                'between them detaches or disables gradients; use method="exact" instead'
            )
        terms = output.detach().double() * gradient.double()
        increases[name] = -terms.movedim(channel_dim, 0).flatten(1).sum(1).cpu()
    return increases


def _with_ordinary_weights(model: nn.Module, x: Any) -> Any:
    """The model's output. Weights made in inference mode are replaced by copies, which autograd accepts."""
    tensors = itertools.chain(model.named_parameters(), model.named_buffers())
    copies = {name: tensor.clone() for name, tensor in tensors if tensor.is_inference()}
    return torch.func.functional_call(model, copies, (x,)) if copies else model(x)

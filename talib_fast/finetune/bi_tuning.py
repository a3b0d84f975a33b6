"""Bi-Tuning: contrastive fine-tuning on the features and on the classifier's weights.

Paper: Zhong, Wang, Kou, Wang and Long, `Bi-tuning of Pre-trained Representations (2020)
<https://arxiv.org/abs/2011.06182>`__.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import normalize

from ..checks import check_module, check_number, check_positive_integer
from ..ops.enqueue import enqueue
from ..ops.snapshot import snapshot
from .classifier import Classifier as ClassifierBase
from .classifier import ParameterGroup, Part
from .labels import check_range, integer_labels
from .logits import at_least_float32, check_temperature
from .names import parameters_by_name, plain_name

# upstream's scripts get ClassifierBase, nn, normalize and torch by `import *`
__all__ = ["BiTuning", "Bituning", "Classifier", "ClassifierBase", "Keys", "nn", "normalize", "torch"]

_Pair = tuple[Tensor, Tensor]  # the key encoder's tensor, and the query encoder's


class Classifier(ClassifierBase):
    """A backbone, pooling, a classification head and a projector for the contrastive losses.

    Args:
        backbone: a module with an attribute ``out_features`` F. Its output goes to ``pool_layer``.
        num_classes: number of target classes C.
        projection_dim: number of features D of the projection.
        finetune: let backbone and projector learn at a tenth of the base rate.
        pool_layer: turns the backbone's output into ``[b, F]``. By default the average over ``[b, C, H, W]``.

    Inputs:
        x: what the backbone takes.

    Returns:
        In training ``(y [b, C], z [b, D], hn [b, F + 1])``. These are the logits, the normalised projection, and the
        normalised features with a 1 appended for the head's bias. In evaluation ``y``.

    Raises:
        TypeError: a part is neither a module nor a function.
        ValueError: the parts' sizes do not fit, or the backbone returns no maps and there is no ``pool_layer``.

    Example:

        >>> import torch
        >>> from torch import nn
        >>> from talib_fast.finetune.bi_tuning import Classifier
        >>> backbone = nn.Conv2d(3, 8, 3)
        >>> backbone.out_features = 8
        >>> model = Classifier(backbone, num_classes=5, projection_dim=16)
        >>> [tuple(output.shape) for output in model(torch.randn(2, 3, 6, 6))]
        [(2, 5), (2, 16), (2, 9)]
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        projection_dim: int = 128,
        finetune: bool = True,
        pool_layer: Part | None = None,
    ) -> None:
        super().__init__(backbone, num_classes, finetune=finetune, pool_layer=pool_layer)
        check_positive_integer(projection_dim, "projection_dim")
        nn.init.normal_(self.head.weight, 0, 0.01)  # type: ignore[arg-type]
        nn.init.zeros_(self.head.bias)  # type: ignore[arg-type]
        self.projector = nn.Linear(self.features_dim, projection_dim)
        self.projection_dim = projection_dim

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        h = self.bottleneck(self.pooled(x))
        y = self.head(h)
        if not self.training:
            return y
        z = normalize(self.projector(h), dim=1)
        hn = normalize(torch.cat([h, h.new_ones(len(h), 1)], dim=1), dim=1)
        return y, z, hn

    def get_parameters(self, base_lr: float = 1.0) -> list[ParameterGroup]:
        """Parameter groups for an optimizer, in the order backbone, bottleneck, head, projector.

        Args:
            base_lr: the learning rate. With ``finetune``, backbone and projector get a tenth of it.
        """
        return self._groups(
            base_lr, [(self.backbone, True), (self.bottleneck, False), (self.head, False), (self.projector, True)]
        )


class Keys(NamedTuple):
    """What :meth:`BiTuning.enqueue` returns of a micro-batch for its forward pass."""

    labels: Tensor
    """The samples' labels, ``[b]``, int64."""
    z_k: Tensor
    """The samples' own projections, ``[b, D]``."""
    queue_z: Tensor
    """The queue of projections from before the micro-batches, ``[D, C·K]``."""


class BiTuning(nn.Module):
    """Contrastive fine-tuning with a momentum encoder and a queue of K keys per class.

    Every sample is compared with 1 + C·K keys: its own key, the K keys of its class, and the keys of the other classes
    in ascending order. ``logits_z`` compares the sample's projection with the projections in the queue as it was before
    this batch. ``logits_y`` compares the head's weight of the sample's class with the features in the queue after this
    batch was enqueued; it gives the head no gradient. Both are log-probabilities, in float32 at least.

    A key that is not finite is not put into the queues. The loss of that step may be NaN, but not the next one.

    Half precision would round a momentum step of a thousandth away. Tensors of the key encoder in half precision
    therefore have averages in float32. The averages move with this module, and are copied and pickled with it. They are
    not in the state dict, which has upstream's keys alone. After ``load_state_dict`` they start from the loaded values,
    so a resumed run may differ by a rounding of half precision. Float32 parameters need no averages, also under
    autocast: their state dict has everything.

    To accumulate gradients over micro-batches, call :meth:`enqueue` with all of them first, and give each forward pass
    what it returned. The key encoder and the queues are then updated once, as with one batch.

    Under ``torch.distributed`` every rank enqueues the keys of all ranks in rank order, so the queues stay equal. The
    ranks' batches must have one size. Give DistributedDataParallel ``broadcast_buffers=False``. Otherwise it sends the
    queues of rank 0 to the others at every step.

    Paper: Zhong, Wang, Kou, Wang and Long, `Bi-tuning of Pre-trained Representations (2020)
    <https://arxiv.org/abs/2011.06182>`__.

    Args:
        encoder_q: query encoder, which is trained. A :class:`~talib_fast.finetune.bi_tuning.Classifier`, or a module
            with its attributes and outputs. Its head has a ``weight`` ``[C, F]``, and a ``bias`` ``[C]`` or none.
        encoder_k: key encoder of the same architecture, with parameters of its own. They are set to the query encoder's
            now, follow them by momentum, and take no gradients.
        num_classes: number of target classes C.
        K: queue length per class.
        m: momentum of the key encoder, in [0, 1].
        T: temperature.
        key_buffers: how the key encoder's buffers, such as running statistics, are updated. ``"own"``: by its own
            forward passes. ``"copy"``: copied from the query encoder at each step. ``"average"``: floating-point
            buffers follow by momentum, others are copied.
        check_labels: check labels on an accelerator before they are used. This costs a synchronisation per step.
            Without it, a label out of range fails in a kernel's bounds check, as in cross entropy. Labels on the CPU
            are always checked, in compiled code by the kernels.
        process_group: the ranks whose keys are joined. None is the default group.

    Inputs:
        im_q: one view of the b samples.
        im_k: another view of them, or the :class:`~talib_fast.finetune.bi_tuning.Keys` of the micro-batch.
        labels: ``[b]``, integers in [0, C). Left out if ``im_k`` are keys.

    Returns:
        In training ``(y_q [b, C], logits_z, logits_y, labels_c)``, the last three ``[b, 1 + C·K]``. ``labels_c``
        spreads the probability evenly over the first K + 1 columns. In evaluation ``y_q``, whatever the other inputs.
        The queues and the key encoder then stay as they are.

    Raises:
        TypeError: a part or an input has the wrong type.
        ValueError: an option is out of range, the encoders do not fit each other, or sizes or labels do not fit.

    Example:

        >>> import copy, torch
        >>> from torch import nn
        >>> from talib_fast.finetune.bi_tuning import BiTuning, Classifier
        >>> backbone = nn.Conv2d(3, 8, 3)
        >>> backbone.out_features = 8
        >>> encoder = Classifier(backbone, num_classes=5, projection_dim=16)
        >>> model = BiTuning(encoder, copy.deepcopy(encoder), num_classes=5, K=4)
        >>> im_q, im_k = torch.randn(2, 2, 3, 6, 6)
        >>> y_q, logits_z, logits_y, labels_c = model(im_q, im_k, torch.tensor([0, 3]))
        >>> logits_z.shape, labels_c[0, :6]
        (torch.Size([2, 21]), tensor([0.2000, 0.2000, 0.2000, 0.2000, 0.2000, 0.0000]))
        >>> loss = nn.functional.kl_div(logits_z, labels_c, reduction="batchmean")
    """

    queue_h: Tensor
    queue_z: Tensor
    queue_ptr: Tensor
    _averages: list[Tensor]  # in float32, of the tensors that _momentum_pairs has in half precision

    def __init__(
        self,
        encoder_q: Classifier,
        encoder_k: Classifier,
        num_classes: int,
        K: int = 40,
        m: float = 0.999,
        T: float = 0.07,
        key_buffers: str = "own",
        check_labels: bool = False,
        process_group: Any = None,
    ) -> None:
        super().__init__()
        for name, encoder in (("encoder_q", encoder_q), ("encoder_k", encoder_k)):
            check_module(encoder, name)
            for part in ("num_classes", "features_dim", "projection_dim", "head"):
                if not hasattr(encoder, part):
                    got = type(encoder).__name__
                    raise TypeError(f"expected {name} to be a bi_tuning.Classifier, got {got} without {part}")
        if num_classes != encoder_q.num_classes:
            raise ValueError(f"expected num_classes = {encoder_q.num_classes}, the encoder's, got {num_classes}")
        _check_head(encoder_q.head, num_classes, encoder_q.features_dim)
        check_positive_integer(K, "K, the queue length,")
        check_number(m, "momentum m", 1)
        check_temperature(T, "temperature T")
        if key_buffers not in ("own", "copy", "average"):
            raise ValueError(f"expected key_buffers to be own, copy or average, got {key_buffers!r}")
        if encoder_q is encoder_k:
            raise ValueError("expected two encoders, got the same module twice: build one more, or copy.deepcopy it")
        if _names_and_shapes(encoder_q) != _names_and_shapes(encoder_k):
            raise ValueError("expected two encoders of one architecture, but their parameters differ in name or shape")
        shapes_q, shapes_k = ([buffer.shape for buffer in encoder.buffers()] for encoder in (encoder_q, encoder_k))
        if key_buffers != "own" and shapes_q != shapes_k:
            raise ValueError(
                f"expected two encoders with the same buffers for key_buffers={key_buffers!r}, "
                "but theirs differ in number or shape"
            )
        of_q = set(encoder_q.parameters())
        shared = next((name for name, parameter in encoder_k.named_parameters() if parameter in of_q), None)
        if shared is not None:  # a shared parameter would follow itself, without gradients
            raise ValueError(f"expected two encoders that share no parameter, but {shared!r} is in both: deepcopy one")
        self.encoder_q = encoder_q
        self.encoder_k = encoder_k
        self.num_classes = num_classes
        self.K = K
        self.m = m
        self.T = T
        self.key_buffers = key_buffers
        self.check_labels = check_labels
        self.process_group = process_group
        with torch.no_grad():
            for parameter_q, parameter_k in zip(encoder_q.parameters(), encoder_k.parameters(), strict=True):
                parameter_k.copy_(parameter_q)
                parameter_k.requires_grad_(False)
        with torch.inference_mode(False):  # tensors made in inference mode can't be overwritten later
            self.register_buffer("queue_h", normalize(torch.randn(encoder_q.features_dim + 1, num_classes, K), dim=0))
            self.register_buffer("queue_z", normalize(torch.randn(encoder_q.projection_dim, num_classes, K), dim=0))
            self.register_buffer("queue_ptr", torch.zeros(num_classes, dtype=torch.long))
        self._averages = []
        self._prepare_averages()

    def extra_repr(self) -> str:
        return f"num_classes={self.num_classes}, K={self.K}, m={self.m}, T={self.T}, key_buffers={self.key_buffers!r}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "BiTuning":
        super()._apply(fn, recurse)
        self._prepare_averages()
        return self

    def _momentum_pairs(self) -> tuple[list[_Pair], list[_Pair]]:
        """What follows by momentum: pairs of at least 32 bits a number, and pairs in half precision."""
        pairs: list[_Pair] = []
        pairs += zip(self.encoder_k.parameters(), self.encoder_q.parameters(), strict=True)
        if self.key_buffers == "average":
            buffers = zip(self.encoder_k.buffers(), self.encoder_q.buffers(), strict=True)
            pairs += [pair for pair in buffers if pair[0].is_floating_point()]
        return [pair for pair in pairs if pair[0].itemsize >= 4], [pair for pair in pairs if pair[0].itemsize < 4]

    def _copied_pairs(self) -> list[_Pair]:
        """The pairs of buffers that are copied at each step."""
        if self.key_buffers == "own":
            return []
        buffers = zip(self.encoder_k.buffers(), self.encoder_q.buffers(), strict=True)
        return [pair for pair in buffers if self.key_buffers == "copy" or not pair[0].is_floating_point()]

    def _prepare_averages(self) -> None:
        """Have an average in float32 for each key encoder's tensor in half precision, on the tensor's device.

        This happens where the module's tensors change, not in the first step: code that is compiled for a step without
        averages would be compiled again for the next one.
        """
        halves = [k for k, _ in self._momentum_pairs()[1]]
        kept = [average.shape for average in self._averages] == [k.shape for k in halves]
        with torch.inference_mode(False), torch.no_grad():  # tensors made in inference mode can't be overwritten later
            self._averages = [
                (self._averages[j] if kept and not self._averages[j].is_meta else k).to(k.device, torch.float32)
                for j, k in enumerate(halves)
            ]

    @torch.no_grad()
    def _momentum_update_key_encoder(self) -> None:
        """Move the key encoder's parameters towards the query encoder's, and its buffers as ``key_buffers`` says."""
        wide, halves = self._momentum_pairs()
        self._follow(wide)
        self._follow_in_float32(halves)
        copied = self._copied_pairs()
        if copied:
            torch._foreach_copy_([k for k, _ in copied], [q for _, q in copied])

    def _follow(self, pairs: list[_Pair]) -> None:
        """Move the first tensor of each pair by momentum towards the second."""
        if pairs:
            torch._foreach_lerp_([k for k, _ in pairs], [q.to(k.dtype) for k, q in pairs], 1 - self.m)

    def _follow_in_float32(self, pairs: list[_Pair]) -> None:
        """The same in half precision, by the averages. One starts anew where its tensor has other values meanwhile."""
        if not pairs:
            return
        keys = [k for k, _ in pairs]
        if [(average.shape, average.device) for average in self._averages] != [(k.shape, k.device) for k in keys]:
            self._prepare_averages()  # an encoder's tensors were replaced, and this module was not asked
        for average, k in zip(self._averages, keys, strict=True):
            average.copy_(torch.where(average.to(k.dtype) == k, average, k))  # in place, as CUDA graphs need it
        self._follow([(average, q) for average, (_, q) in zip(self._averages, pairs, strict=True)])
        torch._foreach_copy_(keys, self._averages)

    def _own_class_first(self, labels: Tensor) -> Tensor:
        """The indices ``[b, C·K]`` of a queue's keys in each sample's order: its own class, then the others."""
        start = labels[:, None] * self.K
        own = start + torch.arange(self.K, device=labels.device)
        other_keys = torch.arange((self.num_classes - 1) * self.K, device=labels.device)
        return torch.cat([own, torch.add(other_keys, other_keys >= start, alpha=self.K)], dim=1)

    @torch.no_grad()
    def _class_weights(self, labels: Tensor) -> Tensor:
        """The normalised weight and bias of the head for each sample's class, over the temperature, ``[b, F + 1]``."""
        head: Any = self.encoder_q.head
        bias = getattr(head, "bias", None)
        bias = head.weight.new_zeros(self.num_classes, 1) if bias is None else bias[:, None]
        weight = torch.cat([head.weight, bias], dim=1)[labels]
        return weight / (weight.norm(dim=1, keepdim=True) * self.T).clamp_min(1e-12)

    @torch.no_grad()
    def _dequeue_and_enqueue(self, h: Tensor, z: Tensor, label: Tensor) -> None:
        """Write keys ``h [b, F + 1]`` and ``z [b, D]``, in this order, to the next slots of their classes.

        ``label`` are their labels ``[b]``, or one label for all. A subclass that overrides this gets one sample per
        call.
        """
        label = torch.as_tensor(label, device=h.device)
        enqueue(self.queue_h, self.queue_z, self.queue_ptr, h, z, label if label.dim() else label.expand(len(h)))

    def _checked_labels(self, labels: Any, **inputs: Tensor) -> Tensor:
        """The labels as int64, checked as far as the options ask for."""
        if not isinstance(labels, Tensor):
            raise TypeError(f"expected labels to be a tensor of integers, got {type(labels).__name__}")
        labels = integer_labels(labels)
        if labels.dim() != 1 or not all(len(input) == len(labels) for input in inputs.values()):
            sizes = ", ".join(str(len(input)) for input in inputs.values())
            raise ValueError(
                f"expected {', '.join(inputs)} and labels of one batch size, got {sizes} and {list(labels.shape)}"
            )
        if (labels.device.type == "cpu" or self.check_labels) and not torch.compiler.is_compiling():
            check_range(labels, self.num_classes)
        return labels

    @torch.no_grad()
    def enqueue(self, batches: Iterable[tuple[Tensor, Tensor]]) -> list[Keys]:
        """Update the key encoder once and enqueue the keys of all micro-batches of an optimizer step.

        Give the keys of each micro-batch to its forward pass, ``bituning(im_q, keys)``, before the next call of this
        method. Multiply each micro-batch's loss by its share of the step's samples: the gradients then add up to those
        of the whole batch, except for batch norms, which see one micro-batch at a time. The key encoder is updated
        before the query encoder's forward passes. So ``key_buffers`` copies or averages the buffers that the last step
        left.

        Args:
            batches: ``(im_k, labels)`` of every micro-batch.

        Returns:
            The :class:`~talib_fast.finetune.bi_tuning.Keys` of every micro-batch.

        Raises:
            TypeError: an input has the wrong type.
            ValueError: an input does not fit, or there is no micro-batch.
            RuntimeError: in evaluation mode, in which queues and key encoder stay as they are.
        """
        if not self.training:
            raise RuntimeError("expected training mode to enqueue keys in, got evaluation mode")
        checked = [(im_k, self._checked_labels(labels, im_k=im_k)) for im_k, labels in batches]
        if not checked:
            raise ValueError("expected at least one micro-batch (im_k, labels), got none")
        with torch.inference_mode(False), torch.no_grad():  # the forward passes use the keys in training
            return self._enqueue_keys(checked)

    @torch.no_grad()
    def _enqueue_keys(self, batches: list[tuple[Tensor, Tensor]]) -> list[Keys]:
        """Update the key encoder and enqueue the keys of all batches, whose labels are checked."""
        self._momentum_update_key_encoder()
        # a copy, because autograd needs the queue as it was before the batch is enqueued
        queue_z = snapshot(self.queue_z.flatten(1))
        keys, features = [], []
        for im_k, labels in batches:
            # a copy from the host need not be waited for; a copy to the host must be
            labels = labels.to(self.queue_ptr.device, non_blocking=labels.device.type == "cpu")
            _, z_k, h_k = _outputs(self.encoder_k, "encoder_k", im_k)
            keys.append(Keys(labels, z_k, queue_z))
            features.append(h_k)
        parts = (features, [own.z_k for own in keys], [own.labels for own in keys])
        h, z, labels = _gather(self.process_group, *map(_joined, parts))
        overridden = type(self)._dequeue_and_enqueue is not BiTuning._dequeue_and_enqueue
        if overridden or "_dequeue_and_enqueue" in vars(self):
            for i, label in enumerate(labels):
                self._dequeue_and_enqueue(h[i : i + 1], z[i : i + 1], label)
        else:
            self._dequeue_and_enqueue(h, z, labels)
        return keys

    def forward(
        self, im_q: Tensor, im_k: Tensor | Keys | None = None, labels: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor, Tensor, Tensor]:
        if not self.training:
            return self.encoder_q(im_q)
        if isinstance(im_k, Keys):
            if labels is not None:
                raise ValueError("expected im_q and keys alone, which hold the labels, got labels as well")
            if len(im_q) != len(im_k.labels):
                raise ValueError(f"expected im_q and keys of one batch size, got {len(im_q)} and {len(im_k.labels)}")
            y_q, z_q, h_q = _outputs(self.encoder_q, "encoder_q", im_q)
            labels, z_k, queue_z = im_k
        else:
            if im_k is None or labels is None:
                raise ValueError("expected im_q, im_k and labels in training mode, got im_q alone")
            labels = self._checked_labels(labels, im_q=im_q, im_k=im_k)
            y_q, z_q, h_q = _outputs(self.encoder_q, "encoder_q", im_q)
            ((labels, z_k, queue_z),) = self._enqueue_keys([(im_k, labels)])

        order = self._own_class_first(labels)
        query = z_q / self.T
        similarities = query @ queue_z.to(query.dtype)
        logits_z = _log_probabilities((query * z_k).sum(1, keepdim=True), similarities, order)

        query = self._class_weights(labels)
        # the long side first: BLAS libraries on CPUs are slower with the transpose
        similarities = (self.queue_h.flatten(1).T.to(query.dtype) @ query.T).T
        logits_y = _log_probabilities((query * h_q).sum(1, keepdim=True), similarities, order)

        even = logits_z.new_full((len(labels), self.K + 1), 1 / (self.K + 1))
        labels_c = F.pad(even, (0, (self.num_classes - 1) * self.K))
        return y_q, logits_z, logits_y, labels_c


def _names_and_shapes(encoder: nn.Module) -> list[tuple[str, torch.Size]]:
    """Names and shapes of ``encoder.parameters()``, in that order, without the parts of names that wrappers add."""
    names: dict[Tensor, str] = {}
    for name, parameter in parameters_by_name(encoder).items():
        names.setdefault(parameter, plain_name(name))
    return [(name, parameter.shape) for parameter, name in names.items()]


def _check_head(head: Any, num_classes: int, features_dim: int) -> None:
    """Raise TypeError unless ``head`` has a weight, and ValueError unless weight and bias have the right shape."""
    weight, bias = getattr(head, "weight", None), getattr(head, "bias", None)
    if not isinstance(weight, Tensor):
        raise TypeError(
            f"expected encoder_q.head to have a weight [{num_classes}, {features_dim}] as nn.Linear has it, "
            f"got {type(head).__name__} without one"
        )
    for name, tensor, shape in (("weight", weight, [num_classes, features_dim]), ("bias", bias, [num_classes])):
        if tensor is not None and list(tensor.shape) != shape:
            raise ValueError(f"expected encoder_q.head with a {name} of shape {shape}, got {list(tensor.shape)}")


def _outputs(encoder: nn.Module, name: str, images: Tensor) -> Any:
    """The encoder's logits, projection and features. TypeError, with that name, if it returns something else."""
    outputs = encoder(images)
    if not isinstance(outputs, (tuple, list)) or len(outputs) != 3:
        got = f"{len(outputs)} outputs" if isinstance(outputs, (tuple, list)) else type(outputs).__name__
        raise TypeError(
            f"expected {name} to give (y, z, hn), as a bi_tuning.Classifier does in training mode, got {got} "
            f"with {name}.training = {encoder.training}"
        )
    return outputs


def _log_probabilities(current: Tensor, similarities: Tensor, order: Tensor) -> Tensor:
    """Log-softmax ``[b, 1 + C·K]`` over the sample's own key and the queue's keys in the sample's order."""
    logits = torch.cat([current, similarities.gather(1, order)], dim=1)
    return F.log_softmax(at_least_float32(logits), dim=1)


def _joined(parts: list[Tensor]) -> Tensor:
    """The parts joined along dimension 0."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _gather(process_group: Any, *tensors: Tensor) -> list[Tensor]:
    """Each tensor joined along dimension 0 over all ranks of the group, in rank order."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size(process_group) == 1:
        return list(tensors)
    joined = []
    for tensor in tensors:
        joined.append(tensor.new_empty(dist.get_world_size(process_group), *tensor.shape))
        dist.all_gather(list(joined[-1]), tensor.contiguous(), process_group)
    return [tensor.flatten(0, 1) for tensor in joined]


Bituning = BiTuning

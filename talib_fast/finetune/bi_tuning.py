"""Bi-Tuning of Pre-trained Representations, 2020 (https://arxiv.org/abs/2011.06182)."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import check_module, check_number, check_positive_integer
from ..ops.snapshot import snapshot
from .classifier import Classifier as ClassifierBase
from .classifier import ParameterGroup
from .labels import check_range, integer_labels
from .logits import at_least_float32, check_temperature
from .names import parameters_by_name, plain_name

__all__ = ["BiTuning", "Bituning", "Classifier"]


class Classifier(ClassifierBase):
    """A backbone, pooling, a classification head and a projector for the contrastive losses.

    Args:
        backbone: has an attribute ``out_features``; maps inputs to what ``pool_layer`` pools.
        num_classes: number of target classes C.
        projection_dim: number of features D of the projection.
        finetune: backbone and projector learn at a tenth of the base rate.
        pool_layer: global average pooling of ``[b, C, H, W]`` by default.

    Inputs:
        x: whatever the backbone takes.

    Returns:
        In training ``(y [b, C], z [b, D], hn [b, F + 1])``, the logits, the normalised projection, and the normalised
        features with a 1 appended, which meets the head's bias; in evaluation ``y``.

    Raises:
        TypeError, ValueError: a part is missing or its sizes do not fit.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        projection_dim: int = 128,
        finetune: bool = True,
        pool_layer: nn.Module | None = None,
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
        z = F.normalize(self.projector(h), dim=1)
        hn = F.normalize(torch.cat([h, h.new_ones(len(h), 1)], dim=1), dim=1)
        return y, z, hn

    def get_parameters(self, base_lr: float = 1.0) -> list[ParameterGroup]:
        """Parameter groups in the order backbone, bottleneck, head, projector."""
        return self._groups(
            base_lr, [(self.backbone, True), (self.bottleneck, False), (self.head, False), (self.projector, True)]
        )


class BiTuning(nn.Module):
    """Contrastive fine-tuning with a momentum encoder and one queue of K keys per class.

    Both outputs ``logits_*`` hold log-probabilities, in float32 at least, over 1 + C·K keys: the sample's own key, the
    K keys of its class, then those of the other classes in ascending order. ``logits_z`` compares projections with the
    queue as it was before this batch, ``logits_y`` compares, with this batch enqueued, every key's feature with the
    head's weight of the sample's class; it gives the head no gradient. From `Bi-tuning of Pre-trained Representations
    <https://arxiv.org/abs/2011.06182>`_.

    Under ``torch.distributed`` every rank enqueues the keys of all ranks of a group, in rank order, so that the queues
    stay alike; the ranks' batches must be of one size. Give DistributedDataParallel ``broadcast_buffers=False``, or it
    sends the queues of rank 0 to the others at every step.

    Args:
        encoder_q: query encoder, trained; a :class:`Classifier`, or what has its attributes and returns.
        encoder_k: key encoder of the same architecture; it starts with the query encoder's parameters, in tensors of
            its own, follows them by momentum and takes no gradients.
        num_classes: number of target classes C.
        K: queue length per class.
        m: momentum of the key encoder, in [0, 1].
        T: temperature.
        key_buffers: what becomes of the key encoder's buffers, BatchNorm's statistics above all: ``own`` leaves them
            to its own forward passes, ``copy`` copies the query encoder's at each step, ``average`` moves the
            floating-point ones by momentum and copies the others.
        check_labels: check labels on an accelerator before anything is done with them, which costs a synchronisation
            per step. Without it those out of range end in a kernel's own bounds check, as cross entropy's do. Labels on
            the CPU are always checked (compiled: by the kernels).
        process_group: the ranks whose keys are joined; the default group if None.

    Inputs:
        im_q, im_k: two views of the same b samples.
        labels: ``[b]``, integers in [0, C).

    Returns:
        In training ``(y_q [b, C], logits_z, logits_y, labels_c)``, the last three ``[b, 1 + C·K]``; ``labels_c``
        spreads probability evenly over the first K + 1 columns. In evaluation ``y_q``, whatever the other inputs; the
        queues and the key encoder stay as they are.

    Raises:
        TypeError, ValueError: a part or an input is not as above.
    """

    queue_h: Tensor
    queue_z: Tensor
    queue_ptr: Tensor

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
        check_positive_integer(K, "K, the queue length,")
        check_number(m, "momentum m", 1)
        check_temperature(T, "temperature T")
        if key_buffers not in ("own", "copy", "average"):
            raise ValueError(f"expected key_buffers to be own, copy or average, got {key_buffers!r}")
        if encoder_q is encoder_k:
            raise ValueError("expected two encoders, got the same module twice: build one more, or copy.deepcopy it")
        if _names_and_shapes(encoder_q) != _names_and_shapes(encoder_k):
            raise ValueError("expected two encoders of one architecture, but their parameters differ in name or shape")
        of_q = set(encoder_q.parameters())
        shared = next((name for name, parameter in encoder_k.named_parameters() if parameter in of_q), None)
        if shared is not None:  # it would follow itself, without gradients
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
        self.register_buffer("queue_h", F.normalize(torch.randn(encoder_q.features_dim + 1, num_classes, K), dim=0))
        self.register_buffer("queue_z", F.normalize(torch.randn(encoder_q.projection_dim, num_classes, K), dim=0))
        self.register_buffer("queue_ptr", torch.zeros(num_classes, dtype=torch.long))

    def extra_repr(self) -> str:
        return f"num_classes={self.num_classes}, K={self.K}, m={self.m}, T={self.T}, key_buffers={self.key_buffers!r}"

    @torch.no_grad()
    def _update_key_encoder(self) -> None:
        torch._foreach_lerp_(list(self.encoder_k.parameters()), list(self.encoder_q.parameters()), 1 - self.m)
        if self.key_buffers == "own":
            return
        averaged: list[tuple[Tensor, Tensor]] = []
        copied: list[tuple[Tensor, Tensor]] = []
        for pair in zip(self.encoder_k.buffers(), self.encoder_q.buffers(), strict=True):
            (averaged if self.key_buffers == "average" and pair[0].is_floating_point() else copied).append(pair)
        if averaged:
            torch._foreach_lerp_([k for k, _ in averaged], [q for _, q in averaged], 1 - self.m)
        if copied:
            torch._foreach_copy_([k for k, _ in copied], [q for _, q in copied])

    def _own_class_first(self, labels: Tensor) -> Tensor:
        """The keys ``[b, C·K]`` of a queue in each sample's order: its own class's, then the others' ascending."""
        start = labels[:, None] * self.K
        own = start + torch.arange(self.K, device=labels.device)
        others = torch.arange((self.num_classes - 1) * self.K, device=labels.device)
        return torch.cat([own, torch.add(others, others >= start, alpha=self.K)], dim=1)

    @torch.no_grad()
    def _class_weights(self, labels: Tensor) -> Tensor:
        """The normalised weight and bias of each sample's class in the head, over the temperature: ``[b, F + 1]``."""
        head = self.encoder_q.head
        weight = torch.cat([head.weight, head.bias[:, None]], dim=1)[labels]  # type: ignore[list-item, index]
        return weight / (weight.norm(dim=1, keepdim=True) * self.T).clamp_min(1e-12)

    @torch.no_grad()
    def _enqueue(self, queue_h: Tensor, queue_z: Tensor, h: Tensor, z: Tensor, labels: Tensor) -> None:
        """Write the keys in batch order, each to its class's next slot; past K of one class the last writer wins.

        ``queue_h [C·K, F + 1]`` and ``queue_z [C·K, D]`` are views of the queues, a slot a row.
        """
        if not len(labels):
            return
        place_in_class = (labels[:, None] == labels).tril(-1).sum(1)
        slot = torch.add((self.queue_ptr[labels] + place_in_class) % self.K, labels, alpha=self.K)
        if len(labels) > self.K:
            # Several keys of one slot are all replaced by the last of them, so that the order of the writes is no
            # matter: argmax takes the first of the largest, the place where the count of the slot's keys ends.
            last = (slot[:, None] == slot).cumsum(1).argmax(1)
            h, z = h.index_select(0, last), z.index_select(0, last)
        queue_h.index_copy_(0, slot, h.to(queue_h.dtype))
        queue_z.index_copy_(0, slot, z.to(queue_z.dtype))
        self.queue_ptr.index_add_(0, labels, torch.ones_like(labels)).remainder_(self.K)

    def _check(self, im_k: Tensor | None, labels: Tensor | None, batch: int) -> tuple[Tensor, Tensor]:
        if im_k is None or labels is None:
            raise ValueError("expected im_q, im_k and labels in training mode, got im_q alone")
        if not isinstance(labels, Tensor):
            raise TypeError(f"expected labels to be a tensor of integers, got {type(labels).__name__}")
        labels = integer_labels(labels)
        if labels.shape != (batch,) or len(im_k) != batch:
            raise ValueError(
                f"expected im_q, im_k and labels of one batch size, got {batch}, {len(im_k)} and {list(labels.shape)}"
            )
        if (labels.device.type == "cpu" or self.check_labels) and not torch.compiler.is_compiling():
            check_range(labels, self.num_classes)
        return im_k, labels

    def forward(
        self, im_q: Tensor, im_k: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor, Tensor, Tensor]:
        if not self.training:
            return self.encoder_q(im_q)
        im_k, labels = self._check(im_k, labels, len(im_q))
        # from the host without waiting; to the host a copy has to be waited for
        labels = labels.to(self.queue_ptr.device, non_blocking=labels.device.type == "cpu")
        y_q, z_q, h_q = self.encoder_q(im_q)
        self._update_key_encoder()
        with torch.no_grad():
            _, z_k, h_k = self.encoder_k(im_k)

        order = self._own_class_first(labels)
        queue_h, queue_z = self.queue_h.flatten(1).T, self.queue_z.flatten(1)
        query = z_q / self.T
        # a copy, because autograd needs the queue as it was when the batch is enqueued
        similarities = query @ snapshot(queue_z).to(query.dtype)
        logits_z = _log_probabilities((query * z_k).sum(1, keepdim=True), similarities, order)

        self._enqueue(queue_h, queue_z.T, *_gather(self.process_group, h_k, z_k, labels))
        query = self._class_weights(labels)
        # with the long side first, for which BLAS libraries on CPUs take less time than for the transpose
        similarities = (queue_h.to(query.dtype) @ query.T).T
        logits_y = _log_probabilities((query * h_q).sum(1, keepdim=True), similarities, order)

        even = logits_z.new_full((len(labels), self.K + 1), 1 / (self.K + 1))
        labels_c = F.pad(even, (0, (self.num_classes - 1) * self.K))
        return y_q, logits_z, logits_y, labels_c


def _names_and_shapes(encoder: nn.Module) -> list[tuple[str, torch.Size]]:
    """Those of ``encoder.parameters()``, in that order, without what is around the encoder or a part of it."""
    names: dict[Tensor, str] = {}
    for name, parameter in parameters_by_name(encoder).items():
        names.setdefault(parameter, plain_name(name))
    return [(name, parameter.shape) for parameter, name in names.items()]


def _log_probabilities(current: Tensor, similarities: Tensor, order: Tensor) -> Tensor:
    """Log-softmax ``[b, 1 + C·K]`` over the sample's own key and the queue's in the sample's order."""
    logits = torch.cat([current, similarities.gather(1, order)], dim=1)
    return F.log_softmax(at_least_float32(logits), dim=1)


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

"""Bi-Tuning of Pre-trained Representations, 2020 (https://arxiv.org/abs/2011.06182)."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from .classifier import Classifier as ClassifierBase
from .classifier import ParameterGroup
from .knowledge_distillation import at_least_float32

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
        Training: ``(y [b, C], z [b, D], hn [b, F + 1])``: logits, the normalised projection, and the normalised
        features with a 1 appended, which meets the head's bias; evaluation: ``y``.

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
        if projection_dim < 1:
            raise ValueError(f"expected projection_dim >= 1, got {projection_dim}")
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

    Under ``torch.distributed`` every rank enqueues the keys of all ranks, in rank order, so that the queues stay
    alike; the ranks' batches must be of one size.

    Args:
        encoder_q: query encoder, trained.
        encoder_k: key encoder of the same architecture; it starts with the query encoder's parameters, follows them
            by momentum and takes no gradients.
        num_classes: number of target classes C.
        K: queue length per class.
        m: momentum of the key encoder, in [0, 1].
        T: temperature.
        key_buffers: what becomes of the key encoder's buffers, BatchNorm's statistics above all: ``own`` leaves them
            to its own forward passes, ``copy`` copies the query encoder's at each step, ``average`` moves the
            floating-point ones by momentum and copies the others.
        check_labels: check the labels' range on accelerators too, which costs a synchronisation per step; on the CPU
            it is always checked.

    Inputs:
        im_q, im_k: two views of the same b samples.
        labels: ``[b]``, integers in [0, C).

    Returns:
        Training: ``(y_q [b, C], logits_z, logits_y, labels_c)``, the last three ``[b, 1 + C·K]``; ``labels_c`` spreads
        probability evenly over the first K + 1 columns. Evaluation: ``y_q``, whatever the other inputs; the queues
        and the key encoder stay as they are.

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
    ) -> None:
        super().__init__()
        if num_classes != encoder_q.num_classes:
            raise ValueError(f"expected num_classes = {encoder_q.num_classes}, the encoder's, got {num_classes}")
        if K < 1:
            raise ValueError(f"expected a queue length K >= 1, got {K}")
        if not 0 <= m <= 1:
            raise ValueError(f"expected a momentum m in [0, 1], got {m}")
        if not T > 0:
            raise ValueError(f"expected a temperature T > 0, got {T}")
        if key_buffers not in ("own", "copy", "average"):
            raise ValueError(f"expected key_buffers to be own, copy or average, got {key_buffers!r}")
        if encoder_q is encoder_k:
            raise ValueError("expected two encoders, got the same module twice: build one more, or copy.deepcopy it")
        shapes_q = [(name, parameter.shape) for name, parameter in encoder_q.named_parameters()]
        if shapes_q != [(name, parameter.shape) for name, parameter in encoder_k.named_parameters()]:
            raise ValueError("expected two encoders of one architecture, but their parameters differ in name or shape")
        self.encoder_q = encoder_q
        self.encoder_k = encoder_k
        self.num_classes = num_classes
        self.K = K
        self.m = m
        self.T = T
        self.key_buffers = key_buffers
        self.check_labels = check_labels
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
        for buffer_q, buffer_k in zip(self.encoder_q.buffers(), self.encoder_k.buffers(), strict=True):
            if self.key_buffers == "average" and buffer_k.is_floating_point():
                buffer_k.lerp_(buffer_q, 1 - self.m)
            else:
                buffer_k.copy_(buffer_q)

    @torch.no_grad()
    def _enqueue(self, h: Tensor, z: Tensor, labels: Tensor) -> None:
        """Write the keys in batch order, each to its class's next slot; past K of one class the last writer wins."""
        if not len(labels):
            return
        position = torch.arange(len(labels), device=labels.device)
        same_class = labels[:, None] == labels
        place_in_class = (same_class & (position < position[:, None])).sum(1)
        slot = labels * self.K + (self.queue_ptr[labels] + place_in_class) % self.K
        # several keys of one slot are all replaced by the last of them, so that the order of the writes is no matter
        last = torch.where(slot[:, None] == slot, position, -1).amax(1)
        self.queue_h.view(len(self.queue_h), -1).index_copy_(1, slot, h[last].T.to(self.queue_h.dtype))
        self.queue_z.view(len(self.queue_z), -1).index_copy_(1, slot, z[last].T.to(self.queue_z.dtype))
        self.queue_ptr.index_add_(0, labels, torch.ones_like(labels)).remainder_(self.K)

    def _own_class_first(self, labels: Tensor) -> Tensor:
        """The columns ``[b, C·K]`` of the queue in each sample's order: its own class, then the others ascending."""
        place = torch.arange(self.num_classes, device=labels.device)
        own = labels[:, None]
        order = torch.where(place == 0, own, place - (place <= own).to(place.dtype))
        return (order[:, :, None] * self.K + torch.arange(self.K, device=labels.device)).flatten(1)

    def _log_probabilities(self, current: Tensor, queue: Tensor, columns: Tensor) -> Tensor:
        logits = torch.cat([current[:, None], queue.gather(1, columns)], dim=1)
        return F.log_softmax(at_least_float32(logits) / self.T, dim=1)

    def _check(self, im_k: Tensor | None, labels: Tensor | None, batch: int) -> tuple[Tensor, Tensor]:
        if im_k is None or labels is None:
            raise ValueError("expected im_q, im_k and labels in training mode, got im_q alone")
        if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.dtype == torch.bool:
            got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
            raise TypeError(f"expected labels to be a tensor of integers, got {got}")
        if labels.shape != (batch,) or len(im_k) != batch:
            raise ValueError(
                f"expected im_q, im_k and labels of one batch size, got {batch}, {len(im_k)} and {list(labels.shape)}"
            )
        if batch and (labels.device.type == "cpu" or self.check_labels):
            low, high = (int(label) for label in torch.stack(torch.aminmax(labels)))
            if low < 0 or high >= self.num_classes:
                raise ValueError(f"expected labels in [0, {self.num_classes}), got labels from {low} to {high}")
        return im_k, labels.long()

    def forward(
        self, im_q: Tensor, im_k: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor, Tensor, Tensor]:
        if not self.training:
            return self.encoder_q(im_q)
        im_k, labels = self._check(im_k, labels, len(im_q))
        labels = labels.to(self.queue_ptr.device)
        y_q, z_q, h_q = self.encoder_q(im_q)
        self._update_key_encoder()
        with torch.no_grad():
            _, z_k, h_k = self.encoder_k(im_k)

        columns = self._own_class_first(labels)
        # a copy, because autograd needs the queue as it was when the batch is enqueued
        queue_z = self.queue_z.flatten(1).clone()
        logits_z = self._log_probabilities((z_q * z_k).sum(1), z_q @ queue_z.to(z_q.dtype), columns)

        self._enqueue(*_gather(h_k, z_k, labels))
        head = self.encoder_q.head
        weight = F.normalize(torch.cat([head.weight, head.bias[:, None]], dim=1).detach(), dim=1)  # type: ignore[index, list-item]
        weight = weight[labels].to(h_q.dtype)
        queue_similarity = weight @ self.queue_h.flatten(1).to(weight.dtype)
        logits_y = self._log_probabilities((h_q * weight).sum(1), queue_similarity, columns)

        labels_c = torch.zeros_like(logits_z, requires_grad=False)
        labels_c[:, : self.K + 1] = 1 / (self.K + 1)
        return y_q, logits_z, logits_y, labels_c


def _gather(*tensors: Tensor) -> list[Tensor]:
    """Each tensor joined along dimension 0 over all ranks, in rank order."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return list(tensors)
    joined = []
    for tensor in tensors:
        parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, tensor.contiguous())
        joined.append(torch.cat(parts))
    return joined


Bituning = BiTuning

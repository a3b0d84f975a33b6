"""The code that the operations are compared with, besides ``nn.BatchNorm2d`` and a plain copy."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from talib_fast.finetune.bi_tuning import BiTuning
from talib_fast.finetune.stochnorm import StochNorm2d
from talib_fast.ops.draw import draw
from talib_fast.ops.spectral_tail import _forward_by_gram as tail_forward
from talib_fast.ops.spectral_tail import _gradient as tail_backward
from talib_fast.ops.squared_distance import _backward as distance_backward
from talib_fast.ops.squared_distance import _forward as distance_forward
from talib_fast.ops.stoch_norm_operators import _backward as operation_backward
from talib_fast.ops.stoch_norm_operators import _forward as operation_forward


class UpstreamComposition(nn.BatchNorm2d):
    """Stochastic normalisation in training as the Transfer-Learning-Library composes it, written from the formulas.

    The order is upstream's: batch norm with the running statistics; batch norm with the batch statistics, which updates
    the running statistics; a mask of ones (probability p) and zeros, drawn by numpy on the host and moved to the
    device; the blend of both outputs. Both batch norms have weight and bias. As in upstream, the running branch's
    backward pass reads the updated running statistics, and half precision gives float32.
    """

    def __init__(self, num_features: int, p: float = 0.5, **options: Any) -> None:
        super().__init__(num_features, **options)
        self.p = p

    def forward(self, input: Tensor) -> Tensor:
        with_running, with_batch = (
            F.batch_norm(
                input,
                self.running_mean,
                self.running_var,
                self.weight,
                self.bias,
                batch,
                self.momentum or 0.0,
                self.eps,
            )
            for batch in (False, True)
        )
        drawn = np.random.binomial(n=1, p=self.p, size=self.num_features).reshape(1, -1, 1, 1)
        mask = torch.from_numpy(drawn).float().to(input.device)
        return (1 - mask) * with_running + mask * with_batch


class _InPyTorch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        mask: Tensor,
        momentum: float,
        eps: float,
    ) -> Tensor:
        state = running_mean, running_var, mask, momentum, eps
        output, statistics, _ = operation_forward(input, weight, bias, *state)
        ctx.save_for_backward(input, statistics, weight, mask)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        return *operation_backward(grad_output, *ctx.saved_tensors)[:3], *[None] * 5


class PyTorchStochNorm2d(StochNorm2d):
    """The layer on the operation's PyTorch implementation, even if a compiled kernel serves the operation."""

    def _forward_training(self, input: Tensor, *followed_by: Any) -> Tensor:
        drawn, (mean, variance), _ = draw(input, self.running_mean, self.running_var)
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        operands = input, self.weight, self.bias, mean, variance, drawn < self.p
        return _InPyTorch.apply(*operands, self.momentum, self.eps)


class RecordingStochNorm2d(StochNorm2d):
    """The layer, which also keeps the generator's states: the memory floor depends on the masks drawn from them."""

    def __init__(self, num_features: int, p: float = 0.5, **options: Any) -> None:
        super().__init__(num_features, p=p, **options)
        self.states: list[Tensor] = []

    def followed_by(self, input: Tensor, *follows: Any) -> Tensor:
        cuda = input.device.type == "cuda"
        generator = torch.cuda.default_generators[input.get_device()] if cuda else torch.default_generator
        self.states.append(generator.get_state())
        return super().followed_by(input, *follows)

    def batch_share(self) -> float:
        """The share of channels that took batch statistics since the last call."""
        device = self.running_mean.device
        again = torch.Generator(device)
        masks = [
            torch.rand(self.num_features, device=device, generator=again.set_state(state)) < self.p
            for state in self.states
        ]
        self.states.clear()
        return torch.stack(masks).float().mean().item()


def upstream_behavioral(sources: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """DELTA without attention as the Transfer-Learning-Library composes it, written from the formula."""
    total = torch.zeros((), device=targets[0].device)
    for source, target in zip(sources, targets, strict=True):
        total = total + 0.5 * torch.norm(target - source.detach()) ** 2
    return total


def upstream_attention(sources: Sequence[Tensor], targets: Sequence[Tensor], attention: Sequence[Tensor]) -> Tensor:
    """DELTA with channel attention as the Transfer-Learning-Library composes it, written from the formula."""
    total = torch.zeros((), device=targets[0].device)
    for source, target, weight in zip(sources, targets, attention, strict=True):
        batch, channels, height, width = target.shape
        target = target.reshape(batch, channels, height * width)
        source = source.reshape(batch, channels, height * width)
        distance = torch.norm(target - source.detach(), 2, 2)
        distance = channels * torch.mul(weight, distance**2) / (height * width)
        total = total + 0.5 * torch.sum(distance)
    return total


def upstream_l2(parameters: Sequence[Tensor], start: Sequence[Tensor] | None = None) -> Tensor:
    """L2, or L2-SP if there is a starting point, as the Transfer-Learning-Library composes it."""
    total = torch.zeros((), device=parameters[0].device)
    for j, parameter in enumerate(parameters):
        total = total + 0.5 * torch.norm(parameter if start is None else parameter - start[j]) ** 2
    return total


class _DistanceInPyTorch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sources: list[Tensor], weights: list[Tensor], channel_dim: int, *targets: Tensor) -> Tensor:
        ctx.save_for_backward(*targets)
        ctx.constants = sources, weights, channel_dim
        return distance_forward(list(targets), sources, weights, channel_dim)[0]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, None, *distance_backward(grad_outputs[0], list(ctx.saved_tensors), *ctx.constants)


def distance_in_pytorch(
    targets: Sequence[Tensor], sources: Sequence[Tensor] = (), weights: Sequence[Tensor] = ()
) -> Tensor:
    """``squared_distance`` by its PyTorch implementation, even if a compiled kernel serves the operation."""
    return _DistanceInPyTorch.apply([source.detach() for source in sources], list(weights), 1, *targets)


@torch.no_grad()
def upstream_channel_attention(
    model: nn.Module, layer: str, x: Tensor, labels: Tensor, temperature: float = 5.0
) -> Tensor:
    """DELTA's channel attention as the Transfer-Learning-Library's script computes it, for one layer and batch.

    It zeroes one of the layer's filters after another, and runs the whole network each time. The layer has no bias.
    """
    weight = model.get_submodule(layer).get_parameter("weight")
    whole = F.cross_entropy(model(x), labels)
    losses = []
    for channel in range(len(weight)):
        kept = weight[channel].clone()
        weight[channel] = 0
        losses.append(F.cross_entropy(model(x), labels) - whole)
        weight[channel] = kept
    increases = torch.stack(losses)
    standardized = (increases - increases.mean()) / increases.std(correction=0)
    return F.softmax(standardized / temperature, 0)


def upstream_spectral_tail(features: Tensor, k: int) -> Tensor:
    """BSS as the Transfer-Learning-Library composes it, written from the formula; half precision as float32."""
    features = features if features.dtype == torch.float64 else features.float()
    _, singular_values, _ = torch.svd(features.t())
    total = torch.zeros((), device=features.device)
    for i in range(k):
        total = total + torch.pow(singular_values[len(singular_values) - 1 - i], 2)
    return total


def spectral_tail_by_eigvalsh(features: Tensor, k: int) -> Tensor:
    """The same from the eigenvalues of the Gram matrix, in float64, because float32 has too few digits for them."""
    features = features.double()
    return torch.linalg.eigvalsh(features @ features.mT)[:k].sum().float()


class _TailInPyTorch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, k: int) -> Tensor:
        value, vectors = tail_forward(features, k)
        ctx.save_for_backward(features, vectors)
        ctx.k = k
        return value

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        features, vectors = ctx.saved_tensors
        return tail_backward(grad_outputs[0], features, vectors, ctx.k), None


def spectral_tail_in_pytorch(features: Tensor, k: int) -> Tensor:
    """``spectral_tail`` by its PyTorch implementation, even if a compiled kernel serves the operation."""
    return _TailInPyTorch.apply(features, k)


class UpstreamBiTuning(BiTuning):
    """Bi-Tuning's training step as the Transfer-Learning-Library composes it, written from what it computes.

    The order is upstream's:

    1. It replaces the key encoder's parameters.
    2. For each sample, it puts the queue's columns in the sample's order, compares them with its projection, and writes
       its key into the queues.
    3. It compares every class's weight with every feature in the queue.
    4. For each sample, it puts the similarities of its class in the sample's order.
    """

    def forward(self, im_q: Tensor, im_k: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # type: ignore[override]
        batch, device = len(im_q), im_q.device
        y_q, z_q, h_q = self.encoder_q(im_q)
        with torch.no_grad():
            for key, query in zip(self.encoder_k.parameters(), self.encoder_q.parameters(), strict=True):
                key.data = key.data * self.m + query.data * (1 - self.m)
            _, z_k, h_k = self.encoder_k(im_k)

        current = torch.einsum("bd,bd->b", z_q, z_k).unsqueeze(-1)
        queue = self.queue_z.clone().detach().to(device)
        positive, negative = torch.Tensor([]).to(device), torch.Tensor([]).to(device)
        for i in range(batch):
            c = labels[i]
            own = queue[:, c, :]
            others = torch.cat([queue[:, 0:c, :], queue[:, c + 1 :, :]], dim=1).flatten(start_dim=1)
            own = torch.einsum("bd,dk->bk", z_q[i : i + 1], own)
            others = torch.einsum("bd,dk->bk", z_q[i : i + 1], others)
            positive, negative = torch.cat((positive, own)), torch.cat((negative, others))
            self._enqueue_one(h_k[i : i + 1], z_k[i : i + 1], labels[i : i + 1])
        logits_z = torch.cat([current, positive, negative], dim=1) / self.T
        logits_z = nn.LogSoftmax(dim=1)(logits_z)

        head = self.encoder_q.head
        weight = torch.cat([head.weight.data, head.bias.data.unsqueeze(-1)], dim=1)  # type: ignore[list-item, operator]
        weight = F.normalize(weight, dim=1)
        current = torch.einsum("bf,fc->bc", h_q, weight.T)
        features = self.queue_h.clone().detach().to(device).flatten(start_dim=1).T
        similarities = torch.einsum("nf,fc->nc", features, weight.T).reshape(self.num_classes, -1, self.num_classes)
        logits_y = torch.Tensor([]).to(device)
        for i in range(batch):
            c = labels[i]
            others = torch.cat([similarities[0:c, :, c], similarities[c + 1 :, :, c]], dim=0).view(-1)
            row = torch.cat([current[i : i + 1, c], similarities[c, :, c], others])
            logits_y = torch.cat([logits_y, row.unsqueeze(0)], dim=0)
        logits_y = nn.LogSoftmax(dim=1)(logits_y / self.T)

        labels_c = torch.zeros([batch, self.K * self.num_classes + 1]).to(device)
        labels_c[:, 0 : self.K + 1].fill_(1 / (self.K + 1))
        return y_q, logits_z, logits_y, labels_c

    @torch.no_grad()
    def _enqueue_one(self, h: Tensor, z: Tensor, labels: Tensor) -> None:
        for i in range(len(h)):
            c = int(labels[i])
            slot = int(self.queue_ptr[c])
            self.queue_h[:, c, slot] = h[i]
            self.queue_z[:, c, slot] = z[i]
            self.queue_ptr[c] = (slot + 1) % self.K


def upstream_co_tuning(logits: Tensor, target: Tensor) -> Tensor:
    """Co-Tuning's loss as the Transfer-Learning-Library composes it, written from the formula."""
    return torch.mean(torch.sum(-target * F.log_softmax(logits, dim=-1), dim=-1))


def upstream_distillation(student: Tensor, teacher: Tensor, T: float) -> Tensor:
    """Knowledge distillation as the Transfer-Learning-Library composes it, written from the formula."""
    return nn.KLDivLoss(reduction="batchmean")(F.log_softmax(student / T, dim=1), F.softmax(teacher / T, dim=1))


def upstream_relationship(batches: Sequence[tuple[Tensor, Tensor]], classifier: nn.Module, device: torch.device) -> Any:
    """Co-Tuning's direct relationship as the Transfer-Learning-Library composes it, written from the formula."""
    collected, collected_labels = [], []
    classifier.eval()
    with torch.no_grad():
        for x, labels in batches:
            collected.append(classifier(x.to(device)).cpu().numpy())
            collected_labels.append(labels)
    logits, all_labels = np.concatenate(collected), torch.cat(collected_labels, dim=0).numpy()
    logits = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities = logits / logits.sum(axis=1, keepdims=True)
    return np.concatenate(
        [probabilities[all_labels == c].mean(axis=0, keepdims=True) for c in range(all_labels.max() + 1)]
    )

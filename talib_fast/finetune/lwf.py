"""Learning without Forgetting, ECCV 2016 (https://arxiv.org/abs/1606.09282)."""

import contextlib
from collections.abc import Iterable
from typing import Any, Dict, List, Optional  # noqa: UP035

import torch
from torch import Tensor, nn

from ..checks import check_module
from .classifier import ClassifierBase, ParameterGroup, Part, check_linear
from .loader import share_of, warn_of_share
from .prediction import OnHost, counted, joined_over_ranks, predictions
from .ranks import check_group, together

# Dict, List, Optional, nn, torch and tqdm for scripts that rely on upstream's star import
__all__ = ["Classifier", "Dict", "List", "Optional", "collect_pretrain_labels", "nn", "torch"]
with contextlib.suppress(ImportError):
    import tqdm

    __all__ += ["tqdm"]


def collect_pretrain_labels(
    data_loader: Iterable,
    classifier: nn.Module,
    device: torch.device | str,
    progress: bool = True,
    process_group: Any = None,
) -> Tensor:
    """The source classifier's logits for every input, in the loader's order: the labels that LWF must not forget.

    From a GPU they come through pinned memory, each batch while the next one is computed. From the second batch on the
    classifier's batch norms are folded into the layers before them, as in :func:`~talib_fast.finetune.frozen.frozen`,
    which gives the same logits to rounding; afterwards it is as it was.

    Args:
        data_loader: batches ``x`` or ``(x, ...)``, where x is a tensor or moves by its ``to(device)``; without
            shuffling, or the order is lost.
        classifier: gives logits ``[b, N_p]``, or maps ``[b, ...]``, in evaluation mode; its modes are restored
            afterwards.
        device: where the classifier is.
        progress: show a progress bar.
        process_group: processes that share out the data; each of them gets the logits of all samples. Those of a
            :class:`~torch.utils.data.DistributedSampler` come once each and in the data set's order, shuffled or not;
            those of accelerate's ``prepare_data_loader`` once each and in the order that the loader had before, unless
            the data set is iterable or the batches are dispatched; data that are shared out in another way rank by
            rank, with a warning where accelerate fills batches up with repeated samples. By default each process is
            alone.

    Returns:
        Logits ``[N, N_p]`` on the CPU.

    Raises:
        TypeError, ValueError: a batch does not start with a tensor, the classifier does not return logits, or the
            loader is empty; on all processes if on one.
    """
    check_group(process_group)
    together(lambda: check_module(classifier, "classifier"), process_group)
    if process_group is None:
        warn_of_share(data_loader, "collect_pretrain_labels", joins=True)
    share, collected = share_of(data_loader, process_group), OnHost()

    def collect() -> None:
        batches = predictions(data_loader, classifier, device, "Collecting pretrain labels", progress, maps=True)
        for _, logits, counts in counted(batches, share):
            collected.append(logits if counts is None else logits[counts.to(logits.device)])

    together(collect, process_group)
    return joined_over_ranks(collected, share, process_group)


class Classifier(ClassifierBase):
    """A backbone with two heads: the source's, on the pooled features, and the target's, after the bottleneck.

    No parameter group holds the source head: it is not trained, but its gradients accumulate unless they are cleared
    with the model's own ``zero_grad()`` or the head is frozen with :meth:`freeze_head_source`. To train it too, as the
    paper does, give the optimizer a group of its own:
    ``optimizer.add_param_group({"params": classifier.head_source.parameters(), "lr": ...})``.

    All but the backbone may be functions; those have no parameters, and their parameter group is empty.

    Args:
        backbone: has an attribute ``out_features``; maps inputs to what ``pool_layer`` pools.
        num_classes: number of target classes.
        head_source: the pretrained head, ``[b, out_features]`` → ``[b, N_p]``.
        head_target: ``[b, features_dim]`` → ``[b, num_classes]``; a linear layer by default.
        bottleneck: applied after pooling, for the target head; identity by default.
        bottleneck_dim: the bottleneck's number of features, needed with ``bottleneck``.
        finetune: the backbone learns at a tenth of the base rate.
        pool_layer: global average pooling of ``[b, C, H, W]`` by default.

    Inputs:
        x: whatever the backbone takes.

    Returns:
        In training ``(y_s [b, N_p], y_t [b, num_classes])``, in evaluation ``y_t``.

    Raises:
        TypeError, ValueError: a part is missing or its sizes do not fit; or the backbone gives no maps, and there is no
            ``pool_layer`` for what it gives.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        head_source: Part,
        head_target: Part | None = None,
        bottleneck: Part | None = None,
        bottleneck_dim: int | None = -1,
        finetune: bool = True,
        pool_layer: Part | None = None,
    ) -> None:
        super().__init__(backbone, num_classes, bottleneck, bottleneck_dim, finetune, pool_layer)
        check_linear(head_source, "head_source", backbone.out_features)  # type: ignore[arg-type]
        self.head_source = head_source
        self.head_target = nn.Linear(self.features_dim, num_classes) if head_target is None else head_target
        check_linear(self.head_target, "head_target", self.features_dim, num_classes)

    def freeze_head_source(self, freeze: bool = True) -> None:
        """Let the source head take no gradients (or, with ``freeze=False``, take them again)."""
        if isinstance(self.head_source, nn.Module):
            self.head_source.requires_grad_(not freeze)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        features = self.pooled(x)
        if not self.training:
            return self.head_target(self.bottleneck(features))
        return self.head_source(features), self.head_target(self.bottleneck(features))

    def get_parameters(self, base_lr: float = 1.0) -> list[ParameterGroup]:
        """Parameter groups in the order backbone, bottleneck, head_target."""
        return self._groups(base_lr, [(self.backbone, True), (self.bottleneck, False), (self.head_target, False)])

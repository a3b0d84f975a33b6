"""LWF: Learning without Forgetting, which keeps the source head's predictions while a new head learns.

Paper: Li and Hoiem, `Learning without Forgetting (ECCV 2016) <https://arxiv.org/abs/1606.09282>`__.
"""

import contextlib
from collections.abc import Iterable
from typing import Any, Dict, List, Optional  # noqa: UP035

import torch
from torch import Tensor, nn

from ..checks import check_module
from .classifier import ClassifierBase, ParameterGroup, Part, check_linear
from .loader import share_of, warn_of_order, warn_of_share
from .prediction import OnHost, counted, joined_over_ranks, predictions
from .ranks import check_group, together

# upstream's scripts get Dict, List, Optional, nn, torch and tqdm by `import *`
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
    """The source classifier's logits for every input, in the loader's order: the predictions that LWF keeps.

    From a GPU the logits are copied through pinned memory, while the next batch is computed. From the second batch on,
    the classifier's batch norms are folded as by :func:`~talib_fast.finetune.frozen.frozen`, which gives the same
    logits to rounding. Afterwards the classifier is as it was.

    Args:
        data_loader: batches ``x`` or ``(x, ...)``. x is a tensor or has a method ``to(device)``. It must not shuffle,
            or the order is lost, and a warning says so.
        classifier: returns logits ``[b, N_p]``, or maps ``[b, ...]``, in evaluation mode.
        device: the device of the classifier.
        progress: show a progress bar.
        process_group: processes that share the data. Each of them gets the logits of all samples. With a
            :class:`~torch.utils.data.DistributedSampler` every sample comes once, in the data set's order, shuffled or
            not. With accelerate's ``prepare_data_loader`` every sample comes once, in the order that the loader had
            before. This excludes iterable data sets and dispatched batches. Data that are shared in another way come
            rank by rank, with a warning where accelerate fills batches with repeated samples. By default each process
            works alone.

    Returns:
        Logits ``[N, N_p]`` on the CPU.

    Raises:
        TypeError: a batch does not start with a tensor, or ``classifier`` is no module. Like the other errors, it is
            raised on all processes of the group.
        ValueError: the classifier does not return logits, or the loader is empty.

    Example:

        >>> import torch
        >>> from torch import nn
        >>> from talib_fast.finetune.lwf import collect_pretrain_labels
        >>> batches = torch.randn(20, 4).split(8)
        >>> collect_pretrain_labels(batches, nn.Linear(4, 3), "cpu", progress=False).shape
        torch.Size([20, 3])
    """
    check_group(process_group)
    together(lambda: check_module(classifier, "classifier"), process_group)
    if process_group is None:
        warn_of_share(data_loader, "collect_pretrain_labels", joins=True)
    warn_of_order(data_loader, "the logits of collect_pretrain_labels")
    share, collected = share_of(data_loader, process_group), OnHost()

    def collect() -> None:
        batches = predictions(data_loader, classifier, device, "Collecting pretrain labels", progress, maps=True)
        for _, logits, counts in counted(batches, share):
            collected.append(logits if counts is None else logits[counts.to(logits.device)])

    together(collect, process_group)
    return joined_over_ranks(collected, share, process_group)


class Classifier(ClassifierBase):
    """A backbone with two heads: the source head on the pooled features, the target head after the bottleneck.

    All parts but the backbone may be functions. They have no parameters, and their parameter group is empty.

    No parameter group contains the source head, so it is not trained. Its gradients accumulate unless you clear them
    with the model's own ``zero_grad()`` or call :meth:`freeze_head_source`. To train it too, as the paper does, give it
    a group of its own: ``optimizer.add_param_group({"params": classifier.head_source.parameters(), "lr": ...})``.

    Paper: Li and Hoiem, `Learning without Forgetting (ECCV 2016) <https://arxiv.org/abs/1606.09282>`__.

    Args:
        backbone: a module with an attribute ``out_features``. Its output goes to ``pool_layer``.
        num_classes: number of target classes.
        head_source: the pretrained head, ``[b, out_features]`` → ``[b, N_p]``.
        head_target: ``[b, features_dim]`` → ``[b, num_classes]``. By default a linear layer.
        bottleneck: applied after pooling, before the target head. By default the identity.
        bottleneck_dim: the bottleneck's number of features. Required with ``bottleneck``.
        finetune: let the backbone learn at a tenth of the base rate.
        pool_layer: turns the backbone's output into ``[b, out_features]``. By default the average over ``[b, C, H,
            W]``.

    Inputs:
        x: what the backbone takes.

    Returns:
        In training ``(y_s [b, N_p], y_t [b, num_classes])``, in evaluation ``y_t``.

    Raises:
        TypeError: a part is neither a module nor a function.
        ValueError: the parts' sizes do not fit, or the backbone returns no maps and there is no ``pool_layer``.

    Example:

        >>> import torch
        >>> from torch import nn
        >>> from talib_fast.finetune.lwf import Classifier
        >>> backbone = nn.Conv2d(3, 8, 3)
        >>> backbone.out_features = 8
        >>> model = Classifier(backbone, num_classes=2, head_source=nn.Linear(8, 10))
        >>> y_s, y_t = model(torch.randn(4, 3, 6, 6))
        >>> y_s.shape, y_t.shape
        (torch.Size([4, 10]), torch.Size([4, 2]))
        >>> model.eval()(torch.randn(4, 3, 6, 6)).shape
        torch.Size([4, 2])
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
        """Let the source head take no gradients. With ``freeze=False`` it takes them again."""
        if isinstance(self.head_source, nn.Module):
            self.head_source.requires_grad_(not freeze)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        features = self.pooled(x)
        if not self.training:
            return self.head_target(self.bottleneck(features))
        return self.head_source(features), self.head_target(self.bottleneck(features))

    def get_parameters(self, base_lr: float = 1.0) -> list[ParameterGroup]:
        """Parameter groups for an optimizer, in the order backbone, bottleneck, head_target.

        Args:
            base_lr: the learning rate. With ``finetune``, the backbone gets a tenth of it.
        """
        return self._groups(base_lr, [(self.backbone, True), (self.bottleneck, False), (self.head_target, False)])

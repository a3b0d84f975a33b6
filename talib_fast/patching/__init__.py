"""Make a script of the Transfer-Learning-Library use talib_fast by one line."""

from torch import nn

from ..checks import check_module
from .library import convert_model, patch_library, unpatch_library
from .model import patch_model

__all__ = ["convert_model", "patch", "unpatch"]


def patch(
    model: nn.Module | None = None,
    *,
    stochnorm: bool = True,
    delta: bool = True,
    bss: bool = True,
    co_tuning: bool = True,
    lwf: bool = True,
    bi_tuning: bool = True,
    knowledge_distillation: bool = True,
    classifier: bool = True,
) -> dict[str, str]:
    """Replace the Transfer-Learning-Library's fine-tuning methods by talib_fast's, or its StochNorm layers in a model.

    ``patch()`` changes the packages ``tllib`` and ``talib``, as far as they are there. (TA-Lib, also called ``talib``,
    is left alone.) It replaces:

    - everything that talib_fast has under the same name in the same module, in ``tllib.regularization``,
      ``tllib.normalization``, ``tllib.modules.classifier`` and ``talib.finetune``;
    - what other modules of these packages have imported of it;
    - replaced base classes of other classes in these packages.

    The library's ``convert_model`` then also calls :func:`~talib_fast.finetune.stochnorm.fuse_activations`. Modules
    that can be imported are imported for this. Modules that can't, as before a script's own ``sys.path.append``, are
    changed when they are imported, by an import hook which stays until :func:`~talib_fast.unpatch`. So an empty result
    of the first call means that nothing is there yet. Nothing else is changed.

    Call it before a script's ``from tllib... import ...``. Names that were imported earlier keep upstream's classes. To
    construct one of these, or of subclasses defined earlier, may then fail.

    ``patch(model)`` turns upstream's StochNorm layers in a model that was built without ``patch()`` into talib_fast's.
    It fuses them with the activations after them, as :func:`~talib_fast.finetune.stochnorm.fuse_activations` does, and
    changes nothing else. The layers stay the same objects and keep their parameters, statistics, ``training``,
    ``requires_grad``, hooks and sharing; a running optimizer goes on. They get ``num_batches_tracked``, and the p that
    was given to upstream's ``convert_model``, which loses it. ``patch(model)`` also completes the StochNorm layers of a
    pickled model that was loaded after ``patch()``. Subclasses are left alone, and a warning lists them.

    A repeated call leaves what is replaced already. If anything fails, nothing is changed.

    Args:
        model: a model to change instead of the library.
        stochnorm: False leaves that module as it is.
        delta: False leaves that module as it is.
        bss: False leaves that module as it is.
        co_tuning: False leaves that module as it is.
        lwf: False leaves that module as it is.
        bi_tuning: False leaves that module as it is.
        knowledge_distillation: False leaves that module as it is.
        classifier: False leaves that module as it is.

    Returns:
        The dotted names of the library's attributes or of the model's layers that this call has replaced, mapped to
        dotted names in talib_fast.

    Raises:
        ImportError: a module of a method is there, but its import fails.
        TypeError: ``model`` is no module, or a choice is not True or False.
        ValueError: methods are chosen for a model, or LWF without Co-Tuning, which derives from it, or a layer's p is
            not in [0, 1].

    Example:

        >>> import talib_fast
        >>> from torch import nn
        >>> talib_fast.patch(nn.Sequential(nn.Linear(2, 2)))  # a model without upstream's layers
        {}
    """
    choices = {
        "stochnorm": stochnorm,
        "delta": delta,
        "bss": bss,
        "co_tuning": co_tuning,
        "lwf": lwf,
        "bi_tuning": bi_tuning,
        "knowledge_distillation": knowledge_distillation,
        "classifier": classifier,
    }
    for name, choice in choices.items():
        if not isinstance(choice, bool):
            raise TypeError(f"expected {name} to be True or False, got {choice!r}")
    methods = {name for name, choice in choices.items() if choice}
    if model is None:
        return patch_library(methods)
    check_module(model, "model")
    if len(methods) < len(choices):
        left_out = ", ".join(sorted(choices.keys() - methods))
        raise ValueError(f"expected a model or a choice of methods, got a model and {left_out} left out")
    return patch_model(model)


def unpatch() -> list[str]:
    """Undo every ``patch()`` so far: the Transfer-Learning-Library gets its own classes and functions back.

    Models stay as they are, both those built since and those given to ``patch(model)``. Their layers and losses go on
    working. Attributes that someone else has set since are left alone. If nothing is patched, nothing happens.

    Returns:
        The dotted names that were restored, whether ``patch()`` replaced them or later imports got them replaced. An
        empty list if the library was never imported.

    Example:

        >>> import talib_fast
        >>> _ = talib_fast.patch()
        >>> _ = talib_fast.unpatch()
    """
    return unpatch_library()

"""The private parts of torch that the layers and operations use.

Each is behind a function that says what it is for, and what happens with a version of torch that lacks it: something
slower or an error, never another result.
"""

import functools
import sys
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor


def in_backward_pass() -> bool:
    """Whether autograd runs a backward pass in this thread, in which activation checkpointing repeats a forward pass.

    Without torch's own answer the current autograd node gives the same one, except in a hook between two nodes.

    Raises:
        RuntimeError: this torch has neither, so a repeated pass can't be recognised.
    """
    current_graph_task_id = getattr(torch._C, "_current_graph_task_id", None)
    if current_graph_task_id is not None:
        return current_graph_task_id() != -1
    current_node = getattr(torch._C, "_current_autograd_node", None)
    if current_node is not None:
        return current_node() is not None
    raise RuntimeError(
        f"StochNorm can't be trained by torch {torch.__version__}, which does not say whether a backward pass runs: "
        "activation checkpointing would give wrong gradients; use a version that talib_fast was tested with"
    )


def saves_by_hooks() -> bool:
    """Whether hooks receive the tensors that autograd saves, as those of activation checkpointing do.

    Without torch's answer it is assumed: every pass is then treated as one that may be repeated, which takes longer.
    """
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top is None or top(True) is not None


def may_be_in_function_transform() -> bool:
    """Whether a transform of ``torch.func`` is around this call.

    Without torch's answer it is assumed: autograd functions are then called in a way that suits both, which takes
    longer.
    """
    active = getattr(torch._C, "_are_functorch_transforms_active", None)
    return active is None or active()


def only_autograd_looks_on() -> bool:
    """Whether this call is ordinary training, which only autograd records.

    It is not with gradients off (a checkpoint may run a first pass) or in a backward pass (a checkpoint repeats one).
    It is not where hooks receive what autograd saves, in transforms of ``torch.func``, in forward mode, or in a trace.
    Every layer asks this, so it calls torch directly. Without one of torch's answers it returns False.
    """
    private = torch._C
    try:
        return (
            torch.is_grad_enabled()
            and private._current_graph_task_id() == -1
            and private._autograd._top_saved_tensors_default_hooks(True) is None
            and not private._are_functorch_transforms_active()
            and torch.autograd.forward_ad._current_level < 0
            and not private._is_tracing()
        )
    except AttributeError:
        return False


def directly(overload: Any) -> Callable:
    """What an operator's ``overload`` calls, without a Python function that takes time on every call."""
    return getattr(overload, "_op", overload)


def function_transforms() -> tuple[str, ...]:
    """The transforms of ``torch.func`` around this call, outermost first: "Vmap", "Grad", "Jvp", "Functionalize".

    Without torch's answer none is seen. A layer in training inside one then raises torch's own error, or takes longer
    under ``torch.func.grad`` and ``torch.vmap``.
    """
    get_stack = getattr(torch._C._functorch, "get_interpreter_stack", None)
    stack = None if get_stack is None else get_stack()
    return () if stack is None else tuple(interpreter.key().name for interpreter in stack)


# What torch.compiler.assume_constant_result sets, without importing the compiler. torch.compile asks once, while it
# traces inside the same transforms, and makes the answer a constant.
function_transforms._dynamo_marked_constant = True  # type: ignore[attr-defined]


def have_global_hooks() -> bool:
    """Whether a hook is registered for all modules, as profilers do.

    Without torch's answer it is assumed: modules are then called one by one, which takes longer.
    """
    has_any = getattr(torch.nn.modules.module, "_has_any_global_hook", None)
    return has_any is None or bool(has_any())


def in_forward_mode() -> bool:
    """Whether a level of ``torch.autograd.forward_ad`` is open, in which tensors may carry tangents.

    Without torch's answer none is seen, and forward-mode differentiation raises torch's own error.
    """
    return getattr(torch.autograd.forward_ad, "_current_level", -1) >= 0


def refuses_random_numbers() -> bool:
    """Whether a ``torch.vmap`` around this call has ``randomness="error"``, as in ``torch.func.jacfwd``.

    Without torch's answer none is seen, and drawing random numbers there raises torch's own error.
    """
    functorch = torch._C._functorch
    try:
        vmaps = [i for i in functorch.get_interpreter_stack() or () if i.key().name == "Vmap"]
        return any(functorch.CVmapInterpreterPtr(vmap).randomness().name == "Error" for vmap in vmaps)
    except AttributeError:
        return False


def is_mapped(tensor: Tensor) -> bool:
    """Whether a ``torch.vmap`` around this call maps over ``tensor``. Without torch's answer it is assumed."""
    functorch = torch._C._functorch
    try:
        while functorch.is_functorch_wrapped_tensor(tensor):
            if functorch.is_batchedtensor(tensor):
                return True
            tensor = functorch.get_unwrapped(tensor)
    except AttributeError:
        return True
    return False


def assign(targets: list[Tensor], values: list[Tensor]) -> None:
    """Copy each value into its target, also where torch refuses the result of ``copy_``.

    A transform of ``torch.func`` refuses it for tensors that are no arguments of its function. A selective checkpoint
    that saves the result finds it changed. Without torch's function for lists ``copy_`` is used, and torch may raise
    its error.
    """
    is_wrapped = getattr(torch._C._functorch, "is_functorch_wrapped_tensor", None)
    plain = is_wrapped is not None and not torch.compiler.is_compiling() and not any(map(is_wrapped, targets))
    if plain and hasattr(torch, "_foreach_copy_"):
        torch._foreach_copy_(targets, values)
        return
    for target, value in zip(targets, values, strict=True):
        target.copy_(value)


def watching_operators(look: Callable[[Any], None]) -> AbstractContextManager | None:
    """A context in which ``look(arguments)`` is called for every operator that this thread runs.

    None without torch's class for it. Then it is unknown which layer follows which, and no batch norm is folded.
    """
    try:
        from torch.utils._python_dispatch import TorchDispatchMode
    except ImportError:
        return None

    class Watching(TorchDispatchMode):
        supports_higher_order_operators = True

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            look((args, kwargs))
            return func(*args, **(kwargs or {}))

    return Watching()


def pack_convolution_weight(
    weight: Tensor, padding: Any, stride: Any, dilation: Any, groups: int, input_size: Any
) -> Tensor | None:
    """A convolution's weight in the order in which oneDNN computes with it on a CPU, for inputs of that size.

    None where there is no such order for the dtype and processor, or no oneDNN. The weight then serves as it is.
    """
    onednn: Any = torch.backends.mkldnn
    if not onednn.is_available() or not onednn.enabled or weight.dtype not in (torch.float32, torch.bfloat16):
        return None
    try:
        operators = torch.ops.mkldnn
        if weight.dtype == torch.bfloat16 and not operators._is_mkldnn_bf16_supported():
            return None
        return operators._reorder_convolution_weight(weight.detach(), padding, stride, dilation, groups, input_size)
    except (AttributeError, RuntimeError):
        return None


def convolve_packed(
    input: Tensor, packed: Tensor, bias: Tensor | None, padding: Any, stride: Any, dilation: Any, groups: int
) -> Tensor:
    """The convolution with a weight from ``pack_convolution_weight``."""
    return torch.ops.mkldnn._convolution_pointwise(
        input, packed, bias, padding, stride, dilation, groups, "none", [], ""
    )


def runs_uncompiled(function: Callable) -> Callable:
    """``function`` in a form that torch.compile does not look into. Its docstring is the message for a single graph."""

    @functools.wraps(function)
    def uncompiled(*args: Any, **kwargs: Any) -> Any:
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        return torch.compiler.disable(function)(*args, **kwargs)

    marked: Any = uncompiled
    marked._torchdynamo_disable, marked._torchdynamo_disable_msg = True, function.__doc__
    return uncompiled


def keep_in_order(operator: str) -> None:
    """Make compiled code call ``operator`` in the order of eager code, whatever lies between the calls.

    Inductor orders the branches of a graph by their memory, even where they draw random numbers. So each call gets the
    first result of the call before as its keyword argument ``after``, which it does not read. Without torch's tracer
    the order is Inductor's, and layers get other random numbers.
    """
    try:
        from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode
    except ImportError:
        return
    latest: weakref.WeakKeyDictionary[Any, Tensor] = weakref.WeakKeyDictionary()  # by the tracer of a graph

    def trace(mode: Any, func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        before = latest.get(mode.tracer)
        if before is not None and before.device == args[0].device:
            kwargs = {**kwargs, "after": before}
        results = mode.__torch_dispatch__(func, types, args, kwargs)
        latest[mode.tracer] = results[0]
        return results

    torch.library.register_torch_dispatch(f"talib_fast::{operator}", ProxyTorchDispatchMode, trace)


def keep_in_compiled_checkpoints(producer: Callable, consumer: str, argument: int) -> None:
    """Make compiled code save the results of ``producer`` for the backward pass, whatever a checkpoint's policy says.

    An activation checkpoint inside ``torch.compile`` is a tag on the nodes of a graph, by which the partitioner repeats
    them in the backward pass. The tag of an operator is set after it is traced. So the operator that uses the result
    changes the tag. Without these tags a producer that is repeated has to notice it and raise.

    Args:
        producer: an operator whose results are saved.
        consumer: the name of an operator that gets the first result.
        argument: the position of that result among the consumer's arguments.
    """
    try:
        from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode
        from torch.utils.checkpoint import CheckpointPolicy
    except ImportError:
        return

    def trace(mode: Any, func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        node = getattr(mode.tracer.unwrap_proxy(args[argument]), "node", None)
        while node is not None and node.target is not producer:  # through views and casts of the first result
            node = node.args[0] if node.op == "call_function" and node.args else None
            node = node if isinstance(node, torch.fx.Node) else None
        for saved in (node, *node.users) if node is not None else ():
            saved.meta["recompute"] = CheckpointPolicy.MUST_SAVE
        return mode.__torch_dispatch__(func, types, args, kwargs)

    torch.library.register_torch_dispatch(f"talib_fast::{consumer}", ProxyTorchDispatchMode, trace)

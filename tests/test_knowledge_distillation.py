import copy
import inspect
import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from talib_fast.finetune.knowledge_distillation import KnowledgeDistillationLoss


def softmax(row):
    exponentials = [math.exp(x - max(row)) for x in row]
    return [e / sum(exponentials) for e in exponentials]


def divergences(student, teacher, T):
    """KL(teacher ‖ student) term by term, in plain loops."""
    terms = []
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        p, q = softmax([x / T for x in t]), softmax([x / T for x in s])
        terms.append([a * math.log(a / b) for a, b in zip(p, q, strict=True)])
    return terms


def logits(batch=5, classes=7, device="cpu", dtype=torch.float64):
    return (torch.randn(2, batch, classes, device=device, dtype=dtype) * 3).unbind()


def test_signatures_are_the_contracts():
    parameters = inspect.signature(KnowledgeDistillationLoss).parameters
    assert [(name, p.default) for name, p in parameters.items()] == [("T", 1.0), ("reduction", "batchmean")]
    assert list(inspect.signature(KnowledgeDistillationLoss.forward).parameters) == ["self", "y_student", "y_teacher"]


def test_positional_and_keyword_calls_agree():
    student, teacher = logits()
    expected = KnowledgeDistillationLoss(3.0, "sum")(student, teacher)
    assert KnowledgeDistillationLoss(T=3.0, reduction="sum")(y_teacher=teacher, y_student=student) == expected


@pytest.mark.parametrize("T", [0.5, 1.0, 3, 20.0])
@pytest.mark.parametrize("reduction", ["none", "sum", "batchmean"])
def test_value_without_a_factor_of_T_squared(T, reduction, device):
    student, teacher = logits(device=device)
    terms = divergences(student, teacher, T)
    total = sum(map(sum, terms))
    expected = {"none": terms, "sum": total, "batchmean": total / 5}[reduction]
    loss = KnowledgeDistillationLoss(T, reduction)(student, teacher)
    torch.testing.assert_close(loss, torch.tensor(expected, device=device, dtype=torch.float64))


def test_mean_divides_by_every_element_and_torch_warns_of_it():
    student, teacher = logits()
    with pytest.warns(UserWarning, match="batchmean"):
        loss = KnowledgeDistillationLoss(2.0, "mean")(student, teacher)
    assert loss.item() == pytest.approx(sum(map(sum, divergences(student, teacher, 2.0))) / 35)


def test_gradient_of_the_student(device):
    student, teacher = logits(device=device)
    student.requires_grad_()
    KnowledgeDistillationLoss(3.0)(student, teacher).backward()
    rows = zip(student.tolist(), teacher.tolist(), strict=True)
    pairs = [(softmax([x / 3 for x in s]), softmax([x / 3 for x in t])) for s, t in rows]
    expected = [[(a - b) / (3 * 5) for a, b in zip(q, p, strict=True)] for q, p in pairs]
    torch.testing.assert_close(student.grad, torch.tensor(expected, device=device, dtype=torch.float64))


def test_gradcheck():
    student, teacher = logits(3, 4)
    loss = KnowledgeDistillationLoss(2.0)
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher), student.requires_grad_())


def test_fault_teacher_logits_received_gradient():
    student, teacher = (x.requires_grad_() for x in logits())
    loss = KnowledgeDistillationLoss(2.0)(student, teacher)
    assert torch.autograd.grad(loss, teacher, allow_unused=True, retain_graph=True) == (None,)
    loss.backward()
    assert teacher.grad is None and student.grad.abs().sum() > 0


def test_equal_logits_have_no_divergence():
    student, _ = logits()
    assert KnowledgeDistillationLoss(2.0)(student, student + 1).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_loss_is_a_scalar_in_float32_at_least(dtype, device):
    student, teacher = logits(device=device, dtype=dtype)
    loss = KnowledgeDistillationLoss(2.0)(student.requires_grad_(), teacher)
    assert loss.shape == () and loss.device == student.device
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert loss.item() == pytest.approx(sum(map(sum, divergences(student.detach(), teacher, 2.0))) / 5, rel=1e-5)
    loss.backward()
    assert student.grad.dtype == dtype


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.bfloat16, torch.float32)])
def test_mixed_dtypes(dtypes):
    student, teacher = (x.to(dtype) for x, dtype in zip(logits(), dtypes, strict=True))
    loss = KnowledgeDistillationLoss()(student, teacher)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(sum(map(sum, divergences(student, teacher, 1.0))) / 5, rel=1e-5)


def test_half_precision_does_not_overflow_at_a_low_temperature(device):
    student = torch.tensor([[6e4, -6e4, 0.0]], dtype=torch.float16, device=device, requires_grad=True)
    loss = KnowledgeDistillationLoss(0.01)(student, student.detach())
    loss.backward()
    assert loss.item() == 0 and student.grad.isfinite().all()


def test_autocast(device):
    student, teacher = logits(device=device, dtype=torch.float32)
    with torch.autocast(device.type, torch.bfloat16):
        loss = KnowledgeDistillationLoss(2.0)(student.bfloat16(), teacher)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(sum(map(sum, divergences(student.bfloat16(), teacher, 2.0))) / 5, rel=1e-5)


def test_empty_batch_is_a_scalar(device):
    loss = KnowledgeDistillationLoss()(torch.zeros(0, 3, device=device), torch.zeros(0, 3, device=device))
    assert loss.shape == () and loss.device.type == device.type
    loss.item()


def test_compiles_without_a_graph_break():
    student, teacher = logits(dtype=torch.float32)
    loss, eager_student = KnowledgeDistillationLoss(2.0), student.clone().requires_grad_()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    compiled_value, value = compiled(student.requires_grad_(), teacher), loss(eager_student, teacher)
    compiled_value.backward()
    value.backward()
    torch.testing.assert_close(compiled_value, value)
    torch.testing.assert_close(student.grad, eager_student.grad)


def test_module_has_no_state_and_copies():
    loss = KnowledgeDistillationLoss(3.0, "sum")
    assert loss.state_dict() == {} and list(loss.parameters()) == []
    student, teacher = logits()
    assert copy.deepcopy(loss)(student, teacher) == loss(student, teacher)
    assert repr(loss) == "KnowledgeDistillationLoss(T=3.0, reduction='sum')"


@pytest.mark.parametrize("T", [0, -1.0, math.nan])
def test_temperature_is_positive(T):
    with pytest.raises(ValueError, match=rf"temperature T > 0, got {T}"):
        KnowledgeDistillationLoss(T)


@pytest.mark.parametrize("T", ["3", None, torch.ones(2)])
def test_temperature_is_a_number(T):
    with pytest.raises(TypeError, match=f"expected temperature T to be a number, got {re.escape(repr(T))}"):
        KnowledgeDistillationLoss(T)


def test_temperature_is_a_tensor_of_one_number():
    student, teacher = torch.randn(2, 4, 3)
    loss = KnowledgeDistillationLoss(torch.tensor(2.0))(student, teacher)
    torch.testing.assert_close(loss, KnowledgeDistillationLoss(2.0)(student, teacher))


def test_logits_are_floating_point_tensors():
    with pytest.raises(TypeError, match=r"y_student to be a floating-point tensor, got list"):
        KnowledgeDistillationLoss()([[1.0]], torch.zeros(1, 1))
    with pytest.raises(TypeError, match=r"y_teacher to be a floating-point tensor, got torch\.int64"):
        KnowledgeDistillationLoss()(torch.zeros(1, 1), torch.zeros(1, 1, dtype=torch.long))


def test_logits_at_several_positions_are_summed_over_them():
    """As nn.KLDivLoss(reduction="batchmean") does, which upstream calls."""
    student, teacher = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    expected = sum(KnowledgeDistillationLoss(2.0, "sum")(*pair) for pair in zip(student, teacher, strict=True)) / 3
    torch.testing.assert_close(KnowledgeDistillationLoss(2.0)(student, teacher), expected)


def test_unknown_reduction():
    with pytest.raises(ValueError, match=r"one of none, sum, mean, batchmean, got 'median'"):
        KnowledgeDistillationLoss(reduction="median")


@pytest.mark.parametrize("student, teacher", [((2, 3), (2, 4)), ((2, 3), (3, 3)), ((3,), (2, 3)), ((2, 3), (2, 1))])
def test_shapes_differ(student, teacher):
    with pytest.raises(ValueError, match=r"one shape, got \[.*\] and \[.*\]"):
        KnowledgeDistillationLoss()(torch.zeros(student), torch.zeros(teacher))


@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "batchmean"])
@pytest.mark.parametrize("shape", [(7,), (1, 7), (1, 1, 7), (4, 1, 7)])
@pytest.mark.filterwarnings("ignore:reduction.*mean:UserWarning")
def test_fault_teacher_that_broadcasts_was_refused(shape, reduction):
    student, teacher = torch.randn(4, 5, 7, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    loss = KnowledgeDistillationLoss(2.0, reduction)
    torch.testing.assert_close(loss(student, teacher), loss(student, teacher.expand_as(student)))


# student [0, 1, -inf], teacher [1, 0, -inf], class by class
MASKED = [(1 / (1 + math.e)) * e for e in (math.e * 1.0, -1.0, 0.0)]


def masked_logits(device="cpu", dtype=torch.float32):
    student, teacher = torch.tensor([[[0, 1, -math.inf]], [[1, 0, -math.inf]]], device=device, dtype=dtype)
    return student.requires_grad_(), teacher


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "batchmean"])
@pytest.mark.filterwarnings("ignore:reduction.*mean:UserWarning")
def test_fault_masked_classes_gave_nan(reduction, dtype, device):
    student, teacher = masked_logits(device, dtype)
    with torch.autocast(device.type, torch.bfloat16, enabled=dtype != torch.float64):
        loss = KnowledgeDistillationLoss(reduction=reduction)(student, teacher)
    total = sum(MASKED)
    expected = {"none": [MASKED], "mean": total / 3}.get(reduction, total)
    torch.testing.assert_close(loss, torch.tensor(expected, device=device).to(loss.dtype))
    loss.sum().backward()
    slope = total / (3 if reduction == "mean" else 1)
    torch.testing.assert_close(
        student.grad.float(), torch.tensor([[-slope, slope, 0]], device=device), rtol=1e-2, atol=0
    )


def test_masked_classes_in_compiled_code():
    student, teacher = masked_logits(dtype=torch.float64)
    loss = torch.compile(KnowledgeDistillationLoss(), fullgraph=True, backend="aot_eager")(student, teacher)
    loss.backward()
    assert loss.item() == pytest.approx(sum(MASKED))
    torch.testing.assert_close(student.grad, torch.tensor([[-sum(MASKED), sum(MASKED), 0]], dtype=torch.float64))


def test_second_derivatives_with_masked_classes():
    student, teacher = masked_logits(dtype=torch.float64)
    loss, p = KnowledgeDistillationLoss(), torch.tensor([1, math.e, 0], dtype=torch.float64) / (1 + math.e)
    hessian = torch.func.hessian(lambda s: loss(s, teacher))(student.detach())[0, :, 0]
    torch.testing.assert_close(hessian, torch.diag(p) - p[:, None] * p)
    (gradient,) = torch.autograd.grad(loss(student, teacher), student, create_graph=True)
    (second,) = torch.autograd.grad(gradient[0, 0], student)
    torch.testing.assert_close(second[0], hessian[0])


def test_a_class_that_the_student_alone_leaves_out_is_infinitely_far():
    student, teacher = (
        torch.tensor([[0, -math.inf, -math.inf], [0, 1, 2]]),
        torch.tensor([[0, 1, -math.inf], [0, 1, 2]]),
    )
    assert KnowledgeDistillationLoss()(student, teacher).item() == math.inf
    rows = KnowledgeDistillationLoss(reduction="none")(student, teacher)
    assert rows[0, 1] == math.inf and rows[0, 2] == 0 and rows[[0, 1], :1].isfinite().all()


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("row", [[0, math.nan, -math.inf], [-math.inf] * 3, [math.inf, 0, -math.inf]])
def test_rows_without_a_softmax_stay_nan(row, side):
    rows = [torch.tensor([[0, 1, -math.inf]]), torch.tensor([[1, 0, -math.inf]])]
    rows[side] = torch.tensor([row])
    assert KnowledgeDistillationLoss(reduction="none")(*rows).isnan().all()
    assert KnowledgeDistillationLoss()(*rows).isnan()


def test_kl_is_upstreams_attribute():
    student, teacher = logits()
    loss = KnowledgeDistillationLoss(2.0, "sum")
    assert isinstance(loss.kl, nn.KLDivLoss) and loss.kl.reduction == loss.reduction == "sum"
    summed = loss(student, teacher)
    loss.kl = nn.KLDivLoss(reduction="batchmean")
    torch.testing.assert_close(loss(student, teacher) * 5, summed)
    loss.reduction = "sum"
    assert torch.equal(loss(student, teacher), summed)


def test_star_import_brings_what_upstreams_does():
    namespace: dict = {}
    exec("from talib_fast.finetune.knowledge_distillation import *", namespace)
    assert namespace["nn"] is nn and namespace["F"] is F and "KnowledgeDistillationLoss" in namespace


def test_teacher_logits_made_under_inference_mode():
    student, teacher = logits()
    with torch.inference_mode():
        constant = teacher.clone()
    gradients = []
    for its in (teacher, constant):
        leaf = student.clone().requires_grad_()
        KnowledgeDistillationLoss()(leaf, its).backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)

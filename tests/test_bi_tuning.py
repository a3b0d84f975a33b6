import copy
import inspect
import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from classifier_support import assert_trains_alike_in_low_precision, with_workers
from compiler_support import needs_inductor
from harness import OperatorCalls
from rank_support import needs_gloo, spawn_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from talib_fast.finetune.bi_tuning import BiTuning, Bituning, Classifier, Keys

REQUIRED = inspect.Parameter.empty
CLASSES, QUEUE, FEATURES, PROJECTION, BATCH = 4, 3, 6, 5, 7


class Backbone(nn.Module):
    out_features = FEATURES

    def __init__(self, norm=False):
        super().__init__()
        self.conv = nn.Conv2d(3, FEATURES, 3)
        self.norm = nn.BatchNorm2d(FEATURES) if norm else nn.Identity()

    def forward(self, x):
        return self.norm(self.conv(x)).tanh()


def encoder(norm=False, classes=CLASSES, **options):
    return Classifier(Backbone(norm), classes, PROJECTION, **options)


def make(norm=False, classes=CLASSES, K=QUEUE, **options):
    return BiTuning(encoder(norm, classes), encoder(norm, classes), classes, K, **options)


def images(batch=BATCH, device="cpu", dtype=torch.float32):
    return torch.randn(batch, 3, 5, 5, device=device, dtype=dtype)


def step_inputs(batch=BATCH, classes=CLASSES, device="cpu", dtype=torch.float32):
    labels = torch.randint(classes, (batch,), device=device)
    return images(batch, device, dtype), images(batch, device, dtype), labels


def loss_of(y_q, logits_z, logits_y, labels_c, labels):
    contrast = nn.KLDivLoss(reduction="batchmean")
    return F.cross_entropy(y_q, labels) + contrast(logits_z, labels_c) + contrast(logits_y, labels_c)


def same_state(a, b):
    return all(torch.equal(a[name], b[name]) for name in a.keys() | b.keys())


class Oracle:
    """Bi-Tuning sample by sample, from its definition; the queues are nested lists ``[class][slot]`` of keys."""

    def __init__(self, model, key_buffers="own"):
        self.q, self.k = copy.deepcopy(model.encoder_q), copy.deepcopy(model.encoder_k)
        self.classes, self.K, self.m, self.T, self.key_buffers = (
            model.num_classes,
            model.K,
            model.m,
            model.T,
            key_buffers,
        )
        self.queue_h = self.unpack(model.queue_h)
        self.queue_z = self.unpack(model.queue_z)
        self.ptr = model.queue_ptr.tolist()

    def unpack(self, queue):
        return [[queue[:, c, k].clone() for k in range(self.K)] for c in range(self.classes)]

    def pack(self, queue):
        return torch.stack([torch.stack(keys, 1) for keys in queue], 1)

    def update_key_encoder(self):
        for q, k in zip(self.q.parameters(), self.k.parameters(), strict=True):
            k.data = self.m * k.data + (1 - self.m) * q.data
        for q, k in zip(self.q.buffers(), self.k.buffers(), strict=True):
            if self.key_buffers == "average" and k.is_floating_point():
                k.data = self.m * k.data + (1 - self.m) * q.data
            elif self.key_buffers != "own":
                k.data = q.data.clone()

    def columns(self, queue, own):
        order = [own, *(c for c in range(self.classes) if c != own)]
        return [key for c in order for key in queue[c]]

    def log_probabilities(self, similarities):
        scores = torch.stack(similarities) / self.T
        return scores - scores.exp().sum().log()

    def step(self, im_q, im_k, labels):
        y_q, z_q, h_q = self.q(im_q)
        with torch.no_grad():
            self.update_key_encoder()
            _, z_k, h_k = self.k(im_k)
        labels = labels.tolist()
        logits_z = [
            self.log_probabilities([z_q[i] @ z_k[i], *(z_q[i] @ key for key in self.columns(self.queue_z, c))])
            for i, c in enumerate(labels)
        ]
        for i, c in enumerate(labels):
            self.queue_h[c][self.ptr[c]], self.queue_z[c][self.ptr[c]] = h_k[i], z_k[i]
            self.ptr[c] = (self.ptr[c] + 1) % self.K
        logits_y = []
        for i, c in enumerate(labels):
            weight = torch.cat([self.q.head.weight[c], self.q.head.bias[c : c + 1]]).detach()
            weight = weight / weight.square().sum().sqrt()
            similarities = [h_q[i] @ weight, *(key @ weight for key in self.columns(self.queue_h, c))]
            logits_y.append(self.log_probabilities(similarities))
        labels_c = [1 / (self.K + 1) if j <= self.K else 0.0 for j in range(1 + self.classes * self.K)]
        labels_c = torch.tensor([labels_c] * len(labels), dtype=y_q.dtype)
        return y_q, torch.stack(logits_z), torch.stack(logits_y), labels_c


# --- Classifier


def test_signatures_are_the_contracts():
    assert [(name, p.default) for name, p in inspect.signature(Classifier).parameters.items()] == [
        ("backbone", REQUIRED),
        ("num_classes", REQUIRED),
        ("projection_dim", 128),
        ("finetune", True),
        ("pool_layer", None),
    ]
    assert [(name, p.default) for name, p in inspect.signature(BiTuning).parameters.items()] == [
        ("encoder_q", REQUIRED),
        ("encoder_k", REQUIRED),
        ("num_classes", REQUIRED),
        ("K", 40),
        ("m", 0.999),
        ("T", 0.07),
        ("key_buffers", "own"),
        ("check_labels", False),
        ("process_group", None),
    ]
    assert list(inspect.signature(BiTuning.forward).parameters) == ["self", "im_q", "im_k", "labels"]
    assert Bituning is BiTuning


def test_classifier_values(device):
    model = encoder().to(device).double()
    x = images(device=device, dtype=torch.float64)
    y, z, hn = model(x)
    assert y.shape == (BATCH, CLASSES) and z.shape == (BATCH, PROJECTION) and hn.shape == (BATCH, FEATURES + 1)
    for i, h in enumerate(model.backbone(x).mean((2, 3))):
        projection, extended = model.projector(h), torch.cat([h, h.new_ones(1)])
        torch.testing.assert_close(y[i], model.head(h))
        torch.testing.assert_close(z[i], projection / projection.square().sum().sqrt())
        torch.testing.assert_close(hn[i], extended / extended.square().sum().sqrt())
    evaluated = model.eval()(x)
    assert isinstance(evaluated, torch.Tensor) and torch.equal(evaluated, y)


def test_classifier_initialises_the_head_narrowly():
    model = Classifier(Backbone(), 5000)
    assert model.head.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert model.head.weight.mean().item() == pytest.approx(0, abs=5e-4)
    assert not model.head.bias.any() and model.projection_dim == 128 and model.projector.out_features == 128


@pytest.mark.parametrize("finetune, pretrained_lr", [(True, 0.1 * 0.3), (False, 0.3)])
def test_classifier_has_four_parameter_groups(finetune, pretrained_lr):
    model = encoder(finetune=finetune)
    groups = model.get_parameters(base_lr=0.3)
    assert [group["lr"] for group in groups] == [pretrained_lr, 0.3, 0.3, pretrained_lr]
    modules = (model.backbone, model.bottleneck, model.head, model.projector)
    for group, module in zip(groups, modules, strict=True):
        assert set(group) == {"params", "lr"}
        assert [id(p) for p in group["params"]] == [id(p) for p in module.parameters()]
    rate = 0.1 if finetune else 1.0
    assert [group["lr"] for group in model.get_parameters()] == [rate, 1.0, 1.0, rate]


def test_classifier_state_dict_and_pool_layer():
    pool = nn.Sequential(nn.AdaptiveMaxPool2d(1), nn.Flatten())
    model = Classifier(Backbone(), CLASSES, PROJECTION, False, pool)
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == {
        "backbone.conv.weight": (FEATURES, 3, 3, 3),
        "backbone.conv.bias": (FEATURES,),
        "head.weight": (CLASSES, FEATURES),
        "head.bias": (CLASSES,),
        "projector.weight": (PROJECTION, FEATURES),
        "projector.bias": (PROJECTION,),
    }
    assert model.pool_layer is pool and model.finetune is False
    assert model.features_dim == FEATURES and model.num_classes == CLASSES
    x = images()
    torch.testing.assert_close(model(x)[0], model.head(model.backbone(x).amax((2, 3))))


@pytest.mark.parametrize("dimension", [0, -1, 2.0])
def test_classifier_with_a_bad_projection(dimension):
    with pytest.raises(ValueError, match=rf"projection_dim to be a positive integer, got {dimension}"):
        Classifier(Backbone(), CLASSES, dimension)


# --- BiTuning: values


@pytest.mark.parametrize("key_buffers", ["own", "copy", "average"])
def test_many_training_steps_equal_the_per_sample_loop(key_buffers):
    model = make(norm=True, m=0.9, T=0.5, key_buffers=key_buffers).double()
    oracle = Oracle(model, key_buffers)
    optimizers = [torch.optim.SGD(e.get_parameters(0.2), lr=0.2, momentum=0.9) for e in (model.encoder_q, oracle.q)]
    for step in range(25):
        im_q, im_k, labels = step_inputs(dtype=torch.float64)
        if step % 5 == 1:
            labels.fill_(step % CLASSES)
        outputs, expected = model(im_q, im_k, labels), oracle.step(im_q, im_k, labels)
        for got, value in zip(outputs, expected, strict=True):
            torch.testing.assert_close(got, value, rtol=1e-9, atol=1e-9)
        for results, optimizer in zip((outputs, expected), optimizers, strict=True):
            optimizer.zero_grad()
            loss_of(*results, labels).backward()
            optimizer.step()
        torch.testing.assert_close(model.queue_h, oracle.pack(oracle.queue_h))
        torch.testing.assert_close(model.queue_z, oracle.pack(oracle.queue_z))
        assert model.queue_ptr.tolist() == oracle.ptr
    for encoder, reference in ((model.encoder_q, oracle.q), (model.encoder_k, oracle.k)):
        for name, tensor in encoder.state_dict().items():
            torch.testing.assert_close(tensor, reference.state_dict()[name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("classes, K, batch", [(1, 1, 4), (1, 5, 3), (3, 1, 7), (2, 2, 11), (9, 4, 1)])
def test_odd_sizes_equal_the_per_sample_loop(classes, K, batch):
    model = make(classes=classes, K=K).double()
    oracle = Oracle(model)
    for _ in range(4):
        inputs = step_inputs(batch, classes, dtype=torch.float64)
        outputs = model(*inputs)
        assert outputs[0].shape == (batch, classes)
        assert all(output.shape == (batch, 1 + classes * K) for output in outputs[1:])
        for got, value in zip(outputs, oracle.step(*inputs), strict=True):
            torch.testing.assert_close(got, value)
        torch.testing.assert_close(model.queue_h, oracle.pack(oracle.queue_h))
        torch.testing.assert_close(model.queue_z, oracle.pack(oracle.queue_z))
        assert model.queue_ptr.tolist() == oracle.ptr


def test_step_on_the_device_equals_the_per_sample_loop(device):
    model = make().double()
    oracle, model = Oracle(model), model.to(device)
    for _ in range(3):
        inputs = step_inputs(dtype=torch.float64)
        outputs = model(*(x.to(device) for x in inputs))
        for got, value in zip(outputs, oracle.step(*inputs), strict=True):
            assert got.device.type == device.type
            torch.testing.assert_close(got.cpu(), value)
    torch.testing.assert_close(model.queue_h.cpu(), oracle.pack(oracle.queue_h))


def test_labels_may_stay_on_the_host(device):
    model = make().to(device)
    im_q, im_k, labels = step_inputs()
    assert model(im_q.to(device), im_k.to(device), labels)[1].device.type == device.type


def test_positional_and_keyword_calls_agree():
    model = make()
    other = copy.deepcopy(model)
    im_q, im_k, labels = step_inputs()
    for got, value in zip(model(im_q, im_k, labels), other(labels=labels, im_k=im_k, im_q=im_q), strict=True):
        assert torch.equal(got, value)


def test_more_samples_of_a_class_than_slots_keep_the_last_writers():
    model = make()
    im_q, im_k, _ = step_inputs()
    model.queue_ptr[2] = 1
    before = model.queue_z.clone()
    model(im_q, im_k, torch.full((BATCH,), 2))
    keys = model.encoder_k(im_k)[1]
    for slot, sample in {1: 6, 2: 4, 0: 5}.items():
        torch.testing.assert_close(model.queue_z[:, 2, slot], keys[sample])
    assert model.queue_ptr.tolist() == [0, 0, (1 + BATCH) % QUEUE, 0]
    assert torch.equal(model.queue_z[:, [0, 1, 3]], before[:, [0, 1, 3]])


def test_columns_are_own_key_then_own_class_then_the_others_ascending():
    model = make(T=1.0)
    im_q, im_k, labels = step_inputs()
    queue = model.queue_z.clone()
    logits_z = model(im_q, im_k, labels)[1]
    z_q = model.encoder_q(im_q)[1]
    for i, label in enumerate(labels.tolist()):
        order = [label] + [c for c in range(CLASSES) if c != label]
        expected = torch.cat([z_q[i] @ queue[:, c] for c in order])
        differences = logits_z[i, 1:] - logits_z[i, 1]
        torch.testing.assert_close(differences, expected - expected[0])
        own_key = z_q[i] @ model.encoder_k(im_k)[1][i]
        torch.testing.assert_close(logits_z[i, 0] - logits_z[i, 1], own_key - expected[0])


def test_logits_z_reads_the_queue_before_this_batch_logits_y_after():
    model, (im_q, im_k, _) = make(T=1.0), step_inputs()
    labels = torch.arange(BATCH) % CLASSES
    queues = [(model.queue_z.clone(), model.queue_h.clone())]
    _, logits_z, logits_y, _ = model(im_q, im_k, labels)
    queues.append((model.queue_z, model.queue_h))
    z_q, head = model.encoder_q(im_q)[1], model.encoder_q.head
    weight = F.normalize(torch.cat([head.weight, head.bias[:, None]], 1), dim=1)[labels]
    for right, (queue_z, queue_h) in zip(((True, False), (False, True)), queues, strict=True):
        keys = ((logits_z, z_q, queue_z), (logits_y, weight, queue_h))
        for is_right, (logits, query, queue) in zip(right, keys, strict=True):
            own = torch.stack([query[i] @ queue[:, c] for i, c in enumerate(labels)])
            differences = logits[:, 1 : QUEUE + 1] - logits[:, 1:2]
            assert torch.allclose(differences, own - own[:, :1], atol=1e-5) is is_right


def test_outputs_are_log_probabilities_and_even_contrastive_labels(device):
    model = make().to(device)
    _, logits_z, logits_y, labels_c = model(*step_inputs(device=device))
    for logits in (logits_z, logits_y):
        torch.testing.assert_close(logits.exp().sum(1), torch.ones(BATCH, device=device))
    assert (labels_c[:, : QUEUE + 1] == 1 / (QUEUE + 1)).all() and not labels_c[:, QUEUE + 1 :].any()
    assert not labels_c.requires_grad and labels_c.dtype == torch.float32


def test_gradients_reach_the_query_encoder_only():
    model = make()
    y_q, logits_z, logits_y, _ = model(*step_inputs())
    logits_y[:, 0].sum().backward(retain_graph=True)
    assert model.encoder_q.head.weight.grad is None and model.encoder_q.head.bias.grad is None
    assert model.encoder_q.projector.weight.grad is None
    assert model.encoder_q.backbone.conv.weight.grad.abs().sum() > 0
    model.zero_grad()
    logits_z[:, 0].sum().backward(retain_graph=True)
    assert model.encoder_q.head.weight.grad is None and model.encoder_q.projector.weight.grad.abs().sum() > 0
    y_q.square().sum().backward()
    assert model.encoder_q.head.weight.grad.abs().sum() > 0
    assert all(p.grad is None and not p.requires_grad for p in model.encoder_k.parameters())
    assert not any(buffer.requires_grad for buffer in model.buffers())


def test_backward_after_a_second_forward():
    model = make(m=1.0).double()
    twin = copy.deepcopy(model)
    first, second = step_inputs(dtype=torch.float64), step_inputs(dtype=torch.float64)
    losses = [loss_of(*model(*inputs), inputs[2]) for inputs in (first, second)]
    sum(losses).backward()
    for inputs in (first, second):
        loss_of(*twin(*inputs), inputs[2]).backward()
    for a, b in zip(model.encoder_q.parameters(), twin.encoder_q.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


# --- BiTuning: keys that are not finite


def spoilt(images, *samples, value=math.nan):
    images = images.clone()
    images[list(samples)] = value
    return images


@pytest.mark.parametrize("share", [0.3, 0.8, 1.0])
@pytest.mark.parametrize("classes, K, batch", [(4, 3, 2), (4, 3, 3), (2, 2, 11), (3, 1, 7), (1, 3, 5), (4, 3, 1)])
def test_fault_keys_that_are_not_finite_were_enqueued(classes, K, batch, share, device):
    model = make(classes=classes, K=K)
    model.queue_ptr.random_(K)
    expected = copy.deepcopy(model)
    model = model.to(device)
    for _ in range(5):
        h, z, labels = (
            torch.randn(batch, FEATURES + 1),
            torch.randn(batch, PROJECTION),
            torch.randint(classes, (batch,)),
        )
        bad = torch.rand(batch) < share
        for i in bad.nonzero().flatten().tolist():
            (h, z)[i % 2][i, i % PROJECTION] = (math.nan, math.inf, -math.inf)[i % 3]
        model._dequeue_and_enqueue(h.to(device), z.to(device), labels.to(device))
        for i in (~bad).nonzero().flatten().tolist():
            c = labels[i]
            slot = expected.queue_ptr[c].item()
            expected.queue_h[:, c, slot], expected.queue_z[:, c, slot] = h[i], z[i]
            expected.queue_ptr[c] = (slot + 1) % K
        assert same_state(
            {name: buffer.cpu() for name, buffer in model.named_buffers()}, dict(expected.named_buffers())
        )


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_step_after_one_with_a_sample_that_is_not_finite(value, device):
    model = make().double().to(device)
    im_q, im_k, labels = step_inputs(device=device, dtype=torch.float64)
    twin, kept = copy.deepcopy(model), [0, 1, 2, 4, 5, 6]
    model(im_q, spoilt(im_k, 3, value=value), labels)
    twin(im_q[kept], im_k[kept], labels[kept])
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, twin.state_dict()[name])
    inputs = step_inputs(device=device, dtype=torch.float64)
    loss = loss_of(*model(*inputs), inputs[2])
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.encoder_q.parameters())


def test_enqueue_operator():
    model = make()
    keys = (torch.randn(5, FEATURES + 1), spoilt(torch.randn(5, PROJECTION), 1), torch.tensor([0, 2, 2, 2, 2]))
    torch.library.opcheck(torch.ops.talib_fast.enqueue.default, (*model.buffers(recurse=False), *keys))


# --- BiTuning: accumulation over micro-batches


@pytest.mark.parametrize("sizes", [(8,), (4, 4), (2, 2, 2, 2), (5, 2, 1)])
def test_micro_batches_equal_one_batch(sizes, device):
    one, several = [copy.deepcopy(model) for model in [make(m=0.5, T=0.5).double().to(device)] * 2]
    optimizers = [torch.optim.SGD(model.encoder_q.parameters(), lr=0.1) for model in (one, several)]
    for _ in range(2):
        im_q, im_k, labels = step_inputs(8, device=device, dtype=torch.float64)
        loss = loss_of(*one(im_q, im_k, labels), labels)
        losses = []
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        parts = list(zip(im_q.split(sizes), im_k.split(sizes), labels.split(sizes), strict=True))
        keys = several.enqueue((its_im_k, its_labels) for _, its_im_k, its_labels in parts)
        for (its_im_q, _, its_labels), own in zip(parts, keys, strict=True):
            losses.append(loss_of(*several(its_im_q, own), its_labels) * len(its_labels) / 8)
            losses[-1].backward()
        torch.testing.assert_close(sum(losses), loss)
        for p, q in zip(several.encoder_q.parameters(), one.encoder_q.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-12)
        for optimizer in optimizers:
            optimizer.step()
        for name, tensor in several.state_dict().items():
            torch.testing.assert_close(tensor, one.state_dict()[name], rtol=1e-10, atol=1e-12)


def test_step_of_keys_compiles_without_a_graph_break():
    model, (im_q, im_k, labels) = make(), step_inputs()
    twin = copy.deepcopy(model)
    for bituning in (model, twin):
        (keys,) = bituning.enqueue([(im_k, labels)])
        assert isinstance(keys, Keys) and not keys.z_k.requires_grad
        forward = torch.compile(bituning, backend="aot_eager", fullgraph=True) if bituning is model else bituning
        loss_of(*forward(im_q, keys), labels).backward()
    for p, q in zip(model.encoder_q.parameters(), twin.encoder_q.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_bad_micro_batches():
    model, (im_q, im_k, labels) = make(), step_inputs()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"at least one micro-batch \(im_k, labels\), got none"):
        model.enqueue([])
    with pytest.raises(ValueError, match=r"im_k and labels of one batch size, got 7 and \[3\]"):
        model.enqueue([(im_k, labels), (im_k, labels[:3])])
    with pytest.raises(ValueError, match=r"labels in \[0, 4\), got labels from 4 to 4"):
        model.enqueue([(im_k, torch.full((BATCH,), 4))])
    with pytest.raises(TypeError, match=r"tensor of integers, got list"):
        model.enqueue([(im_k, [0] * BATCH)])
    with pytest.raises(RuntimeError, match=r"training mode to enqueue keys in, got evaluation mode"):
        model.eval().enqueue([(im_k, labels)])
    assert same_state(model.train().state_dict(), before)
    (keys,) = model.enqueue([(im_k, labels)])
    with pytest.raises(ValueError, match=r"im_q and keys of one batch size, got 3 and 7"):
        model(im_q[:3], keys)
    with pytest.raises(ValueError, match=r"im_q and keys alone, .* got labels as well"):
        model(im_q, keys, labels)
    assert torch.equal(model.eval()(im_q, keys), model(im_q))


# --- BiTuning: upstream's hooks


class Hooked(BiTuning):
    def _momentum_update_key_encoder(self):
        self.calls = ["momentum"]
        super()._momentum_update_key_encoder()

    def _dequeue_and_enqueue(self, h, z, label):
        assert h.shape == (1, FEATURES + 1) and z.shape == (1, PROJECTION) and label.shape == ()
        self.calls.append(label.item())
        super()._dequeue_and_enqueue(h, z, label)


def test_fault_hooks_of_a_subclass_were_ignored():
    model = make(m=0.5)
    hooked = Hooked(encoder(), encoder(), CLASSES, QUEUE, 0.5)
    hooked.load_state_dict(model.state_dict())
    for _ in range(2):
        inputs = step_inputs()
        for got, value in zip(hooked(*inputs), model(*inputs), strict=True):
            torch.testing.assert_close(got, value)
        assert hooked.calls == ["momentum", *inputs[2].tolist()]
        assert same_state(hooked.state_dict(), model.state_dict())


def test_several_keys_of_one_class_are_enqueued_at_once():
    model, keys = make(), (torch.randn(2, FEATURES + 1), torch.randn(2, PROJECTION))
    model.queue_ptr[1] = QUEUE - 1
    model._dequeue_and_enqueue(*keys, torch.tensor(1))
    for queue, own in zip((model.queue_h, model.queue_z), keys, strict=True):
        assert torch.equal(queue[:, 1, [QUEUE - 1, 0]], own.T)
    assert model.queue_ptr.tolist() == [0, 1, 0, 0]


# --- BiTuning: state


def test_buffers_and_state_dict():
    torch.manual_seed(3)
    model = make()
    shapes = {name: tuple(buffer.shape) for name, buffer in model.named_buffers()}
    assert shapes == {
        "queue_h": (FEATURES + 1, CLASSES, QUEUE),
        "queue_z": (PROJECTION, CLASSES, QUEUE),
        "queue_ptr": (CLASSES,),
    }
    assert model.queue_ptr.dtype == torch.long and not model.queue_ptr.any()
    for queue in (model.queue_h, model.queue_z):
        torch.testing.assert_close(queue.square().sum(0), torch.ones(CLASSES, QUEUE))
    encoders = [f"encoder_{x}.{name}" for x in "qk" for name in model.encoder_q.state_dict()]
    assert set(model.state_dict()) == {"queue_h", "queue_z", "queue_ptr", *encoders}
    assert (model.K, model.m, model.T, model.num_classes) == (QUEUE, 0.999, 0.07, CLASSES)


def test_defaults():
    model = BiTuning(encoder(), encoder(), CLASSES)
    assert (model.K, model.m, model.T, model.key_buffers) == (40, 0.999, 0.07, "own")
    assert "num_classes=4, K=40, m=0.999, T=0.07" in repr(model)


def test_key_encoder_starts_as_the_query_encoder():
    model = make()
    for q, k in zip(model.encoder_q.parameters(), model.encoder_k.parameters(), strict=True):
        assert torch.equal(q, k) and q.requires_grad and not k.requires_grad and q.data_ptr() != k.data_ptr()


def test_deepcopy_and_state_dict_round_trip():
    model = make(norm=True)
    model(*step_inputs())
    other, inputs = make(norm=True), step_inputs()
    other.load_state_dict(model.state_dict())
    twin = copy.deepcopy(model)
    outputs = model(*inputs)
    for copied in (other, twin):
        for got, value in zip(copied(*inputs), outputs, strict=True):
            assert torch.equal(got, value)
        assert same_state(copied.state_dict(), model.state_dict())


def test_fault_momentum_update_rebound_storage():
    model = make(norm=True, m=0.75, key_buffers="average")
    with torch.no_grad():
        for p in model.encoder_q.parameters():
            p.add_(torch.randn_like(p))
    tensors = [*model.encoder_k.parameters(), *model.buffers()]
    addresses = [t.data_ptr() for t in tensors]
    before = [k.clone() for k in model.encoder_k.parameters()]
    for _ in range(2):
        model(*step_inputs())
    assert [t.data_ptr() for t in [*model.encoder_k.parameters(), *model.buffers()]] == addresses
    pairs = zip(before, model.encoder_q.parameters(), model.encoder_k.parameters(), strict=True)
    for k, q, now in pairs:
        once = 0.75 * k + 0.25 * q
        torch.testing.assert_close(now, 0.75 * once + 0.25 * q)


@pytest.mark.parametrize("m", [0, 1])
def test_extreme_momentum(m):
    model = make(m=m)
    with torch.no_grad():
        for p in model.encoder_q.parameters():
            p.add_(1)
    before = copy.deepcopy(model.encoder_k.state_dict())
    model(*step_inputs())
    assert same_state(model.encoder_k.state_dict(), before if m else model.encoder_q.state_dict())


@pytest.mark.parametrize("key_buffers", ["own", "copy", "average"])
def test_buffers_of_the_key_encoder(key_buffers):
    model, seen = make(norm=True, m=0.75, key_buffers=key_buffers), []
    model(*step_inputs())
    norm_q, norm_k = model.encoder_q.backbone.norm, model.encoder_k.backbone.norm
    previous = norm_k.running_mean.clone()
    norm_k.num_batches_tracked.fill_(10)
    model.encoder_k.register_forward_pre_hook(
        lambda *_: seen.extend((norm_k.running_mean.clone(), norm_k.num_batches_tracked.item()))
    )
    im_q, im_k, labels = step_inputs()
    model(im_q, im_k, labels)
    query = norm_q.running_mean
    mean = {"own": previous, "copy": query, "average": 0.75 * previous + 0.25 * query}[key_buffers]
    tracked = {"own": 10, "copy": 2, "average": 2}[key_buffers]
    torch.testing.assert_close(seen[0], mean)
    assert seen[1] == tracked
    batch_mean = model.encoder_k.backbone.conv(im_k).mean((0, 2, 3))
    torch.testing.assert_close(norm_k.running_mean, 0.9 * mean + 0.1 * batch_mean)
    assert norm_k.num_batches_tracked.item() == tracked + 1


@pytest.mark.parametrize("key_buffers", ["own", "average"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fault_half_precision_rounded_the_momentum_away(dtype, key_buffers, device):
    model = make(norm=True, m=0.999, key_buffers=key_buffers).to(device, dtype)

    def pairs():
        found = zip(model.encoder_k.parameters(), model.encoder_q.parameters(), strict=True)
        norm_k, norm_q = model.encoder_k.backbone.norm, model.encoder_q.backbone.norm
        return [*found, (norm_k.running_mean, norm_q.running_mean)] if key_buffers == "average" else [*found]

    def moved(steps):
        return [k.double() + (1 - 0.999**steps) * (q.double() - k.double()) for k, q in pairs()]

    for _, q in pairs():
        q.data += 0.05 * torch.rand_like(q)
    for k in (None, 1):  # and from values that came in between, as from a checkpoint
        for tensor, _ in pairs() if k else ():
            tensor.data.fill_(k)
        expected = moved(100)
        for _ in range(100):
            model._momentum_update_key_encoder()
        for (tensor, _), right in zip(pairs(), expected, strict=True):
            torch.testing.assert_close(tensor.double(), right, rtol=torch.finfo(dtype).eps, atol=1e-5)


def test_averages_of_half_precision_are_in_no_state_dict(device):
    model = make(norm=True).to(device, torch.bfloat16)
    for q, k in zip(model.encoder_q.parameters(), model.encoder_k.parameters(), strict=True):
        q.data.fill_(2)
        k.data.fill_(1)

    def check(model, start):
        for _ in range(100):
            model._momentum_update_key_encoder()
        for k in model.encoder_k.parameters():
            right = torch.full_like(k, 2 + (start - 2) * 0.999**100, dtype=torch.float64)
            torch.testing.assert_close(k.double(), right, rtol=0, atol=2**-8 + 1e-5)  # half the distance of two numbers

    check(model, 1)
    assert set(model.state_dict()) == set(make(norm=True).state_dict())
    resumed = make(norm=True).to(device, torch.bfloat16)
    resumed.load_state_dict(model.state_dict())
    copied = copy.deepcopy(model)
    check(resumed, 1.09375)  # 2 - 0.999^100 = 1.0952, rounded to bfloat16
    check(model, 2 - 0.999**100)
    check(copied, 2 - 0.999**100)
    assert same_state(copied.encoder_k.state_dict(), model.encoder_k.state_dict())


def test_key_encoder_that_is_cast_by_itself():
    model = make(m=0.75)
    model.encoder_k.bfloat16()
    for q, k in zip(model.encoder_q.parameters(), model.encoder_k.parameters(), strict=True):
        q.data.fill_(2)
        k.data.fill_(1)
    model._momentum_update_key_encoder()
    for k in model.encoder_k.parameters():
        assert k.dtype == torch.bfloat16 and (k == 1.25).all()


@pytest.mark.parametrize("cast", ["encoders", "model"])
def test_step_in_half_precision_compiles_once(cast):
    parts = [encoder(norm=True) for _ in range(2)]
    if cast == "encoders":
        parts = [part.bfloat16() for part in parts]
    model = BiTuning(*parts, CLASSES, QUEUE, key_buffers="average").bfloat16()
    step = torch.compile(model, backend="aot_eager", fullgraph=True)
    for stance in ("default", "fail_on_recompile", "fail_on_recompile"):
        im_q, im_k, labels = step_inputs(dtype=torch.bfloat16)
        with torch.compiler.set_stance(stance):
            loss_of(*step(im_q, im_k, labels), labels).backward()


def test_key_encoder_in_float32_follows_a_query_encoder_in_half_precision():
    model = make(m=0.75)
    model.encoder_q.bfloat16()
    with torch.no_grad():
        for k in model.encoder_k.parameters():
            k.fill_(1)
    model._momentum_update_key_encoder()
    for k, q in zip(model.encoder_k.parameters(), model.encoder_q.parameters(), strict=True):
        torch.testing.assert_close(k, 0.75 + 0.25 * q.float())


def test_fault_eval_crashed(device):
    model = make(norm=True).to(device)
    im_q, im_k, labels = step_inputs(device=device)
    model(im_q, im_k, labels)
    model.eval()
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for outputs in (model(im_q), model(im_q, im_k), model(im_q, im_k, labels), model(im_q=im_q, labels=labels)):
            assert isinstance(outputs, torch.Tensor) and torch.equal(outputs, model.encoder_q(im_q))
    assert outputs.shape == (BATCH, CLASSES)
    assert same_state(model.state_dict(), before)
    assert len(model.train()(im_q, im_k, labels)) == 4


# --- BiTuning: host synchronisation and operators


@pytest.mark.parametrize("classes, K, batch", [(2, 1, 2), (200, 40, 48)])
def test_fault_forward_took_720_host_syncs_and_3955_operators(classes, K, batch):
    model, inputs = make(classes=classes, K=K), step_inputs(batch, classes)
    with OperatorCalls(model.encoder_q, model.encoder_k) as calls:
        model(*inputs)
    assert not {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal"} & set(calls.names)
    assert len(calls.names) < 60


def test_step_needs_no_value_on_the_host():
    model, inputs = make(norm=True).to("meta"), [x.to("meta") for x in step_inputs()]
    outputs = model(*inputs)
    loss_of(*outputs, inputs[2]).backward()
    assert [tuple(output.shape) for output in outputs] == [(BATCH, CLASSES)] + [(BATCH, 1 + CLASSES * QUEUE)] * 3
    model.check_labels = True
    with pytest.raises((RuntimeError, NotImplementedError)):
        model(*inputs)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_step_does_not_synchronise():
    model, inputs = make(norm=True).cuda(), step_inputs(device="cuda")
    model(*inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss_of(*model(*inputs), inputs[2]).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_step_in_a_cuda_graph():
    model, inputs = make().cuda().double(), step_inputs(device="cuda", dtype=torch.float64)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        model(*inputs)
    torch.cuda.current_stream().wait_stream(stream)
    twin, graph = copy.deepcopy(model), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = model(*inputs)
    model.load_state_dict(twin.state_dict())
    for _ in range(3):
        for static, new in zip(inputs, step_inputs(device="cuda", dtype=torch.float64), strict=True):
            static.copy_(new)
        graph.replay()
        for got, value in zip(outputs, twin(*inputs), strict=True):
            torch.testing.assert_close(got, value)
    assert torch.equal(model.queue_ptr, twin.queue_ptr)


# --- BiTuning: precision and compilation


def test_autocast_keeps_log_probabilities_in_float32(device):
    model = make().to(device)
    exact, inputs = copy.deepcopy(model), step_inputs(device=device)
    with torch.autocast(device.type, torch.bfloat16):
        outputs = model(*inputs)
    reference = exact(*inputs)
    for got, value in zip(outputs, reference, strict=True):
        torch.testing.assert_close(got.float(), value, atol=0.3, rtol=0.05)
    loss_of(*(output.float() for output in outputs), inputs[2]).backward()
    assert all(p.grad.isfinite().all() for p in model.encoder_q.parameters())
    assert [output.dtype for output in outputs[1:]] == [torch.float32] * 3
    for output in (outputs[1].exp(), outputs[2].exp(), outputs[3]):
        torch.testing.assert_close(output.float().sum(1), torch.ones(BATCH, device=device))


@with_workers
def test_training_with_workers_autocast_and_channels_last(device):
    def loss_of_batch(model, im_q, im_k, labels):
        return loss_of(*model(im_q, im_k, labels), labels)

    inputs = step_inputs(12)
    assert_trains_alike_in_low_precision(make(norm=True, T=0.5), device, inputs, loss_of_batch)


def test_half_precision_model(device):
    model = make().to(device)
    exact, inputs = copy.deepcopy(model), step_inputs(device=device)
    outputs = model.bfloat16()(inputs[0].bfloat16(), inputs[1].bfloat16(), inputs[2])
    for got, value in zip(outputs, exact(*inputs), strict=True):
        torch.testing.assert_close(got.float(), value, atol=0.3, rtol=0.05)
    assert model.queue_h.dtype == model.queue_z.dtype == torch.bfloat16


def test_labels_of_any_integer_type():
    model = make()
    inputs = step_inputs()
    outputs = copy.deepcopy(model)(*inputs)
    for dtype in (torch.int32, torch.uint8, torch.int16):
        for got, value in zip(copy.deepcopy(model)(*inputs[:2], inputs[2].to(dtype)), outputs, strict=True):
            assert torch.equal(got, value)


def test_empty_batch():
    model = make()
    before = copy.deepcopy(model.state_dict())
    outputs = model(images(0), images(0), torch.zeros(0, dtype=torch.long))
    assert [tuple(o.shape) for o in outputs] == [(0, CLASSES)] + [(0, 1 + CLASSES * QUEUE)] * 3
    assert same_state(model.state_dict(), before)


def test_step_under_another_default_device():
    model, inputs = make(), step_inputs()
    twin = copy.deepcopy(model)
    with torch.device("meta"):
        outputs = model(*inputs)
    for got, value in zip(outputs, twin(*inputs), strict=True):
        assert torch.equal(got, value)


def test_keys_and_labels_made_under_inference_mode():
    model, inputs = make(), step_inputs()
    twin = copy.deepcopy(model)
    with torch.inference_mode():
        im_k, labels = inputs[1].clone(), inputs[2].clone()
    for bituning, arguments in ((model, (inputs[0], im_k, labels)), (twin, inputs)):
        loss_of(*bituning(*arguments), inputs[2]).backward()
    for p, q in zip(model.encoder_q.parameters(), twin.encoder_q.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


@pytest.mark.parametrize("how", ["built", "enqueued"])
def test_fault_what_was_made_under_inference_mode_could_not_be_trained_with(how):
    encoders, (im_q, im_k, labels) = (encoder(), encoder()), step_inputs()
    with torch.inference_mode(how == "built"):
        model = BiTuning(*encoders, CLASSES, QUEUE)
    twin = copy.deepcopy(model)
    with torch.inference_mode(how == "enqueued"):
        (keys,) = model.enqueue([(im_k, labels)])
    loss_of(*model(im_q, keys), labels).backward()
    loss_of(*twin(im_q, im_k, labels), labels).backward()
    assert same_state(model.state_dict(), twin.state_dict())
    for p, q in zip(model.encoder_q.parameters(), twin.encoder_q.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def train(model, forward, steps):
    optimizer = torch.optim.SGD(model.encoder_q.get_parameters(0.1), lr=0.1)
    for inputs in steps:
        loss = loss_of(*forward(*inputs), inputs[2])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=needs_inductor)])
def test_fault_compiled_training_took_gradients_with_the_queue_after_the_batch(backend):
    model = make()
    twin, steps = copy.deepcopy(model), [step_inputs() for _ in range(3)]
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    loss = train(model, compiled, steps)
    torch.testing.assert_close(loss, train(twin, twin, steps))
    im_q, im_k, labels = steps[0]
    for forward in (compiled, twin):
        forward(im_q, spoilt(im_k, 0, 4), labels)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, twin.state_dict()[name])


@pytest.mark.parametrize("label", [CLASSES, -1])
def test_compiled_step_refuses_labels_out_of_range(label):
    model = torch.compile(make(), backend="aot_eager", fullgraph=True)
    with pytest.raises(RuntimeError, match="out of bounds"):
        model(images(3), images(3), torch.tensor([0, label, 1]))


def test_step_compiles_without_a_graph_break_on_another_device():
    model, inputs = make().to("meta"), [x.to("meta") for x in step_inputs()]
    outputs = torch.compile(model, backend="aot_eager", fullgraph=True)(*inputs)
    loss_of(*outputs, inputs[2]).backward()
    assert outputs[1].shape == (BATCH, 1 + CLASSES * QUEUE)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_compiled_training_on_cuda_equals_eager_without_a_graph_break():
    model = make().cuda().double()
    twin, steps = copy.deepcopy(model), [step_inputs(device="cuda", dtype=torch.float64) for _ in range(3)]
    loss = train(model, torch.compile(model, backend="aot_eager", fullgraph=True), steps)
    torch.testing.assert_close(loss, train(twin, twin, steps))
    torch.testing.assert_close(model.queue_h, twin.queue_h)


# --- BiTuning: bad input


@pytest.mark.parametrize(
    "labels, message",
    [
        ([0, 4, 1], r"labels in \[0, 4\), got labels from 0 to 4"),
        ([2, -1, 1], r"labels in \[0, 4\), got labels from -1 to 2"),
    ],
)
def test_fault_labels_out_of_range_were_accepted(labels, message):
    model = make(norm=True)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        model(images(3), images(3), torch.tensor(labels))
    assert same_state(model.state_dict(), before)


def test_labels_on_the_device_are_checked_on_request(device):
    model = make(check_labels=True).to(device)
    with pytest.raises(ValueError, match=r"labels in \[0, 4\), got labels from 0 to 9"):
        model(images(2, device), images(2, device), torch.tensor([0, 9], device=device))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"K": 0}, r"K, the queue length, to be a positive integer, got 0"),
        ({"K": 4.0}, r"K, the queue length, to be a positive integer, got 4.0"),
        ({"m": 1.5}, r"momentum m in \[0, 1\], got 1.5"),
        ({"m": -0.1}, r"momentum m in \[0, 1\], got -0.1"),
        ({"m": math.nan}, r"momentum m in \[0, 1\], got nan"),
        ({"T": 0}, r"temperature T > 0, got 0"),
        ({"T": math.nan}, r"temperature T > 0, got nan"),
        ({"key_buffers": "share"}, r"key_buffers to be own, copy or average, got 'share'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        BiTuning(encoder(), encoder(), CLASSES, **options)


@pytest.mark.parametrize("option, name", [("m", "momentum m"), ("T", "temperature T")])
def test_options_that_are_no_numbers(option, name):
    with pytest.raises(TypeError, match=rf"expected {name} to be a number, got 'x'"):
        BiTuning(encoder(), encoder(), CLASSES, **{option: "x"})


def test_encoders_that_share_parameters():
    one, other = encoder(), encoder()
    other.backbone = one.backbone
    name = next(iter(dict(one.named_parameters())))
    with pytest.raises(ValueError, match=rf"share no parameter, but '{name}' is in both"):
        BiTuning(one, other, CLASSES)
    assert all(parameter.requires_grad for parameter in (*one.parameters(), *other.parameters()))


def test_bad_encoders():
    one = encoder()
    with pytest.raises(ValueError, match=r"two encoders, got the same module twice"):
        BiTuning(one, one, CLASSES)
    with pytest.raises(ValueError, match=r"two encoders of one architecture"):
        BiTuning(one, encoder(norm=True), CLASSES)
    with pytest.raises(ValueError, match=r"two encoders of one architecture"):
        BiTuning(one, encoder(classes=5), CLASSES)
    with pytest.raises(ValueError, match=r"num_classes = 4, the encoder's, got 5"):
        BiTuning(one, encoder(), 5)
    with pytest.raises(TypeError, match=r"encoder_q to be a bi_tuning\.Classifier, got Linear without num_classes"):
        BiTuning(nn.Linear(3, 3), one, CLASSES)
    with pytest.raises(TypeError, match=r"encoder_k to be a torch\.nn\.Module, got str"):
        BiTuning(one, "x", CLASSES)


def test_head_without_bias():
    one, other = encoder(), encoder()
    for module in (one, other):
        module.head = nn.Linear(FEATURES, CLASSES, bias=False)
    model = BiTuning(one, other, CLASSES, QUEUE)
    with_bias = make()
    with_bias.load_state_dict({**model.state_dict(), **{f"encoder_{x}.head.bias": torch.zeros(CLASSES) for x in "qk"}})
    inputs = step_inputs()
    for got, value in zip(model(*inputs), with_bias(*inputs), strict=True):
        torch.testing.assert_close(got, value)


@pytest.mark.parametrize(
    "head, error, message",
    [
        (nn.Sequential(nn.Linear(6, 4)), TypeError, r"head to have a weight \[4, 6\] .*, got Sequential without one"),
        (nn.Linear(6, 5), ValueError, r"head with a weight of shape \[4, 6\], got \[5, 6\]"),
        (nn.Linear(7, 4), ValueError, r"head with a weight of shape \[4, 6\], got \[4, 7\]"),
        (nn.Bilinear(6, 6, 4), ValueError, r"head with a weight of shape \[4, 6\], got \[4, 6, 6\]"),
    ],
)
def test_heads_that_do_not_fit(head, error, message):
    one, other = encoder(), encoder()
    one.head, other.head = head, copy.deepcopy(head)
    with pytest.raises(error, match=message):
        BiTuning(one, other, CLASSES)


@pytest.mark.parametrize("batch", [2, 3])  # the rows of a batch of 3 could be taken for three outputs
@pytest.mark.parametrize("name", ["encoder_q", "encoder_k"])
def test_encoders_in_evaluation_mode_are_named(name, batch):
    model = make()
    getattr(model, name).eval()
    with pytest.raises(TypeError, match=rf"expected {name} to give \(y, z, hn\).*Tensor with {name}.training = False"):
        model(*step_inputs(batch))


def test_star_import_brings_what_upstreams_does():
    namespace: dict = {}
    exec("from talib_fast.finetune.bi_tuning import *", namespace)
    assert namespace["nn"] is nn and namespace["torch"] is torch and namespace["normalize"] is F.normalize
    assert issubclass(Classifier, namespace["ClassifierBase"].__mro__[1]) and namespace["BiTuning"] is BiTuning


@pytest.mark.parametrize(
    "inputs, error, message",
    [
        ((images(3),), ValueError, r"im_q, im_k and labels in training mode, got im_q alone"),
        ((images(3), images(3)), ValueError, r"im_q, im_k and labels in training mode"),
        ((images(3), images(3), [0, 1, 2]), TypeError, r"tensor of integers, got list"),
        ((images(3), images(3), torch.zeros(3)), TypeError, r"expected integer labels, got torch.float32"),
        ((images(3), images(3), torch.zeros(3) > 0), TypeError, r"expected integer labels, got torch.bool"),
        ((images(3), images(2), torch.arange(3)), ValueError, r"one batch size, got 3, 2 and \[3\]"),
        ((images(3), images(3), torch.arange(2)), ValueError, r"one batch size, got 3, 3 and \[2\]"),
        ((images(3), images(3), torch.arange(3)[:, None]), ValueError, r"one batch size, got 3, 3 and \[3, 1\]"),
    ],
)
def test_bad_inputs(inputs, error, message):
    model = make()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        model(*inputs)
    assert same_state(model.state_dict(), before)


# --- BiTuning: several processes

RANKS, STEPS, PER_RANK = 2, 3, 4


def rank_batches(rank):
    generator = torch.Generator().manual_seed(100 + rank)
    for _ in range(STEPS):
        im_q, im_k = torch.randn(2, PER_RANK, 3, 5, 5, generator=generator, dtype=torch.float64)
        yield im_q, im_k, torch.randint(CLASSES, (PER_RANK,), generator=generator)


def train_a_rank(rank, folder):
    torch.manual_seed(0)
    bare = make(m=0.5, T=0.5).double()
    for im_q, im_k, labels in rank_batches(rank):
        bare(im_q, im_k, labels)
        bare.enqueue(zip(spoilt(im_k, rank).split(2), labels.split(2), strict=True))
    torch.manual_seed(rank)
    model = make(m=0.5, T=0.5).double()
    train(model, DistributedDataParallel(model), rank_batches(rank))
    groups = [dist.new_group([member]) for member in range(RANKS)]
    torch.manual_seed(0)
    alone = make(m=0.5, T=0.5, process_group=groups[rank]).double()
    for inputs in rank_batches(rank):
        alone(*inputs)
    torch.save((bare.state_dict(), model.state_dict(), alone.state_dict()), f"{folder}/{rank}.pt")


@needs_gloo
def test_fault_rank_0s_queue_overwrote_the_others(tmp_path):
    spawn_ranks(RANKS, train_a_rank, tmp_path)
    joined = [
        [torch.cat(parts) for parts in zip(*ranks, strict=True)]
        for ranks in zip(*(rank_batches(rank) for rank in range(RANKS)), strict=True)
    ]
    torch.manual_seed(0)
    bare = make(m=0.5, T=0.5).double()
    for im_q, im_k, labels in joined:
        bare(im_q, im_k, labels)
        bare.enqueue([(spoilt(im_k, *(rank * PER_RANK + rank for rank in range(RANKS))), labels)])
    torch.manual_seed(0)
    trained = make(m=0.5, T=0.5).double()
    train(trained, trained, joined)
    for rank in range(RANKS):
        states = torch.load(tmp_path / f"{rank}.pt")
        torch.manual_seed(0)
        alone = make(m=0.5, T=0.5).double()  # in a group of its own
        for inputs in rank_batches(rank):
            alone(*inputs)
        for state, model in zip(states, (bare, trained, alone), strict=True):
            for name, tensor in model.state_dict().items():
                torch.testing.assert_close(state[name], tensor, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("key_buffers", ["own", "copy", "average"])
def test_encoders_with_different_buffers(key_buffers):
    query, key = encoder(), encoder()
    key.register_buffer("scale", torch.ones(2))
    if key_buffers == "own":  # the key encoder's buffers are its own
        BiTuning(query, key, CLASSES, QUEUE)
        return
    expected = f"the same buffers for key_buffers='{key_buffers}', but theirs differ in number or shape"
    with pytest.raises(ValueError, match=expected):
        BiTuning(query, key, CLASSES, QUEUE, key_buffers=key_buffers)

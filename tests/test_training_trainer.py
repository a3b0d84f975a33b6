import os
import signal
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from training_support import CPU, make_data, make_images, make_run, tiny_network

from talib_fast.errors import UserError
from talib_fast.training import memory, stepbar, trainer
from talib_fast.training.memory import PeakMemory
from talib_fast.training.methods import Method
from talib_fast.training.recipes import RECIPES
from talib_fast.training.schedules import SCHEDULES, factor
from talib_fast.training.tensorboard import summary_writer
from talib_fast.training.trainer import DivergedError, Record, balanced_weights, interrupts_deferred


@pytest.fixture
def data(tmp_path):
    return make_data(make_images(tmp_path / "images"))


@pytest.fixture
def checkpoint(tmp_path):
    return tmp_path / "checkpoints" / "run.pt"


def interrupt_at(monkeypatch, method, step, number=signal.SIGINT):
    """Raise the signal in the middle of the step of that number."""
    forward = Method.forward
    calls = iter(range(1000))

    def interrupted_forward(self, batch):
        if self.name == method and next(calls) == step:
            signal.raise_signal(number)
        return forward(self, batch)

    monkeypatch.setattr(Method, "forward", interrupted_forward)


def outcome(run):
    """What must agree between two runs: everything but times and memory."""
    record = asdict(run.record)
    for measured in ("step_seconds", "seconds", "preparation_seconds", "peak_mib"):
        del record[measured]
    return record


@pytest.mark.parametrize("method", [*RECIPES, "co_tuning+bss+stochnorm", "delta_attention+stochnorm"])
def test_interrupted_run_ends_where_an_uninterrupted_one_does(method, data, checkpoint, monkeypatch):
    whole = make_run(method, data, checkpoint)
    whole.finish()
    assert not checkpoint.exists()
    with monkeypatch.context() as patch:
        interrupt_at(patch, method, step=7)
        with pytest.raises(KeyboardInterrupt):
            make_run(method, data, checkpoint).finish()
    assert torch.load(checkpoint, weights_only=True)["record"]["losses"] == whole.record.losses[:8]
    torch.manual_seed(99)  # what was drawn in between must not matter
    monkeypatch.setattr(Method, "prepare", lambda *args: pytest.fail("prepared again"))
    resumed = make_run(method, data, checkpoint)
    resumed.finish()
    assert outcome(resumed) == outcome(whole)
    for name, value in whole.method.state_dict().items():
        assert value.equal(resumed.method.state_dict()[name]), name


def test_mixed_precision_resumes_exactly(data, checkpoint, monkeypatch):
    whole = make_run("stochnorm", data, checkpoint, "--amp")
    whole.finish()
    with monkeypatch.context() as patch:
        interrupt_at(patch, "stochnorm", step=5, number=signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            make_run("stochnorm", data, checkpoint, "--amp").finish()
    resumed = make_run("stochnorm", data, checkpoint, "--amp")
    resumed.finish()
    assert outcome(resumed) == outcome(whole)
    plain = make_run("stochnorm", data, checkpoint.with_name("other.pt"))
    plain.finish()
    assert outcome(plain)["losses"] != outcome(whole)["losses"]


@pytest.mark.parametrize("method", ["delta", "delta_attention"])
def test_the_pretrained_network_computes_in_another_dtype(method, data, checkpoint):
    runs = [make_run(method, data, checkpoint, *words) for words in ([], ["--source-dtype", "bfloat16"])]
    for run in runs:
        run.finish()
    losses = [torch.tensor(run.record.losses) for run in runs]
    assert not losses[0].equal(losses[1])
    torch.testing.assert_close(*losses, rtol=0.05, atol=0)
    assert [run.method.parts[method].source.dtype for run in runs] == [None, torch.bfloat16]


def test_interrupt_in_the_last_step_keeps_the_run(data, checkpoint, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_at(patch, "plain", step=11)
        with pytest.raises(KeyboardInterrupt):
            make_run("plain", data, checkpoint).finish()
    monkeypatch.setattr(Method, "forward", lambda *args: pytest.fail("trained again"))
    record = make_run("plain", data, checkpoint).finish()
    assert record.step == 12 and record.accuracies[-1][0] == 12


def test_record(data, checkpoint):
    run = make_run("delta_attention", data, checkpoint, "--lr", "0.05")
    start = time.perf_counter()
    record = run.finish()
    took = time.perf_counter() - start
    result = record.result(data)
    assert [step for step, _ in record.accuracies] == [2, 4, 6, 8, 10, 12]
    assert all(0 <= accuracy <= 100 for _, accuracy in record.accuracies)
    assert result["accuracy"] == record.accuracies[-1][1] and "val_accuracy" not in result
    assert (result["train_images"], result["val_images"], result["test_images"]) == (12, 0, 9)
    right = sum(label == predicted for label, predicted in zip(data.test.labels, record.answers.predicted, strict=True))
    assert result["accuracy"] == pytest.approx(100 * right / 9) and "answers" not in result
    assert all(1 / 3 <= probability <= 1 for probability in record.answers.probabilities)
    assert result["seconds"] == sorted(result["seconds"]) and len(result["seconds"]) == 6
    assert result["seconds"][0] > 0 and result["seconds"][-1] < took
    assert result["peak_mib"] > 10
    assert len(result["losses"]) == len(result["cross_entropies"]) == 12
    assert result["preparation_seconds"] > 0 and result["seconds_per_step"] > 0
    assert result["preparation_seconds"] + 6 * result["seconds_per_step"] < took  # six took the median or more
    assert "step_seconds" not in result


def test_validation_images_are_what_a_run_is_followed_by(tmp_path, checkpoint):
    data = make_data(make_images(tmp_path / "images"), val_share=0.5)
    run = make_run("plain", data, checkpoint, "--lr", "0.5")
    result = run.finish().result(data)
    assert (result["train_images"], result["val_images"], result["test_images"]) == (6, 6, 9)
    assert result["val_accuracy"] == result["accuracies"][-1][1]
    run.method.eval()
    with torch.no_grad():
        for part, images in (("accuracy", data.test), ("val_accuracy", data.val)):
            logits = torch.cat([run.method.classifier(batch) for batch, _ in images])
            assert result[part] == pytest.approx(100 * (logits.argmax(1) == images.labels).float().mean().item())


@pytest.mark.parametrize("method", ["bi_tuning", "stochnorm+bss"])
def test_a_run_with_workers_and_random_crops_resumes_exactly(method, tmp_path, checkpoint, monkeypatch):
    folder = make_images(tmp_path / "images")
    words = ("--optimizer", "adamw", "--schedule", "cosine", "--warmup", "3", "--class-weights")
    whole = make_run(method, make_data(folder, augmentation="standard"), checkpoint, *words)
    whole.finish()
    with_workers = make_data(folder, augmentation="standard", workers=2)
    with monkeypatch.context() as patch:
        interrupt_at(patch, whole.method.name, step=5)
        with pytest.raises(KeyboardInterrupt):
            make_run(method, with_workers, checkpoint, *words).finish()
    resumed = make_run(method, with_workers, checkpoint, *words)
    resumed.finish()
    assert outcome(resumed) == outcome(whole)


def test_few_steps_are_evaluated_once_each(data, checkpoint):
    assert [step for step, _ in make_run("plain", data, checkpoint, "--steps", "3").finish().accuracies] == [1, 2, 3]


def test_the_network_stays_as_it_was(data, checkpoint):
    network = tiny_network()
    make_run("plain", data, checkpoint, "--lr", "0.1", network=network).finish()
    for name, value in tiny_network().backbone.state_dict().items():
        assert network.backbone.state_dict()[name].equal(value)


def test_same_seed_gives_every_method_the_same_new_head(data, checkpoint):
    heads = [make_run(method, data, checkpoint).method.classifier.head.weight for method in ("plain", "l2_sp", "delta")]
    assert heads[0].equal(heads[1]) and heads[0].equal(heads[2])


def test_learning_rates_fall_after_three_fifths(data, checkpoint, monkeypatch):
    run = make_run("plain", data, checkpoint, "--lr", "0.5", "--steps", "10")
    rates = []
    step = run.optimizer.step
    run.optimizer.step = lambda *args: (rates.append([g["lr"] for g in run.optimizer.param_groups]), step())[1]
    run.finish()
    assert rates[:6] == [[0.05, 0.5]] * 6
    assert rates[6:] == [[pytest.approx(0.005), pytest.approx(0.05)]] * 4


def test_schedules():
    rates = {name: [factor(name, step, 10, 0) for step in range(10)] for name in SCHEDULES}
    assert rates["step"] == [1.0] * 6 + [0.1] * 4 and rates["constant"] == [1.0] * 10
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    for rate in rates["cosine"]:
        assert rate == pytest.approx(cosine.get_last_lr()[0])
        optimizer.step()
        cosine.step()
    warm = [factor("cosine", step, 14, 4) for step in range(14)]
    assert warm[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8]) and warm[4:] == pytest.approx(rates["cosine"])
    assert factor("step", 2, 3, 5) == 0.5  # a run may end before it is warm


def test_optimizers(data, checkpoint):
    sgd = make_run("plain", data, checkpoint).optimizer
    assert isinstance(sgd, torch.optim.SGD) and [group["lr"] for group in sgd.param_groups] == [0.002, 0.02]
    run = make_run("plain", data, checkpoint, "--optimizer", "adamw", "--weight-decay", "0.05")
    assert isinstance(run.optimizer, torch.optim.AdamW)
    assert [group["lr"] for group in run.optimizer.param_groups] == [1e-4, 1e-3]
    assert {group["weight_decay"] for group in run.optimizer.param_groups} == {0.05}
    tied = make_run("l2_sp", data, checkpoint, "--weight-decay", "0.05").optimizer
    assert {group["weight_decay"] for group in tied.param_groups} == {0.0}  # l2_sp decays towards the start


def test_balanced_weights():
    weights = balanced_weights(torch.tensor([0] * 6 + [1] * 3 + [2]), 3)
    torch.testing.assert_close(weights, torch.tensor([10 / 18, 10 / 9, 10 / 3]))
    assert balanced_weights(torch.tensor([1, 0, 0, 1]), 2).tolist() == [1.0, 1.0]


def test_curves_for_tensorboard(data, checkpoint, tmp_path, monkeypatch):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    whole = make_run("plain", data, checkpoint, curves=tmp_path / "whole")
    whole.finish()
    with monkeypatch.context() as patch:
        interrupt_at(patch, "plain", step=7)
        with pytest.raises(KeyboardInterrupt):
            make_run("plain", data, checkpoint, curves=tmp_path / "resumed").finish()
    make_run("plain", data, checkpoint, curves=tmp_path / "resumed").finish()
    for folder in ("whole", "resumed"):
        events = accumulator.EventAccumulator(str(tmp_path / folder)).Reload()
        losses = [(event.step, event.value) for event in events.Scalars("loss")]
        assert losses == [(step, pytest.approx(loss)) for step, loss in enumerate(whole.record.losses, 1)]
        assert [(event.step, event.value) for event in events.Scalars("accuracy")] == [
            (step, pytest.approx(accuracy)) for step, accuracy in whole.record.accuracies
        ]


def test_missing_tensorboard_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(UserError, match="--tensorboard needs tensorboard, which is not installed: pip install tensor"):
        summary_writer()


@pytest.mark.parametrize(("method", "decay"), [("plain", 5e-4), ("l2_sp", 0.0), ("delta", 0.0), ("bss", 5e-4)])
def test_weight_decay(method, decay, data, checkpoint):
    assert {group["weight_decay"] for group in make_run(method, data, checkpoint).optimizer.param_groups} == {decay}


def test_checkpoints_are_written_now_and_then(data, checkpoint, monkeypatch):
    monkeypatch.setattr(trainer, "CHECKPOINT_SECONDS", 0.0)
    run = make_run("plain", data, checkpoint)
    run.finish()
    assert torch.load(checkpoint, weights_only=True)["record"]["losses"] == run.record.losses


@pytest.mark.parametrize("method", ["plain", "l2"])
def test_a_loss_that_is_no_number_ends_the_run(method, data, checkpoint):
    run = make_run(method, data, checkpoint, "--amp", "--lr", "0.25")
    next(run.method.classifier.parameters()).data.fill_(float("nan"))
    remedy = f" or --trade-off l2={RECIPES['l2'].trade_off:g}," if method == "l2" else ""
    with pytest.raises(
        DivergedError,
        match=f"^{method} with seed 0 diverged with a loss of nan at step 1 of 12: "
        f"lower --lr 0.25,{remedy} or leave out --amp$",
    ):
        run.finish()


def test_wrong_checkpoints_are_named(data, checkpoint, monkeypatch):
    monkeypatch.setattr(trainer, "CHECKPOINT_SECONDS", 0.0)
    make_run("plain", data, checkpoint, "--steps", "1").finish()
    with pytest.raises(UserError, match=r"run\.pt was made with other settings \(steps was 1 and is now 12\): remove"):
        make_run("plain", data, checkpoint).finish()
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"run\.pt is damaged: remove it to start that run again"):
        make_run("plain", data, checkpoint).finish()


def test_second_interrupt_does_not_wait():
    with interrupts_deferred() as interrupted, pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
        assert interrupted.is_set()
        signal.raise_signal(signal.SIGINT)


def test_signal_handlers_are_put_back():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with interrupts_deferred():
        assert signal.getsignal(signal.SIGINT) != before[0]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_other_threads_may_train(data, checkpoint):
    records: list[Record] = []
    thread = threading.Thread(target=lambda: records.append(make_run("plain", data, checkpoint).finish()))
    thread.start()
    thread.join()
    assert records[0].step == 12


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux has /proc/self/clear_refs")
def test_peak_memory_is_the_runs_own():
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("/proc/self/clear_refs is not writable")
    memory.release_memory()  # what other tests left behind would otherwise be collected while this one measures
    peak = PeakMemory(CPU)
    before = peak.mib()
    block = torch.ones(100, 2**20)  # 400 MiB
    assert 350 < peak.mib() - before < 500
    del block
    memory.release_memory()
    assert PeakMemory(CPU).mib() < before + 100


def test_peak_memory_without_proc(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "PROC", tmp_path / "nowhere")
    assert 10 < PeakMemory(CPU).mib() < 1e6


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_run(data, checkpoint, tmp_path):
    device = torch.device("cuda")
    peak = PeakMemory(device)
    block = torch.ones(100, 2**20, device=device)
    assert peak.mib() >= 400
    del block
    memory.release_memory()


class Terminal:
    """A stderr that says it is a terminal and keeps what is written."""

    def __init__(self):
        self.text = ""

    def isatty(self):
        return True

    def write(self, text):
        self.text += text

    def flush(self):
        pass


def test_bar_on_a_terminal(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with stepbar.StepBar("plain, seed 0", 3, done=1) as bar:
        bar.update(2.0, [])
        time.sleep(0.15)  # tqdm draws ten times a second
        bar.update(1.5, [(3, 50.0)])
    assert "plain, seed 0" in terminal.text and "3/3" in terminal.text
    assert "loss 1.500, accuracy 50.0 %" in terminal.text


def test_lines_elsewhere(monkeypatch, capsys):
    with stepbar.StepBar("plain, seed 0", 2) as bar:
        bar.update(2.0, [])
        bar.update(1.5, [(2, 50.0)])
    assert capsys.readouterr().err == "  plain, seed 0: step 2/2, loss 1.500, accuracy 50.0 %\n"


def test_lines_without_tqdm(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with stepbar.StepBar("plain, seed 0", 2) as bar:
        bar.update(1.5, [(1, 50.0)])
    assert terminal.text == "  plain, seed 0: step 1/2, loss 1.500, accuracy 50.0 %\n"

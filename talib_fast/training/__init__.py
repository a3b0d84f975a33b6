"""``python -m talib_fast finetune``: fine-tune a pretrained network with each method and compare them."""

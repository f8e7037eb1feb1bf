"""What a model's repository holds, as files: GGUF, tokenizer, chat template, names of the hub. Knows no plan."""

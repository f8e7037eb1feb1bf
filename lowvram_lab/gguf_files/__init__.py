"""What a ``.gguf`` file says, in transformers' words, and a config in GGUF's: header, config, tokenizer.

Knows neither plans nor where a model comes from; ``model/gguf.py`` makes a directory of a file, and
``weights/gguf_export.py`` a file of a model.
"""

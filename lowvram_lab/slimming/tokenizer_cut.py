"""A tokenizer and a model's settings with fewer tokens, in new places: every token id in their files is changed.

Knows JSON alone. What holds ids is named here once: the same walk finds them and puts others in their place.
"""

from collections.abc import Callable, Mapping

from lowvram_lab.slimming.vocabulary import halves

Change = Callable[[int], int]
"""A token's id → its new one."""

_LISTS = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "force_words_ids")


def cut_tokenizer(tokenizer_json: dict, new: Mapping[int, int]) -> dict:
    """``tokenizer.json`` with the tokens that stay, and the merges of these.

    Args:
        tokenizer_json: Its content.
        new: Old id → new id, of every token that stays. Holds all that ``tokenizer_ids`` finds.
    """
    model = tokenizer_json["model"]
    kept = sorted((new[index], token) for token, index in model["vocab"].items() if index in new)
    vocab = {token: index for index, token in kept}
    merges = [merge for merge in model["merges"] if all(t in vocab for t in (*halves(merge), "".join(halves(merge))))]
    return {**with_tokenizer_ids(tokenizer_json, new.__getitem__), "model": {**model, "vocab": vocab, "merges": merges}}


def with_tokenizer_ids(tokenizer_json: dict, change: Change) -> dict:
    """``tokenizer.json`` with other ids wherever it has some, but for its vocabulary."""
    padding = tokenizer_json.get("padding")
    return {
        **tokenizer_json,
        "added_tokens": sorted(
            ({**token, "id": change(token["id"])} for token in tokenizer_json["added_tokens"]),
            key=lambda token: token["id"],
        ),
        "post_processor": _processor(tokenizer_json.get("post_processor"), change),
        "padding": padding and {**padding, "pad_id": change(padding["pad_id"])},
    }


def with_setting_ids(settings: dict, change: Change) -> dict:
    """``config.json`` or ``generation_config.json`` with other token ids; negative ones stay: they mean none."""
    return {key: _setting(key, value, change) for key, value in settings.items()}


def with_added_ids(tokenizer_config: dict, change: Change) -> dict:
    """``tokenizer_config.json`` with other ids; tokens go by name everywhere but in ``added_tokens_decoder``."""
    if "added_tokens_decoder" not in tokenizer_config:
        return dict(tokenizer_config)
    decoder = {str(change(int(index))): token for index, token in tokenizer_config["added_tokens_decoder"].items()}
    return {**tokenizer_config, "added_tokens_decoder": decoder}


def ids_found(walk: Callable[[dict, Change], dict], values: dict) -> set[int]:
    """Every id that one of the functions above would change."""
    found: set[int] = set()

    def note(index: int) -> int:
        found.add(index)
        return index

    walk(values, note)
    return found


def _processor(processor: dict | None, change: Change) -> dict | None:
    """A post-processor, as the tokenizers library writes it."""
    kind = (processor or {}).get("type")
    if kind == "Sequence":
        return {**processor, "processors": [_processor(step, change) for step in processor["processors"]]}
    if kind in ("BertProcessing", "RobertaProcessing"):
        return processor | {key: [processor[key][0], change(processor[key][1])] for key in ("sep", "cls")}
    if kind == "TemplateProcessing":
        special = processor["special_tokens"]
        changed = {name: {**token, "ids": [change(i) for i in token["ids"]]} for name, token in special.items()}
        return {**processor, "special_tokens": changed}
    return processor


def _setting(key: str, value: object, change: Change) -> object:
    if isinstance(value, dict):
        return with_setting_ids(value, change)
    if key == "forced_decoder_ids":  # places and ids
        return value and [[place, _all(index, change)] for place, index in value]
    if key == "sequence_bias":  # sequences of ids and what is added to their logits
        return value and [[_all(sequence, change), bias] for sequence, bias in value]
    if key in _LISTS or key.endswith(("_token_id", "_token_ids")):
        return _all(value, change)
    return value


def _all(value: object, change: Change) -> object:
    """Lists of any depth."""
    if isinstance(value, list):
        return [_all(each, change) for each in value]
    return change(value) if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else value

"""Whether a slimmed or quantised model still generates: short questions in two languages, answers judged by rules.

A model may classify well, and be close to its original token by token, and yet write nothing of use: it loops, loses
brackets, no longer copies.
"""

import json
from collections.abc import Callable, Mapping, Sequence

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowvram_lab.chat.completion import CompletionSession
from lowvram_lab.chat.prompt import chat_ids, stop_ids, text_ids
from lowvram_lab.chat.session import ChatSession
from lowvram_lab.engine.loaded import Loaded
from lowvram_lab.errors import BudgetError, LowvramError
from lowvram_lab.evaluation.battery_report import Battery, Item, Result
from lowvram_lab.packaged import data_path


def battery_items() -> tuple[Item, ...]:
    """The library's own sixty items: eight kinds, half of each in English and half in Chinese."""
    return tuple(Item(**values) for values in json.loads(data_path("battery.json").read_text(encoding="utf-8")))


def battery_way(tokenizer: PreTrainedTokenizerBase) -> str:
    """How a battery asks: by ``"chat"``, or by ``"completion"`` where the tokenizer has no chat template."""
    return "chat" if getattr(tokenizer, "chat_template", None) else "completion"


def battery_context(
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Item] | None = None,
    template_arguments: Mapping[str, object] | None = None,
) -> int:
    """Tokens of context that the longest item takes, its answer included.

    Args:
        tokenizer: The model's.
        items: By default ``battery_items()``.
        template_arguments: What the chat template takes beside messages.
    """
    items = battery_items() if items is None else items
    return max(len(_prompt_ids(tokenizer, item, template_arguments)) + item.max_new_tokens for item in items)


def check_battery_context(name: str, context: int | None, needed: int) -> None:
    """Refuses a context that the items do not fit into.

    Args:
        name: Whose context.
        context: What there is; ``None`` where nothing limits it.
        needed: From ``battery_context``.

    Raises:
        BudgetError: It is too small.
    """
    if context is not None and context < needed:
        raise BudgetError(
            f"{name}: expected a context of {needed} tokens for the longest item of the battery, found {context}; plan "
            "for more, or take a model that sees more"
        )


def battery(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Item] | None = None,
    *,
    compare: "PreTrainedModel | Battery | None" = None,
    template_arguments: Mapping[str, object] | None = None,
    precision: str | None = None,
    progress: bool = True,
) -> Battery:
    """Asks a model every item, each in a chat of its own, greedily, and judges the answers.

    A model from ``load`` answers by ``ChatSession`` (or, where the tokenizer has no chat template, goes on with the
    item as a text, by ``CompletionSession``); any other one by its own forward pass, without this library's layers and
    caches. ``Battery.way`` says which of the two ways was taken.

    Args:
        model: From ``load``, or any transformers model.
        tokenizer: Its tokenizer.
        items: By default ``battery_items()``.
        compare: A reference to be asked the same (from ``load_reference``, say), or its battery.
        template_arguments: What the chat template takes beside messages. A model that thinks first wants
            ``{"enable_thinking": False}``: there is no room for it.
        precision: Of weights in two planes, see ``ChatSession``.
        progress: Show a progress bar.

    Raises:
        LowvramError: No items, or two of one id; or the reference's battery is of others.
        BudgetError: The model's context is too small for the longest one.
        SourceError: The chat template refuses a chat.
    """
    items = _checked(battery_items() if items is None else items)
    check_battery_context(*_room(model), battery_context(tokenizer, items, template_arguments))
    options = {"template_arguments": template_arguments, "progress": progress}
    answer = _answerer(model, tokenizer, precision=precision, **options)
    results = []
    for item in tqdm(items, desc="battery", unit="item", disable=not progress, leave=False):
        said = answer(item)
        results.append(Result(item, said, item.passes(said)))
    found = Battery(battery_way(tokenizer), tuple(results))
    if compare is None:
        return found
    if not isinstance(compare, Battery):
        compare = battery(compare, tokenizer, items, **options)
    return found.beside(compare)


def _checked(items: Sequence[Item]) -> tuple[Item, ...]:
    """Items of which each can be told from the others."""
    if not items:
        raise LowvramError("expected items to ask, found none; leave items out for the library's own")
    names = [item.id for item in items]
    if twice := [name for name in names if names.count(name) > 1]:
        raise LowvramError(f"expected items with ids of their own, found {twice[0]!r} twice; rename one")
    return tuple(items)


def _is_ours(model: PreTrainedModel) -> bool:
    return isinstance(getattr(model, "lowvram", None), Loaded)


def _room(model: PreTrainedModel) -> tuple[str, int | None]:
    """A model's name, and the context that it has."""
    if _is_ours(model):
        return model.lowvram.plan.model, model.lowvram.plan.context
    return type(model).__name__, getattr(model.config, "max_position_embeddings", None)


def _answerer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    template_arguments: Mapping[str, object] | None,
    precision: str | None,
    progress: bool,
) -> Callable[[Item], str]:
    """What answers an item, none of them knowing of the one before."""
    if not _is_ours(model):
        return lambda item: _stock_answer(model, tokenizer, item, template_arguments)
    options = {"precision": precision, "progress": progress}
    if battery_way(tokenizer) == "chat":
        chat = ChatSession(model, tokenizer, template_arguments=template_arguments, **options)
        return lambda item: _chat_answer(chat, item)
    completion = CompletionSession(model, tokenizer, **options)
    return lambda item: _completion(completion, item)


def _chat_answer(session: ChatSession, item: Item) -> str:
    *before, question = item.messages()
    session.max_new_tokens = item.max_new_tokens
    with session.beside(before):
        return session.ask(question["content"])


def _completion(session: CompletionSession, item: Item) -> str:
    session.max_new_tokens = item.max_new_tokens
    return session.ask(item.text())


@torch.no_grad()
def _stock_answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    item: Item,
    template_arguments: Mapping[str, object] | None,
) -> str:
    """The likeliest token each time: ``generate`` would heed a penalty or a temperature that the checkpoint states."""
    ends = stop_ids(model, tokenizer)
    fed = torch.tensor([_prompt_ids(tokenizer, item, template_arguments)], device=model.device)
    cache, tokens = None, []
    while len(tokens) < item.max_new_tokens:
        out = model(fed, past_key_values=cache, use_cache=True, logits_to_keep=1)
        token = out.logits[0, -1].argmax()
        if token.item() in ends:
            break
        tokens.append(token.item())
        cache, fed = out.past_key_values, token.view(1, 1)
    return tokenizer.decode(tokens, skip_special_tokens=True)


def _prompt_ids(
    tokenizer: PreTrainedTokenizerBase, item: Item, template_arguments: Mapping[str, object] | None
) -> list[int]:
    if battery_way(tokenizer) == "chat":
        return chat_ids(tokenizer, item.messages(), template_arguments)
    return text_ids(tokenizer, item.text())

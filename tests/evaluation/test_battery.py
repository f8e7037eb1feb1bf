"""The generation battery: its rules on right and wrong answers, its statistics, and models end to end."""

import copy
import json
import math
from dataclasses import replace

import pytest
import torch

from lowvram_lab.chat.completion import CompletionSession
from lowvram_lab.chat.session import ChatSession
from lowvram_lab.errors import BudgetError, LowvramError
from lowvram_lab.evaluation.answer_rules import check_rule, normalised, passes, unfenced
from lowvram_lab.evaluation.battery import battery, battery_context, battery_items, battery_way
from lowvram_lab.evaluation.battery_report import Battery, Item, Result
from lowvram_lab.evaluation.chance import mcnemar_p_value, wilson_interval
from lowvram_lab.evaluation.validation import Limits, validate
from lowvram_lab.memory.gpu import StandInGpu
from tests.helpers.checkpoints import write_model
from tests.helpers.commands import run_command as run
from tests.helpers.tiny import letters_state, load_tiny, tiny_plan, tiny_stock, tiny_tokenizer

ITEMS = battery_items()
KEYS = {"name": "json_keys", "keys": ["a", "b"]}
LINES = {"name": "lines_begin_with", "prefix": "- ", "count": 2}
LIST = {"name": "items_in_list", "count": 3}
OPEN = {"name": "closes", "opened": "([{x} y"}
FREE = {"name": "no_repetition", "mentions": ["fox", "狐"]}
TOLD = "The fox went down to the river, drank, looked about, and saw nobody it knew."


@pytest.mark.parametrize(
    ("rule", "answer", "right"),
    [
        *(({"name": "equals", "value": "blue-fox-9"}, *pair) for pair in [
            ("blue-fox-9", True),
            (' "blue-fox-9".\n', True),
            ("Answer: blue-fox-9", True),
            ("ｂｌｕｅ-ｆｏｘ-９。", True),
            ("**Answer:** blue-fox-9", True),
            ("The answer is: blue-fox-9", True),
            ("Blue-Fox-9", False),
            ("blue-fox-9 blue-fox-9", False),
            ("blue fox 9", False),
            ("", False),
        ]),
        ({"name": "equals", "value": "窗户"}, "答：「窗户」。", True),
        ({"name": "equals", "value": "A, B"}, "A,  B", True),
        ({"name": "equals", "value": "green lamp", "any_case": True}, "Green Lamp", True),
        ({"name": "equals", "value": "green lamp", "any_case": True}, "Green Light", False),
        *(({"name": "number", "value": 12}, *pair) for pair in [
            ("12", True),
            ("7 + 5 = 12.", True),
            ("一共12个。", True),
            ("１２", True),
            ("12.0", True),
            ("x=12", True),
            ("10-12", True),
            ("112", False),
            ("12.5", False),
            ("-12", False),
            ("1,012", False),
            ("12 or 13", False),
            ("12cm", False),
            ("12.5cm", False),
            ("v12", False),
            ("0.12", False),
            ("十二", False),
            ("", False),
        ]),
        ({"name": "number", "value": 12345}, "It is 12,345", True),
        ({"name": "number", "value": 1}, "1,234cm", False),
        ({"name": "number", "value": 3}, "1,2,3", True),
        ({"name": "number", "value": -4.5}, "(-4.5)", True),
        ({"name": "regex", "pattern": r"\d{4}-\d\d"}, " 2022-05\n", True),
        *(({"name": "numbers", "values": [1, 2, -3]}, *pair) for pair in [
            ("1, 2, -3", True),
            ("１、 2、 -3。", True),
            ("from 1 by 2 to -3.0", True),
            ("2, 1, -3", False),
            ("1, 2, -3, 4", False),
            ("1, 2", False),
            ("", False),
        ]),
        ({"name": "regex", "pattern": "a,b"}, "Answer: ａ，ｂ。", True),
        ({"name": "regex", "pattern": r"\d{4}-\d\d"}, "in 2022-05", False),
        ({"name": "regex", "pattern": r"\d{4}-\d\d"}, "2022-05-01", False),
        *((KEYS, *pair) for pair in [
            ('{"a": 1, "b": [2]}', True),
            ('```json\n{"b": null, "a": {"c": 1}}\n```', True),
            ('Here: {"a": 1, "b": 2} and {', True),
            ('{"a": 1}', False),
            ('{"a": 1, "b": 2, "c": 3}', False),
            ('{"a": 1, "b": 2, "a": 3}', False),
            ('{"a": 1, "b": 2', False),
            ("{'a': 1, 'b': 2}", False),
            ('[{"a": 1}, "b"]', False),
            ("a, b", False),
            ('{"a":' * 100_000, False),
        ]),
        ({**KEYS, "values": {"a": 1}}, '{"a": 1, "b": 2}', True),
        ({**KEYS, "values": {"a": 1}}, '{"a": "1", "b": 2}', False),
        ({**KEYS, "values": {"a": 1}}, '{"a": true, "b": 2}', False),
        ({**KEYS, "values": {"b": [1, 2]}}, '{"a": true, "b": [1, 2]}', True),
        *((LINES, *pair) for pair in [
            ("- cat\n- dog", True),
            ("\n  - cat\n\n- dog\n", True),
            ("- cat\n- dog\n- ox", False),
            ("- cat\n- cat", False),
            ("- cat", False),
            ("- cat\n-", False),
            ("- cat\n- dog\nThat is all.", False),
            ("Animals:\n- cat\n- dog", False),
            ("-cat\n-dog", False),
            ("", False),
        ]),
        ({**LINES, "among": ["Cat", "Dog", "Ox"]}, "- dog.\n- cat", True),
        ({**LINES, "among": ["Cat", "Dog", "Ox"]}, "- dog\n- cow", False),
        ({**LINES, "among": ["Cat", "Dog", "Ox"]}, "- dog\n- Dog.", False),
        *((LIST, *pair) for pair in [
            ("cat, dog, ox", True),
            ("猫，狗、牛。", True),
            ("Answer: cat, dog, ox.", True),
            ("cat, dog, and ox", True),
            ("cat, dog and ox", False),
            ("cat, dog", False),
            ("cat, dog, ox, cow", False),
            ("cat, dog, Cat", False),
            ("cat, , dog", False),
            ("cat\ndog, ox, cow", False),
            ("", False),
        ]),
        ({**LIST, "among": ["A", "B", "C"]}, "c, a, b", True),
        ({**LIST, "among": ["A", "B", "C"]}, "a, b, d", False),
        ({**LIST, "among": ["A", "B", "C", "D"], "in_order": True}, "a, b, c", True),
        ({**LIST, "among": ["A", "B", "C", "D"], "in_order": True}, "a, c, b", False),
        ({**LIST, "among": ["A", "B", "C", "D"], "in_order": True}, "b, c, d", False),
        *((OPEN, *pair) for pair in [
            ("])", True),
            ("] )", True),
            ("([{x} y])", True),
            ("Answer: ( [{x} y] ).", True),
            ("（[{x} y]）", True),
            (")]", False),
            ("]", False),
            ("}])", False),
            ("]))", False),
            ("([{x} z])", False),
            ("([{x} y", False),
            ("([{x} y])([{x} y])", False),
            ("", False),
        ]),
        ({"name": "closes", "opened": "《小"}, "《小》", True),
        ({"name": "closes", "opened": "《小"}, "《小〉", False),
        ({"name": "closes", "opened": "(a) b"}, "(a) b", False),
        *((FREE, *pair) for pair in [
            (TOLD, True),
            ("从前有一只狐狸，它住在山的那一边，很少有人见过它。", True),
            (TOLD.replace("fox", "dog"), False),
            ("A fox.", False),
            ("The fox ran. " * 12, False),
            ("狐狸很好。" * 12, False),
            ("fox" + "x" * 200, False),
            ("", False),
        ]),
        ({**FREE, "most": 1.0}, "The fox ran. " * 12, True),
        ({**FREE, "but_not": ["Saw nobody"]}, TOLD, False),
        ({**FREE, "but_not": ["saw anybody"]}, TOLD, True),
        *(({"name": "short_answer", "values": ["cold", "冷"], "beside": ["ice", "is", "it's", "冰", "是", "的"]}, *pair)
          for pair in [
            ("Ice is COLD.", True),
            ("冰是冷的", True),
            ("It’s (cold)", True),
            ("Answer: **cold**", True),
            ("not cold", False),
            ("冰不是冷的", False),
            ("hot and cold", False),
            ("scolded", False),
            ("cold 7", False),
            ("ice", False),
            ("", False),
        ]),
        ({"name": "short_answer", "values": ["7", "seven"]}, "7 (Seven)", True),
        ({"name": "short_answer", "values": ["7", "seven"]}, "-7", False),
        ({"name": "short_answer", "values": ["7", "seven"]}, "7.5", False),
    ],
)  # fmt: skip
def test_a_rule_on_an_answer(rule, answer, right):
    check_rule("here", rule)
    assert passes(rule, answer) is right


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        ("```\nab\n```", "ab\n"),
        ("\n```json\n{}\n``` and more", "{}\n"),
        ("```\nab", "ab"),
        ("ab\n```\ncd\n```", "ab\n```\ncd\n```"),
        ("```ab```", "```ab```"),
        ("ab", "ab"),
    ],
)
def test_a_fence_that_an_answer_begins_with_is_no_part_of_it(text, inside):
    assert unfenced(text) == inside


def test_normalising_leaves_the_inside_alone():
    assert normalised(" A：  x ,  Y。") == "x , Y"
    assert normalised("Answer:") == "Answer:".strip(":")
    assert normalised("an apple: red") == "an apple: red"


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ({"name": "rhymes"}, "a rule with a name among equals, number"),
        ("equals", "a rule with a name among"),
        ({"name": "equals"}, "expected equals with value, any_case, found"),
        ({"name": "equals", "value": "a", "values": "b"}, "expected equals with value, any_case, found value, values"),
    ],
)
def test_what_is_no_rule(rule, expected):
    with pytest.raises(LowvramError, match=expected):
        item(rule=rule)


def item(id="one", **changes):
    values = {"kind": "copying", "language": "en", "prompt": "Copy: ab", "max_new_tokens": 4}
    return Item(id, **{**values, "rule": {"name": "equals", "value": "ab"}, **changes})


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"prompt": " "}, "expected prompt as text"),
        ({"kind": 3}, "expected kind as text, found 3"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"shots": [["a"]]}, "shots of a question and an answer each"),
        ({"shots": [["a", ""]]}, "shots of a question and an answer each"),
    ],
)
def test_what_is_no_item(changes, expected):
    with pytest.raises(LowvramError, match=expected):
        item(**changes)


def test_what_comes_after_the_judged_part_does_not_count():
    cut = item(until="\n")
    assert cut.passes("ab\nand more")
    assert cut.passes("```\nab\n```")
    assert cut.passes("\n\nab\n")
    assert not item().passes("ab\nand more")


@pytest.mark.parametrize(
    ("passed", "count", "low", "high"),
    [  # Newcombe 1998, Statistics in Medicine 17, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (29, 29, 1 - 0.1170, 1.0),
    ],
)
def test_an_interval_is_wilsons(passed, count, low, high):
    found = wilson_interval(passed / count, count)
    assert found == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


def test_an_interval_stays_within_0_and_1():
    for count in range(1, 200):
        (low, _), (_, high) = wilson_interval(0.0, count), wilson_interval(1.0, count)
        assert low >= 0 and high <= 1 and f"{low:.1%}" == "0.0%", count


@pytest.mark.parametrize(
    ("lost", "gained", "p"),
    [
        (0, 0, 1.0),
        (1, 0, 1.0),
        (5, 0, 2 / 32),  # five coins on one side, of either side
        (6, 0, 2 / 64),
        (0, 6, 2 / 64),
        (3, 3, 1.0),
        (8, 2, 2 * (1 + 10 + 45) / 1024),
        (15, 5, 0.04138947),  # R: binom.test(5, 20)
        (60, 0, 2.0**-59),
    ],
)
def test_a_p_value_is_the_exact_mcnemar_tests(lost, gained, p):
    assert mcnemar_p_value(lost, gained) == pytest.approx(p)


def made(verdicts, way="chat"):
    """A battery of which these items passed, as many in English as in Chinese."""
    items = [item(f"i{n}", language=("en", "zh")[n % 2], kind=("copying", "facts")[n // 10]) for n in range(20)]
    return Battery(way, tuple(Result(i, "ab", bool(v)) for i, v in zip(items, verdicts, strict=True)))


ALL, SOME = [1] * 20, [0] * 5 + [1] * 15


def test_scores_by_kind_and_language():
    found = made(SOME)
    assert found.score().passed == 15
    assert found.score().interval == wilson_interval(0.75, 20)
    assert str(found.score("copying")) == "5 of 10 pass, 50.0% (23.7% to 76.3%)"
    assert found.score("copying", "zh").items == 5
    table = found.table()
    assert list(table.index) == ["copying", "facts", "all"]
    assert table["passed"].tolist() == [5, 10, 15]
    assert table.loc["all", ["low", "high"]].tolist() == list(wilson_interval(0.75, 20))
    assert found.table("language")["passed"].tolist() == [7, 8, 15]
    assert list(found.rows().columns) == ["id", "kind", "language", "passed", "answer"]
    with pytest.raises(LowvramError, match="by kind or language, found 'id'"):
        found.table("id")
    with pytest.raises(LowvramError, match="expected a kind and a language of the items, found 'rhymes' and None"):
        found.score("rhymes")


def test_pairs_are_counted_and_chance_is_named():
    compared = made(SOME).compare(made(ALL))
    assert compared.lost == tuple(f"i{n}" for n in range(5))
    assert compared.gained == ()
    assert compared.difference == -0.25
    assert compared.p_value == pytest.approx(0.0625)
    assert compared.within_chance
    assert "within chance (20 items are few: a small difference would not show)" in compared.summary()
    worse = made([0] * 6 + [1] * 14).compare(made(ALL))
    assert worse.verdict == "worse"
    assert "5 lost" not in worse.summary()
    assert "6 lost, 0 gained, p = 0.031 (McNemar, exact); worse than the reference, by more" in worse.summary()
    assert made(ALL).compare(made([0] * 20)).verdict == "better"
    assert made(ALL).compare(made(ALL)).p_value == 1
    assert json.loads(json.dumps(compared.to_dict()))["verdict"] == "within chance"
    assert compared._repr_html_().startswith("<b>Comparison</b>")


def test_only_what_was_asked_alike_is_compared():
    with pytest.raises(LowvramError, match="asked in the same way, found chat and completion"):
        made(ALL).compare(made(ALL, "completion"))
    other = made(ALL)
    with pytest.raises(LowvramError, match="two batteries of the same items"):
        made(ALL).compare(Battery("chat", other.results[:-1]))
    with pytest.raises(LowvramError, match="two batteries of the same items"):
        made(ALL).beside(Battery("chat", other.results[:-1]))


def test_a_battery_beside_its_reference_shows_both():
    found = made(SOME).beside(made(ALL).beside(made(SOME)))
    assert found.reference.reference is None
    assert found.table()["lost"].tolist() == [5, 0, 5]
    assert found.table()["reference"].tolist() == [10, 10, 20]
    assert found.table("language")["gained"].tolist() == [0, 0, 0]
    first, second = found.summary().splitlines()
    assert first == "generation battery: 15 of 20 pass, 75.0% (53.1% to 88.8%); asked by chat, greedy"
    assert second == found.comparison.summary()
    assert "no chat template" in made(ALL, "completion").summary()
    values = json.loads(json.dumps(found.to_dict()))
    assert values["kinds"]["copying"]["passed"] == 5
    assert values["comparison"]["lost"] == ["i0", "i1", "i2", "i3", "i4"]
    assert values["reference"]["passed"] == 20
    assert len(values["rows"]) == 20
    assert made(ALL).to_dict()["comparison"] is None
    assert "copying" in repr(found)
    assert found._repr_html_().startswith("<b>Battery</b>")


def tiny(context=512, dtype="fp32"):
    return load_tiny(
        "qwen2", tiny_plan("qwen2", "fp32", context=context, dtype=dtype), StandInGpu(None), letters_state()
    )


def untemplated():
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.chat_template = None
    return tokenizer


SHORT = [
    item("one", shots=[["Copy: x", "x"], ["Copy: yz", "yz"]], max_new_tokens=12),
    item("two", prompt="Say something.", rule={"name": "regex", "pattern": "[a-z]+"}, max_new_tokens=7),
    item("three", language="zh", prompt="照抄：一", rule={"name": "equals", "value": "一"}),
]


def test_each_item_is_asked_in_a_chat_of_its_own():
    model, tokenizer = tiny(), tiny_tokenizer()
    found = battery(model, tokenizer, SHORT, progress=False)
    assert found.way == "chat"
    assert [r.passed for r in found.results] == [False, True, False]
    for result in found.results:
        session = ChatSession(model, tokenizer, max_new_tokens=result.item.max_new_tokens, progress=False)
        session.history = result.item.messages()[:-1]
        assert session.ask(result.item.prompt) == result.answer
        assert 0 < len(result.answer) <= result.item.max_new_tokens
    (alone,) = battery(model, tokenizer, SHORT[2:], progress=False).results
    assert alone == found.results[2]


def test_without_a_chat_template_the_item_is_a_text_to_go_on_with():
    model, tokenizer = tiny(), untemplated()
    found = battery(model, tokenizer, SHORT, progress=False)
    assert found.way == battery_way(tokenizer) == "completion"
    assert SHORT[0].text() == "Copy: x\nx\n\nCopy: yz\nyz\n\nCopy: ab\n"
    session = CompletionSession(model, tokenizer, max_new_tokens=12, progress=False)
    assert session.ask(SHORT[0].text()) == found.results[0].answer


@pytest.mark.parametrize("tokenizer", [tiny_tokenizer, untemplated])
def test_a_stock_model_is_asked_the_same(tokenizer):
    """The same weights in float32, by our decoder and by transformers' own forward pass."""
    found = battery(tiny(), tokenizer(), SHORT, compare=tiny_stock("qwen2", letters_state()), progress=False)
    assert [r.answer for r in found.results] == [r.answer for r in found.reference.results]
    assert found.comparison.p_value == 1
    again = battery(tiny(), tokenizer(), SHORT, compare=found.reference, progress=False)
    assert again.reference == found.reference


def test_the_checkpoints_own_sampling_is_not_heeded():
    stock = tiny_stock("qwen2", letters_state())
    plain = battery(stock, tiny_tokenizer(), SHORT, progress=False)
    stock.generation_config.update(do_sample=True, temperature=5.0, repetition_penalty=3.0)
    assert battery(stock, tiny_tokenizer(), SHORT, progress=False) == plain


def test_the_librarys_own_items_are_the_default():
    few = [replace(each, max_new_tokens=1) for each in ITEMS]
    found = battery(tiny(1024), tiny_tokenizer(), few, progress=False)
    assert len(found.results) == 60
    assert battery_context(tiny_tokenizer()) == battery_context(tiny_tokenizer(), ITEMS) > 200


def test_what_cannot_be_asked_is_refused_before_anything_is():
    model, tokenizer = tiny(64), tiny_tokenizer()
    needed = battery_context(tokenizer, SHORT)
    with pytest.raises(BudgetError, match=f"tiny-qwen2: expected a context of {needed} tokens .* found 64; plan"):
        battery(model, tokenizer, SHORT, progress=False)
    assert battery(tiny(needed), tokenizer, SHORT, progress=False).results
    with pytest.raises(BudgetError, match=f"expected a context of {needed} tokens .* found {needed - 1}"):
        battery(tiny(needed - 1), tokenizer, SHORT, progress=False)
    with pytest.raises(LowvramError, match="expected items to ask, found none"):
        battery(model, tokenizer, [], progress=False)
    with pytest.raises(LowvramError, match="'one' twice"):
        battery(model, tokenizer, [SHORT[0], SHORT[0]], progress=False)


def test_a_model_that_is_not_the_same_any_more_loses():
    """Weights of noise where the reference's are: what only says letters no longer does."""
    rule = {"name": "regex", "pattern": "[a-z]+"}
    items = [item(f"i{n}", prompt=f"Say {n}.", rule=rule) for n in range(8)]
    broken = letters_state()
    broken["lm_head.weight"] = torch.roll(broken["lm_head.weight"], 150, 0)
    found = battery(
        tiny_stock("qwen2", broken),
        tiny_tokenizer(),
        items,
        compare=tiny_stock("qwen2", letters_state()),
        progress=False,
    )
    assert found.score().passed == 0
    assert found.comparison.verdict == "worse"


def test_validation_asks_it_where_it_is_told_to(monkeypatch):
    monkeypatch.setattr("lowvram_lab.evaluation.battery.battery_items", lambda: SHORT)
    session = ChatSession(tiny(), tiny_tokenizer(), max_new_tokens=4, progress=False)
    session.ask("say something")
    history, lenient = list(session.history), Limits(perplexity_increase=10, kl_mean=10, top1_agreement=0, repetition=1)
    plain = validate(session, limits=lenient, progress=False)
    assert plain.battery is None and plain.to_dict()["battery"] is None
    report = validate(session, limits=lenient, battery=True, progress=False)
    (figure,) = [check for check in report.checks if "battery" in check.name]
    assert (figure.value, figure.passed) == ("1 of 3 pass, 33.3% (6.1% to 79.2%), by chat", None)
    assert session.history == history
    reference = tiny_stock("qwen2", letters_state())
    options = {"reference": reference, "text": "a small text to be scored", "limits": lenient, "progress": False}
    report = validate(session, battery=True, **options)
    (check,) = [check for check in report.checks if check.name == "battery against the reference"]
    assert (check.value, check.passed) == ("+0.0%: 0 lost, 0 gained, p = 1", True)
    assert json.loads(json.dumps(report.to_dict()))["battery"]["comparison"]["verdict"] == "within chance"
    worse = made([0] * 6 + [1] * 14).beside(made(ALL))
    monkeypatch.setattr("lowvram_lab.evaluation.validation.run_battery", lambda *args, **options: worse)
    assert not validate(session, battery=True, **options).passed


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("battery") / "model", "qwen2")


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr("lowvram_lab.evaluation.battery.battery_items", lambda: SHORT)


def test_the_command_prints_a_table_and_json(capsys, directory, short):
    status, out, err = run(capsys, "evaluate", directory, "--battery")
    assert status == 0, err
    assert "of 3 pass" in out and "copying" in out and "reference" not in out
    status, out, err = run(
        capsys, "evaluate", directory, "--battery", "--reference", directory, "--format", "int8", "--json"
    )
    assert status == 0, err
    found = json.loads(out)
    assert found["items"] == 3 and found["comparison"]["verdict"] == "within chance"
    assert "McNemar" in err


def test_a_converted_model_needs_no_reference(capsys, directory, short, tmp_path):
    words = ["--format", "int8", "--output", tmp_path / "out"]
    status, _, err = run(capsys, "convert", "--input", directory, *words)
    assert status == 0, err
    status, out, err = run(capsys, "evaluate", tmp_path / "out", "--battery", "--json")
    assert status == 0, err
    assert json.loads(out)["reference"] is None


def test_the_commands_mistakes_are_one_line_before_anything_is_loaded(capsys, directory, short, tmp_path, monkeypatch):
    monkeypatch.setattr("lowvram_lab.cli.evaluate.load", None)
    small = write_model(tmp_path / "small", "qwen2", max_position_embeddings=64)
    silent = write_model(tmp_path / "silent", "qwen2")
    untemplated().save_pretrained(silent)
    (silent / "chat_template.jinja").unlink(missing_ok=True)
    mistakes = [
        ([directory, "--battery", "--tokens", "9"], "--battery asks questions of its own, found --tokens"),
        ([directory, "--battery", "--window", "9"], "found --window"),
        ([directory, "--template-argument", "x=1"], "--template-argument goes with --battery"),
        ([small, "--battery"], "expected a context of"),
        ([directory, "--battery", "--reference", small], "expected a context of"),
        ([directory, "--battery", "--reference", silent], "asked in the same way, found chat and completion"),
        ([directory, "--battery", "--reference", "no-such-model"], "no-such-model"),
        ([directory, "--battery", "--template-argument", "x=1"], "x"),
    ]
    for words, expected in mistakes:
        status, out, err = run(capsys, "evaluate", *words)
        assert (status, out, len(err.splitlines())) == (2, "", 1), (words, err)
        assert expected in err


@pytest.mark.slow
@pytest.mark.integration
def test_the_built_in_model_passes_a_good_part_and_falls_without_six_of_its_layers():
    import lowvram_lab as lv

    source = lv.find_source("smollm2-135m")
    tokenizer = source.tokenizer()
    plan = lv.Plan.uniform(source.spec(), "bf16", context=battery_context(tokenizer))
    whole = battery(lv.load(plan, StandInGpu(None), progress=False), tokenizer, progress=False)
    assert 0.4 <= whole.score().share <= 0.75
    shorter = lv.load_reference(plan, progress=False)
    del shorter.model.layers[20:26]
    shorter.config.num_hidden_layers = len(shorter.model.layers)
    for index, layer in enumerate(shorter.model.layers):
        layer.self_attn.layer_idx = index
    fallen = battery(shorter, tokenizer, compare=whole, progress=False)
    assert fallen.score().share < 0.15
    assert fallen.comparison.verdict == "worse"
    assert math.isclose(fallen.comparison.difference, fallen.score().share - whole.score().share)

"""The battery's own items: right answers as a good model says them pass; wrong ones, and what knows nothing, fail."""

import pytest

from lowvram_lab.evaluation.answer_rules import RULES
from lowvram_lab.evaluation.battery import battery_items

KINDS = {"arithmetic", "brackets", "copying", "json", "format", "counting", "repetition", "facts"}
FREE_KINDS = KINDS - {"arithmetic", "counting", "facts"}
"""Kinds whose answers say what the question is about: no answer to one question is right for another."""
ITEMS = battery_items()
each_item = pytest.mark.parametrize("item", ITEMS, ids=lambda item: item.id)

ANSWERS = {
    # id: (right answers), (wrong ones)
    "arithmetic-en-1": (["10", "5 + 5 = 10.", "**10**"], ["55", "5 + 5 = 11", "ten or so"]),
    "arithmetic-en-2": (["12", "7 + 5 is 12.", "Answer: 12"], ["75", "7 + 5 = 13", "5"]),
    "arithmetic-en-3": (["6", "10 - 4 = 6", "`6`"], ["14", "-6", "4"]),
    "arithmetic-en-4": (["50", "The answer is 50.", "20 + 30 = 50"], ["2030", "5", "50 or 60"]),
    "arithmetic-zh-1": (["7", "4 加 3 等于 7。", "答：７"], ["4 + 3 = 8", "43", "六"]),
    "arithmetic-zh-2": (["2", "8 减 6 等于 2。", "答案是：2"], ["86", "14", "3"]),
    "arithmetic-zh-3": (["60", "30 加 30 等于 60", "６０。"], ["50", "3030", "30"]),
    "arithmetic-zh-4": (["5", "一共 5 本。", "3 + 2 = 5本"], ["32", "6", "3 本"]),
    "brackets-en-1": (["( { } )", "({})", "} )"], [") }", "( { ) }", "( [ ] )"]),
    "brackets-en-2": (["[5, 6]", "Answer: [5, 6].", "```\n[5, 6]\n```"], ["[5, 6)", "[1, 2]", "[5, 6"]),
    "brackets-en-3": (["(bird)", '"(bird)"', ")"], ["(bird", "(dog)", "(bird))"]),
    "brackets-en-4": (["((x) + y)", "( (x) + y )", "`((x) + y)`."], ["((x) + y", "((x) + y))", "((a) + b)"]),
    "brackets-zh-1": (["《小河》", "答：《小河》。", "》"], ["《小河", "《大海》", "〈小河〉"]),
    "brackets-zh-2": (["((三))", "（（三））", "))"], ["((三)", "((一))", "[[三]]"]),
    "brackets-zh-3": (["【秋】", "“【秋】”", "】"], ["【秋】】", "【夏】", "[秋]"]),
    "brackets-zh-4": (["[8]", "[8]。", "]"], ["[8)", "[2]", "[[8]"]),
    "copying-en-1": (["KM40", "Answer: KM40", '"KM40".'], ["KM4", "KM41", "Copy: KM40"]),
    "copying-en-2": (["grey-elk-6", "`grey-elk-6`", "```\ngrey-elk-6\n```"], ["grey-elk-4", "grey elk 6"]),
    "copying-en-3": (
        ["The cook left seven spoons on the stair.", '"The cook left seven spoons on the stair."'],
        ["The cook left seven spoons.", "The cook left six spoons on the stair.", "the cook"],
    ),
    "copying-en-4": (["green lamp", "Green lamp.", '"Green lamp"'], ["Green light", "lamp", "a green lamp"]),
    "copying-zh-1": (["窗户", "“窗户”。", "答：窗户"], ["窗", "窗户窗户", "苹果"]),
    "copying-zh-2": (["C-37", "C-37。", "Ｃ-37"], ["C-38", "C37", "B-26"]),
    "copying-zh-3": (["90 21", "90 21。", "「90 21」"], ["90 12", "9021", "90 21 34"]),
    "copying-zh-4": (["两本新书", "两本新书。", "结果：两本新书"], ["两本书", "一本新书", "三只小鸟"]),
    "json-en-1": (
        ['{"name": "Mark", "age": 7}', '```json\n{\n  "age": 7,\n  "name": "Mark"\n}\n```'],
        ['{"name": "Mark", age: 7}', '{"name": "Mark", "age": "7"}', '{"name": "Anna", "age": 9}'],
    ),
    "json-en-2": (
        ['{"city": "Paris", "country": "France"}', 'Here it is:\n\n{"country": "France", "city": "Paris"}'],
        ['{"city": "Paris"}', '{"city": "", "country": ""}', '{"city": "Paris", "country": "Paris"}'],
    ),
    "json-en-3": (
        ['{"colour": "yellow", "fruit": "lemon"}', '```json\n{"colour": "yellow", "fruit": "lemon"}\n```'],
        ['{"colour": "yellow", "fruit": "lemon"', '{"color": "yellow", "fruit": "lemon"}', "yellow lemon"],
    ),
    "json-en-4": (
        ['{"count": 4, "unit": "jars"}', 'Answer: {"unit": "jars", "count": 4}'],
        ['{"count": 4}', '{"count": 5, "unit": "bags"}', '{"count": "4", "unit": "jars"}'],
    ),
    "json-zh-1": (
        ['{"name": "小刚", "age": 7}', '```json\n{"name": "小刚", "age": 7}\n```'],
        ['{"name": "小刚", "age": 七}', '{"name": "小红", "age": 7}', '{“name”：“小刚”，“age”：7}'],
    ),
    "json-zh-2": (['{"数量": 6}', '答：{"数量":6}。'], ['{"数量": 8}', '{"数量": "6"}', '{"count": 6}']),
    "json-zh-3": (['{"x": 1, "y": 2}', '{"y": 2, "x": 1}'], ['{"x": 1}', '{"x": 2, "y": 1}', "x = 1, y = 2"]),
    "json-zh-4": (
        ['{"window": true}', '```\n{"window": true}\n```'],
        ['{"window": True}', '{"window": false}', '{"door": true}'],
    ),
    "format-en-1": (
        ["- Monday\n- Tuesday\n- Friday\n\nOK?", "```\n- monday\n- Sunday.\n- Friday\n```"],
        ["1. Monday\n2. Tuesday\n3. Friday", "- Monday\n- Tuesday", "- a\n- b\n- c", "- Monday\n- Friday\n- Friday"],
    ),
    "format-en-2": (
        ["red, green, blue", "Red, Yellow, and Blue.", "Answer: black, white, grey"],
        ["red, green", "red, red, blue", "cat, dog, horse", "red green blue"],
    ),
    "format-en-3": (
        ["January, February, March, April", "January, February, March, and April."],
        ["January\nFebruary\nMarch\nApril", "February, January, March, April", "January, February, March"],
    ),
    "format-en-4": (["2022-05-02", "2022-05-02.", "`2022-05-02`"], ["02-05-2022", "2022-02-05", "2022-05-021"]),
    "format-zh-1": (
        ["- 红\n- 黄\n- 蓝", "- 红色\n- 绿色\n- 黑色。"],
        ["红\n黄\n蓝", "- 红\n- 黄", "- 猫\n- 狗\n- 马", "- 红、黄、蓝"],
    ),
    "format-zh-2": (["4，5，6", "4, 5, 6", "答：4，5，6。"], ["4 5 6", "6，5，4", "4、5、6", "4，5，6，7"]),
    "format-zh-3": (["2022-06-07", "2022-06-07。", "“2022-06-07”"], ["2022-6-7", "2022-07-06", "2021-03-04"]),
    "format-zh-4": (["07:00", "07：00", "07:00。"], ["7点", "7:00", "08:00"]),
    "counting-en-1": (["3", "3 letters", "Cat has 3 letters."], ["4", "cat", "3 or 4"]),
    "counting-en-2": (["3", "Answer: 3.", "a b c: 3"], ["4", "2", "a b c d"]),
    "counting-en-3": (["80", "The next number is 80.", "50, 60, 70, 80"], ["70", "90", "50, 60, 70"]),
    "counting-en-4": (
        ["1, 2, 3, 4, 5, 6", "1, 2, 3, 4, 5, 6.", "1 2 3 4 5 6"],
        ["1, 2, 3, 5", "6, 5, 4, 3, 2, 1", "1, 2, 3, 4, 5, 6, 7"],
    ),
    "counting-zh-1": (["4", "4。", "答：4 个甲"], ["3", "甲甲甲甲甲", "5"]),
    "counting-zh-2": (["9", "下一个是 9。", "6，7，8，9"], ["8", "10", "6，7，8"]),
    "counting-zh-3": (["1，2，3，4，5", "1、2、3、4、5。", "1 2 3 4 5"], ["1，2，3", "5，4，3，2，1", "1，2，3，5，4"]),
    "counting-zh-4": (["12", "是 12。", "6，8，10，12"], ["11", "10", "14"]),
    "repetition-en-1": (
        [
            "Once upon a time a fox lived under an old oak. One night it heard music, and went to listen.",
            "A clever vixen had three cubs. When the hounds came, she led them far away from her den.",
        ],
        ["A fox.", "The fox ran. " * 12, "Once upon a time a dog lived in a house by the sea, and was always alone."],
    ),
    "repetition-en-2": (
        [
            "Bread is made from flour, water, salt and yeast.\n\n1. Mix them.\n2. Let the dough rise.\n3. Bake it.",
            "You knead flour with water and yeast, wait until it has grown to twice its size, shape it, and bake it.",
        ],
        [
            "Bread is baked.",
            "Bread is made by making bread. " * 6,
            "First you heat the oven, then you put it in and wait for half an hour.",
        ],
    ),
    "repetition-en-3": (
        [
            "People like cycling because it is cheap, good for their health, and lets them see the country on the way.",
            "A bike takes you to work without noise or smoke, needs no petrol, and can be left nearly anywhere.",
        ],
        [
            "It is fun.",
            "To ride a bicycle, " * 9,
            "They like the fresh air, they save money, and they meet their friends on the way.",
        ],
    ),
    "repetition-zh-1": (
        ["猫是一种安静的动物，喜欢晒太阳。", "猫很可爱，走路轻轻的，会捉老鼠。"],
        ["猫。", "猫很好。" * 8, "狗是人的好朋友，它会看家。"],
    ),
    "repetition-zh-2": (
        ["书是知识的海洋，读书使人聪明。", "阅读能让我们学到很多新的东西。"],
        ["读书好。", "读书很好，" * 6, "春天花开了，有红的，有白的，很好看。"],
    ),
    "repetition-zh-3": (
        ["茶是中国人爱喝的饮料，有绿茶和红茶。", "喝茶能提神，茶叶泡在热水里很香。"],
        ["茶好喝。", "茶是茶，" * 8, "春天花开了，有红的，有白的，很好看。"],
    ),
    "facts-en-1": (["7", "Seven.", "There are 7 days in a week."], ["12", "24/7", "not 7", "5 or 7"]),
    "facts-en-2": (
        ["Paris", "The capital of France is Paris. It lies on the Seine.", "It’s **Paris**."],
        ["Lyon", "not Paris", "Paris or London", "The capital of France is France."],
    ),
    "facts-en-3": (["cold", "Ice is cold.", "It's very cold."], ["Hot and cold", "not cold", "Hot.", "scolded"]),
    "facts-zh-1": (["北京", "中国的首都是北京。", "答：北京市"], ["上海", "不是北京", "东京", "北京或上海"]),
    "facts-zh-2": (["water", "Water.", "水用英语说是“water”。"], ["dog", "not water", "不是 water", "shui"]),
    "facts-zh-3": (["fish", "鱼的英文是 fish。", "Fish"], ["book", "not fish", "cat fish", "yu"]),
}  # fmt: skip


def test_sixty_items_of_eight_kinds_half_of_each_in_either_language():
    assert len({item.id for item in ITEMS}) == len(ITEMS) == 60
    assert {item.kind for item in ITEMS} == KINDS
    for kind in KINDS:
        languages = [item.language for item in ITEMS if item.kind == kind]
        assert languages.count("en") == languages.count("zh") >= 3
    assert {item.rule["name"] for item in ITEMS} == set(RULES)
    assert len({(item.shots, item.prompt) for item in ITEMS}) == 60
    assert set(ANSWERS) == {item.id for item in ITEMS}


@each_item
def test_right_answers_pass_and_wrong_ones_fail(item):
    right, wrong = ANSWERS[item.id]
    assert len(right) >= 2 and len(wrong) >= 2
    assert [answer for answer in (item.example, *right) if not item.passes(answer)] == []
    assert [answer for answer in (item.counterexample, *wrong) if item.passes(answer)] == []


@each_item
def test_what_knows_no_answer_fails(item):
    """Neither nothing, nor some phrase, nor the question or what stands before it said again."""
    said = [text for shot in item.shots for text in shot]
    chat = [item.text(), "\n".join(said), " ".join(said), " ".join([*said, item.prompt])]
    phrases = ["", " ", "yes", "Yes.", "no", "I don't know.", "I'm sorry, I can't do that.", "是", "不知道。", "好的。"]
    known = [*said, *chat, *phrases, item.prompt, f"{item.prompt} " * 8]
    assert [text for text in known if item.passes(text)] == []


@pytest.mark.parametrize("kind", sorted(FREE_KINDS))
def test_an_answer_to_one_question_is_none_to_another(kind):
    items = [item for item in ITEMS if item.kind == kind]
    answers = {answer for item in items for _, answer in item.shots}
    assert [(item.id, answer) for item in items for answer in answers if item.passes(answer)] == []
    others = [(item, other) for item in items for other in items if item is not other]
    assert [(item.id, other.id) for item, other in others if item.passes(other.example)] == []


def test_no_answer_is_right_for_more_than_two():
    """Whoever says the same to everything, a small number say, gains next to nothing."""
    told = {answer for item in ITEMS for _, answer in item.shots}
    told |= {answer for right, wrong in ANSWERS.values() for answer in (*right, *wrong)}
    counts = {answer: sum(item.passes(answer) for item in ITEMS) for answer in told | {str(n) for n in range(101)}}
    assert [answer for answer, count in counts.items() if count > 2] == []


@each_item
def test_an_item_is_short_and_is_what_its_name_says(item):
    assert item.id.startswith(f"{item.kind}-{item.language}-")
    assert 8 <= item.max_new_tokens <= (96 if item.kind == "repetition" else 48)
    said = "".join(message["content"] for message in item.messages())
    assert item.language == "zh" or said.isascii()
    assert len(item.messages()) == 2 * len(item.shots) + 1

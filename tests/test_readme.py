"""README.md and its Chinese twin: the same sections, commands, code, tables and links, in the same order."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
ENGLISH, CHINESE = ((ROOT / name).read_text("utf-8") for name in ("README.md", "README.zh-CN.md"))


def code_blocks(text):
    """Language and lines of every block, without comments, which each language has its own."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    return [(language, [re.sub(r"\s+# .*", "", line) for line in block.splitlines()]) for language, block in found]


def outside_code(text):
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def headings(text):
    return re.findall(r"^#+(?= )", outside_code(text), flags=re.MULTILINE)


def test_they_have_the_same_headings():
    assert headings(CHINESE) == headings(ENGLISH)


def test_their_code_blocks_say_the_same():
    assert code_blocks(ENGLISH)
    assert code_blocks(CHINESE) == code_blocks(ENGLISH)


def test_their_tables_have_the_same_shape():
    shapes = [[line.count("|") for line in text.splitlines() if line.startswith("|")] for text in (ENGLISH, CHINESE)]
    assert shapes[0] == shapes[1]


def test_they_name_the_same_things():
    for pattern in (r"`[^`]+`", r"(?<=\]\()[^)]+"):  # commands and names; where links and pictures lead
        named = [
            sorted(found for found in re.findall(pattern, outside_code(text)) if "README" not in found)
            for text in (ENGLISH, CHINESE)
        ]
        assert named[0] == named[1]


def test_they_lead_to_each_other():
    assert "](README.zh-CN.md)" in ENGLISH and "](README.md)" in CHINESE


def test_every_link_into_the_project_leads_somewhere():
    for text in (ENGLISH, CHINESE):
        for link in re.findall(r"\]\(((?!http)[^)#]+)\)", text):
            assert (ROOT / link).exists(), link

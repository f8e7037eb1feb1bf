"""The committed notebooks: their order of cells, their size, and outputs that belong in a repository.

That they run is pytest --nbmake's to say (``make test``).
"""

import ast
import importlib.util
import json
import re
import shutil
import tomllib
from pathlib import Path

import nbformat
import pytest

import lowvram_lab as lab

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
MOST_BYTES = 500_000

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path):
    return nbformat.read(path, as_version=4)


def code_cells(path):
    return [cell for cell in read(path).cells if cell.cell_type == "code"]


def outputs(path):
    return [(cell.id, output) for cell in code_cells(path) for output in cell.outputs]


def shown(cell) -> str:
    """What a reader sees below a cell, as plain text."""
    return "\n".join(output.get("text") or output.get("data", {}).get("text/plain", "") for output in cell.outputs)


def output_texts(path):
    """Every text a reader sees in an output, and the cell it is in."""
    for cell_id, output in outputs(path):
        if output.output_type == "stream":
            yield cell_id, output.text
        for mime, data in output.get("data", {}).items():
            if mime.startswith("text/"):
                yield cell_id, data


def import_script(path):
    """A script as a module; its folder is no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


links = import_script(FOLDER / "publish_links.py")


def test_there_are_notebooks():
    assert NOTEBOOKS
    for path in NOTEBOOKS:
        assert re.fullmatch(r"\d\d_[a-z0-9_]+\.ipynb", path.name)


def test_the_setup_cell_is_the_same_everywhere():
    setups = {cell.source for path in NOTEBOOKS for cell in read(path).cells if cell.id == "setup"}
    assert len(setups) == 1
    setup = setups.pop()
    assert "import lowvram_lab as lab" in setup
    assert "==" not in setup  # Colab's own torch, numpy and ipywidgets stay


# ---- where the package comes from ----


@each
def test_a_notebook_says_what_pyproject_says_of_where_the_package_comes_from(path):
    notebook = json.loads(path.read_text("utf-8"))
    assert links.linked(notebook, path.name, links.published()) == notebook, "run make publish-links"


ADDRESSES = re.compile(r"github\.com/[\w.-]+/[\w.-]+|colab\.research\.google\.com/github/[\w.-]+/[\w.-]+")


@each
def test_a_notebook_sends_nobody_to_another_address(path):
    text = "".join(cell.source for cell in read(path).cells)
    assert {found.split("github")[-1] for found in ADDRESSES.findall(text)} <= {
        f"{way}/{links.published()}" for way in (".com", "")
    }


@pytest.fixture
def project(tmp_path):
    """pyproject.toml and notebooks, to be written to."""
    shutil.copy(FOLDER.parent / "pyproject.toml", tmp_path)
    (tmp_path / "notebooks").mkdir()
    for path in NOTEBOOKS:
        shutil.copy(path, tmp_path / "notebooks")
    links.publish("", tmp_path)
    return tmp_path


def pages(project):
    return {path.relative_to(project): path.read_bytes() for path in project.rglob("*.*") if path.is_file()}


def test_publishing_writes_badges_and_setup_cells_and_takes_them_away_again(project):
    unpublished = pages(project)
    assert "wheel" in unpublished[Path("notebooks", NOTEBOOKS[0].name)].decode()
    assert set(links.publish("ann/low-vram.lab", project)) == {project / page for page in unpublished}
    assert tomllib.loads((project / "pyproject.toml").read_text("utf-8"))["tool"]["lowvram"]["published"] == (
        links.published(project)
    )
    for path in sorted((project / "notebooks").iterdir()):
        cells = {cell.id: cell.source for cell in read(path).cells}
        page = f"https://colab.research.google.com/github/ann/low-vram.lab/blob/main/notebooks/{path.name}"
        assert f"]({page})" in cells["title"]
        assert "%pip install -q git+https://github.com/ann/low-vram.lab\n" in cells["setup"]
    assert links.publish("ann/low-vram.lab", project) == []  # nothing left to write
    links.publish("bob/another", project)
    links.publish("", project)
    assert pages(project) == unpublished  # outputs and ids are what they were


def test_publishing_leaves_outputs_and_ids_alone(project):
    before = {path.name: read(path) for path in NOTEBOOKS}
    links.publish("ann/lab", project)
    for name, notebook in before.items():
        for old, new in zip(notebook.cells, read(project / "notebooks" / name).cells, strict=True):
            changed = old.id in ("title", "setup")
            assert (old.id, old.get("outputs")) == (new.id, new.get("outputs"))
            assert (old.source != new.source) == changed


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["ann"],
        ["ann/"],
        ["/lab"],
        ["ann/lab/tree"],
        ["https://github.com/ann/lab"],
        ["ann/lab.git"],
        ["ann/.."],
        ["ann/a b"],
        ["ann/lab\n"],
        ['ann/"lab'],
        ["-ann/lab"],
        ["änn/lab"],
        ["a", "b"],
    ],
)
def test_a_repository_that_cannot_be_is_refused_in_one_line(words, capsys):
    before = pages(FOLDER)
    assert links.main(words) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and "REPO=owner/name" in err
    assert pages(FOLDER) == before


@pytest.mark.parametrize("spoilt", ["no title", "no lines", "twice", "not JSON"])
def test_a_notebook_without_a_place_for_the_links_stops_it_before_anything_is_written(spoilt, project):
    last = max((project / "notebooks").iterdir())
    notebook = json.loads(last.read_text("utf-8"))
    setup = next(cell for cell in notebook["cells"] if cell["id"] == "setup")
    if spoilt == "no title":
        notebook["cells"] = notebook["cells"][1:]
    elif spoilt == "no lines":
        setup["source"] = ["import lowvram_lab as lab"]
    else:
        setup["source"] *= 2
    last.write_text("{" if spoilt == "not JSON" else json.dumps(notebook))
    before = pages(project)
    with pytest.raises(links.LowvramError, match=last.name):
        links.publish("ann/lab", project)
    assert pages(project) == before


@each
def test_is_valid_and_has_unique_cell_ids(path):
    notebook = read(path)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    ids = [cell.id for cell in notebook.cells]
    assert len(set(ids)) == len(ids)


@each
def test_the_order_of_cells(path):
    ids = [cell.id for cell in read(path).cells]
    sections = list(dict.fromkeys(found.group() for found in map(re.compile(r"s\d").match, ids) if found))
    assert 3 <= len(sections) <= 6
    assert sections == [f"s{number}" for number in range(1, len(sections) + 1)]
    landmarks = ["title", "setup", "parameters", *(f"{s}-text" for s in sections), "summary", "exercises", "asserts"]
    positions = [ids.index(landmark) for landmark in landmarks]
    assert positions == sorted(positions)
    assert positions[0] == 0 and ids[-1] == "asserts"
    for number in (1, 2, 3):
        assert f"exercise-{number}" in ids


@each
def test_every_section_opens_with_a_prediction(path):
    """The reader commits to an answer before any of the section's figures."""
    cells = {cell.id: cell.source for cell in read(path).cells}
    assert "**Predict**" in cells["parameters-text"]  # says what to do with it
    opened = [name for name in cells if re.fullmatch(r"s\d-text", name)]
    assert [name for name in opened if "?" not in cells[name].partition("**Predict.**")[2]] == []


@each
def test_the_title_says_what_a_reader_wants_to_know(path):
    title = read(path).cells[0].source
    assert title.startswith(f"# {int(path.name[:2])}. ")
    for word in ("**Question.**", "**Time.**", "**Needs.**"):
        assert word in title


@each
def test_there_is_one_parameters_cell_and_it_reads_the_environment(path):
    tagged = [cell for cell in read(path).cells if "parameters" in cell.metadata.get("tags", [])]
    assert [cell.id for cell in tagged] == ["parameters"]
    lines = [line for line in tagged[0].source.splitlines() if line.strip() and not line.startswith("import ")]
    assert lines and all('os.environ.get("LOWVRAM_' in line for line in lines)


@each
def test_every_section_and_no_exercise_has_a_picture(path):
    pictured = {cell_id.split("-")[0] for cell_id, output in outputs(path) if "image/png" in output.get("data", {})}
    sections = {cell.id.split("-")[0] for cell in code_cells(path) if re.match(r"s\d-", cell.id)}
    assert pictured == sections


@each
def test_a_picture_is_the_last_code_of_its_section_and_comes_with_a_figure_in_text(path):
    last = {cell.id.split("-")[0]: cell for cell in code_cells(path) if re.match(r"s\d-", cell.id)}
    for section, cell in last.items():
        kinds = [output.output_type for output in cell.outputs]
        assert "stream" in kinds and "image/png" in cell.outputs[-1].get("data", {}), section
        assert any(re.search(r"\d", output.text) for output in cell.outputs if output.output_type == "stream"), section


@each
def test_stays_small(path):
    assert path.stat().st_size <= MOST_BYTES


@each
def test_was_run_from_top_to_bottom(path):
    counts = [cell.execution_count for cell in code_cells(path)]
    assert counts == list(range(1, len(counts) + 1))


@each
def test_outputs_hold_no_error_no_stderr_and_no_widget(path):
    assert "widgets" not in read(path).metadata
    for cell_id, output in outputs(path):
        assert output.output_type != "error", cell_id
        assert output.get("name") != "stderr", f"{cell_id}: {output.get('text', '')[:200]}"
        assert "application/vnd.jupyter.widget-view+json" not in output.get("data", {}), cell_id


@each
def test_outputs_hold_nothing_of_the_machine_they_were_made_on(path):
    for cell_id, text in output_texts(path):
        assert not re.search(r"(?<![\w.])/(work|root|tmp|home|Users|opt)/", text), f"{cell_id}: {text[:200]}"
        assert not re.search(r" at 0x[0-9a-f]{6,}", text), f"{cell_id}: an address in memory"
    for cell in read(path).cells:
        assert "execution" not in cell.metadata, f"{cell.id}: run nbstripout (make notebooks)"


@each
def test_exercises_run_as_they_are_and_do_not_tell(path):
    exercises = [cell for cell in code_cells(path) if cell.id.startswith("exercise-")]
    assert len(exercises) == 3
    for cell in exercises:
        assert re.search(r"(answer =|return) None  # your turn", cell.source), cell.id
        assert re.search(r"^lab\.check\(", cell.source.splitlines()[-1]), cell.id
        assert re.fullmatch(r"exercise \d: not yet: no answer so far", shown(cell).splitlines()[-1]), cell.id
        assert not any("expected" in line for line in re.findall(r"print\(.*", cell.source)), cell.id
    hints = [cell.source for cell in read(path).cells if cell.cell_type == "markdown" and "<details>" in cell.source]
    assert len(hints) == 3


@each
def test_the_asserts_hold_and_come_last(path):
    last = read(path).cells[-1]
    assert "assert " in last.source and shown(last).strip() == "all asserts hold"


@each
def test_what_a_stand_in_did_is_called_simulated(path):
    texts = " ".join(text for _, text in output_texts(path))
    assert "stand-in" not in texts or "simulated" in texts
    for found in re.finditer(r"stand-in GPU(?! \(simulated\))", texts):
        raise AssertionError(texts[max(0, found.start() - 80) : found.end() + 80])


@each
def test_pyplot_is_left_alone(path):
    assert not any("pyplot" in cell.source for cell in code_cells(path))


@each
def test_every_name_of_the_package_is_a_public_one(path):
    """Cells say ``lab.name`` and import no submodule, so that what lies where can change without editing them."""
    for cell in code_cells(path):
        code = "\n".join(line for line in cell.source.splitlines() if not line.lstrip().startswith(("!", "%")))
        if cell.id == "setup":
            continue
        assert "lowvram_lab." not in code, f"{cell.id}: a module by its name"
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] != lab.__name__, f"{cell.id}: {ast.unparse(node)}"
            if isinstance(node, ast.Import):
                assert lab.__name__ not in {alias.name.split(".")[0] for alias in node.names}, cell.id
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "lab":
                assert node.attr in lab.__all__, f"{cell.id}: lab.{node.attr}"


def test_no_function_is_written_in_two_notebooks():
    owners: dict[str, str] = {}
    for path in NOTEBOOKS:
        for cell in code_cells(path):
            for name in re.findall(r"^def (\w+)", cell.source, flags=re.MULTILINE):
                assert owners.setdefault(name, path.name) == path.name, f"{name} belongs in the library"

"""What holds the package together: versions, constraints, sizes, data, names, and what an import may cost."""

import ast
import json
import shutil
import subprocess
import sys
import tarfile
import tomllib
import warnings
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import lowvram_lab

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "lowvram_lab"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
LONG_FILE = 400
BODY_LINES = 45
FOLDER_LINES = 3200
HEAVY = ("torch", "transformers", "matplotlib", "ipywidgets", "bitsandbytes")

modules = pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))


def constraints() -> dict[str, Requirement]:
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]
    return {canonicalize_name(pin.name): pin for pin in pins}


def test_version_agrees():
    assert lowvram_lab.__version__ == PROJECT["version"]


def test_constraints_pin_exactly_and_leave_cuda_to_torch():
    for name, pin in constraints().items():
        (specifier,) = pin.specifier
        assert specifier.operator == "==" and "+" not in specifier.version, f"{pin}: want name==version, no local part"
        assert not name.startswith(("nvidia-", "triton", "cuda-")), f"{name} is torch's own affair"


@pytest.mark.parametrize("extra", ["", "notebook", "test", "export", "browser"])
def test_constraints_cover_what_is_declared(extra):
    declared = PROJECT["optional-dependencies"][extra] if extra else PROJECT["dependencies"]
    pins = constraints()
    for requirement in map(Requirement, declared):
        pin = pins.get(canonicalize_name(requirement.name))
        assert pin is not None, f"{requirement.name} is declared but not in constraints.txt"
        (specifier,) = pin.specifier
        assert requirement.specifier.contains(specifier.version), f"{pin} lies below {requirement}"


def test_llama_cpp_is_only_in_bench():
    where = [extra for extra, names in PROJECT["optional-dependencies"].items() if "llama" in " ".join(names)]
    assert where == ["bench"] and "llama-cpp-python" not in constraints()


@modules
def test_a_long_module_is_pointed_out(path):
    """No limit: 420 clear lines beat two files torn apart."""
    lines = len(path.read_text("utf-8").splitlines())
    if lines > LONG_FILE:
        warnings.warn(f"{path.relative_to(PACKAGE)} has {lines} lines", stacklevel=1)


@modules
def test_a_function_is_short_enough_to_see_at_once(path):
    """How many parameters and branches it may have is for ruff to say (pyproject.toml)."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            lines = body[-1].end_lineno - body[0].lineno + 1 if body else 0
            assert lines <= BODY_LINES, f"{node.name}: {lines} lines beside its docstring, over {BODY_LINES}"


@pytest.mark.parametrize("folder", sorted(p for p in PACKAGE.iterdir() if list(p.glob("*.py"))), ids=lambda p: p.name)
def test_a_folder_keeps_to_its_budget(folder):
    """The house as a whole stays small."""
    lines = sum(len(path.read_text("utf-8").splitlines()) for path in folder.rglob("*.py"))
    assert lines <= FOLDER_LINES, f"{folder.name}/ has {lines} lines, over {FOLDER_LINES}: delete something"


@modules
def test_every_folder_with_code_is_a_package(path):
    assert (path.parent / "__init__.py").is_file(), f"{path.parent.name}/ has no __init__.py and would not be installed"


def folders_with_code() -> set[str]:
    return {".".join(path.parent.relative_to(ROOT).parts) for path in PACKAGE.rglob("__init__.py")}


def data_folders() -> set[str]:
    folders = {path.parent for path in (ROOT / "data").rglob("*") if path.is_file()}
    return {".".join(("lowvram_lab", *folder.relative_to(ROOT).parts)) for folder in folders}


def test_every_folder_is_named_in_pyproject():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]
    assert settings["packages"] == sorted(folders_with_code() | data_folders())
    assert set(settings["package-data"]) == data_folders() | {"lowvram_lab.kernels"}


def build(call: str, folder: Path, output: Path) -> Path:
    """What setuptools makes of the project in a folder."""
    code = f"from setuptools import build_meta; build_meta.{call}({str(output)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, capture_output=True, timeout=300)
    return max(output.iterdir(), key=lambda path: path.stat().st_mtime)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """What a build needs of this checkout, copied: a build writes beside its sources."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("lowvram_lab", "data"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, folder)
    return folder


def installed_files() -> set[str]:
    """Every file that the package must come with, by its place in a wheel."""
    code = {path.relative_to(ROOT) for pattern in ("*.py", "*.cpp", "*.h") for path in PACKAGE.rglob(pattern)}
    data = {Path("lowvram_lab") / path.relative_to(ROOT) for path in (ROOT / "data").rglob("*") if path.is_file()}
    return {path.as_posix() for path in code | data}


def test_a_wheel_holds_the_code_and_the_data_and_nothing_else(checkout, tmp_path):
    with zipfile.ZipFile(build("build_wheel", checkout, tmp_path)) as wheel:
        names = set(wheel.namelist())
    assert {name for name in names if ".dist-info/" not in name} == installed_files()
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_a_wheel_made_from_the_sdist_holds_the_same(checkout, tmp_path):
    for name in ("sdist", "unpacked", "wheel"):
        (tmp_path / name).mkdir()
    with tarfile.open(build("build_sdist", checkout, tmp_path / "sdist")) as sdist:
        sdist.extractall(tmp_path / "unpacked", filter="data")
    (project,) = (tmp_path / "unpacked").iterdir()
    with zipfile.ZipFile(build("build_wheel", project, tmp_path / "wheel")) as wheel:
        assert {name for name in wheel.namelist() if ".dist-info/" not in name} == installed_files()


def test_an_editable_install_finds_the_data(checkout, tmp_path):
    """The finder that an editable install writes, run by a Python that knows no other copy of the package."""
    with zipfile.ZipFile(build("build_editable", checkout, tmp_path)) as wheel:
        wheel.extractall(tmp_path / "site")
    code = (
        f"import site; site.addsitedir({str(tmp_path / 'site')!r})\n"
        "import lowvram_lab\n"
        "from lowvram_lab.packaged import packaged_facts, sample_text\n"
        "print(lowvram_lab.__file__, len(packaged_facts()), len(sample_text()) > 100)"
    )
    run = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, cwd=tmp_path)
    configs = len(list((ROOT / "data" / "configs").iterdir()))
    assert run.stdout.split() == [str(checkout / "lowvram_lab" / "__init__.py"), str(configs), "True"], run.stderr


@pytest.mark.parametrize("path", sorted((ROOT / "data").rglob("*.json")), ids=lambda p: p.name)
def test_data_parses(path):
    assert json.loads(path.read_text("utf-8"))


def test_bilingual_text_is_half_english_half_chinese():
    paragraphs = (ROOT / "data" / "bilingual.txt").read_text("utf-8").strip().split("\n\n")
    chinese = [max(p) >= "\u4e00" for p in paragraphs]
    assert len(paragraphs) >= 8 and chinese == [i % 2 == 1 for i in range(len(paragraphs))]


def test_no_public_name_is_that_of_a_module_beside_it():
    """Whoever imported the module would find it where the function was."""
    beside = {path.stem for path in PACKAGE.iterdir() if path.is_dir() or path.suffix == ".py"}
    assert beside.isdisjoint(lowvram_lab.__all__)


@pytest.mark.parametrize("name", lowvram_lab.__all__)
def test_every_public_name_is_there(name):
    assert getattr(lowvram_lab, name) is not None


def test_import_is_light():
    code = f"import lowvram_lab, sys; print(*[m for m in {HEAVY} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "", f"import lowvram_lab also imports {run.stdout.strip()}"

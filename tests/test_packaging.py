"""What holds the package together: versions, constraints, sizes of files, data, names, and what an import may cost."""

import json
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import lowvram_lab

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "lowvram_lab"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
LONG_FILE = 400
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
def test_every_folder_with_code_is_a_package(path):
    assert (path.parent / "__init__.py").is_file(), f"{path.parent.name}/ has no __init__.py and would not be installed"


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

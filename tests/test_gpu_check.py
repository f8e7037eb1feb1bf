"""The script for a card, where there is none: what it does with a part that fails, stays away or never ends."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def gpu_check():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import gpu_check
    finally:
        sys.path.remove(str(BENCHMARKS))
    return gpu_check


def _part(gpu_check, code: str, name: str = "part"):
    return gpu_check.Part(name, 60, ("-c", code, "{output}", "{weights}"), lambda result: f"found {result['found']}")


WRITES = "import json, sys; open(sys.argv[1], 'w').write(json.dumps({'found': 3, 'ttft_s': 0.5}))"


def test_a_part_that_ends_well_says_its_result(gpu_check, tmp_path):
    row = gpu_check.run_part(_part(gpu_check, WRITES), 60, tmp_path)
    assert row["words"] == "found 3"
    assert "failed" not in row


def test_times_are_kept_of_a_card_alone(gpu_check, tmp_path, monkeypatch):
    assert gpu_check.run_part(_part(gpu_check, WRITES), 60, tmp_path)["result"] == {"found": 3}
    monkeypatch.setattr(gpu_check, "runtime", lambda: "cuda")
    assert gpu_check.run_part(_part(gpu_check, WRITES), 60, tmp_path)["result"] == {"found": 3, "ttft_s": 0.5}


@pytest.mark.parametrize(
    ("code", "seconds", "reason"),
    [
        ("print('before'); raise SystemExit('no such card')", 60, "exit status 1"),
        ("print('no such card')", 60, "wrote no result"),
        ("print('no such card', flush=True); import time; time.sleep(600)", 2, "stopped after 2 s"),
    ],
)
def test_a_part_that_fails_is_a_row_with_its_last_words(gpu_check, tmp_path, code, seconds, reason):
    row = gpu_check.run_part(_part(gpu_check, code), seconds, tmp_path)
    assert row["failed"] == reason
    assert row["said"][-1] == "no such card"


def test_a_part_that_fails_late_keeps_what_it_found(gpu_check, tmp_path):
    row = gpu_check.run_part(_part(gpu_check, WRITES + "; sys.exit(1)"), 60, tmp_path)
    assert (row["failed"], row["words"]) == ("exit status 1", "found 3")


def test_a_run_of_tests_is_counted_by_name(gpu_check, tmp_path):
    written = tmp_path / "test_three.py"
    written.write_text(
        "import pytest\ndef test_good(): pass\ndef test_bad(): assert 1 == 2, 'a reason'\n"
        "def test_left(): pytest.skip('no twin')\n"
    )
    arguments = ("-m", "pytest", "-q", "-p", "no:cacheprovider", str(written), "--junitxml={output}")
    row = gpu_check.run_part(gpu_check.Part("tests", 60, arguments, gpu_check._tests_words), 60, tmp_path)
    assert row["words"] == "1 passed, 1 failed, 1 skipped"
    assert "a reason" in next(iter(row["result"]["failed"].values()))
    assert "no twin" in next(iter(row["result"]["skipped"].values()))
    assert row["failed"] == "exit status 1"


def test_what_is_asked_names_scripts_that_are_there(gpu_check):
    for small in (True, False):
        for part in gpu_check.parts(small, "qwen1.5-4b"):
            script = Path(part.arguments[0])
            assert script.is_file() or part.arguments[:2] == ("-m", "pytest")
    assert (
        sum(part.seconds for part in gpu_check.parts(False, "qwen1.5-4b")) > gpu_check.SECONDS
    )  # the last may be left out


def test_without_a_card_it_says_so_and_writes_nothing(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "gpu_check.py"), "--output", str(tmp_path / "result.json")]
    done = subprocess.run(command, capture_output=True, text=True, env={"CUDA_VISIBLE_DEVICES": "", "PATH": ""})
    assert done.returncode == 2
    assert done.stderr == "gpu_check.py: expected a CUDA card, found none; `make fake-cuda` needs none\n"
    assert not list(tmp_path.iterdir())


def test_an_unknown_part_is_named(gpu_check, monkeypatch, capsys):
    monkeypatch.setattr(gpu_check.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--parts", "sped"])
    assert gpu_check.main() == 2
    assert "expected parts of forecast, trace" in capsys.readouterr().err


def test_a_check_without_time_names_what_it_left_out(gpu_check, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu_check.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_check.torch.cuda, "get_device_name", lambda: "A Card")
    monkeypatch.setattr(gpu_check, "runtime", lambda: "fake CUDA")
    monkeypatch.setattr(gpu_check, "facts", dict)
    monkeypatch.setattr(gpu_check, "machine", lambda: {"gpu_bytes": 4 << 30})
    output = tmp_path / "result.json"
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--seconds", "0", "--output", str(output)])
    assert gpu_check.main() == 1
    assert capsys.readouterr().out.count("could not: ") == 7
    rows = json.loads(output.read_text())["parts"]
    assert set(rows) == {part.name for part in gpu_check.parts(True, "")}
    assert {row["failed"] for row in rows.values()} == {"not run: out of time"}

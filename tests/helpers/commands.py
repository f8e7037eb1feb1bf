"""The command line, run in this process."""

from lowvram_lab.cli import main as cli


def run_command(capsys, *words):
    """Exit status, stdout and stderr of ``lowvram WORDS``, in this process."""
    try:
        status = cli.main([str(word) for word in words])
    except SystemExit as stop:
        status = stop.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err

"""Write into the notebooks where the project is published, or that it is not: Colab badges and setup cells.

The one place that says it is ``published`` under ``[tool.lowvram]`` in pyproject.toml: ``owner/name`` on GitHub, or
nothing. ``make publish-links REPO=owner/name`` writes it there and into every notebook; ``REPO=`` takes it away.
"""

import json
import re
import sys
import tomllib
from pathlib import Path

from lowvram_lab.errors import LowvramError
from lowvram_lab.files import write_atomically

ROOT = Path(__file__).resolve().parent.parent
BADGE = "https://colab.research.google.com/assets/colab-badge.svg"
_REPOSITORY = re.compile(r"[A-Za-z0-9](?:-?[A-Za-z0-9]){0,38}/(?!\.+$)[\w.-]{1,100}(?<!\.git)", re.ASCII)
_SETTING = re.compile(r'^published = "[^"\n]*"', re.MULTILINE)
_LINES = {
    "title": re.compile(r"^(\[!\[Open in Colab\]|\*\*In Colab\.\*\*).*$", re.MULTILINE),
    "setup": re.compile(r"^except ImportError:.*\n    %pip install .*$", re.MULTILINE),
}
"""For each cell that says where the package comes from, by id, the lines that do."""


def published(root: Path = ROOT) -> str:
    """Where the project is published: ``owner/name`` on GitHub, or ``""``."""
    return tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["tool"]["lowvram"]["published"]


def checked(repository: str) -> str:
    """``repository``, if it is empty or GitHub could have it.

    Raises:
        LowvramError: It could not.
    """
    if repository and not _REPOSITORY.fullmatch(repository):
        raise LowvramError(
            f"expected REPO=owner/name as in a GitHub address, or REPO= for none, found {repository!r}; nothing written"
        )
    return repository


def lines(repository: str, notebook: str) -> dict[str, str]:
    """For each cell, by id, the lines that say where the package comes from.

    Args:
        repository: ``owner/name``, or ``""`` for a project that is published nowhere.
        notebook: File name.
    """
    if repository:
        page = f"https://colab.research.google.com/github/{repository}/blob/main/notebooks/{notebook}"
        return {
            "title": f"[![Open in Colab]({BADGE})]({page})",
            "setup": "except ImportError:  # on Colab; torch, numpy and ipywidgets stay as they are there\n"
            f"    %pip install -q git+https://github.com/{repository}",
        }
    return {
        "title": "**In Colab.** Build the wheel with `make dist` and upload `dist/lowvram_lab-*.whl` to the session's "
        "files; the first cell installs it with `%pip install`.",
        "setup": "except ImportError:  # on Colab, once the wheel is uploaded; torch, numpy and ipywidgets stay there\n"
        "    %pip install -q lowvram_lab-*.whl",
    }


def linked(notebook: dict, name: str, repository: str) -> dict:
    """A notebook whose title and setup cells agree with ``repository``; outputs and everything else as they are.

    Args:
        notebook: As JSON gives it.
        name: File name.
        repository: ``owner/name``, or ``""``.

    Raises:
        LowvramError: A cell lacks the lines to replace, or has them twice.
    """
    wanted = lines(repository, name)
    cells = []
    for cell in notebook["cells"]:
        if (cell_id := cell.get("id")) in wanted:
            text, count = _LINES[cell_id].subn(lambda _, new=wanted[cell_id]: new, "".join(cell["source"]))
            if count != 1:
                raise LowvramError(
                    f"{name}: expected the cell {cell_id!r} to say once where the package comes from, found it {count} "
                    "times; copy that cell from another notebook"
                )
            cell = {**cell, "source": text.splitlines(keepends=True)}
        cells.append(cell)
    if missing := wanted.keys() - {cell.get("id") for cell in cells}:
        raise LowvramError(f"{name}: expected a cell with the id {min(missing)!r}, found none")
    return {**notebook, "cells": cells}


def publish(repository: str, root: Path = ROOT) -> list[Path]:
    """Writes pyproject.toml and every notebook that does not say ``repository`` yet; returns those written.

    Raises:
        LowvramError: No such repository can be, or a file has no place for it. Nothing is written then.
    """
    checked(repository)
    settings = root / "pyproject.toml"
    text, count = _SETTING.subn(f'published = "{repository}"', settings.read_text("utf-8"))
    if count != 1:
        raise LowvramError(f'{settings.name}: expected one line published = "…" under [tool.lowvram], found {count}')
    pages = {settings: text}
    for path in sorted((root / "notebooks").glob("*.ipynb")):
        try:
            notebook = linked(json.loads(path.read_text("utf-8")), path.name, repository)
        except (ValueError, KeyError, TypeError) as error:
            raise LowvramError(f"{path.name}: expected a notebook in JSON, found something else ({error!r})") from error
        pages[path] = json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
    changed = [path for path, page in pages.items() if page != path.read_text("utf-8")]
    for path in changed:
        write_atomically(path, pages[path])
    return changed


def main(words: list[str]) -> int:
    """Exit status: 0 done, 2 a mistake explained in one line."""
    try:
        if len(words) != 1:
            raise LowvramError("say where: make publish-links REPO=owner/name, or REPO= to take the links away")
        changed = publish(words[0])
    except (LowvramError, OSError) as error:
        print(f"publish-links: {error}", file=sys.stderr)
        return 2
    where = f"published at {words[0]}" if words[0] else "published nowhere"
    print(f"{where}: {len(changed)} files written" + "".join(f"\n  {path.relative_to(ROOT)}" for path in changed))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

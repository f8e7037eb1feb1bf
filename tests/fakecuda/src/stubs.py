"""Writes stubs for the functions that a real library (or header) has and ours has not, and the linker's version script.

    python stubs.py NAME --real LIBRARY.so | --header FILE PATTERN  --written OBJECT --answer CODE --to PREFIX

PREFIX.c then holds functions that count themselves (``fakecuda_stub``) and return CODE; with ``--launch`` they count as
a kernel on the stream of the handle that is their first argument. PREFIX.map exports all names under the real library's
version nodes, so that a program linked against the real one accepts ours.
"""

import argparse
import re
import subprocess
from pathlib import Path


def exported(library):
    """{version node or None: {function names}} of a shared library."""
    found = {}
    text = subprocess.run(["readelf", "-W", "--dyn-syms", library], check=True, capture_output=True, text=True).stdout
    for line in text.splitlines():
        fields = line.split()
        if len(fields) < 8 or fields[3] not in ("FUNC", "IFUNC") or fields[6] == "UND":
            continue
        name, _, version = fields[7].partition("@")
        found.setdefault(version.lstrip("@") or None, set()).add(name)
    return found


def defined(objects):
    """Names that our own object files define."""
    text = subprocess.run(["nm", "--defined-only", "-g", *objects], check=True, capture_output=True, text=True).stdout
    return {line.split()[-1] for line in text.splitlines() if len(line.split()) == 3}


def main():
    """See the module."""
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("--real")
    parser.add_argument("--header", nargs=2)
    parser.add_argument("--written", nargs="*", default=[])
    parser.add_argument("--answer", type=int, default=0)
    parser.add_argument("--launch", metavar="REGEX", help="these are kernels of the library and succeed")
    parser.add_argument("--succeed", metavar="REGEX", help="these return 0")
    parser.add_argument("--to", required=True)
    options = parser.parse_args()
    if options.real:
        nodes = exported(options.real)
    else:
        text = Path(options.header[0]).read_text(errors="replace")
        nodes = {None: set(re.findall(options.header[1], text))}
    ours = defined(options.written) if options.written else set()
    lines = ["void fakecuda_stub(const char *, const char *);", "int fakecuda_library_call(const char *, void *);"]
    lines += [f'#define STUB(name, code) long name(void) {{ fakecuda_stub("{options.name}", #name); return code; }}']
    lines += ["void *fake_stream_of(void *handle);"] if options.launch else []
    call = "fakecuda_library_call(#name, fake_stream_of(handle)) ? 13 : 0"
    lines += [f"#define LAUNCH(name) long name(void *handle) {{ return {call}; }}"]
    for name in sorted(set().union(*nodes.values()) - ours):
        if options.launch and re.fullmatch(options.launch, name):
            lines.append(f"LAUNCH({name})")
        else:
            code = 0 if options.succeed and re.fullmatch(options.succeed, name) else options.answer
            lines.append(f"STUB({name}, {code})")
    Path(options.to + ".c").write_text("\n".join(lines) + "\n")
    script, others = [], ours - set().union(*nodes.values())
    for version, names in sorted(nodes.items(), key=lambda item: str(item[0])):
        names = sorted(names | others if not script else names)
        body = "".join(f"  {name};\n" for name in names)
        script.append((version or "") + " {\n global:\n" + body + (" local: *;\n" if not script else "") + "};\n")
    Path(options.to + ".map").write_text("".join(script))


if __name__ == "__main__":
    main()

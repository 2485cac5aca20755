"""Compiles the feature table and the built-in profiles.

    python pyhv/cpu/generate.py

reads features.toml and profiles/*.toml beside this file, and writes

    pyhv/cpu/_features.py    both as plain literals, for features.py and profiles/: no start of pyhv parses TOML
    csrc/gen/cpuid_bits.h    the masks of the few bits that C must know

each only where its content changes, by a temporary file and a rename, so that `make` rebuilds nothing needlessly and a
reader never sees half a file. The build runs it before there is an engine or _features.py; what it imports of pyhv
needs neither. A fault in the input ends it with exit status 1 and one line on stderr that names the entry.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent.parent

if __name__ == "__main__":  # run as a script, it finds its own tree and not an installed pyhv
    sys.path.insert(0, str(REPOSITORY))

from pyhv.cpu.compile_profile import ProfileFault, ProfileLiteral, compile_profile  # noqa: E402
from pyhv.cpu.feature_table import Table, TableError, parse_table  # noqa: E402


def render_module(table: Table, profiles: Sequence[ProfileLiteral]) -> str:
    """The text of pyhv/cpu/_features.py."""
    lines = [
        '"""Made by generate.py of features.toml and profiles/*.toml: do not edit. features.py gives it its types."""',
        "",
        "WORDS = (",
    ]
    for word in dict.fromkeys(entry.word for entry in table.entries):
        lines.append(f"    ({tuple(word)!r}, (")
        for entry in table.entries:
            if entry.word == word:  # all of Feature but the word, which stands above
                lines.append(f"        {(*entry[:3], *entry[4:])!r},")
        lines.append("    )),")
    lines += [")", "", "XSAVE = (", *(f"    {tuple(component)!r}," for component in table.xsave), ")"]
    lines += ["", "NUMBERS = (", *(f"    {(*n[:2], tuple(n.word), *n[3:])!r}," for n in table.numbers), ")"]
    lines += ["", "PROFILES = {", *(f"    {profile[0]!r}: {profile!r}," for profile in profiles), "}", ""]
    return "\n".join(lines)


def render_header(table: Table) -> str:
    """The text of csrc/gen/cpuid_bits.h."""
    lines = [
        "/* Made by pyhv/cpu/generate.py of pyhv/cpu/features.toml: do not edit.",
        " * The masks of the CPUID bits that C must know. */",
        "#ifndef PYHV_CPUID_BITS_H",
        "#define PYHV_CPUID_BITS_H",
        "",
    ]
    for entry in table.entries:
        if c_name := table.c_names.get(entry.name):
            lines.append(f"#define {c_name} 0x{entry.mask:08X}u /* {entry.name}: {entry.title} */")
    lines += ["", "#endif", ""]
    return "\n".join(lines)


def write_if_changed(path: Path, text: str) -> bool:
    """Needs: nothing. Does: makes the file at `path` hold `text`, at once (temporary file and rename), leaving it alone
    where it does already; true if it wrote. On failure (OSError): the file is as it was."""
    data = text.encode()
    try:
        if path.read_bytes() == data:
            return False
    except FileNotFoundError:
        pass
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return True


def compile_builtin(directory: Path, table: Table) -> list[ProfileLiteral]:
    """All profiles of a directory, by name. Raises TableError."""
    features = table.by_any_name()
    profiles = []
    for path in sorted(directory.glob("*.toml")):
        try:
            profile = compile_profile(path.read_text(encoding="utf-8"), features)
        except ProfileFault as fault:
            raise TableError(f"profiles/{path.name}: {fault}") from None
        if profile[0] != path.stem:
            raise TableError(f"profiles/{path.name}: the profile's name is {profile[0]!r}")
        profiles.append(profile)
    return profiles


def generate(source: Path, module: Path, header: Path) -> None:
    """Reads `source`/features.toml and `source`/profiles/, writes the two files. Raises TableError, OSError."""
    try:
        table = parse_table((source / "features.toml").read_text(encoding="utf-8"))
    except TableError as error:
        raise TableError(f"features.toml: {error}") from None
    profiles = compile_builtin(source / "profiles", table)
    for path, text in ((module, render_module(table, profiles)), (header, render_header(table))):
        write_if_changed(path, text)


def main() -> int:
    try:
        generate(HERE, HERE / "_features.py", REPOSITORY / "csrc" / "gen" / "cpuid_bits.h")
    except (TableError, OSError, UnicodeDecodeError) as error:
        print(f"generate.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

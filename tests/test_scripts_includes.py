"""The files that a script includes and its libraries are found, and checked like the script."""

from __future__ import annotations

from pathlib import Path

import pytest

from dtrace_exporter.config import files, load
from dtrace_exporter.permissions import Guard
from dtrace_exporter.scripts import includes
from dtrace_exporter.scripts.reader import ScriptError, read
from dtrace_exporter.yaml_reader import ConfigError

COUNTS = "BEGIN { @ = count(); }\n"


def found(path: Path, text: str) -> set[Path]:
    """Return the files and directories that a script at a path depends on."""
    return {each.resolve() for each in includes.files(read(str(path), text))}


def test_headers(tmp_path: Path) -> None:
    """Headers are found beside the including file and by -I, even if they form a circle."""
    for name in ("lib/a.h", "lib/deep/b.h", "beside.h", "lib/other.h", "far.h"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "lib/a.h").write_text('#include "deep/b.h"\n', encoding="utf-8")
    (tmp_path / "lib/deep/b.h").write_text("# import <../../lib/a.h>\n", encoding="utf-8")
    lines = (
        f"#!/usr/sbin/dtrace -CI{tmp_path}/lib -s",
        "#include <a.h>",
        '  # /* why */ include /* not */ "beside.h"',
        f'#include "{tmp_path}/far.h"',
        "#include <stdint.h>",
        '/*\n#include "lib/other.h"\n*/',
        "#define INCLUDE a",
    )
    there = found(tmp_path / "x.d", "\n".join((*lines, COUNTS)))
    wanted = {tmp_path / "lib", *(tmp_path / name for name in ("lib/a.h", "beside.h", "far.h"))}
    own = {tmp_path, tmp_path / "lib/deep"}
    missing = {tmp_path / "deep", *(each / "lib" for each in tmp_path.parents[:2])}
    assert there == {*wanted, *own, *missing, tmp_path / "lib/deep/b.h"}


@pytest.mark.parametrize(
    "line",
    [
        *('%:include "a.h"', '??=include "a.h"', '#inc\\\nlude "a.h"', '#include \\ \n"a.h"'),
        *('/* x */ #include "a.h"', '/*\n*/#include "a.h"', '#/*\n*/ include "a.h"'),
        *('\ufeff#include "a.h"', '\0#include "a.h"', 'x\r#include "a.h"', '\r\n#include "a.h"\r'),
        *('#include "a.h" /*', '\'\n#include "a.h"', "#include <.//a.h>", '#import "a.h"'),
    ],
)
def test_spellings(line: str, tmp_path: Path) -> None:
    """A header is found for each spelling of #include that the preprocessor accepts."""
    (tmp_path / "a.h").touch()
    (tmp_path / "b.h").write_text(line, encoding="utf-8")
    text = f'#!/usr/sbin/dtrace -Cs\n#include "b.h"\n{COUNTS}'
    assert found(tmp_path / "x.d", text) == {tmp_path, tmp_path / "a.h", tmp_path / "b.h"}


@pytest.mark.parametrize("line", ['/* #include "a.h" */', '// #include "a.h"', '"#include <a.h>"'])
def test_no_include(line: str, tmp_path: Path) -> None:
    """An #include in a comment or a string is ignored."""
    (tmp_path / "a.h").touch()
    (tmp_path / "b.h").write_text(line, encoding="utf-8")
    text = f'#!/usr/sbin/dtrace -Cs\n#include "b.h"\n{COUNTS}'
    assert found(tmp_path / "x.d", text) == {tmp_path, tmp_path / "b.h"}


def test_libraries(tmp_path: Path) -> None:
    """With -L, each library in the directory is found, and the directory itself."""
    for name in ("one.d", "two.d", "not.h"):
        (tmp_path / name).touch()
    text = f'#!/usr/sbin/dtrace -L {tmp_path} -s\n#include "not.h"\n{COUNTS}'
    assert found(tmp_path / "s/x.d", text) == {tmp_path, tmp_path / "one.d", tmp_path / "two.d"}


def test_without_a_preprocessor(tmp_path: Path) -> None:
    """Without -C, nothing is included."""
    (tmp_path / "a.h").touch()
    assert found(tmp_path / "x.d", f'#include "a.h"\n{COUNTS}') == set()


def test_what_is_no_file(tmp_path: Path) -> None:
    """A missing, huge, binary or oddly named header is left to the preprocessor."""
    (tmp_path / "d").mkdir()
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    (tmp_path / "big").write_bytes(b"x" * (2 << 20))
    wanted = ("none", "d", "binary", "big", "x" * 5000, "nul\0")
    names = "".join(f'#include "{name}"\n' for name in wanted)
    (tmp_path / "all.h").write_text(names, encoding="ascii")
    text = f'#!/usr/sbin/dtrace -Cs\n#include "all.h"\n{COUNTS}'
    there = {tmp_path / name for name in ("all.h", "d", "binary", "big")}
    assert found(tmp_path / "x.d", text) == {tmp_path, *there}


def test_macro() -> None:
    """An #include of a macro is refused under -C, since its file is not known."""
    text = f'#define FILE "a.h"\n#include FILE\n{COUNTS}'
    assert read("x.d", text)
    with pytest.raises(ScriptError, match=r"^x.d:3: a macro that is included, expected a file's"):
        read("x.d", f"#!/usr/sbin/dtrace -Cs\n{text}")


@pytest.mark.parametrize(
    ("flags", "place"), [("-CI", "s/lib"), ("-CI", "s"), ("-L", "s"), ("-L", "s/lib"), ("-C", "")]
)
def test_shared_directories(flags: str, place: str, tmp_path: Path) -> None:
    """The service refuses a search directory that others can write, even a sticky one like /tmp."""
    shared = tmp_path / "s"
    shared.mkdir()
    script = (tmp_path if place else shared) / "x.d"
    line = f"#!/usr/sbin/dtrace {flags} {tmp_path / place if place else ''} -s"
    script.write_text(f'{line}\n#include "none.h"\n{COUNTS}', encoding="utf-8")
    look = Guard(refuse=True).look
    load(None, look, [script])
    shared.chmod(0o1777)
    with pytest.raises(ConfigError, match=f"found that {shared} can be written by everybody"):
        load(None, look, [script])


@pytest.mark.parametrize("name", ["s/none.h", "s/deep/none.h", "{}/s/none.h"])
def test_missing_headers(name: str, tmp_path: Path) -> None:
    """The service refuses a script if others can add a header that it includes, even in /tmp."""
    shared = tmp_path / "s"
    shared.mkdir()
    script = tmp_path / "x.d"
    text = f'#!/usr/sbin/dtrace -Cs\n#include "{name.format(tmp_path)}"\n{COUNTS}'
    script.write_text(text, encoding="utf-8")
    look = Guard(refuse=True).look
    load(None, look, [script])
    shared.chmod(0o1777)
    with pytest.raises(ConfigError, match=f"found that {shared} can be written by everybody"):
        load(None, look, [script])


@pytest.mark.parametrize("what", ["more.h", "lib", "lib/one.d"])
def test_refused(what: str, tmp_path: Path) -> None:
    """The service and --script refuse a script if others can change a file that it depends on."""
    (tmp_path / "lib").mkdir()
    for name in ("more.h", "lib/one.d"):
        (tmp_path / name).touch(mode=0o644)
    script, config = tmp_path / "x.d", tmp_path / "c.yml"
    line = f"#!/usr/sbin/dtrace -C -L {tmp_path}/lib -s"
    script.write_text(f'{line}\n#include "more.h"\n{COUNTS}', encoding="utf-8")
    config.write_text("scripts: [{script: x.d}]", encoding="utf-8")
    look = Guard(refuse=True).look
    read_both = load(config, look), load(None, look, [script])
    assert all(tmp_path / what in files(None, each) for each in read_both)
    (tmp_path / what).chmod(0o777)
    says = rf"expected a file that nobody but .*{tmp_path / what} can be written by everybody"
    with pytest.raises(ConfigError, match=says):
        load(config, look)
    with pytest.raises(ConfigError, match=says):
        load(None, look, [script])

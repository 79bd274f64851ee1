"""Compilation of C++ sources at first use, with real compilers and none."""

import os
import sys
from pathlib import Path

import pytest

from minimind.environment import NATIVE_VARIABLE
from minimind.model import native
from minimind.paths import CACHE_VARIABLE

if sys.platform != "linux" or not native._compiler():
    pytest.skip("no C++ compiler on Linux", allow_module_level=True)


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A C++ file that includes another, and an empty cache folder."""
    monkeypatch.setenv(NATIVE_VARIABLE, "1")
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    (tmp_path / "number.h").write_text("const int number = 42;\n")
    path = tmp_path / "answer.cpp"
    path.write_text('#include "number.h"\nextern "C" int answer() { return number; }\n')
    native._load.cache_clear()
    yield path
    native._load.cache_clear()


def libraries(tmp_path: Path) -> list[str]:
    """Return the names of the compiled files."""
    folder = tmp_path / "cache" / "native"
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_compiled_once_and_kept(source, tmp_path, monkeypatch):
    sources = (source, source.with_name("number.h"))
    assert native.compile_library(sources).answer() == 42
    (name,) = libraries(tmp_path)
    assert name.startswith("answer-") and name.endswith(".so")
    native._load.cache_clear()
    library = tmp_path / "cache" / "native" / name
    changed = library.stat().st_mtime_ns
    assert native.compile_library(sources).answer() == 42
    assert library.stat().st_mtime_ns == changed


def test_a_changed_source_header_or_flag_is_another_library(source, tmp_path):
    sources = (source, source.with_name("number.h"))
    native.compile_library(sources)
    native.compile_library(sources, ("-DOTHER",))
    source.with_name("number.h").write_text("const int number = 43;\n")
    native._load.cache_clear()
    assert native.compile_library(sources).answer() == 43
    assert len(libraries(tmp_path)) == 3


def test_without_a_compiler_there_is_a_reason(source, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert native.compile_library((source,)) == "no C++ compiler; install g++"


@pytest.mark.parametrize("variable", ["CXX", "CXXFLAGS"])
def test_an_unbalanced_quote_is_the_reason(source, monkeypatch, variable):
    monkeypatch.setenv(variable, 'g++ "')
    assert native.compile_library((source,)) == f"{variable}: No closing quotation"


def test_switched_off(source, tmp_path, monkeypatch):
    monkeypatch.setenv(NATIVE_VARIABLE, "0")
    assert native.compile_library((source,)) == "MINIMIND_NATIVE=0"
    assert not libraries(tmp_path)


def test_an_error_of_the_compiler_is_the_reason(source, tmp_path):
    source.write_text("this is no C++")
    reason = native.compile_library((source,))
    assert isinstance(reason, str)
    assert "failed" in reason and "error" in reason
    assert not libraries(tmp_path)


def test_a_compiler_that_writes_no_library_is_the_reason(source, tmp_path, monkeypatch):
    compiler = tmp_path / "compiler"  # writes text to the name after -o
    compiler.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && exit\n'
        'while [ $# -gt 1 ]; do shift; done; echo text > "$1"\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    assert "file too short" in native.compile_library((source,))


def test_a_damaged_library_is_compiled_again(source, tmp_path):
    sources = (source, source.with_name("number.h"))
    native.compile_library(sources)
    (name,) = libraries(tmp_path)
    library = tmp_path / "cache" / "native" / name
    library.unlink()  # the loaded one stays mapped
    library.write_bytes(b"")
    native._load.cache_clear()
    assert native.compile_library(sources).answer() == 42


def test_a_cache_folder_that_cannot_be_written_is_the_reason(source, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "file"))
    reason = native.compile_library((source,))
    assert isinstance(reason, str) and os.path.basename(tmp_path) in reason

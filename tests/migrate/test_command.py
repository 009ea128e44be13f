"""``python -m eagerq.migrate``."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from eagerq.migrate.__main__ import main

OLD, NEW = "from torch.ao.quantization import prepare\n", "from eagerq import prepare\n"
LEFT = "from torch.ao.quantization import prepare_fx\n"
CLEAN = "import torch\n"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    for name, text in {
        "old.py": OLD,
        "left.py": LEFT,
        "clean.py": CLEAN,
        "inner/old.py": OLD,
        "notes.txt": OLD,
        ".git/old.py": OLD,
        ".hidden/old.py": OLD,
        "env/pyvenv.cfg": "",
        "env/old.py": OLD,
        "lib/site-packages/old.py": OLD,
        "__pycache__/old.py": OLD,
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def texts(project: Path) -> dict[str, str]:
    return {path.relative_to(project).as_posix(): path.read_text() for path in project.rglob("*") if path.is_file()}


def test_shows_a_diff_and_changes_nothing(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = texts(project)
    assert main([str(project)]) == 1
    shown = capsys.readouterr()
    assert f"--- {project}/old.py" in shown.out
    assert f"-{OLD}+{NEW}" in shown.out
    assert shown.out.count("+++") == 2
    assert f"{project}/left.py:1:35: torch.ao.quantization.prepare_fx: FX graph mode" in shown.err
    assert "4 files read, 2 to migrate, 1 places to decide" in shown.err
    assert texts(project) == before


def test_writes(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = texts(project)
    assert main(["--write", str(project)]) == 1
    assert texts(project) == {**before, "old.py": NEW, "inner/old.py": NEW}
    assert "2 migrated, 1 places" in capsys.readouterr().err
    assert main(["--write", str(project / "old.py"), str(project / "clean.py")]) == 0
    assert "0 migrated, 0 places" in capsys.readouterr().err


def test_checks(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--check", str(project / "inner")]) == 1
    assert "old.py: has names to migrate" in capsys.readouterr().out
    assert main(["--check", str(project / "clean.py")]) == 0
    assert main(["--check", str(project / "left.py")]) == 1
    assert texts(project)["inner/old.py"] == OLD


def test_named_files_need_no_suffix(project: Path) -> None:
    assert main(["--write", str(project / "notes.txt")]) == 0
    assert (project / "notes.txt").read_text() == NEW


@pytest.mark.parametrize(
    "data",
    [
        b"\xef\xbb\xbfimport torch.ao.quantization as tq\r\n\r\nx = 'caf\xc3\xa9'\r\n",
        b"# -*- coding: latin-1 -*-\nimport torch.ao.quantization as tq\nx = 'caf\xe9'",
        b"#!/usr/bin/python\r\nimport torch.ao.quantization as tq  # \xe2\x82\xac\n\x0cx = 1\r\n",
    ],
)
def test_bytes_and_mode_stay(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "program.py"
    path.write_bytes(data)
    path.chmod(0o750)
    assert main(["--write", str(path)]) == 0
    assert path.read_bytes() == data.replace(b"torch.ao.quantization", b"eagerq")
    assert path.stat().st_mode & 0o777 == 0o750
    assert [inner.name for inner in tmp_path.iterdir()] == ["program.py"]


def test_new_lines_end_as_the_others(tmp_path: Path) -> None:
    path = tmp_path / "program.py"
    path.write_bytes(b"import torch\r\ntorch.quantization.prepare, torch.e\r\n")
    assert main(["--write", str(path)]) == 0
    assert path.read_bytes() == b"import torch\r\nimport eagerq\r\neagerq.prepare, torch.e\r\n"


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real.py").write_text(OLD)
    (tmp_path / "link.py").symlink_to("real.py")
    assert main(["--write", str(tmp_path / "link.py")]) == 0
    assert (tmp_path / "link.py").is_symlink()
    assert (tmp_path / "real.py").read_text() == NEW


def test_a_failed_write_leaves_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "program.py"
    path.write_text(OLD)

    def fail(*args: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    assert main(["--write", str(path)]) == 2
    assert path.read_text() == OLD
    assert [inner.name for inner in tmp_path.iterdir()] == ["program.py"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"import torch\ndef f(:\n", "no Python 3"),
        (b"import torch\nx = '\xff'\n", "UTF-8"),
        (b"# coding: nonsense\nimport torch\n", "unknown encoding"),
    ],
)
def test_unreadable_files_are_named_and_others_done(
    project: Path, capsys: pytest.CaptureFixture[str], data: bytes, message: str
) -> None:
    (project / "bad.py").write_bytes(data)
    assert main(["--write", str(project)]) == 2
    shown = capsys.readouterr().err
    assert f"{project}/bad.py: " in shown
    assert message in shown
    assert (project / "old.py").read_text() == NEW
    assert (project / "bad.py").read_bytes() == data


def test_wrong_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "nowhere.py")]) == 2
    assert "nowhere.py does not exist" in capsys.readouterr().err
    for arguments in ([], ["--write", "--check", "."], ["--wrong", "."]):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 2


@pytest.mark.parametrize(
    ("option", "status", "out"),
    [([], 0, f"-{OLD}+{NEW}"), (["--write"], 0, NEW), (["--check"], 1, "<stdin>: has names")],
)
def test_standard_input(
    option: list[str],
    status: int,
    out: str,
    monkeypatch: pytest.MonkeyPatch,
    capfdbinary: pytest.CaptureFixture[bytes],
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(OLD.encode())))
    assert main([*option, "-"]) == status
    sys.stdout.flush()
    shown = capfdbinary.readouterr().out.decode()
    assert out in shown
    assert option != ["--write"] or shown == NEW


WITHOUT_LIBCST = """
import sys
sys.modules["libcst"] = None
import runpy
sys.argv = ["eagerq.migrate", sys.argv[1]]
runpy.run_module("eagerq.migrate", run_name="__main__")
"""


def test_without_libcst_it_says_what_to_install(project: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_LIBCST, str(project)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 2
    assert done.stderr.strip().endswith("migration needs libcst. To fix it: pip install 'eagerq[migrate]'.")
    assert "Traceback" not in done.stderr


def test_eagerq_does_not_import_it() -> None:
    code = "import sys, eagerq; assert not {'libcst', 'eagerq.migrate'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, cwd=Path(__file__).parents[2])

"""Programs of this folder, as they are and migrated, as modules."""

from __future__ import annotations

import functools
import sys
import types
from pathlib import Path
from types import ModuleType

from eagerq.migrate import migrate_source

HERE = Path(__file__).resolve().parent


@functools.cache
def migrated_text(path: Path) -> str:
    """Nothing may be left to decide."""
    done = migrate_source(path.read_text(encoding="utf-8"))
    assert done.undecided == ()
    return done.text


@functools.cache
def load(path: Path, migrated: bool) -> ModuleType:
    name = f"{'new' if migrated else 'old'}_{path.stem}"
    module = types.ModuleType(name)
    text = migrated_text(path) if migrated else path.read_text(encoding="utf-8")
    sys.modules[name] = module  # for pickle and dataclasses
    exec(compile(text, name, "exec"), module.__dict__)
    return module

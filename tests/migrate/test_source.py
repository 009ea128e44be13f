"""Source in, source out."""

from __future__ import annotations

import ast

import pytest
from migrate.cases import CASES, Case

from eagerq.migrate import migrate_source

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@each_case
def test_before_and_after(case: Case) -> None:
    done = migrate_source(case.before)
    assert done.text == case.after
    assert done.undecided == ()
    ast.parse(done.text)


@each_case
def test_again(case: Case) -> None:
    assert migrate_source(case.after).text == case.after

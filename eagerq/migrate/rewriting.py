"""Applies a plan to a program; everything that the plan does not name keeps its bytes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from difflib import SequenceMatcher

import libcst as cst
from libcst.helpers import get_full_name_for_node

from eagerq.migrate.imports import dotted, plain_import, rewrite_import
from eagerq.migrate.planning import Plan
from eagerq.migrate.program import Binding, Program

__all__ = ["rewrite"]

_Line = cst.SimpleStatementLine | cst.BaseCompoundStatement


def rewrite(text: str, program: Program, made: Plan) -> str:
    """The new source of a program that was read from ``text``."""
    seen = program.module.code
    new = program.module.visit(_Rewriter(program, made)).code
    return new if seen == text else _carried_over(text, seen, new)


def _carried_over(text: str, seen: str, new: str) -> str:
    """The changes from ``seen`` to ``new``, made in ``text``: libcst loses form feeds between lines."""
    lines, before, after = (whole.split("\n") for whole in (text, seen, new))
    changed: list[str] = []
    for operation, start, end, new_start, new_end in SequenceMatcher(None, before, after, False).get_opcodes():
        changed += lines[start:end] if operation == "equal" else after[new_start:new_end]
    return "\n".join(changed)


class _Names(cst.CSTTransformer):
    def __init__(self, made: Plan) -> None:
        super().__init__()
        self.made = made

    def on_visit(self, node: cst.CSTNode) -> bool:
        return node not in self.made.names

    def on_leave(self, original_node: cst.CSTNode, updated_node: cst.CSTNode) -> cst.CSTNode:  # type: ignore[override]
        new = self.made.names.get(original_node)
        if new is None:
            return updated_node
        # parentheses around it, if any
        return dotted(new).with_changes(lpar=original_node.lpar, rpar=original_node.rpar)  # type: ignore[attr-defined]


class _Rewriter(cst.CSTTransformer):
    def __init__(self, program: Program, made: Plan) -> None:
        super().__init__()
        self.made = made
        self.names = _Names(made)
        self.quoted = {quoted.string: quoted for quoted in program.quoted}
        self.statements: dict[cst.CSTNode, list[cst.BaseSmallStatement]] = {}
        self.after: defaultdict[cst.CSTNode, list[str]] = defaultdict(list)
        by_statement: defaultdict[cst.CSTNode, list[Binding]] = defaultdict(list)
        for binding in program.bindings:
            by_statement[binding.statement].append(binding)
        for star in program.stars:
            by_statement[star] = []
        for statement, bindings in by_statement.items():
            self.statements[statement] = rewrite_import(statement, bindings, made)  # type: ignore[arg-type]
        self.module = program.module

    # --- expressions

    def visit_Attribute(self, node: cst.Attribute) -> bool:
        return node not in self.made.names

    def leave_Attribute(self, original_node: cst.Attribute, updated_node: cst.Attribute) -> cst.BaseExpression:
        return self._named(original_node, updated_node)

    def leave_Name(self, original_node: cst.Name, updated_node: cst.Name) -> cst.BaseExpression:
        return self._named(original_node, updated_node)

    def _named(self, original: cst.BaseExpression, updated: cst.BaseExpression) -> cst.BaseExpression:
        new = self.made.names.get(original)
        return updated if new is None else dotted(new).with_changes(lpar=original.lpar, rpar=original.rpar)

    def leave_SimpleString(self, original_node: cst.SimpleString, updated_node: cst.SimpleString) -> cst.BaseExpression:
        if original_node in self.made.texts:
            return updated_node.with_changes(value=self.made.texts[original_node])
        quoted = self.quoted.get(original_node)
        if quoted is None:
            return updated_node
        text = self.module.code_for_node(quoted.expression.visit(self.names))  # type: ignore[arg-type]
        return updated_node.with_changes(
            value=f"{original_node.prefix}{original_node.quote}{text}{original_node.quote}"
        )

    # --- statements

    def visit_Module(self, node: cst.Module) -> None:
        self._plan_insertions(node.body)

    def visit_IndentedBlock(self, node: cst.IndentedBlock) -> None:
        self._plan_insertions(node.body)

    def _plan_insertions(self, body: Sequence[cst.BaseStatement]) -> None:
        """New imports go after the run of imports that the first to need them stands in."""
        present = {name for line in body for name in self._plainly_imported(line)}
        for number, line in enumerate(body):
            if not isinstance(line, cst.SimpleStatementLine):
                continue
            needed = {module for small in line.body for module in self._needs(small)} - present
            if not needed or self._shares_its_line(line):
                continue
            end = number
            while end + 1 < len(body) and _continues_imports(body[end + 1]):
                end += 1
            self.after[body[end]] += sorted(needed)
            present |= needed

    def _needs(self, small: cst.BaseSmallStatement) -> set[str]:
        return self.made.needs.get(small, set()) if isinstance(small, (cst.Import, cst.ImportFrom)) else set()

    def _shares_its_line(self, place: cst.SimpleStatementLine | cst.SimpleStatementSuite) -> bool:
        """``import torch; torch.e``: what is needed has to follow at once."""
        return isinstance(place, cst.SimpleStatementSuite) or len(place.body) > 1

    def _plainly_imported(self, line: cst.BaseStatement) -> list[str]:
        """The modules that a line, once rewritten, binds by their full name."""
        if not isinstance(line, cst.SimpleStatementLine):
            return []
        smalls = [new for small in line.body for new in self.statements.get(small, [small])]
        return [
            str(get_full_name_for_node(alias.name))
            for small in smalls
            if isinstance(small, cst.Import)
            for alias in small.names
            if alias.asname is None
        ]

    def leave_SimpleStatementLine(
        self, original_node: cst.SimpleStatementLine, updated_node: cst.SimpleStatementLine
    ) -> cst.BaseStatement | cst.FlattenSentinel[cst.BaseStatement] | cst.RemovalSentinel:
        added: list[cst.BaseStatement] = [
            cst.SimpleStatementLine([plain_import(module)]) for module in self.after.get(original_node, ())
        ]
        smalls = self._smalls(original_node, updated_node)
        if smalls is None:
            return cst.FlattenSentinel([updated_node, *added]) if added else updated_node
        if len(original_node.body) > 1:
            lines: list[cst.BaseStatement] = [updated_node.with_changes(body=smalls)] if smalls else []
        else:
            lines = [cst.SimpleStatementLine([small]) for small in smalls]
        lines += added
        if not lines:
            if updated_node.leading_lines and any(line.comment for line in updated_node.leading_lines):
                return updated_node  # it has a comment of its own
            return cst.RemoveFromParent()
        lines[0] = lines[0].with_changes(leading_lines=updated_node.leading_lines)
        place = len(lines) - len(added) - 1 if len(lines) > len(added) else 0
        lines[place] = lines[place].with_changes(trailing_whitespace=updated_node.trailing_whitespace)
        return cst.FlattenSentinel(lines)

    def leave_SimpleStatementSuite(
        self, original_node: cst.SimpleStatementSuite, updated_node: cst.SimpleStatementSuite
    ) -> cst.BaseSuite:
        smalls = self._smalls(original_node, updated_node)
        return updated_node if smalls is None else updated_node.with_changes(body=smalls or [cst.Pass()])

    def _smalls(
        self,
        original: cst.SimpleStatementLine | cst.SimpleStatementSuite,
        updated: cst.SimpleStatementLine | cst.SimpleStatementSuite,
    ) -> list[cst.BaseSmallStatement] | None:
        """The small statements, rewritten; None where none is."""
        smalls: list[cst.BaseSmallStatement] = []
        for old, new in zip(original.body, updated.body, strict=True):
            smalls += self.statements.get(old, [new])
            if self._shares_its_line(original):
                smalls += map(plain_import, sorted(self._needs(old)))
        if smalls == list(updated.body):
            return None
        return [*smalls[:-1], smalls[-1].with_changes(semicolon=cst.MaybeSentinel.DEFAULT)] if smalls else []


def _continues_imports(line: cst.BaseStatement) -> bool:
    return (
        isinstance(line, cst.SimpleStatementLine)
        and not line.leading_lines
        and all(isinstance(small, (cst.Import, cst.ImportFrom)) for small in line.body)
    )

"""A parsed program: which import each of its names comes from, by libcst's scopes."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import libcst as cst
from libcst import metadata as meta
from libcst.helpers import get_full_name_for_node

__all__ = ["Binding", "Chain", "ImportStatement", "Program", "Quoted", "Root", "aliases_of", "path_of", "read"]

ImportStatement = cst.Import | cst.ImportFrom
Chain = list[cst.Name | cst.Attribute]
_OLD = re.compile(r"\btorch(ao)?\b")


@dataclass(eq=False)
class Binding:
    """A name that an import statement binds.

    Attributes:
        name: as the program has it, ``nnq``.
        base: what it stands for, ``("torch", "ao", "nn", "quantized")``.
        path: all that the statement names; longer than ``base`` for ``import a.b.c``, which binds ``a``.
        imported: how many of ``path`` are a module's for certain.
        scope: where the name is bound.
    """

    name: str
    base: tuple[str, ...]
    path: tuple[str, ...]
    imported: int
    statement: ImportStatement
    alias: cst.ImportAlias
    scope: Any


@dataclass(eq=False)
class Quoted:
    """An annotation in quotes, parsed."""

    string: cst.SimpleString
    expression: cst.BaseExpression


@dataclass(eq=False)
class Root:
    """An expression such as ``torch.nn.Linear``, from its name (first in ``chain``) to its last attribute.

    Attributes:
        bindings: the imports that the name may come from.
        elsewhere: it may come from something else.
        quoted: the annotation that holds it.
    """

    chain: Chain
    bindings: list[Binding]
    elsewhere: bool
    quoted: Quoted | None = None

    @property
    def name(self) -> str:
        return cst.ensure_type(self.chain[0], cst.Name).value

    @property
    def attributes(self) -> list[str]:
        return [link.attr.value for link in self.chain if isinstance(link, cst.Attribute)]


@dataclass(eq=False)
class Program:
    """What the planner needs to know.

    Attributes:
        roots: expressions that open with an imported name of torch's, or with one called like it.
        bound: every name that the program binds.
        first_lines: the names that it binds at its top level, and the first line that does.
        unresolved: names that nothing in it binds.
    """

    module: cst.Module
    parents: Mapping[cst.CSTNode, cst.CSTNode]
    positions: Mapping[cst.CSTNode, Any]
    bindings: list[Binding] = field(default_factory=list)
    stars: list[cst.ImportFrom] = field(default_factory=list)
    roots: list[Root] = field(default_factory=list)
    calls: list[cst.Call] = field(default_factory=list)
    strings: list[cst.SimpleString | cst.FormattedStringText] = field(default_factory=list)
    quoted: list[Quoted] = field(default_factory=list)
    bound: set[str] = field(default_factory=set)
    first_lines: dict[str, int] = field(default_factory=dict)
    unresolved: dict[str, cst.Name] = field(default_factory=dict)
    uses_eagerq: bool = False

    def position(self, node: cst.CSTNode) -> tuple[int, int]:
        """Line and column, both from 1."""
        start = self.positions[node].start
        return start.line, start.column + 1

    def parent(self, node: cst.CSTNode) -> cst.CSTNode | None:
        return self.parents.get(node)


def path_of(node: cst.CSTNode | None) -> tuple[str, ...]:
    """``a.b.c`` -> ``("a", "b", "c")``."""
    name = get_full_name_for_node(node) if node is not None else None
    return tuple(name.split(".")) if name else ()


def aliases_of(statement: ImportStatement) -> list[cst.ImportAlias]:
    """What it imports; nothing for a star."""
    return [] if isinstance(statement.names, cst.ImportStar) else list(statement.names)


def read(text: str) -> Program:
    """Parse a program and resolve its names.

    Raises:
        libcst.ParserSyntaxError: when it is no Python.
    """
    wrapper = meta.MetadataWrapper(cst.parse_module(text), unsafe_skip_copy=True)
    scopes = wrapper.resolve(meta.ScopeProvider)
    program = Program(wrapper.module, wrapper.resolve(meta.ParentNodeProvider), wrapper.resolve(meta.PositionProvider))
    reader = _Reader(program, scopes, wrapper.resolve(meta.ExpressionContextProvider))
    wrapper.module.visit(reader)
    for scope in set(scopes.values()):
        for assignment in getattr(scope, "assignments", ()):
            if isinstance(assignment, meta.BuiltinAssignment):
                continue
            name = assignment.name.split(".")[0]
            program.bound.add(name)
            if isinstance(scope, meta.GlobalScope):
                line = program.position(assignment.node)[0]
                program.first_lines[name] = min(line, program.first_lines.get(name, line))
    for node, scope in reader.names:
        _place(program, scope, _chain(program, node), reader.by_name)
    for string, scope in reader.annotations:
        _place_quoted(program, string, scope, reader.by_name)
    return program


def _chain(program: Program, name: cst.Name) -> Chain:
    chain: Chain = [name]
    above = program.parent(name)
    while isinstance(above, cst.Attribute) and above.value is chain[-1]:
        chain.append(above)
        above = program.parent(above)
    return chain


BoundBy = dict[tuple[cst.CSTNode, str], list[Binding]]


def _place(program: Program, scope: Any, chain: Chain, by_name: BoundBy, quoted: Quoted | None = None) -> None:
    name = cst.ensure_type(chain[0], cst.Name)
    assignments: Collection[Any] = scope[name.value]
    bindings: list[Binding] = []
    elsewhere = False
    for assignment in assignments:
        if isinstance(assignment, meta.ImportAssignment):
            bindings += by_name.get((assignment.node, name.value), [])
            elsewhere |= (assignment.node, name.value) not in by_name
        else:
            elsewhere |= not _assigns_none(program, assignment)
    if not assignments and not name.value.startswith("__"):
        program.unresolved.setdefault(name.value, name)
    if bindings or name.value in ("torch", "torchao"):
        program.roots.append(Root(chain, bindings, elsewhere or not assignments, quoted))


def _assigns_none(program: Program, assignment: Any) -> bool:
    """``tq = None``, where an import failed."""
    target = program.parent(assignment.node) if isinstance(assignment, meta.Assignment) else None
    statement = program.parent(target) if isinstance(target, cst.AssignTarget) else target
    value = statement.value if isinstance(statement, (cst.Assign, cst.AnnAssign)) else None
    return isinstance(value, cst.Name) and value.value == "None"


def _place_quoted(program: Program, string: cst.SimpleString, scope: Any, by_name: BoundBy) -> None:
    value = string.evaluated_value
    if not isinstance(value, str) or string.raw_value != value:
        return
    try:
        expression = cst.parse_expression(value)
    except cst.ParserSyntaxError:
        return
    quoted = Quoted(string, expression)
    chains = _QuotedChains()
    expression.visit(chains)
    for chain in chains.found:
        _place(program, scope, chain, by_name, quoted)
    program.quoted.append(quoted)


class _QuotedChains(cst.CSTVisitor):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[Chain] = []

    def visit_Attribute(self, node: cst.Attribute) -> bool:
        inner: cst.BaseExpression = node
        chain: list[Any] = []
        while isinstance(inner, cst.Attribute):
            chain.append(inner)
            inner = inner.value
        if isinstance(inner, cst.Name):
            self.found.append([inner, *reversed(chain)])
            return False
        return True

    def visit_Name(self, node: cst.Name) -> None:
        self.found.append([node])


class _Reader(cst.CSTVisitor):
    """Collects; visits a node's children as libcst's own scope analysis does."""

    def __init__(self, program: Program, scopes: Mapping[cst.CSTNode, Any], contexts: Mapping[cst.CSTNode, Any]):
        super().__init__()
        self.program = program
        self.scopes = scopes
        self.contexts = contexts
        self.names: list[tuple[cst.Name, Any]] = []
        self.annotations: list[tuple[cst.SimpleString, Any]] = []
        self.by_name: BoundBy = {}
        self.annotation_depth = 0
        self.defined: set[cst.Name] = set()

    def visit_Import(self, node: cst.Import) -> bool:
        for alias in node.names:
            path = path_of(alias.name)
            base = path if alias.asname else path[:1]
            self._bind(node, alias, base, path, len(path))
        return False

    def visit_ImportFrom(self, node: cst.ImportFrom) -> bool:
        module = path_of(node.module)
        if not node.relative:
            if isinstance(node.names, cst.ImportStar):
                self.program.stars.append(node)
                self.program.uses_eagerq |= module[0] == "eagerq"
            for alias in aliases_of(node):
                path = (*module, *path_of(alias.name))
                self._bind(node, alias, path, path, len(module))
        return False

    def _bind(
        self,
        node: ImportStatement,
        alias: cst.ImportAlias,
        base: tuple[str, ...],
        path: tuple[str, ...],
        imported: int,
    ) -> None:
        self.program.uses_eagerq |= path[0] == "eagerq"
        name = path_of(alias.asname.name)[0] if alias.asname else path_of(alias.name)[0]
        if path[0] in ("torch", "torchao"):
            binding = Binding(name, base, path, imported, node, alias, self.scopes[alias])
            self.program.bindings.append(binding)
            self.by_name.setdefault((node, name), []).append(binding)

    def visit_Attribute(self, node: cst.Attribute) -> bool:
        node.value.visit(self)
        return False

    def visit_Arg(self, node: cst.Arg) -> bool:
        node.value.visit(self)
        return False

    def visit_Param(self, node: cst.Param) -> bool:
        for child in (node.default, node.annotation):
            if child is not None:
                child.visit(self)
        return False

    def visit_FunctionDef(self, node: cst.FunctionDef) -> None:
        self.defined.add(node.name)

    def visit_ClassDef(self, node: cst.ClassDef) -> None:
        self.defined.add(node.name)

    def visit_NameItem(self, node: cst.NameItem) -> bool:
        return False

    def visit_Name(self, node: cst.Name) -> None:
        scope = None if node in self.defined else self.scopes.get(node)
        if scope is not None and self.contexts.get(node) is not meta.ExpressionContext.STORE:
            self.names.append((node, scope))

    def visit_Annotation(self, node: cst.Annotation) -> None:
        self.annotation_depth += 1

    def leave_Annotation(self, original_node: cst.Annotation) -> None:
        self.annotation_depth -= 1

    def visit_Call(self, node: cst.Call) -> None:
        self.program.calls.append(node)

    def visit_SimpleString(self, node: cst.SimpleString) -> None:
        if not _OLD.search(node.value):
            return
        if self.annotation_depth and self.scopes.get(node) is not None:
            self.annotations.append((node, self.scopes[node]))
        else:
            self.program.strings.append(node)

    def visit_FormattedStringText(self, node: cst.FormattedStringText) -> None:
        if _OLD.search(node.value):
            self.program.strings.append(node)

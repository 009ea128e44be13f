"""Import statements, rewritten so that they keep their form where that is possible."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import libcst as cst
from libcst.helpers import get_full_name_for_node

from eagerq.migrate.names import Found
from eagerq.migrate.planning import Plan
from eagerq.migrate.program import Binding, ImportStatement, aliases_of

__all__ = ["dotted", "plain_import", "rewrite_import"]


def dotted(name: str) -> cst.Name | cst.Attribute:
    """``"a.b"`` as an expression."""
    first, *others = name.split(".")
    expression: cst.Name | cst.Attribute = cst.Name(first)
    for other in others:
        expression = cst.Attribute(expression, cst.Name(other))
    return expression


def plain_import(module: str) -> cst.Import:
    """``import module``."""
    return cst.Import([cst.ImportAlias(dotted(module))])


def rewrite_import(statement: ImportStatement, bindings: Sequence[Binding], made: Plan) -> list[cst.BaseSmallStatement]:
    """What takes the statement's place; itself where nothing changes."""
    by_alias = {binding.alias: binding for binding in bindings}
    if isinstance(statement, cst.Import):
        return _rewrite_plain(statement, by_alias, made)
    if isinstance(statement.names, cst.ImportStar):
        return (
            [statement.with_changes(module=dotted(made.stars[statement]))] if statement in made.stars else [statement]
        )
    return _rewrite_from(statement, by_alias, made)


def _rewrite_plain(
    statement: cst.Import, by_alias: dict[cst.ImportAlias, Binding], made: Plan
) -> list[cst.BaseSmallStatement]:
    aliases: list[cst.ImportAlias] = []
    seen: set[str | None] = set()
    for alias in statement.names:
        binding = by_alias.get(alias)
        if binding in made.torch_for:
            _add(aliases, seen, alias.with_changes(name=cst.Name("torch")))
        if binding in made.targets:
            _add(aliases, seen, alias.with_changes(name=dotted(made.targets[binding].name)))
        elif binding not in made.dropped:
            _add(aliases, seen, alias)
    if aliases == list(statement.names):
        return [statement]
    if not aliases:
        return []
    if len(statement.names) == 1:  # torch, and what was in it, on a line each
        return [statement.with_changes(names=[alias]) for alias in aliases]
    aliases = [alias.with_changes(comma=cst.MaybeSentinel.DEFAULT) for alias in aliases]
    return [statement.with_changes(names=aliases)]


def _add(aliases: list[cst.ImportAlias], seen: set[str | None], alias: cst.ImportAlias) -> None:
    name = None if alias.asname else get_full_name_for_node(alias.name)
    if name is None or name not in seen:
        aliases.append(alias)
    seen.add(name)


_Placed = tuple[str, cst.ImportAlias]  # module to import from, or "" for a plain import


def _rewrite_from(
    statement: cst.ImportFrom, by_alias: dict[cst.ImportAlias, Binding], made: Plan
) -> list[cst.BaseSmallStatement]:
    old = get_full_name_for_node(statement.module) if statement.module else ""
    groups: defaultdict[str, list[cst.ImportAlias]] = defaultdict(list)
    for alias in aliases_of(statement):
        binding = by_alias.get(alias)
        if binding in made.dropped:
            continue
        if binding is None or binding not in made.targets:
            groups[str(old)].append(alias)
        else:
            module, new = _placed(alias, binding, made.targets[binding])
            groups[module].append(new)
    unchanged = list(groups) == [old] and groups[str(old)] == aliases_of(statement)
    if unchanged or statement.relative:
        return [statement]
    return [
        small
        for module, aliases in groups.items()
        for small in (
            [_subset(statement, module, aliases)] if module else [cst.Import([_bare(alias)]) for alias in aliases]
        )
    ]


def _bare(alias: cst.ImportAlias) -> cst.ImportAlias:
    return alias.with_changes(comma=cst.MaybeSentinel.DEFAULT)


def _placed(alias: cst.ImportAlias, binding: Binding, found: Found) -> _Placed:
    module, _, name = found.name.rpartition(".")
    renamed = alias.asname or (cst.AsName(cst.Name(binding.name)) if binding.name != name else None)
    return module, alias.with_changes(name=cst.Name(name), asname=renamed)


def _subset(statement: cst.ImportFrom, module: str, aliases: list[cst.ImportAlias]) -> cst.ImportFrom:
    """The statement with some of its names, laid out as it was."""
    last, end = aliases_of(statement)[-1].comma, aliases[-1].comma
    comma = last
    if isinstance(last, cst.Comma) and isinstance(end, cst.Comma):
        closing, after = last.whitespace_after, end.whitespace_after
        if isinstance(closing, cst.ParenthesizedWhitespace) and isinstance(after, cst.ParenthesizedWhitespace):
            # its own comment, the last one's indentation
            after = after.with_changes(last_line=closing.last_line, indent=closing.indent)
            comma = last.with_changes(whitespace_after=after)
    names = [*aliases[:-1], aliases[-1].with_changes(comma=comma)]
    return statement.with_changes(module=dotted(module), names=names)

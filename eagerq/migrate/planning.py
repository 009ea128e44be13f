"""Decides, for every name of torch's in a program, what becomes of it; changes nothing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import libcst as cst

from eagerq.migrate.names import Found, Namespace, Outcome, Refused, lookup
from eagerq.migrate.program import Binding, ImportStatement, Program, Root, path_of
from eagerq.migrate.result import Undecided

__all__ = ["Plan", "plan"]


@dataclass
class Plan:
    """What to change.

    Attributes:
        names: expressions to their new dotted names.
        targets: bindings of imports to where they went.
        dropped: bindings that nothing needs any more.
        torch_for: ``import torch.x`` statements' bindings that also have to keep ``torch`` bound.
        needs: import statements to the modules of eagerq to import after them.
        texts: string literals to their new text.
    """

    names: dict[cst.CSTNode, str] = field(default_factory=dict)
    targets: dict[Binding, Found] = field(default_factory=dict)
    dropped: set[Binding] = field(default_factory=set)
    torch_for: set[Binding] = field(default_factory=set)
    needs: defaultdict[ImportStatement, set[str]] = field(default_factory=lambda: defaultdict(set))
    texts: dict[cst.CSTNode, str] = field(default_factory=dict)
    stars: dict[cst.ImportFrom, str] = field(default_factory=dict)
    undecided: list[Undecided] = field(default_factory=list)

    def refuse(self, program: Program, node: cst.CSTNode, reason: str, remedy: str) -> None:
        line, column = program.position(node)
        self.undecided.append(Undecided(line, column, reason, remedy))


@dataclass(eq=False)
class _Use:
    """A root, and what was found for it."""

    root: Root
    outcome: Outcome
    refusal: Refused | None = None

    @property
    def base(self) -> tuple[str, ...]:
        return self.root.bindings[0].base

    @property
    def node(self) -> cst.CSTNode:
        """What the new name replaces."""
        assert isinstance(self.outcome, Found)
        return self.root.chain[self.outcome.taken - len(self.base)]


def plan(program: Program) -> Plan:
    """Decide everything."""
    made = Plan()
    uses = [_use(program, root) for root in program.roots]
    _spare_arguments_of_refused(program, uses)
    for group, members in _groups(program, uses):
        _plan_group(program, made, group, members)
    for use in uses:
        if use.refusal:
            at = use.root.quoted.string if use.root.quoted else use.root.chain[0]
            made.refuse(program, at, use.refusal.reason, use.refusal.remedy)
    return made


# --- what a name is ----------------------------------------------------------------------------------


def _own(binding: Binding) -> Outcome:
    return lookup(binding.base, min(binding.imported, len(binding.base)))


def _use(program: Program, root: Root) -> _Use:
    written = ".".join([root.name, *root.attributes])
    if not root.bindings:
        meant = lookup([root.name, *root.attributes])
        if meant is None or isinstance(meant, Namespace):
            return _Use(root, None)
        return _Use(root, None, Refused(f"{written}: {root.name} is no import here", "rename it by hand", 0))
    if not any(_leads_on(_own(binding)) for binding in root.bindings):
        return _Use(root, None)  # imported one by one: each import is decided where it stands
    outcomes = [_outcome(binding, root.attributes) for binding in root.bindings]
    if not any(isinstance(outcome, (Found, Refused)) for outcome in outcomes):
        return _Use(root, None)
    if len({_meaning(*each) for each in zip(root.bindings, outcomes, strict=True)}) > 1:
        return _Use(root, None, Refused(f"{written}: {root.name} may be one of several imports", "import one", 0))
    if root.elsewhere:
        reason = f"{written}: {root.name} is not only an import here"
        return _Use(root, None, Refused(reason, "give the other one another name", 0))
    outcome = outcomes[0]
    if isinstance(outcome, Refused):
        return _Use(root, outcome, outcome)
    if "#" in program.module.code_for_node(root.chain[-1]):
        return _Use(root, None, Refused(f"{written}: a comment stands inside this name", "move the comment out", 0))
    whole = len(root.bindings[0].base) + len(root.attributes)
    if isinstance(outcome, Found) and outcome.is_module and outcome.taken == whole:
        return _Use(root, outcome, _misused(program, root, written, outcome))
    return _Use(root, outcome)


def _leads_on(outcome: Outcome) -> bool:
    """Whether more names may be read from it: it is a module that goes, or any that stays."""
    return not isinstance(outcome, Refused) and not (isinstance(outcome, Found) and not outcome.is_module)


def _outcome(binding: Binding, attributes: Sequence[str]) -> Outcome:
    return lookup([*binding.base, *attributes], min(binding.imported, len(binding.base)))


def _meaning(binding: Binding, outcome: Outcome) -> tuple[str, int]:
    """What it is now, and how many attributes that takes."""
    if isinstance(outcome, Found):
        return outcome.name, outcome.taken - len(binding.base)
    return type(outcome).__name__, 0


def _misused(program: Program, root: Root, written: str, found: Found) -> Refused | None:
    """A module as a value: what will be read from it cannot be seen, but in the simplest cases."""
    node: cst.CSTNode = root.chain[-1]
    above = program.parent(node)
    if isinstance(above, (cst.Comparison, cst.If, cst.IfExp, cst.UnaryOperation, cst.BooleanOperation)):
        return None  # is tq None?
    if root.quoted is not None or isinstance(above, cst.Expr):
        return None
    reason = f"{written}: what will be read from this module cannot be seen"
    if isinstance(above, cst.Arg):
        call = program.parent(above)
        name = _attribute_asked_for(call, above) if isinstance(call, cst.Call) else None
        if name is not None:
            inner = lookup([*root.bindings[0].base, *root.attributes, name])
            if isinstance(inner, Found):
                return None
            reason = inner.reason if isinstance(inner, Refused) else reason
    return Refused(reason, f"put {found.name} here if that has every name it is used for", 0)


def _attribute_asked_for(call: cst.Call, argument: cst.Arg) -> str | None:
    """``getattr(module, "Conv2d")``."""
    if path_of(call.func) not in (("getattr",), ("hasattr",)) or len(call.args) < 2 or call.args[0] is not argument:
        return None
    name = call.args[1].value
    return str(name.evaluated_value) if isinstance(name, cst.SimpleString) else None


def _spare_arguments_of_refused(program: Program, uses: list[_Use]) -> None:
    """A call that stays with torch keeps the dtype that it is given."""
    staying = {link for use in uses if use.refusal for link in use.root.chain}
    for use in uses:
        if isinstance(use.outcome, Found) and use.outcome.name.startswith("torch.") and not use.refusal:
            above = program.parent(use.root.chain[-1])
            while above is not None and not isinstance(above, cst.BaseStatement):
                if isinstance(above, cst.Call) and above.func in staying:
                    use.outcome = None
                    break
                above = program.parent(above)


# --- imports that share names are decided together -------------------------------------------------------


def _groups(program: Program, uses: list[_Use]) -> Iterator[tuple[list[Binding], list[_Use]]]:
    leader = {binding: binding for binding in program.bindings}

    def find(binding: Binding) -> Binding:
        while leader[binding] is not binding:
            binding = leader[binding]
        return binding

    for use in uses:
        for binding in use.root.bindings[1:]:
            leader[find(binding)] = find(use.root.bindings[0])
    members: defaultdict[Binding, list[_Use]] = defaultdict(list)
    for use in uses:
        if use.root.bindings:
            members[find(use.root.bindings[0])].append(use)
    groups: defaultdict[Binding, list[Binding]] = defaultdict(list)
    for binding in program.bindings:
        groups[find(binding)].append(binding)
    for first, bindings in groups.items():
        yield bindings, members[first]


def _name_is_taken(program: Program) -> bool:
    return "eagerq" in program.bound and not program.uses_eagerq


def _plan_group(program: Program, made: Plan, bindings: list[Binding], uses: list[_Use]) -> None:
    own = [_own(binding) for binding in bindings]
    stays = any(use.refusal for use in uses) or _name_is_taken(program)
    for binding, outcome in zip(bindings, own, strict=True):
        if isinstance(outcome, Refused):
            made.refuse(program, binding.alias, outcome.reason, outcome.remedy)
        elif isinstance(outcome, Found) and not (outcome.is_module and stays):
            made.targets[binding] = outcome
    if all(isinstance(outcome, Found) and not outcome.is_module for outcome in own):
        _plan_objects(program, made, bindings, uses)
        return
    remaining = any([_plan_use(program, made, bindings, use) for use in uses])
    if any(isinstance(outcome, Namespace) for outcome in own):
        _plan_namespaces(program, made, bindings, uses, remaining)


def _plan_objects(program: Program, made: Plan, bindings: list[Binding], uses: list[_Use]) -> None:
    """Names imported one by one keep their name, unless it says what it no longer is: quint8."""
    target = made.targets[bindings[0]]
    new = target.name.rpartition(".")[2]
    old = bindings[0].name
    named = any(binding.alias.asname for binding in bindings)
    if new == old or named or new in program.bound or any(use.root.elsewhere for use in uses):
        return
    for use in uses:
        made.names[use.root.chain[0]] = new
    for binding in bindings:
        binding.name = new


def _plan_use(program: Program, made: Plan, bindings: list[Binding], use: _Use) -> bool:
    """Whether the use still needs its import as it was."""
    if use.refusal or not isinstance(use.outcome, Found):
        return True
    found = use.outcome
    alias = made.targets.get(use.root.bindings[0])
    base = alias.name if alias else ".".join(use.base)
    if found.name == base or found.name.startswith(f"{base}."):
        new = use.root.name + found.name[len(base) :]
    elif _name_is_taken(program):
        use.refusal = Refused(f"{'.'.join(use.base)}: eagerq is another name here", "rename that one", 0)
        return True
    else:
        new = found.name
        for binding in bindings:
            made.needs[binding.statement].add(found.module)
    old = ".".join([use.root.name, *use.root.attributes][: found.taken - len(use.base) + 1])
    if new != old:
        made.names[use.node] = new
    return new.split(".")[0] == use.root.name


def _plan_namespaces(program: Program, made: Plan, bindings: list[Binding], uses: list[_Use], remaining: bool) -> None:
    """``import torch``, ``import torch.ao.quantization``, ``from torch import ao``."""
    kept = [binding for binding in bindings if len(binding.path) <= len(binding.base)]
    for binding in bindings:
        whole = lookup(binding.path, len(binding.path))
        if len(binding.path) == len(binding.base):
            if uses and not remaining:
                made.dropped.add(binding)
        elif isinstance(whole, Refused):
            made.refuse(program, binding.alias, whole.reason, whole.remedy)
            kept.append(binding)
        elif _still_read(binding, uses) or whole is None:
            kept.append(binding)
        elif isinstance(whole, Found):
            made.targets[binding] = whole
        elif binding.path[:2] == ("torch", "ao"):
            made.dropped.add(binding)
        else:
            kept.append(binding)
    if remaining:
        lines = [program.position(use.root.chain[0])[0] for use in uses if use.root.quoted is None]
        for binding in bindings:
            if binding not in kept and not any(_binds_in_time(program, other, binding, lines) for other in kept):
                made.torch_for.add(binding)
                kept.append(binding)


def _binds_in_time(program: Program, other: Binding, gone: Binding, lines: list[int]) -> bool:
    """Whether an import serves for one that goes: it is in the same scope, and comes before the next use."""
    then, now = program.position(other.statement)[0], program.position(gone.statement)[0]
    return other.scope is gone.scope and not any(now <= line <= then for line in lines)


def _still_read(binding: Binding, uses: list[_Use]) -> bool:
    """Something that stays is inside the module that the statement loads."""
    path = list(binding.path)
    return any(use.refusal and [*use.base, *use.root.attributes][: len(path)] == path for use in uses)

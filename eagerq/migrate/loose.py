"""What scopes do not show: modules loaded by name, names in strings, star imports, scripting."""

from __future__ import annotations

import re

import libcst as cst

from eagerq.migrate.names import Found, Namespace, Refused, lookup, public_names
from eagerq.migrate.planning import Plan
from eagerq.migrate.program import Program, path_of

__all__ = ["plan_loose_ends"]

_DOTTED = re.compile(r"torch(ao)?(\.\w+)+")
_OPENS = re.compile(r"(torch(?:ao)?(?:\.\w+)+)\.?")
_SCRIPTING = ("script", "trace", "trace_module", "freeze", "optimize_for_inference")
_SCRIPT_REMEDY = "use torch.compile or torch.export on the converted model"


def plan_loose_ends(program: Program, made: Plan) -> None:
    """Adds them to what has been planned."""
    loaded = _plan_loading_calls(program, made)
    for string in program.strings:
        if string not in loaded:
            _plan_string(program, made, string)
    _plan_stars(program, made)
    if program.uses_eagerq or made.targets or made.names or made.undecided or made.stars:
        _list_scripting(program, made)


def _plan_loading_calls(program: Program, made: Plan) -> set[cst.CSTNode]:
    """``importlib.import_module("torch.ao.quantization")``; gives the strings that were dealt with."""
    seen: set[cst.CSTNode] = set()
    for call in program.calls:
        function = path_of(call.func)
        if not function or function[-1] not in ("import_module", "__import__") or not call.args:
            continue
        string = call.args[0].value
        if not isinstance(string, cst.SimpleString) or not _DOTTED.fullmatch(str(string.evaluated_value)):
            continue
        path = str(string.evaluated_value).split(".")
        outcome = lookup(path, len(path))
        seen.add(string)
        if isinstance(outcome, Found) and outcome.taken == len(path):
            # without a fromlist the call gives the outermost package
            outermost = function[-1] == "__import__" and len(call.args) < 4 and not _is_statement(program, call)
            if outermost and not any(arg.keyword and arg.keyword.value == "fromlist" for arg in call.args):
                reason = f"{'.'.join(path)}: __import__ gives its outermost package"
                made.refuse(program, string, reason, f'use importlib.import_module("{outcome.name}")')
            else:
                made.texts[string] = f"{string.prefix}{string.quote}{outcome.name}{string.quote}"
        elif isinstance(outcome, Refused):
            made.refuse(program, string, outcome.reason, outcome.remedy)
        elif isinstance(outcome, Namespace) and path[:2] == ["torch", "ao"]:
            made.refuse(program, string, f"{'.'.join(path)}: parts of it went to different places", "load those")
    return seen


def _is_statement(program: Program, node: cst.CSTNode) -> bool:
    return isinstance(program.parent(node), cst.Expr)


def _plan_string(program: Program, made: Plan, string: cst.SimpleString | cst.FormattedStringText) -> None:
    """Names in other strings may be anything: a look-up, a pattern, a message. Text is none."""
    if isinstance(string, cst.FormattedStringText):
        value, match = string.value, _OPENS.match(string.value)
    else:
        value = str(string.evaluated_value)
        match = _OPENS.fullmatch(value)
    if match is None or _is_statement(program, string):
        return
    outcome = lookup(match[1].split("."))
    remedy = "rename it by hand if something is looked up by it"
    if isinstance(outcome, Found):
        made.refuse(program, string, f"{match[1]}: a name in a string ({outcome.name} now)", remedy)
    elif isinstance(outcome, Refused):
        made.refuse(program, string, f"{match[1]}: a name in a string", outcome.remedy)
    elif isinstance(outcome, Namespace) and match[1].startswith("torch.ao"):
        made.refuse(program, string, f"{match[1]}: a name in a string", remedy)


def _plan_stars(program: Program, made: Plan) -> None:
    """A star goes when all that the program can have from it is in its new place."""
    targets = {}
    for star in program.stars:
        path = path_of(star.module)
        outcome = lookup(path, len(path))
        if isinstance(outcome, Refused):
            made.refuse(program, star, outcome.reason, outcome.remedy)
        elif isinstance(outcome, Found):
            targets[star] = outcome
    if not targets:
        return
    offered = frozenset[str]().union(*(public_names(found.name) for found in targets.values()))
    unknown = sorted(program.unresolved.keys() - offered)
    for star, found in targets.items():
        line = program.position(star)[0]
        clashes = sorted(name for name in offered if program.first_lines.get(name, line) < line)
        module = ".".join(path_of(star.module))
        if unknown:
            reason = f"{module}: a star import, and {found.name} has no {', '.join(unknown)}"
            made.refuse(program, star, reason, "import the names that you use")
        elif clashes:
            reason = f"{module}: a star import; with {found.name} it would also bind {', '.join(clashes)}"
            made.refuse(program, star, reason, "import the names that you use")
        else:
            made.stars[star] = found.name


def _list_scripting(program: Program, made: Plan) -> None:
    """torch.jit knows no QTensor; told of only where a program quantizes."""
    for root in program.roots:
        name = [*(root.bindings[0].base if root.bindings else ()), *root.attributes]
        if name[:2] == ["torch", "jit"] and len(name) > 2 and name[2] in _SCRIPTING:
            reason = f"{'.'.join(name[:3])}: TorchScript takes no model of eagerq's"
            made.refuse(program, root.chain[0], reason, _SCRIPT_REMEDY)

"""The shape of the package, read off the syntax tree of its files.

Imports point down, nothing that torch is about to delete is named, files stay short, and
``__init__`` files only re-export. Reading ``sys.modules`` instead would prove nothing, since
``import torch`` itself loads ``torch.ao``.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "eagerq"

# Level -> rooms. A room is a module or a package of eagerq; everything inside a package belongs to
# its room, private files included. A room imports from its own level and from those below.
LEVELS: dict[int, tuple[str, ...]] = {
    6: ("pt2e", "training", "freeze", "numeric_suite", "equalization", "bias_correction", "report", "migrate"),
    5: ("quantize", "fuse_modules", "quantization_mappings", "fuser_method_mappings"),
    4: ("intrinsic",),
    3: ("nn.qat", "nn.quantized", "nn.quantizable", "stubs", "tree", "twins"),
    2: ("observer", "fake_quantize", "qconfig", "qconfig_mapping", "inspection"),
    1: ("bundles", "checkpoint", "functional", "ranges", "qtensor", "qtensor_activations", "qtensor_ops", "kernels"),
    0: ("errors", "scheme", "native"),
}
LEVEL_OF = {room: level for level, rooms in LEVELS.items() for room in rooms}

# Re-exports for people, above everything: no room may import from these.
FACADES = ("", "utils")
TOP = max(LEVELS) + 1

MAX_LINES = 400

# What torch is removing, or what only its old quantization needs.
FORBIDDEN = re.compile(
    r"""torch\.(
        ao | quantization | jit
        | nn\.(quantized\w* | quantizable | qat | intrinsic\w*)
        | (quint8 | qint8 | qint32 | quint4x2)
        | quantize_per_\w+
        | q_\w+
        | ops\.quantized
    )(\.|$)""",
    re.VERBOSE,
)

# File -> the forbidden names that it alone may use (and what hangs on them). Each such file says
# why in a comment. An entry that its file no longer needs fails, so that the fence cannot rot.
FENCED: dict[str, tuple[str, ...]] = {"pt2e/operators.py": ("torch.ao.quantization.fx._decomposed",)}


# --- reading a file ---------------------------------------------------------------------------


def module_of(path: str) -> str:
    """``nn/qat/__init__.py`` -> ``nn.qat``; the package's own ``__init__.py`` -> ``""``."""
    parts = PurePosixPath(path).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str | None:
    """The room that a module (or a name in it) belongs to: its longest prefix in the table."""
    parts = module.split(".")
    prefixes = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
    return next((prefix for prefix in prefixes if prefix in LEVEL_OF), None)


def level_of_file(path: str) -> int | None:
    module = module_of(path)
    if module in FACADES:
        return TOP
    room = room_of(module)
    if room is not None:
        return LEVEL_OF[room]
    if PurePosixPath(path).name == "__init__.py":
        # A package of several rooms. Importing any of them runs this file first, so what it pulls
        # in must be fit for the lowest.
        return min((LEVEL_OF[inner] for inner in LEVEL_OF if inner.startswith(f"{module}.")), default=None)
    return None


def _absolute(node: ast.ImportFrom, path: str) -> str:
    """The full name of the module that a ``from`` import reads, relative dots resolved."""
    if not node.level:
        return node.module or ""
    package = ["eagerq", *PurePosixPath(path).parts[:-1]]
    base = package[: len(package) - node.level + 1]
    return ".".join([*base, *([node.module] if node.module else [])])


def _chain(node: ast.expr) -> list[str] | None:
    """``a.b.c`` -> ``["a", "b", "c"]``; ``getattr(a, "b")`` counts as ``a.b``."""
    if isinstance(node, ast.Name):
        return [node.id]
    inner: ast.expr
    if isinstance(node, ast.Attribute):
        inner, name = node.value, node.attr
    elif (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in ("getattr", "hasattr")
        and len(node.args) >= 2
        and isinstance(node.args[1], ast.Constant)
        and isinstance(node.args[1].value, str)
    ):
        inner, name = node.args[0], node.args[1].value
    else:
        return None
    start = _chain(inner)
    return None if start is None else [*start, name]


def _imported_by_call(node: ast.Call) -> str | None:
    """The module that ``import_module("x")`` or ``__import__("x")`` loads."""
    called = _chain(node.func)
    if not called or called[-1] not in ("import_module", "__import__") or not node.args:
        return None
    first = node.args[0]
    return first.value if isinstance(first, ast.Constant) and isinstance(first.value, str) else None


def names_used(path: str, text: str) -> Iterator[tuple[int, str]]:
    """Line and full name of every import and attribute chain, seen through the file's own aliases."""
    tree = ast.parse(text, path)
    aliases: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for item in node.names:
                yield node.lineno, item.name
                bound = item.asname or item.name.split(".")[0]
                aliases[bound] = item.name if item.asname else bound
        elif isinstance(node, ast.ImportFrom):
            module = _absolute(node, path)
            for item in node.names:
                yield node.lineno, f"{module}.{item.name}"
                aliases[item.asname or item.name] = f"{module}.{item.name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and (loaded := _imported_by_call(node)):
            yield node.lineno, loaded
        if isinstance(node, ast.Attribute | ast.Call) and (chain := _chain(node)) and chain[0] in aliases:
            yield node.lineno, ".".join([aliases[chain[0]], *chain[1:]])


# --- the checks: path inside eagerq/ and source in, complaints out ------------------------------


def check_levels(path: str, text: str) -> list[str]:
    level = level_of_file(path)
    if level is None:
        return [f"eagerq/{path} is in no room: place it in LEVELS of tests/test_layering.py"]
    complaints = []
    for line, name in sorted(set(names_used(path, text))):
        if name != "eagerq" and not name.startswith("eagerq."):
            continue
        inner = name.removeprefix("eagerq").removeprefix(".")
        room = room_of(inner)
        if room is not None and LEVEL_OF[room] > level:
            complaints.append(
                f"eagerq/{path}:{line}: level {level} imports upward: {name} is on level {LEVEL_OF[room]}"
            )
        elif room is None and level < TOP and not _opens_a_room(inner):
            complaints.append(
                f"eagerq/{path}:{line}: {name} is in no room: import it from the room that defines it, "
                "or place a new room in LEVELS of tests/test_layering.py"
            )
    return complaints


def _opens_a_room(inner: str) -> bool:
    """Whether this is only the beginning of a chain such as ``eagerq.nn.qat``."""
    return not inner or any(room.startswith(f"{inner}.") for room in LEVEL_OF)


def check_forbidden(path: str, text: str) -> list[str]:
    found: dict[int, str] = {}  # of a line's chains, torch.ao, torch.ao.nn ..., the longest
    for line, name in names_used(path, text):
        if FORBIDDEN.match(name) and not _fenced(path, name) and len(name) > len(found.get(line, "")):
            found[line] = name
    return [
        f"eagerq/{path}:{line}: {name} is going from torch: do without it, or fence it in FENCED "
        "of tests/test_layering.py with the reason in the file"
        for line, name in sorted(found.items())
    ]


def _fenced(path: str, name: str) -> bool:
    # torch.ao, where torch.ao.quantization.fx._decomposed is allowed, is a step on the way there.
    return any(
        f"{name}.".startswith(f"{allowed}.") or f"{allowed}.".startswith(f"{name}.") for allowed in FENCED.get(path, ())
    )


def check_length(path: str, text: str) -> list[str]:
    lines = len(text.splitlines())
    if lines <= MAX_LINES:
        return []
    return [f"eagerq/{path}: {lines} lines, at most {MAX_LINES}: split it by what its parts are for"]


def check_reexports(path: str, text: str) -> list[str]:
    if PurePosixPath(path).name != "__init__.py" and module_of(path) not in FACADES:
        return []
    return [
        f"eagerq/{path}:{node.lineno}: only explicit imports, __all__ and __version__ belong here"
        for node in ast.parse(text, path).body
        if not _only_reexports(node) and not (path == "__init__.py" and _loads_on_first_use(node))
    ]


def _only_reexports(node: ast.stmt) -> bool:
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    if isinstance(node, ast.ImportFrom):
        return all(item.name != "*" for item in node.names)
    if isinstance(node, ast.Assign):
        targets = [target.id for target in node.targets if isinstance(target, ast.Name)]
        if len(targets) != len(node.targets) or not {"__all__", "__version__"}.issuperset(targets):
            return False
        try:
            ast.literal_eval(node.value)
        except ValueError:
            return False
        return True
    return isinstance(node, ast.Import)


def _loads_on_first_use(node: ast.stmt) -> bool:
    """``if TYPE_CHECKING:`` a re-export, ``else:`` a ``__getattr__`` that imports by one ``if`` and else raises."""
    if not isinstance(node, ast.If) or ast.unparse(node.test) != "TYPE_CHECKING" or len(node.orelse) != 1:
        return False
    function = node.orelse[0]
    return (
        all(_only_reexports(inner) for inner in node.body)
        and isinstance(function, ast.FunctionDef)
        and function.name == "__getattr__"
        and [type(statement) for statement in function.body] == [ast.If, ast.Raise]
        and ast.unparse(function.body[0]).count("\n") == 1
        and "return _import_module(" in ast.unparse(function.body[0])
    )


CHECKS = (check_levels, check_forbidden, check_length, check_reexports)


# --- eagerq passes ------------------------------------------------------------------------------

SOURCES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


def test_there_is_something_to_read() -> None:
    assert "__init__.py" in SOURCES


@pytest.mark.parametrize("path", SOURCES)
def test_house(path: str) -> None:
    text = (PACKAGE / path).read_text(encoding="utf-8")
    complaints = [complaint for check in CHECKS for complaint in check(path, text)]
    assert not complaints, "\n".join(complaints)


def test_no_room_is_placed_twice() -> None:
    assert len(LEVEL_OF) == sum(len(rooms) for rooms in LEVELS.values())


def test_fences_are_needed() -> None:
    for path, allowed in FENCED.items():
        used = [name for _, name in names_used(path, (PACKAGE / path).read_text(encoding="utf-8"))]
        for prefix in allowed:
            assert FORBIDDEN.match(prefix), f"{prefix} is not forbidden"
            assert any(f"{name}.".startswith(f"{prefix}.") for name in used), f"{path} does not use {prefix}"


# --- and the checks can fail --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("errors.py", "from eagerq.scheme import IntegerType"),  # sideways
        ("nn/qat/linear.py", "from eagerq.fake_quantize import FakeQuantize"),
        ("nn/qat/linear.py", "from eagerq import functional as F\nF.fake_quantize()"),
        ("nn/qat/linear.py", "from ._mixin import QATMixin\nfrom . import conv\nfrom .. import quantized"),
        ("nn/qat/_mixin.py", "from ...observer import MinMaxObserver"),
        ("intrinsic/qat/conv.py", "import eagerq.nn.qat\neagerq.nn.qat.Conv2d"),
        ("kernels/onednn.py", "from eagerq.kernels.reference import linear"),
        ("nn/__init__.py", "from eagerq.nn import qat, quantized"),
        ("nn/quantizable/lstm.py", "from eagerq.twins import attach_observer"),
        ("utils.py", "from eagerq import prepare\nfrom eagerq.quantize import convert"),
        ("__init__.py", "from eagerq.quantize import prepare\nfrom eagerq.nn.quantizable import LSTM"),
    ],
)
def test_imports_that_are_fine(path: str, text: str) -> None:
    assert check_levels(path, text) == []


@pytest.mark.parametrize(
    ("path", "text", "complaint"),
    [
        ("errors.py", "import eagerq.observer", "eagerq.observer is on level 2"),
        ("observer.py", "from eagerq.nn.qat import Linear", "eagerq.nn.qat.Linear is on level 3"),
        ("observer.py", "from eagerq import stubs", "eagerq.stubs is on level 3"),
        ("observer.py", "from . import stubs", "eagerq.stubs is on level 3"),
        ("observer.py", "from .nn import qat", "eagerq.nn.qat is on level 3"),
        ("nn/qat/linear.py", "from ...intrinsic.qat import ConvBn2d", "is on level 4"),
        ("nn/quantizable/__init__.py", "from ...quantize import prepare", "is on level 5"),
        (
            "nn/qat/_mixin.py",
            "def f():\n    from eagerq.quantize import convert",
            ":2: level 3 imports upward",
        ),
        ("stubs.py", "if TYPE_CHECKING:\n    from eagerq.quantize import convert", "is on level 5"),
        ("stubs.py", "importlib.import_module('eagerq.quantize')", "is on level 5"),
        ("stubs.py", "import eagerq.errors\neagerq.quantize.convert()", ":2: level 3 imports upward"),
        ("quantize.py", "from eagerq.pt2e import export", "is on level 6"),
        ("nn/__init__.py", "from eagerq import quantize", "is on level 5"),
        ("quantize.py", "from eagerq import FakeQuantize", "import it from the room that defines it"),
        ("quantize.py", "import eagerq\neagerq.FakeQuantize", ":2: eagerq.FakeQuantize is in no room"),
        ("quantize.py", "from eagerq.nn import Linear", "import it from the room that defines it"),
        ("quantize.py", "from eagerq.utils import get_qparam_dict", "import it from the room"),
        ("quantize.py", "from eagerq.helpers import thing", "place a new room"),
        ("helpers.py", "", "place it in LEVELS"),
        ("_helpers.py", "", "place it in LEVELS"),
        ("nn/_shared.py", "", "place it in LEVELS"),
    ],
)
def test_imports_that_are_not(path: str, text: str, complaint: str) -> None:
    assert complaint in "\n".join(check_levels(path, text))


@pytest.mark.parametrize(
    "text",
    [
        "import torch\ntorch.per_tensor_affine, torch.qscheme, torch.fake_quantize_per_tensor_affine",
        "import torch\ntorch.ops.onednn.qlinear_pointwise.default",
        "from torch import nn\nnn.Linear, nn.functional.relu",
        "x.q_scale(); x.int_repr(); self.ao.nn; qint8 = 1; qint8",
        "'torch.quint8'",  # old dtypes are recognised by their name
        "from eagerq import quantize_per_tensor\nfrom eagerq.nn import quantized",
    ],
)
def test_names_that_are_fine(text: str) -> None:
    assert check_forbidden("observer.py", text) == []


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("import torch.ao", "torch.ao"),
        ("import torch.ao.quantization as tq", "torch.ao.quantization"),
        ("from torch.ao.quantization import observer", "torch.ao.quantization.observer"),
        ("import torch\ntorch.ao.nn.qat.Linear", "torch.ao.nn.qat.Linear"),
        ("import torch as t\nt.quantization.prepare", "torch.quantization.prepare"),
        ("import torch.quantization", "torch.quantization"),
        ("import torch.nn.quantized.dynamic", "torch.nn.quantized.dynamic"),
        ("from torch import nn\nnn.quantized.FloatFunctional()", "torch.nn.quantized.FloatFunctional"),
        ("from torch.nn import intrinsic", "torch.nn.intrinsic"),
        ("from torch.nn import qat, quantizable", "torch.nn.quantizable"),
        ("import torch\n@torch.jit.ignore\ndef f(): ...", "torch.jit.ignore"),
        ("import torch\ntorch.quint8", "torch.quint8"),
        ("from torch import qint8 as int8", "torch.qint8"),
        ("import torch\ngetattr(torch, 'qint32')", "torch.qint32"),
        ("import torch\nhasattr(torch, 'quint4x2')", "torch.quint4x2"),
        ("import torch\ntorch.quantize_per_tensor(x)", "torch.quantize_per_tensor"),
        ("import torch\ntorch.quantize_per_channel(x)", "torch.quantize_per_channel"),
        ("import torch\ntorch.q_per_channel_axis(x)", "torch.q_per_channel_axis"),
        ("import torch\ntorch.ops.quantized.add(x, y)", "torch.ops.quantized.add"),
        ("from torch import ops\nops.quantized.add", "torch.ops.quantized.add"),
        ("import torch\ngetattr(torch.ops, 'quantized').add", "torch.ops.quantized.add"),
        ("import importlib\nimportlib.import_module('torch.ao.nn')", "torch.ao.nn"),
        ("__import__('torch.ao')", "torch.ao"),
        ("def f():\n    import torch.ao", ":2: torch.ao"),
    ],
)
def test_names_that_are_not(text: str, name: str) -> None:
    complaints = check_forbidden("observer.py", text)
    assert len(complaints) == 1
    assert f"{name} is going from torch" in complaints[0]


def test_a_fence_holds_for_its_file_and_its_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FENCED, "pt2e/operators.py", ("torch.ao.quantization.fx._decomposed",))
    text = "import torch\nimport torch.ao.quantization.fx._decomposed as d\nd.lib\n"
    assert check_forbidden("pt2e/operators.py", text) == []
    assert check_forbidden("pt2e/export.py", text)
    assert check_forbidden("pt2e/operators.py", text + "torch.quint8")
    assert check_forbidden("pt2e/operators.py", text + "torch.ao.quantization.prepare")


def test_length() -> None:
    assert check_length("observer.py", "x = 1\n" * MAX_LINES) == []
    assert "401 lines, at most 400" in check_length("observer.py", "x = 1\n" * (MAX_LINES + 1))[0]


@pytest.mark.parametrize("path", ["__init__.py", "nn/qat/__init__.py", "utils.py"])
@pytest.mark.parametrize(
    ("text", "fine"),
    [
        ('"""Doc."""\nfrom eagerq.errors import EagerqError\n__all__ = ["EagerqError"]', True),
        ("from __future__ import annotations\nimport eagerq.nn\n__version__ = '1'", True),
        ("from eagerq.errors import *", False),
        ("def helper(): ...", False),
        ("table = {}", False),
        ("__all__ = [name for name in dir()]", False),
        ("if True:\n    import eagerq.nn", False),
    ],
)
def test_reexports(path: str, text: str, fine: bool) -> None:
    assert bool(check_reexports(path, text)) is not fine
    assert check_reexports("observer.py", text) == []


LAZY = """
if TYPE_CHECKING:
    from eagerq import pt2e as pt2e
else:
    def __getattr__(name):
        if name == "pt2e":
            return _import_module("eagerq.pt2e")
        raise AttributeError(name)
"""


@pytest.mark.parametrize(
    ("path", "text", "fine"),
    [
        ("__init__.py", LAZY, True),
        ("nn/__init__.py", LAZY, False),
        ("utils.py", LAZY, False),
        ("__init__.py", LAZY.replace("TYPE_CHECKING", "True"), False),
        ("__init__.py", LAZY.replace("__getattr__", "helper"), False),
        ("__init__.py", LAZY.replace("        raise", "        table = {}\n        raise"), False),
        ("__init__.py", LAZY.replace("return _import_module", "return helper"), False),
    ],
)
def test_loading_on_first_use(path: str, text: str, fine: bool) -> None:
    assert bool(check_reexports(path, text)) is not fine

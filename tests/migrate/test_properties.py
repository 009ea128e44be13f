"""Programs put together by chance: migrated, they mean the same, and nothing old is left but what is listed."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from typing import Any

from conftest import Oracle
from hypothesis import given, settings
from hypothesis import strategies as st
from test_layering import FORBIDDEN, names_used

from eagerq.migrate import migrate_source

# import -> what it is read through
QUANTIZATION = {
    "import torch": ("torch.ao.quantization", "torch.quantization"),
    "import torch as t": ("t.ao.quantization", "t.quantization"),
    "import torch.ao.quantization": ("torch.ao.quantization", "torch.quantization"),
    "import torch.quantization as oldest": ("oldest",),
    "import torch.ao.quantization as tq": ("tq",),
    "from torch.ao import quantization as q": ("q",),
    "from torch import quantization": ("quantization",),
    "from torch import ao": ("ao.quantization",),
    "import os, torch.ao.quantization as tq2": ("tq2",),
}
QUANTIZED = {
    "import torch": ("torch.ao.nn.quantized", "torch.nn.quantized"),
    "import torch.nn.quantized": ("torch.nn.quantized",),
    "import torch.nn as nn": ("nn.quantized",),
    "from torch import nn as nn2, Tensor": ("nn2.quantized",),
    "from torch import ao": ("ao.nn.quantized",),
    "import torch.ao.nn as aonn": ("aonn.quantized",),
    "import torch.ao.nn.quantized as nnq": ("nnq", "nnq.modules.linear"),
    "from torch.ao.nn import quantized, qat": ("quantized",),
}
PLAIN = {
    "import torch": ("torch.nn.Linear", "torch.relu"),
    "import torch.nn as nn": ("nn.Linear",),
    "import torch.ao.quantization": ("torch.nn.Linear",),
    "from torch import nn as nn2, Tensor": ("nn2.ReLU", "Tensor"),
}
NAMES = {
    id(QUANTIZATION): ("QuantStub", "prepare_qat", "observer.MinMaxObserver", "FakeQuantize", "fuse_modules"),
    id(QUANTIZED): ("Linear",),
}
LEFT_OUT = ("prepare_fx", "quantize_jit", "quantize_fx.convert_fx", "no_such_name")
OF_DTYPES = ("torch.quint8", "torch.qint8")


@dataclass(frozen=True)
class Use:
    statement: str
    expression: str


@st.composite
def uses(draw: st.DrawFn) -> Use:
    table: Any = draw(st.sampled_from([QUANTIZATION, QUANTIZED, PLAIN]))
    statement = draw(st.sampled_from(sorted(table)))
    prefix = draw(st.sampled_from(table[statement]))
    if table is PLAIN:
        return Use(statement, prefix)
    if table is QUANTIZATION and draw(st.integers(0, 9)) == 9:
        return Use(statement, f"lambda: {prefix}.{draw(st.sampled_from(LEFT_OUT))}")
    return Use(statement, f"{prefix}.{draw(st.sampled_from(NAMES[id(table)]))}")


def block(found: list[Use], indent: str, first: int) -> list[str]:
    imports = list(dict.fromkeys(use.statement for use in found))
    lines = [f"{indent}{statement}" for statement in imports]
    return lines + [f"{indent}seen[{first + number}] = {use.expression}" for number, use in enumerate(found)]


@st.composite
def programs(draw: st.DrawFn) -> str:
    outer, inner = draw(st.lists(uses(), max_size=5)), draw(st.lists(uses(), max_size=4))
    lines = ["# a program", *block(outer, "", 0)]
    if inner:
        lines += ["def f():", *block(inner, "    ", 100), "    return 1", "f()"]
    if draw(st.booleans()):
        lines += ["import torch", f"seen[200] = {draw(st.sampled_from(OF_DTYPES))}"]
    return "\n".join([*lines, ""])


def meaning(text: str) -> dict[int, str]:
    seen: dict[int, Any] = {}
    exec(compile(text, "program", "exec"), {"seen": seen})
    return {number: getattr(value, "__qualname__", str(value)) for number, value in seen.items()}


@settings(max_examples=100)
@given(programs())
def test_they_mean_the_same_and_only_what_is_left_out_is_left(ao: Oracle, text: str) -> None:
    done = migrate_source(text)
    ast.parse(done.text)
    again = migrate_source(done.text)
    assert again.text == done.text
    assert [undecided.reason for undecided in again.undecided] == [undecided.reason for undecided in done.undecided]
    old, new = meaning(text), meaning(done.text)
    renamed = {"torch.quint8": "torch.uint8", "torch.qint8": "torch.int8"}
    assert new == {number: renamed.get(name, name) for number, name in old.items()}
    left = [number for number, line in enumerate(text.splitlines(), 1) if "lambda" in line]
    assert [undecided.line for undecided in done.undecided] == left
    if not left:
        assert not [name for _, name in names_used("new.py", done.text) if FORBIDDEN.match(name)]

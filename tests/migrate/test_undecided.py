"""What stays is listed: where, why, and what to do."""

from __future__ import annotations

from textwrap import dedent

import pytest

from eagerq.migrate import migrate_source

# line:column of what stays, what the message says; the program keeps these lines
STAYS = [
    ("from torch.ao.quantization import prepare_fx", "1:35: torch.ao.quantization.prepare_fx: FX graph mode"),
    ("import torch.ao.quantization.quantize_fx as q", "1:8: torch.ao.quantization.quantize_fx: FX graph mode"),
    ("import torch.ao.quantization.quantize_fx", "1:8: torch.ao.quantization.quantize_fx: FX graph mode"),
    ("from torch.ao.quantization.fx.utils import x", "1:44: torch.ao.quantization.fx: FX graph mode"),
    ("from torch.ao.quantization.backend_config import BackendConfig", "FX graph mode"),
    ("import torch.ao.ns._numeric_suite_fx as ns", "FX graph mode"),
    ("from torch.quantization import quantize_jit", "1:32: torch.quantization.quantize_jit: TorchScript"),
    ("from torch.ao.quantization import script_qconfig", "TorchScript is left out"),
    ("from torch.ao.nn.sparse.quantized import Linear", "sparse quantization is left out"),
    ("from torch.ao.pruning import WeightNormSparsifier", "sparse"),
    ("from torch.ao.nn.quantized.reference import Linear", "reference modules"),
    ("from torch.ao.quantization import no_such_name", "eagerq has no no_such_name"),
    ("from torch.ao.quantization import FakeQuantise", "it has FakeQuantize"),
    ("from torch.ao.nn.quantized import Conv2", "1:35: torch.ao.nn.quantized.Conv2: eagerq.nn.quantized has no Conv2"),
    ("import torch\ntorch.backends.quantized.engine = 'onednn'", "2:1: torch.backends.quantized: eagerq picks"),
    ("import torch\ntorch.ops.quantized.add(1, 2)", "2:1: torch.ops.quantized: these operators"),
    ("from torch import ops\nops.quantized.add(1, 2)", "2:1: torch.ops.quantized: these operators"),
    ("import torch\nx = torch.q_scale(1)", "2:5: torch.q_scale: it takes"),
    ("import torch\nx = torch.quint2x4", "2-bit"),
    (
        "import torch\nx = torch.quantize_per_tensor_dynamic(y, torch.qint8, False)",
        "2:5: torch.quantize_per_tensor_dynamic",
    ),
    ("import torch\nx = torch.quantized_max_pool2d(y, torch.quint8)", "torch.quantized_max_pool2d"),
    ("def f(torch): return torch.ao.quantization.prepare", "1:22: torch.ao.quantization.prepare: torch is no import"),
    ("from mine import torch\ntorch.ao.quantization.prepare", "torch is no import here"),
    ("import torch\ntorch = torch.cuda or mine\ntorch.quantization.prepare", "torch is not only an import"),
    ("import torch.nn.quantized as q\ndef f(name): return getattr(q, name)", "2:29: q: what will be read"),
    ("import torch\ndef f(name): return getattr(torch.nn.quantized, name)", "torch.nn.quantized: what will be read"),
    ("import torch.nn.quantized as q\ngetattr(q, 'nothing')", "eagerq.nn.quantized has no nothing"),
    ("import torch.ao.quantization as tq\nf(tq)", "2:3: tq: what will be read from this module"),
    ("import importlib\nimportlib.import_module('torch.ao.quantization.fx')", "2:25: torch.ao.quantization.fx: FX"),
    ("import importlib\nimportlib.import_module('torch.ao.nn')", "parts of it went to different places"),
    ("import importlib\nimportlib.import_module(f'torch.ao.nn.{x}')", "torch.ao.nn: a name in a string"),
    ("x = __import__('torch.ao.quantization')", "1:16: torch.ao.quantization: __import__ gives its outermost"),
    (
        "patch('torch.ao.quantization.prepare')",
        "1:7: torch.ao.quantization.prepare: a name in a string (eagerq.prepare",
    ),
    ("import torch\nx = (torch\n  # why\n  .ao.quantization.prepare)", "2:6: torch.ao.quantization.prepare: a comment"),
    ("from torch.ao.quantization import *\nno_such_thing", "a star import, and eagerq has no no_such_thing"),
    ("calibrate = 1\nfrom torch.ao.quantization import *", "with eagerq it would also bind calibrate"),
    ("import torch\neagerq = 1\ntorch.quantization.prepare", "eagerq is another name here"),
    ("import torch.quantization as tq\neagerq = 1\ntq._numeric_suite, tq.prepare", "eagerq is another name here"),
    (
        "if a:\n    import torch.nn.quantized as q\nelse:\n    import torch.nn.qat as q\nq.Linear",
        "5:1: q.Linear: q may be one of several imports",
    ),
]


@pytest.mark.parametrize(("before", "message"), STAYS, ids=[message for _, message in STAYS])
def test_stays_and_is_listed(before: str, message: str) -> None:
    done = migrate_source(before)
    assert done.text == before
    assert any(message in str(undecided) for undecided in done.undecided), done.undecided
    assert all(undecided.remedy for undecided in done.undecided)
    assert migrate_source(done.text) == done


def test_positions_are_those_of_the_old_text() -> None:
    done = migrate_source("import torch.ao.quantization\n\ttorch.ao.quantization\n".replace("\t", ""))
    assert done.undecided == ()
    text = "import torch\n\nif torch:\n    x = (1, torch.ops.quantized.add)\n"
    (undecided,) = migrate_source(text).undecided
    assert (undecided.line, undecided.column) == (4, 13)


def test_what_is_decided_is_renamed_around_what_is_not() -> None:
    before = """
    import torch
    import torch.ao.quantization as tq
    from torch.ao.quantization import (
        QuantStub,  # ours
        prepare_fx,  # theirs
        convert,
    )

    class Net(torch.nn.Module):
        make = tq.prepare_qat
        other = tq.quantize_fx.prepare_qat_fx
        engine = torch.backends.quantized.engine
    """
    after = """
    import torch
    import torch.ao.quantization as tq
    from eagerq import (
        QuantStub,  # ours
        convert,
    )
    from torch.ao.quantization import (
        prepare_fx,  # theirs
    )
    import eagerq

    class Net(torch.nn.Module):
        make = eagerq.prepare_qat
        other = tq.quantize_fx.prepare_qat_fx
        engine = torch.backends.quantized.engine
    """
    done = migrate_source(dedent(before))
    assert done.text == dedent(after)
    assert [undecided.line for undecided in done.undecided] == [6, 12, 13]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "import os",
        "import torch\nimport torch.nn as nn\n\n\nx = nn.Linear(1, 1 )   # torch.ao\n",
        '"""torch.ao.quantization.prepare"""\nimport torch\nx = "see torch.ao.quantization for that"\n',
        "import torch\r\nx = torch.e\r\n",
        "import torch\n@torch.jit.script\ndef f(): ...\n",
        "import torch\nx = torch.fake_quantize_per_tensor_affine, torch.per_tensor_affine, torch.qscheme\n",
        "x.quint8; self.torch.qint8; ao.quantization.prepare; quantization = 1; quantization.prepare\n",
        "from .torch.ao import quantization\nfrom . import torch_helpers\n",
    ],
)
def test_nothing_to_do(text: str) -> None:
    assert migrate_source(text) == type(migrate_source(""))(text)


@pytest.mark.parametrize("place", ["torch.jit.script(m)", "torch.jit.trace(m, x)", "torch.jit.freeze(m)"])
def test_scripting_is_listed_where_a_program_quantizes(place: str) -> None:
    old = f"import torch\nfrom torch.ao.quantization import convert\n{place}\n"
    done = migrate_source(old)
    assert "3:1" in str(done.undecided[0])
    assert "torch.compile or torch.export" in done.undecided[0].remedy
    assert migrate_source(done.text) == done  # still listed

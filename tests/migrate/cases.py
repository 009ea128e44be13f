"""Programs before and after."""

from __future__ import annotations

from textwrap import dedent
from typing import NamedTuple


class Case(NamedTuple):
    name: str
    before: str
    after: str


def case(name: str, before: str, after: str) -> Case:
    return Case(name, dedent(before).lstrip("\n"), dedent(after).lstrip("\n"))


IMPORTS = [
    case("plain", "import torch.ao.quantization\n", "import eagerq\n"),
    case("renamed", "import torch.ao.quantization as tq\ntq.prepare\n", "import eagerq as tq\ntq.prepare\n"),
    case(
        "package",
        "from torch.ao import quantization\nquantization.prepare\n",
        "import eagerq as quantization\nquantization.prepare\n",
    ),
    case("package, renamed", "from torch.ao import quantization as q\n", "import eagerq as q\n"),
    case("package, old", "from torch import quantization as q\n", "import eagerq as q\n"),
    case(
        "names", "from torch.ao.quantization import prepare_qat, convert\n", "from eagerq import prepare_qat, convert\n"
    ),
    case("one renamed", "from torch.quantization import QuantStub as Q\n", "from eagerq import QuantStub as Q\n"),
    case(
        "submodule",
        "from torch.ao.quantization.observer import MinMaxObserver\n",
        "from eagerq.observer import MinMaxObserver\n",
    ),
    case(
        "submodule, itself", "from torch.ao.quantization import observer as o\n", "from eagerq import observer as o\n"
    ),
    case(
        "submodule like a function",
        "from torch.quantization.quantize import prepare\n",
        "from eagerq.quantize import prepare\n",
    ),
    case("function like a submodule", "from torch.quantization import quantize\n", "from eagerq import quantize\n"),
    case("nn", "import torch.ao.nn.quantized as nnq\nnnq.Linear\n", "import eagerq.nn.quantized as nnq\nnnq.Linear\n"),
    case(
        "nn, from",
        "from torch.ao.nn import quantized, qat as nnqat\n",
        "from eagerq.nn import quantized, qat as nnqat\n",
    ),
    case("nn, old", "from torch.nn import quantized as nnq\n", "from eagerq.nn import quantized as nnq\n"),
    case(
        "intrinsic",
        "from torch.ao.nn import intrinsic as nni\nnni.ConvReLU2d\n",
        "from eagerq import intrinsic as nni\nnni.ConvReLU2d\n",
    ),
    case("intrinsic, old", "import torch.nn.intrinsic.qat as nniqat\n", "import eagerq.intrinsic.qat as nniqat\n"),
    case(
        "inner file",
        "from torch.ao.nn.quantized.modules.conv import Conv2d\n",
        "from eagerq.nn.quantized import Conv2d\n",
    ),
    case(
        "inner file, old",
        "from torch.nn.intrinsic.modules.fused import ConvReLU2d, _FusedModule\n",
        "from eagerq.intrinsic import ConvReLU2d, _FusedModule\n",
    ),
    case("modules", "from torch.nn.quantized.modules import Conv2d\n", "from eagerq.nn.quantized import Conv2d\n"),
    case(
        "the numeric suite",
        "import torch.ao.ns._numeric_suite as ns\nfrom torch.quantization import _numeric_suite\nns.compare_weights\n",
        "import eagerq.numeric_suite as ns\nfrom eagerq import numeric_suite as _numeric_suite\nns.compare_weights\n",
    ),
    case(
        "private modules",
        "from torch.ao.quantization._correct_bias import bias_correction\nimport torch.quantization._equalize as e\n",
        "from eagerq.bias_correction import bias_correction\nimport eagerq.equalization as e\n",
    ),
    case(
        "a module that is none any more",
        "from torch.ao.quantization.quant_type import QuantType\n",
        "from eagerq import QuantType\n",
    ),
    case(
        "a private name",
        """
        from torch.ao.quantization._learnable_fake_quantize import _LearnableFakeQuantize
        x = _LearnableFakeQuantize
        """,
        """
        from eagerq.fake_quantize import LearnableFakeQuantize
        x = LearnableFakeQuantize
        """,
    ),
    case(
        "in parentheses",
        """
        from torch.ao.quantization import (  # what it takes
            QuantStub,  # in

            # out
            DeQuantStub as DQ,
            prepare_qat,
        )  # end
        """,
        """
        from eagerq import (  # what it takes
            QuantStub,  # in

            # out
            DeQuantStub as DQ,
            prepare_qat,
        )  # end
        """,
    ),
    case(
        "to several places",
        "from torch.ao.nn import quantized as nnq, intrinsic as nni, qat\n",
        "from eagerq.nn import quantized as nnq, qat\nfrom eagerq import intrinsic as nni\n",
    ),
    case(
        "to several places, in lines",
        """
        from torch import (
            nn,  # stays
            quantization,  # goes
            quantize_per_tensor,
            Tensor,
        )
        x: Tensor
        """,
        """
        from torch import (
            nn,  # stays
            Tensor,
        )
        import eagerq as quantization
        from eagerq import (
            quantize_per_tensor,
        )
        x: Tensor
        """,
    ),
    case("among others", "import os, torch.ao.quantization as tq, sys\n", "import os, eagerq as tq, sys\n"),
    case(
        "on a line with others",
        "import os; import torch.ao.quantization as tq; x = 1\n",
        "import os; import eagerq as tq; x = 1\n",
    ),
    case("after a colon", "if True: import torch.ao.quantization as tq\n", "if True: import eagerq as tq\n"),
    case(
        "star",
        "from torch.ao.quantization import *\nprepare_qat(QuantStub())\n",
        "from eagerq import *\nprepare_qat(QuantStub())\n",
    ),
    case(
        "stars",
        "from torch.quantization import *\nfrom torch.nn.quantized import *\nLinear(prepare)\n",
        "from eagerq import *\nfrom eagerq.nn.quantized import *\nLinear(prepare)\n",
    ),
    case(
        "in a function",
        "def f():\n    from torch.ao.quantization import prepare\n    return prepare\n",
        "def f():\n    from eagerq import prepare\n    return prepare\n",
    ),
    case(
        "in functions in functions",
        """
        def f():
            def g():
                import torch.nn.quantized as q
                return [q.Linear for _ in (q.Conv2d, 1)]
            q = 1
            return g, q
        """,
        """
        def f():
            def g():
                import eagerq.nn.quantized as q
                return [q.Linear for _ in (q.Conv2d, 1)]
            q = 1
            return g, q
        """,
    ),
    case(
        "for types only",
        """
        from typing import TYPE_CHECKING
        if TYPE_CHECKING:
            from torch.ao.quantization import QuantStub

        def f(x: "QuantStub") -> None: ...
        """,
        """
        from typing import TYPE_CHECKING
        if TYPE_CHECKING:
            from eagerq import QuantStub

        def f(x: "QuantStub") -> None: ...
        """,
    ),
    case(
        "with a fallback",
        """
        try:
            import torch.ao.quantization as tq
        except ImportError:
            import torch.quantization as tq
        tq.prepare
        """,
        """
        try:
            import eagerq as tq
        except ImportError:
            import eagerq as tq
        tq.prepare
        """,
    ),
    case(
        "or None",
        """
        try:
            from torch.ao import quantization as tq
        except ImportError:
            tq = None
        if tq is not None:
            tq.prepare
        """,
        """
        try:
            import eagerq as tq
        except ImportError:
            tq = None
        if tq is not None:
            tq.prepare
        """,
    ),
    case(
        "by a call",
        'import importlib\nimportlib.import_module("torch.ao.nn.quantized")\n',
        'import importlib\nimportlib.import_module("eagerq.nn.quantized")\n',
    ),
    case(
        "by another call",
        "x = __import__('torch.quantization', fromlist=['a'])\n",
        "x = __import__('eagerq', fromlist=['a'])\n",
    ),
]

CHAINS = [
    case(
        "no import of its own",
        "import torch\n\nm = torch.ao.quantization.prepare_qat(torch.nn.Linear(1, 1))\n",
        "import torch\nimport eagerq\n\nm = eagerq.prepare_qat(torch.nn.Linear(1, 1))\n",
    ),
    case(
        "torch no longer used",
        "# license\nimport os\nimport torch  # noqa\n\nq = torch.quantization.QuantStub()\n",
        "# license\nimport os\nimport eagerq  # noqa\n\nq = eagerq.QuantStub()\n",
    ),
    case(
        "both imports",
        "import torch\nimport torch.ao.quantization\n\ntorch.ao.quantization.convert(torch.nn.ReLU())\n",
        "import torch\nimport eagerq\n\neagerq.convert(torch.nn.ReLU())\n",
    ),
    case(
        "the submodule's import binds torch",
        "import torch.ao.quantization  # why\ntorch.ao.quantization.convert(torch.nn.ReLU())\n",
        "import torch\nimport eagerq  # why\neagerq.convert(torch.nn.ReLU())\n",
    ),
    case(
        "torch is imported again, but later",
        "import torch.ao.quantization\nx = torch.e\nimport torch\ny = torch.e\n",
        "import torch\nimport eagerq\nx = torch.e\nimport torch\ny = torch.e\n",
    ),
    case(
        "through nn",
        """
        import torch
        from torch import nn
        import torch.nn.functional as F
        # mine
        import mine

        class Block(nn.Module):
            kind = nn.intrinsic.ConvReLU2d
            def forward(self):
                return nn.quantized.FloatFunctional(), torch, F
        """,
        """
        import torch
        from torch import nn
        import torch.nn.functional as F
        import eagerq.intrinsic
        import eagerq.nn.quantized
        # mine
        import mine

        class Block(nn.Module):
            kind = eagerq.intrinsic.ConvReLU2d
            def forward(self):
                return eagerq.nn.quantized.FloatFunctional(), torch, F
        """,
    ),
    case(
        "through ao",
        "from torch import ao\nao.quantization.convert, ao.nn.quantized.Linear\n",
        "import eagerq\nimport eagerq.nn.quantized\neagerq.convert, eagerq.nn.quantized.Linear\n",
    ),
    case(
        "through ao.nn",
        "import torch.ao.nn as aonn\naonn.quantized.Linear\n",
        "import eagerq.nn.quantized\neagerq.nn.quantized.Linear\n",
    ),
    case(
        "in the scope of the import",
        "def f():\n    import torch\n    return torch.ao.quantization.prepare\n",
        "def f():\n    import eagerq\n    return eagerq.prepare\n",
    ),
    case(
        "after a colon",
        "def f(): import torch; return torch.ao.quantization.prepare, torch.e\n",
        "def f(): import torch; import eagerq; return eagerq.prepare, torch.e\n",
    ),
    case(
        "further attributes",
        "import torch.ao.quantization as tq\ntq.observer.MinMaxObserver.with_args(a=1)(b).c\n",
        "import eagerq as tq\ntq.observer.MinMaxObserver.with_args(a=1)(b).c\n",
    ),
    case(
        "inner files by attribute",
        "import torch.ao.nn.quantized as nnq\nnnq.modules.conv.Conv2d, (nnq.modules.Linear)\n",
        "import eagerq.nn.quantized as nnq\nnnq.Conv2d, (nnq.Linear)\n",
    ),
    case(
        "layout and comments",
        "import torch\n\nx = (torch  .ao\n     .nn.qat.Linear)\ny = torch.e  # torch.ao.nn\n",
        "import torch\nimport eagerq.nn.qat\n\nx = (eagerq.nn.qat.Linear)\ny = torch.e  # torch.ao.nn\n",
    ),
    case(
        "annotations",
        """
        import torch

        def f(a: "torch.ao.quantization.QConfig | None", *b: torch.ao.quantization.QConfig) -> "list[torch.Tensor]":
            c: 'torch.quantization.QConfig' = a
            return c
        """,
        """
        import torch
        import eagerq

        def f(a: "eagerq.QConfig | None", *b: eagerq.QConfig) -> "list[torch.Tensor]":
            c: 'eagerq.QConfig' = a
            return c
        """,
    ),
    case(
        "already imported",
        "import torch\nimport eagerq\n\ntorch.ao.quantization.prepare, torch.e\n",
        "import torch\nimport eagerq\n\neagerq.prepare, torch.e\n",
    ),
    case(
        "getattr of a known name",
        "import torch.nn.quantized as q\ngetattr(q, 'Linear')\n",
        "import eagerq.nn.quantized as q\ngetattr(q, 'Linear')\n",
    ),
    case(
        "shadowed in one place only",
        "import torch\n\ndef f(torch): return torch.e\n\ntorch.quantization.convert\n",
        "import eagerq\n\ndef f(torch): return torch.e\n\neagerq.convert\n",
    ),
]

TENSORS = [
    case(
        "dtypes",
        "import torch as t\n(t.quint8, t.qint8, t.qint32)\n",
        "import torch as t\n(t.uint8, t.int8, t.int32)\n",
    ),
    case("dtypes, from", "from torch import nn, quint8\nx = quint8\n", "from torch import nn, uint8\nx = uint8\n"),
    case("dtypes, renamed", "from torch import quint8 as q8\nx = q8\n", "from torch import uint8 as q8\nx = q8\n"),
    case("dtypes, taken", "from torch import qint8\nint8 = qint8\n", "from torch import int8 as qint8\nint8 = qint8\n"),
    case(
        "4 bits",
        "import torch\nx = torch.quint4x2, torch.e\n",
        "import torch\nimport eagerq.scheme\nx = eagerq.scheme.uint4, torch.e\n",
    ),
    case(
        "functions",
        "import torch\ny = torch.quantize_per_tensor(torch.ones(1), 1., 0, torch.quint8)\n",
        "import torch\nimport eagerq\ny = eagerq.quantize_per_tensor(torch.ones(1), 1., 0, torch.uint8)\n",
    ),
    case(
        "functions, from",
        "from torch import quantize_per_channel as q\n",
        "from eagerq import quantize_per_channel as q\n",
    ),
]

CASES = [*IMPORTS, *CHAINS, *TENSORS]

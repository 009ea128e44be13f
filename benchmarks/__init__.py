"""Speed and memory of eagerq beside torch.ao, other libraries and the float model, each figure with its goal.

``python -m benchmarks`` prints every table; ``--only resnet18`` the rows whose name holds a text; ``--quick`` a
rough look; ``--json PATH`` and ``--markdown PATH`` write them to a file too. Ratios are what counts, and only on
a quiet machine: the contenders take turns in one process, and a ratio is the median over the rounds.

A table is a module of ``rows/`` that yields ``Benchmark`` rows; another
library is a ``Peer`` in a module of ``peers/``.
"""

"""Speed and memory of eagerq beside torch.ao and the float model, each figure with its goal.

``python -m benchmarks`` prints every table; ``--only resnet18`` the rows whose name holds a text;
``--json PATH`` writes them to a file too. Ratios are what counts, and only on a quiet machine: the contenders
take turns in one process, and a ratio is the median over the rounds.
"""

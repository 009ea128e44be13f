"""From eager models to Q/DQ graphs, and the graph flow for models that can be traced."""

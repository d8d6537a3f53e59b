"""The paper's experiments, one a module: which problems, which claims. Notebooks call them and explain."""

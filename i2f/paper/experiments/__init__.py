"""The paper's experiments, one per module, all of one shape. Notebooks call them and explain.

problems(config)                        -> what is to be solved, by the parameters: dictionaries of plain values
run(problems, settings)                 -> `Results`: tables, one row per problem, and arrays for figures
judge(tables, thresholds, dataset)      -> claims, from the tables alone; their words are in EXPERIMENT.toml
"""

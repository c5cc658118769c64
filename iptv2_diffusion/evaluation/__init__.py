"""Evaluation tools of `eval/` and the recipes: metrics, references, sample folders, third-party denoisers, speed."""

"""The parts that all trainings share: configuration, checkpoints and exact resumption, EMA, logs, the loop.

`options` and `errors` import nothing heavy, so that `--help` answers at once.
"""

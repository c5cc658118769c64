"""What every train script shares: configuration, checkpoints and exact resumption, averaged weights, logs, the loop.

`options` and `errors` import nothing heavy, so that `--help` answers at once.
"""

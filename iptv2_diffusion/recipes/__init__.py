"""One folder a training: its options, data, task and run."""

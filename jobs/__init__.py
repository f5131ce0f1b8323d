"""What a person submits: one file a stage, the order of stages, the config and the command line."""

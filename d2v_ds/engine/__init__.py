"""DeepSpeed: building the engine, the partitioned EMA, checkpoints, the launch environment."""

"""Who takes part in a launch and whether they are still there; imports no model and no Megatron."""

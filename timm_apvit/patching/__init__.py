"""The mathematics of adaptive patches, in tensors alone: where patches lie, how they are sampled, what says where."""

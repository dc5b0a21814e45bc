"""Tensor parallelism on GPUs: each rank has a shard of every matrix, and follows the steps of rank 0."""

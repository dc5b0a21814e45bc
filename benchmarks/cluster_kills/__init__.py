"""Parts of a cluster die under load: `python -m benchmarks.cluster_kills --help`."""

"""Break one Redis, a Redis behind Sentinels, and a Redis Cluster under load: `python -m benchmarks.chaos`."""

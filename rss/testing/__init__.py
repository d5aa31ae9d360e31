"""A real Redis or Redis Cluster for tests, demos and benchmarks: find one, or start one."""

from rss.testing.clusters import Cluster, ClusterServer, cluster
from rss.testing.find import RedisServer, redis_server
from rss.testing.local import NoServerError, free_port, local_server, server_binary

__all__ = [
    "Cluster",
    "ClusterServer",
    "NoServerError",
    "RedisServer",
    "cluster",
    "free_port",
    "local_server",
    "redis_server",
    "server_binary",
]

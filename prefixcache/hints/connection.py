"""From a URL to a Redis client: TLS, ACL users, Sentinel, Cluster.

redis://[user:password@]host[:port][/database]
rediss://...?ssl_ca_certs=FILE              the same with TLS; also ssl_certfile, ssl_keyfile
unix:///path/to/socket
redis+cluster://host:port,host:port         also rediss+cluster://
redis+sentinel://host:port,host:port/service[/database]   also rediss+sentinel://
"""

from __future__ import annotations

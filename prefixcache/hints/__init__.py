"""What replicas tell each other through Redis: who they are, how busy, and which blocks they hold.

It is advice, never truth: a hint that is late or wrong costs a prompt some time, and
whatever Redis does, no request waits for it.

    schema       keys, records and the scripts that run inside Redis
    table        which blocks a replica has, as one compact string
    connection   from a URL to a Redis client: TLS, ACL users, Sentinel, Cluster
    publisher    a replica's side: keeps its lease and its table current, in a thread of its own
    locator      a reader's side: who is there, and who holds how much of a prompt
"""

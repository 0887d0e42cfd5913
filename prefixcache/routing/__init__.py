"""Which replica gets a request: policies, what a router remembers, and the router itself."""

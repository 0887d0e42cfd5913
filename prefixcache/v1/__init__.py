"""Messages and stubs of package prefixcache.v1, generated from proto/ by `make proto`."""

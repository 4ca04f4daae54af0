"""`portway run`: the process that owns the sockets while the service's code comes and goes."""
